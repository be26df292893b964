"""Benchmarks: ratios and medians measured within one run. `make bench` runs them; they are not part of the tests."""
