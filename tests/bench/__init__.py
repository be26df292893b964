"""Performance, as ratios and medians within one run. Never part of the tests: `make bench`."""
