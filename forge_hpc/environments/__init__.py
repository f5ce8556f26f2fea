"""What the policy talks with over several turns: tools, games, tests. Text in, text and a reward out."""

from forge_hpc.environments.base import Environment, EnvironmentFull, Opening, Response, Step
from forge_hpc.environments.load import load_environment
from forge_hpc.environments.pool import EnvironmentFailed, EnvironmentPool
from forge_hpc.environments.tools import Tools, tool

__all__ = [
    "Environment",
    "EnvironmentFailed",
    "EnvironmentFull",
    "EnvironmentPool",
    "Opening",
    "Response",
    "Step",
    "Tools",
    "load_environment",
    "tool",
]
