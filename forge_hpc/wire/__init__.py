"""Bytes between hosts: parallel TLS streams out of one process's memory into another's. Nothing here imports torch."""
