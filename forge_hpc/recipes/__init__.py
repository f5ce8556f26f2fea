"""The controller loops, one file an algorithm."""
