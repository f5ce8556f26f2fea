"""forge_hpc: reinforcement-learning post-training of language models on Slurm clusters."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge_hpc.api import Run as Run

__version__ = "0.1.0"
__all__ = ["Run"]


def __getattr__(name: str) -> Any:
    """``forge_hpc.Run`` is loaded when it is asked for: most processes of a run have no use for it."""
    if name == "Run":
        from forge_hpc.api import Run

        return Run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
