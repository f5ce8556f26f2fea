"""What ``algorithm`` may say: which options each loss has, and what belongs to it. No torch here."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import ADVANTAGES, LOSSES
from forge_hpc.config.schema import AlgorithmConfig, Config, MismatchConfig
from forge_hpc.config.source import class_defaults
from forge_hpc.config.user_code import load_user_code, remembered

_CLIPS = ("clip_low", "clip_high")
_LEARNS_FROM_EQUAL = {"batch_mean_std": "", "gdpo": " where only their sums are equal"}
"""Advantages of groups whose rewards are equal, and when."""
_EVERY_LOSS = (
    "kl_coef",
    "kl_estimator",
    "kl_weighted",
    "old_kl_coef",
    "entropy_coef",
    "normalization",
    "mismatch",
    "off_policy_mask_threshold",
    "max_tokens",
)


@dataclass(frozen=True)
class LossFacts:
    """What is to be known of a loss before its class can be loaded, which takes torch."""

    options: tuple[str, ...] = ()
    """Options that not every loss has: clips are keys of ``algorithm``, others of its ``loss_args``."""
    advantage: str = "group_mean_std"
    """The advantage that belongs to it."""
    kl_coef: float = 0.0
    """Its default."""


@functools.cache
def loss_facts(name: str) -> LossFacts:
    """Those of a built-in loss, read from the source of its class and of those that it inherits from."""
    place, _, cls = LOSSES[name].rpartition(":")
    parameters, attributes = class_defaults(place, cls)
    renamed: dict[str, str] = attributes.get("renamed", {})
    known = {*_EVERY_LOSS, *renamed.values()}
    return LossFacts(
        tuple(option for option in parameters if option not in known),
        attributes.get("advantage", LossFacts.advantage),
        parameters.get(renamed.get("kl_coef", "kl_coef"), LossFacts.kl_coef),
    )


def loss_options(a: AlgorithmConfig) -> dict[str, Any]:
    """The keys of ``algorithm`` that are arguments of the loss; those that are None are left to it."""
    return {
        "clip_low": a.clip_low,
        "clip_high": a.clip_high,
        "kl_coef": a.kl_coef,
        "kl_estimator": a.kl_estimator,
        "kl_weighted": a.kl_weighted or None,
        "old_kl_coef": a.old_kl_coef,
        "entropy_coef": a.entropy_coef,
        "normalization": a.normalization,
        "mismatch": None if a.mismatch == MismatchConfig() else a.mismatch,
        "off_policy_mask_threshold": a.off_policy_mask_threshold,
    }


def options_set(a: AlgorithmConfig) -> list[str]:
    """Those of them that ask something of the loss: it must know them. A coefficient of 0 asks for nothing."""
    coefs = dict.fromkeys(("kl_coef", "kl_estimator", "kl_weighted"), a.kl_coef)
    coefs |= {"old_kl_coef": a.old_kl_coef, "entropy_coef": a.entropy_coef}
    return [name for name, value in loss_options(a).items() if value is not None and coefs.get(name) != 0]


def resolve_advantage(a: AlgorithmConfig) -> str:
    """The advantage that a run trains with: ``algorithm.advantage``, or where that is null the one of the loss.

    The first call for a loss of the user's own runs its module: that is for the nodes, not for a login node.
    """
    return a.advantage or _own_advantage(a.loss)


@remembered
def _own_advantage(loss: str) -> str:
    """A built-in loss's, or what a user's own says as ``advantage``."""
    if loss in LOSSES:
        return loss_facts(loss).advantage
    name = getattr(load_user_code(loss, "loss"), "advantage", LossFacts.advantage)
    if name not in ADVANTAGES:
        raise UserError(f"algorithm.loss={loss} has the advantage {name!r}", f"known: {', '.join(ADVANTAGES)}")
    return str(name)


def check_loss(a: AlgorithmConfig) -> None:
    """Raise a UserError for an option that the loss does not use, or a value out of range."""
    for name in a.loss_args:
        if name in loss_options(a):
            raise UserError(f"algorithm.loss_args has {name!r}", f"set algorithm.{name} instead")
    if a.loss in LOSSES:
        _check_builtin_options(a)
    _check_mismatch(a)


def check_fit(cfg: Config, advantage: str | None, kl_coef: float) -> None:
    """Raise a UserError where what a loss brings with it does not fit the rest of the configuration.

    Args:
        advantage: what the run trains with; None: not known yet.
        kl_coef: likewise.
    """
    a = cfg.algorithm
    if kl_coef > 0 and not cfg.reference.enable:
        raise UserError(
            f"algorithm.kl_coef={kl_coef:g}{'' if a.kl_coef else f', the default of algorithm.loss={a.loss},'} needs "
            "the reference model",
            "set reference.enable=true, or algorithm.kl_coef=0",
        )
    if a.dynamic_sampling and advantage in _LEARNS_FROM_EQUAL:
        raise UserError(
            "algorithm.dynamic_sampling leaves groups with equal rewards out, from which the advantage "
            f"{advantage} learns{_LEARNS_FROM_EQUAL[advantage]}",
            "set algorithm.dynamic_sampling=false, or algorithm.advantage to one that compares sums within groups",
        )


def _check_builtin_options(a: AlgorithmConfig) -> None:
    own = loss_facts(a.loss).options
    for name in (*options_set(a), *a.loss_args):
        key = f"algorithm.loss_args.{name}" if name in a.loss_args else f"algorithm.{name}"
        if name not in own and (name in _CLIPS or name in a.loss_args):
            users = [loss for loss in LOSSES if name in loss_facts(loss).options]
            hint = f"losses that do: {', '.join(users)}" if users else f"it has: {', '.join(own) or 'no arguments'}"
            raise UserError(f"{key} is not used by algorithm.loss={a.loss}", hint)
    for name, value in a.loss_args.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"algorithm.loss_args.{name} must be a number greater than 0, it is {value!r}")


def _check_mismatch(a: AlgorithmConfig) -> None:
    m = a.mismatch
    for name in ("token_bounds", "sequence_bounds", "product_bounds"):
        bounds = getattr(m, name)
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
            raise UserError(
                f"algorithm.mismatch.{name} is {bounds}", "write [low, high] with 0 <= low < high: [0.5, 5]"
            )
    clips = [name for name in _CLIPS if getattr(a, name) is not None] + ["old_kl_coef"] * bool(a.old_kl_coef)
    if m != MismatchConfig() and clips and a.minibatches * a.epochs == 1:
        raise UserError(
            f"algorithm.{clips[0]} has no effect with algorithm.mismatch: the ratio is taken against the trainer's own "
            "log-probabilities, and one optimizer step a batch leaves it at 1",
            f"leave algorithm.{clips[0]} out, or algorithm.mismatch, or set algorithm.minibatches or algorithm.epochs",
        )
