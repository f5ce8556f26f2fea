"""The state of a whole run on disk."""

from forge_hpc.checkpoint.manifest import CheckpointError, FileRecord, describe, verify
from forge_hpc.checkpoint.store import CheckpointStore, load_extra

__all__ = ["CheckpointError", "CheckpointStore", "FileRecord", "describe", "load_extra", "verify"]
