"""Tests of the documentation: generated tables, the built site, and every command and snippet in it."""
