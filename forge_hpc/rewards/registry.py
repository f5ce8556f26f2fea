"""From the name of a reward in the configuration to the function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.rewards.exact import exact_reward
from forge_hpc.rewards.gsm8k import gsm8k_reward
from forge_hpc.rewards.math import math_reward

RewardFunction = Callable[..., float | Awaitable[float]]

BUILTIN_REWARDS: dict[str, RewardFunction] = {"exact": exact_reward, "gsm8k": gsm8k_reward, "math": math_reward}
INLINE_REWARDS = {name: BUILTIN_REWARDS[name] for name in ("exact", "gsm8k")}
"""Built-in rewards so quick and so safe that they need no process of their own."""


def load_reward(name: str) -> RewardFunction:
    """The function that `name` means: a built-in one, ``package.module:function`` or ``path/to/file.py:function``.

    Runs the user's module. Raises UserError where there is no such thing.
    """
    if name in BUILTIN_REWARDS:
        return BUILTIN_REWARDS[name]
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute:
        raise UserError(
            f"unknown reward {name!r}",
            f"one of {', '.join(BUILTIN_REWARDS)}, or package.module:function, or file.py:function",
        )
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{module_name} has no function {attribute!r}", "check the name of the reward")
    return function


def _load_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no such reward file: {path}", "give reward.name as file.py:function")
    module_name = f"forge_hpc_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module


def _import(module_name: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # found, but something that it imports is missing
        raise UserError(
            f"no module {module_name!r} for a reward", "is it installed, or in the current directory?"
        ) from None
