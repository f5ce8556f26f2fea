"""Losses: pure functions of tensors, one short file each."""

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.grpo import GRPOLoss
from forge_hpc.losses.registry import build_loss
from forge_hpc.losses.reinforce import ReinforceLoss
from forge_hpc.losses.sft import SFTLoss

__all__ = ["GRPOLoss", "LossOutput", "ReinforceLoss", "SFTLoss", "build_loss"]
