"""Tests of `controllers/core/`."""
