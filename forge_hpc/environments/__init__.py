"""What the policy talks with over several turns: tools, games, tests. Text in, text and a reward out."""

from forge_hpc.environments.base import Environment, EnvironmentFull, Opening, Response, Step
from forge_hpc.environments.load import load_environment
from forge_hpc.environments.pool import EnvironmentFailed, EnvironmentPool

__all__ = [
    "Environment",
    "EnvironmentFailed",
    "EnvironmentFull",
    "EnvironmentPool",
    "Opening",
    "Response",
    "Step",
    "load_environment",
]
