"""What can be known of a reward without running it: its name, and the signature that its source shows.

The source is parsed, never imported: this runs on the login node. What it does not show (decorators, inherited methods,
installed modules) is checked by the reward pool when the run starts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import REWARDS
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.config.source import source_file
from forge_hpc.config.sources import run_sources
from forge_hpc.config.user_code import find_user_code, nearest

MODEL = "model"
"""The reward that a trained model gives: the run's own frozen model, and no process of the reward pool."""
ENVIRONMENT = "environment"
"""What the rewards of an environment are called, which are added with weight 1."""
SIGNATURE = "(prompt, response, target, **fields)"

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def reward_model_of(cfg: Config) -> RewardConfig | None:
    """The reward of a trained model, where the run has one."""
    return next((reward for reward in cfg.reward if reward.name == MODEL), None)


def by_label(rewards: Sequence[RewardConfig]) -> dict[str, RewardConfig]:
    """What a reward is called in metrics and rollouts: its function's name, or all of its name to tell two apart."""
    short = [reward.name.rpartition(":")[2] for reward in rewards]
    labels = [reward.name if short.count(name) > 1 else name for reward, name in zip(rewards, short, strict=True)]
    assert len(set(labels)) == len(labels), "validation refuses a reward given twice"
    return dict(zip(labels, rewards, strict=True))


def reward_weights(cfg: Config) -> dict[str, dict[str, float]]:
    """By the name of each of the run's sources, the weights of the rewards that its episodes get, by their labels."""
    found = {}
    for run in run_sources(cfg):
        weights = {label: reward.weight for label, reward in by_label(run.config.reward).items()}
        found[run.name] = weights | ({} if run.config.environment.name is None else {ENVIRONMENT: 1.0})
    return found


def check_reward(key: str, reward: RewardConfig) -> None:
    """Raise a UserError for what `reward` cannot be: no such file or function, a wrong signature, wrong ``args``.

    Args:
        key: where it stands, ``reward.0``.
    """
    place, colon, name = REWARDS.get(reward.name, reward.name).rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"{key}.name is {reward.name!r}", "write package.module:function or file.py:function")
    if reward.name in REWARDS:
        file = source_file(place)
    elif place.endswith(".py"):
        file = Path(place).expanduser()
    else:
        return  # finding a module runs the packages that it is in
    found = find_user_code(f"{key}.name", file, name)
    if isinstance(found, _Function) and not found.decorator_list:
        _check_call(f"{key}.name", name, found.args, num_given=3)
    elif isinstance(found, ast.ClassDef) and not found.decorator_list:
        _check_class(key, found, reward)


def _check_call(key: str, name: str, arguments: ast.arguments, num_given: int) -> None:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    if arguments.kwarg is None:
        raise UserError(
            f"{key}: {name} does not take **fields, and every field of the example is handed to it",
            f"its signature is {SIGNATURE} -> float",
        )
    if positional < num_given and arguments.vararg is None:
        raise UserError(f"{key}: {name} takes too few arguments", f"its signature is {SIGNATURE} -> float")


def _check_class(key: str, found: ast.ClassDef, reward: RewardConfig) -> None:
    methods = {s.name: s for s in found.body if isinstance(s, _Function) and not s.decorator_list}
    complete = not found.bases and not found.keywords  # else it may have inherited what it does not show
    if "__call__" in methods:
        _check_call(f"{key}.name", f"{found.name}.__call__", methods["__call__"].args, num_given=4)
    elif complete:
        raise UserError(
            f"{key}.name: {found.name} has no __call__", f"define __call__(self, {SIGNATURE[1:]}, async or not"
        )
    if "__init__" in methods:
        _check_args(f"{key}.args", found.name, methods["__init__"].args, reward.args)
        _check_types(f"{key}.args", methods["__init__"].args, reward.args)
    elif complete and reward.args:
        raise UserError(f"{key}.args: {found.name} takes no arguments", f"it is given {', '.join(reward.args)}")


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def _check_types(key: str, arguments: ast.arguments, given: Mapping[str, Any]) -> None:
    """`given` are of the plain types that the source says; of others nothing is known here."""
    for argument in [*arguments.args, *arguments.kwonlyargs]:
        kind = argument.annotation.id if isinstance(argument.annotation, ast.Name) else ""
        if argument.arg not in given or kind not in _TYPES:
            continue
        value = given[argument.arg]
        if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
            a = "an" if kind == "int" else "a"
            raise UserError(f"{key}: {argument.arg} is {value!r}, which is no {kind}", f"write {a} {kind}")


def _check_args(key: str, name: str, arguments: ast.arguments, given: Iterable[str]) -> None:
    """`given` are keyword arguments of ``__init__``."""
    positional = [a.arg for a in arguments.posonlyargs + arguments.args][1:]
    names = positional + [a.arg for a in arguments.kwonlyargs]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    takes = f"it takes {', '.join(names)}" if names else "it takes no arguments"
    for argument in given:
        if argument not in names and arguments.kwarg is None:
            raise UserError(f"{key}: {name} has no argument {argument!r}", nearest(argument, names) or takes)
    if missing := [argument for argument in required if argument not in given]:
        raise UserError(f"{key}: {name} needs {' and '.join(missing)}", takes)
