"""Monarch actors, one a file, and the services that the recipes speak to."""
