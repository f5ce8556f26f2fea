"""From the name of an environment in the configuration to the class."""

from __future__ import annotations

from collections.abc import Callable

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import ENVIRONMENTS
from forge_hpc.config.user_code import load_user_code
from forge_hpc.environments.base import Environment

EnvironmentFactory = Callable[..., Environment]


def load_environment(name: str) -> EnvironmentFactory:
    """The class that `name` means: a built-in one, ``package.module:Class`` or ``path/to/file.py:Class``.

    Runs the user's module. Raises UserError where there is no such thing.
    """
    if name not in ENVIRONMENTS and ":" not in name:
        raise UserError(
            f"unknown environment {name!r}",
            f"one of {', '.join(ENVIRONMENTS)}, or package.module:Class, or file.py:Class",
        )
    return load_user_code(ENVIRONMENTS.get(name, name), "environment")
