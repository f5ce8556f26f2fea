"""Losses by the name in ``algorithm.loss``, and a user's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from forge_hpc.config.algorithm import check_fit, loss_options, options_set, resolve_advantage
from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import LOSSES
from forge_hpc.config.schema import AlgorithmConfig, Config
from forge_hpc.config.user_code import load_user_code
from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.mismatch import MismatchCorrection

LossFn = Callable[..., LossOutput]


def build_loss(name: str, cfg: AlgorithmConfig, max_tokens: int = 1) -> LossFn:
    """The loss of that name, with the options of the configuration.

    A loss of the user's own, ``file.py:name`` or ``package.module:name``, is either a class, whose instances are the
    loss, or a function, which is the loss. Either gets ``algorithm.loss_args`` as keyword arguments, and those options
    of ``algorithm`` that it has parameters for.

    Args:
        max_tokens: the token budget of a response, ``rollout.max_response_tokens``.

    Raises:
        UserError: an unknown name, an option that the loss has no parameter for, arguments that it does not take.
    """
    if name not in LOSSES and ":" not in name:
        raise UserError(
            f"unknown loss {name!r}",
            f"algorithm.loss is one of {', '.join(LOSSES)}, or your own as file.py:name or package.module:name",
        )
    factory = load_user_code(LOSSES.get(name, name), "loss")
    # What it calls an option of ``algorithm``, where it has another name for it.
    renamed: dict[str, str] = getattr(factory, "renamed", {})
    given = {renamed.get(key, key): value for key, value in _options(cfg, max_tokens).items()}
    unused = [f"algorithm.{key}" for key in options_set(cfg) if not _takes(factory, renamed.get(key, key))]
    unused += [f"algorithm.loss_args.{key}" for key in cfg.loss_args if not _takes(factory, key)]
    if unused:
        raise UserError(f"{unused[0]} is not used by algorithm.loss={name}", "leave it out, or check its name")
    arguments = {key: value for key, value in given.items() if _takes(factory, key)} | dict(cfg.loss_args)
    if not inspect.isclass(factory):
        loss_fn = functools.partial(factory, **arguments)
        vars(loss_fn).update(vars(factory))  # normalization, say, which tells the engine what to hand over
        return loss_fn
    try:
        loss: Any = factory(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"algorithm.loss={name} cannot be made: {error}", "check algorithm.loss_args") from error
    if not callable(loss):
        raise UserError(f"algorithm.loss={name}: its instances cannot be called", "give the class a __call__")
    return loss


def check_loss_fits(cfg: Config) -> str:
    """At the start of a run: check what is known of a loss of the user's own only when it is loaded.

    Returns:
        The advantage that the run trains with.

    Raises:
        UserError: the loss cannot be built; its KL penalty has no reference model; its advantage is not known, or does
            not fit.
    """
    a = cfg.algorithm
    advantage = resolve_advantage(a)
    check_fit(cfg, advantage, _kl_coef(build_loss(a.loss, a, cfg.rollout.max_response_tokens)))
    return advantage


def _kl_coef(loss: LossFn) -> float:
    """The weight of its KL penalty, 0 where it has none under that name: an attribute, or a function's argument."""
    if isinstance(loss, functools.partial):
        parameter = inspect.signature(loss).parameters.get("kl_coef")
        value = None if parameter is None else parameter.default
    else:
        value = getattr(loss, "kl_coef", None)
    return value if isinstance(value, int | float) else 0.0


def _takes(factory: Callable[..., Any], name: str) -> bool:
    """Whether it has a parameter of that name. The ``**rest`` of a function is for tensors and does not count."""
    parameters = inspect.signature(factory).parameters
    takes_any = inspect.isclass(factory) and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return takes_any or name in parameters


def _options(cfg: AlgorithmConfig, max_tokens: int) -> dict[str, Any]:
    """What the configuration says to a loss; what it leaves open is the loss's own default."""
    options = {key: value for key, value in loss_options(cfg).items() if value is not None}
    if "mismatch" in options:
        m = cfg.mismatch
        token, sequence, product = (
            None if bounds is None else (bounds[0], bounds[1])
            for bounds in (m.token_bounds, m.sequence_bounds, m.product_bounds)
        )
        options["mismatch"] = MismatchCorrection(m.cap, token, sequence, m.level, product, m.veto)
    return options | {"max_tokens": max_tokens}
