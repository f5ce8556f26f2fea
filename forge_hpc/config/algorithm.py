"""What ``algorithm`` may say: the names of losses and advantages, and which options each loss has. No torch here."""

from __future__ import annotations

from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import AlgorithmConfig, MismatchConfig

_CLIPS = ("clip_low", "clip_high")
LOSSES: dict[str, tuple[str, ...]] = {
    "grpo": _CLIPS,
    "dr_grpo": _CLIPS,
    "dapo": _CLIPS,
    "ppo": _CLIPS,
    "cispo": _CLIPS,
    "gspo": _CLIPS,
    "sapo": ("tau_pos", "tau_neg"),
    "rloo": (),
    "reinforce": _CLIPS,
    "simple_grpo": (),
}
"""Losses by name, with the options that not every loss has: clips are keys of ``algorithm``, others of its
``loss_args``."""
ADVANTAGES = ("group_mean_std", "group_mean", "leave_one_out", "group_mean_batch_std", "batch_mean_std")
KL_ESTIMATORS = ("k1", "k2", "k3")
NORMALIZATIONS = ("token", "sequence", "constant")


def loss_options(a: AlgorithmConfig) -> dict[str, Any]:
    """The keys of ``algorithm`` that are arguments of the loss; those that are None are left to it."""
    return {
        "clip_low": a.clip_low,
        "clip_high": a.clip_high,
        "kl_coef": a.kl_coef,
        "kl_estimator": a.kl_estimator,
        "entropy_coef": a.entropy_coef,
        "normalization": a.normalization,
        "mismatch": None if a.mismatch == MismatchConfig() else a.mismatch,
    }


def options_set(a: AlgorithmConfig) -> list[str]:
    """Those of them that differ from the schema's default: the loss must know them."""
    default = loss_options(AlgorithmConfig())
    return [name for name, value in loss_options(a).items() if value != default[name]]


def check_loss(a: AlgorithmConfig) -> None:
    """Raise a UserError for an option that the loss does not use, or a value out of range."""
    for name in a.loss_args:
        if name in loss_options(a):
            raise UserError(f"algorithm.loss_args has {name!r}", f"set algorithm.{name} instead")
    if a.loss in LOSSES:
        _check_builtin_options(a)
    if a.clip_low is not None and a.clip_low > 1:
        raise UserError(
            f"algorithm.clip_low must be at most 1, it is {a.clip_low}", "1 is no lower bound, 0.2 usual for a ratio"
        )
    _check_mismatch(a)


def _check_builtin_options(a: AlgorithmConfig) -> None:
    own = LOSSES[a.loss]
    for name in (*options_set(a), *a.loss_args):
        key = f"algorithm.loss_args.{name}" if name in a.loss_args else f"algorithm.{name}"
        if name not in own and (name in _CLIPS or name in a.loss_args):
            users = [loss for loss, options in LOSSES.items() if name in options]
            hint = f"losses that do: {', '.join(users)}" if users else f"it has: {', '.join(own) or 'no arguments'}"
            raise UserError(f"{key} is not used by algorithm.loss={a.loss}", hint)
    for name, value in a.loss_args.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(f"algorithm.loss_args.{name} must be a number greater than 0, it is {value!r}")


def _check_mismatch(a: AlgorithmConfig) -> None:
    m = a.mismatch
    if m.cap is not None and m.cap <= 0:
        raise UserError(f"algorithm.mismatch.cap must be greater than 0, it is {m.cap}", "usual is 2")
    for name in ("token_bounds", "sequence_bounds"):
        bounds = getattr(m, name)
        if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
            raise UserError(
                f"algorithm.mismatch.{name} is {bounds}", "write [low, high] with 0 <= low < high: [0.5, 5]"
            )
    clips = [name for name in _CLIPS if getattr(a, name) is not None]
    if m != MismatchConfig() and clips:
        raise UserError(
            f"algorithm.{clips[0]} has no effect with algorithm.mismatch: the ratio is taken against the trainer's own "
            "log-probabilities, and one optimizer step a batch leaves it at 1",
            f"leave algorithm.{clips[0]} out, or algorithm.mismatch",
        )
