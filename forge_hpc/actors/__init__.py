"""Monarch actors, one a file."""
