"""Configuration: typed schema, loading, validation, placement. Imports no torch, vLLM or Monarch."""

from forge_hpc.config.changes import safe_changes
from forge_hpc.config.errors import EXIT_USAGE, UserError, print_error
from forge_hpc.config.load import all_keys, config_text, diff_config, load_config, read_config, save_config
from forge_hpc.config.schema import Config
from forge_hpc.config.split import Placement, plan
from forge_hpc.config.validate import signal_lead_s, validate, walltime_s

__all__ = [
    "EXIT_USAGE",
    "Config",
    "Placement",
    "UserError",
    "all_keys",
    "config_text",
    "diff_config",
    "load_config",
    "plan",
    "print_error",
    "read_config",
    "safe_changes",
    "save_config",
    "signal_lead_s",
    "validate",
    "walltime_s",
]
