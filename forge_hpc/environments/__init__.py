"""What the policy talks with over several turns: tools, games, tests. Text in, text and a reward out."""

from forge_hpc.environments.base import Environment, Opening, Step
from forge_hpc.environments.pool import EnvironmentFailed, EnvironmentPool
from forge_hpc.environments.registry import BUILTIN_ENVIRONMENTS, load_environment

__all__ = [
    "BUILTIN_ENVIRONMENTS",
    "Environment",
    "EnvironmentFailed",
    "EnvironmentPool",
    "Opening",
    "Step",
    "load_environment",
]
