"""Losses by the name in ``algorithm.loss``."""

from __future__ import annotations

from collections.abc import Callable

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import AlgorithmConfig
from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.grpo import GRPOLoss
from forge_hpc.losses.reinforce import ReinforceLoss
from forge_hpc.losses.sft import SFTLoss

LossFn = Callable[..., LossOutput]

_LOSSES: dict[str, Callable[[AlgorithmConfig], LossFn]] = {
    "grpo": lambda cfg: GRPOLoss(cfg.clip_low, cfg.clip_high, cfg.kl_coef, cfg.entropy_coef),
    "reinforce": lambda cfg: ReinforceLoss(cfg.kl_coef, cfg.entropy_coef),
    "sft": lambda cfg: SFTLoss(),
}


def build_loss(name: str, cfg: AlgorithmConfig) -> LossFn:
    """The loss of that name, with the coefficients of the configuration.

    Raises:
        UserError: an unknown name.
    """
    if name not in _LOSSES:
        raise UserError(f"unknown loss {name!r}", f"algorithm.loss is one of {', '.join(_LOSSES)}")
    return _LOSSES[name](cfg)
