"""Configuration: typed schema, loading, validation, placement. Imports no torch, vLLM or Monarch."""

from typing import TYPE_CHECKING, Any

from forge_hpc.config.errors import EXIT_USAGE, UserError, print_error
from forge_hpc.config.schema import Config
from forge_hpc.config.split import Placement, plan
from forge_hpc.config.validate import check_environment, validate, walltime_s

if TYPE_CHECKING:
    from forge_hpc.config.changes import safe_changes
    from forge_hpc.config.load import all_keys, config_text, diff_config, load_config, read_config, save_config

__all__ = [
    "EXIT_USAGE",
    "Config",
    "Placement",
    "UserError",
    "all_keys",
    "check_environment",
    "config_text",
    "diff_config",
    "load_config",
    "plan",
    "print_error",
    "read_config",
    "safe_changes",
    "save_config",
    "validate",
    "walltime_s",
]


def __getattr__(name: str) -> Any:
    """What needs OmegaConf, whose import is more than half of what a reward's process takes to start."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from forge_hpc.config import changes, load

    return getattr(changes if name == "safe_changes" else load, name)
