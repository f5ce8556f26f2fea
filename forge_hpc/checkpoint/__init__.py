"""The state of a whole run on disk."""

from forge_hpc.checkpoint.store import CheckpointStore, verify

__all__ = ["CheckpointStore", "verify"]
