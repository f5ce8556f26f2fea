"""Data: from files and hub to prompts and documents, and what flows through a run. Imports no torch."""

from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt

__all__ = ["Completion", "Document", "Episode", "Group", "Prompt"]
