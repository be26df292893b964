"""Packages of the project: built as for a release, installed elsewhere and used from there."""
