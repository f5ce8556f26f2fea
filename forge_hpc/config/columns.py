"""Which columns of documents a loss takes, read from its source: one that nobody fills is refused before the queue.

What can be known only by running the user's code is found at the first step, by ``TrainEngine``.
"""

from __future__ import annotations

import ast
from collections.abc import Collection
from pathlib import Path
from typing import Any

from forge_hpc.config.algorithm import loss_options
from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import ModelNeed, Needs
from forge_hpc.config.registry import LOSSES
from forge_hpc.config.schema import AlgorithmConfig, Config
from forge_hpc.config.source import class_defaults
from forge_hpc.config.user_code import find_user_code

ARGUMENTS = ("advantages", "mask", "generator_logprobs", "ref_logprobs", "segment_ids", "group_ids", "normalizer")
"""What every loss is called with, beside columns."""
OUTPUTS = {"lm": ("logprobs", "old_logprobs", "entropy"), "value": ("values",)}
"""And what of the model, by its head."""


def check_columns(cfg: Config, needs: Needs) -> None:
    """Raise a UserError where a loss takes a column that the recipe, which says what it fills, does not fill."""
    if needs.columns is None:
        return
    for name, need in needs.models.items():
        missing = [column for column in _columns_asked(cfg, need) if column not in needs.columns]
        if missing:
            loss = f"algorithm.loss={cfg.algorithm.loss}" if need.loss is None else f"the loss {need.loss}"
            loss = "the loss of a value head" if need.loss is None and need.head == "value" else loss
            raise UserError(
                f"{loss} takes the column {missing[0]!r} of what {name!r} is trained on, and recipe={cfg.recipe} fills "
                f"{', '.join(needs.columns) or 'none'}",
                f"take another loss, or have the recipe fill document.columns[{missing[0]!r}] and name it in its needs",
            )


def _columns_asked(cfg: Config, need: ModelNeed) -> tuple[str, ...]:
    """The columns that a model's loss takes, none where that is not known without running it."""
    if not need.trained or need.loss == "sft":
        return ()
    if need.loss is None and need.head == "value":
        return _of_ours("forge_hpc.losses.value:ValueLoss")
    own = AlgorithmConfig(loss_args=dict(need.loss_args))
    loss, options = (cfg.algorithm.loss, cfg.algorithm) if need.loss is None else (need.loss, own)
    place, _, name = loss.rpartition(":")
    if loss in LOSSES:
        return _of_ours(LOSSES[loss])
    if not place.endswith(".py"):  # a package's, whose import runs it
        return ()
    found = find_user_code("loss", Path(place).expanduser(), name)
    if isinstance(found, ast.ClassDef):
        return _of_class(found, OUTPUTS[need.head])
    if not isinstance(found, ast.FunctionDef) or found.decorator_list:
        return ()
    given = {
        "max_tokens",
        *options.loss_args,
        *(key for key, value in loss_options(options).items() if value is not None),
    }
    return _open_parameters(found.args, {*OUTPUTS[need.head], *given})


def _of_ours(place: str) -> tuple[str, ...]:
    module, _, name = place.rpartition(":")
    _, attributes = class_defaults(module, name)
    return tuple(attributes.get("columns") or ())


def _of_class(found: ast.ClassDef, outputs: Collection[str]) -> tuple[str, ...]:
    """As ``losses.base.columns_of``, where it inherits nothing or has the attribute ``columns`` itself."""
    for statement in found.body:
        targets: list[Any] = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        if any(isinstance(target, ast.Name) and target.id == "columns" for target in targets):
            return _names(statement.value)  # type: ignore[attr-defined]
    call = [s for s in found.body if isinstance(s, ast.FunctionDef) and s.name == "__call__" and not s.decorator_list]
    if found.bases or not call:
        return ()
    own = call[0].args
    first = (own.posonlyargs or own.args)[0].arg if own.posonlyargs or own.args else ""
    return tuple(name for name in _open_parameters(own, outputs) if name != first)


def _names(node: ast.expr | None) -> tuple[str, ...]:
    try:
        names = ast.literal_eval(node) if node is not None else ()
    except ValueError:
        return ()
    return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list | tuple) else ()


def _open_parameters(own: ast.arguments, known: Collection[str]) -> tuple[str, ...]:
    """Those without a default that are none of ``ARGUMENTS`` and of what else is known."""
    positional = [*own.posonlyargs, *own.args]
    names = [a.arg for a in positional[: len(positional) - len(own.defaults)]]
    names += [a.arg for a, default in zip(own.kwonlyargs, own.kw_defaults, strict=True) if default is None]
    return tuple(name for name in names if name not in ARGUMENTS and name not in known)
