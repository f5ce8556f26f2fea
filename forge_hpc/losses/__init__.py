"""Losses: pure functions of tensors, one short file each. What they share stands in ``base`` and ``policy``."""

from forge_hpc.losses.base import LossOutput
from forge_hpc.losses.build import build_loss
from forge_hpc.losses.cispo import CISPOLoss
from forge_hpc.losses.dapo import DAPOLoss
from forge_hpc.losses.dppo import DPPOLoss
from forge_hpc.losses.dr_grpo import DrGRPOLoss
from forge_hpc.losses.gmpo import GMPOLoss
from forge_hpc.losses.grpo import GRPOLoss
from forge_hpc.losses.gspo import GSPOLoss
from forge_hpc.losses.luspo import LUSPOLoss
from forge_hpc.losses.mismatch import MismatchCorrection, add_effective_sample_size
from forge_hpc.losses.policy import PolicyLoss, Tokens
from forge_hpc.losses.ppo import PPOLoss
from forge_hpc.losses.reduction import Sequences, step_normalizer
from forge_hpc.losses.reinforce import ReinforceLoss
from forge_hpc.losses.rloo import RLOOLoss
from forge_hpc.losses.sapo import SAPOLoss
from forge_hpc.losses.sft import SFTLoss
from forge_hpc.losses.simple_grpo import SimpleGRPOLoss
from forge_hpc.losses.value import ValueLoss
from forge_hpc.losses.vespo import VESPOLoss

__all__ = [
    "CISPOLoss",
    "DAPOLoss",
    "DPPOLoss",
    "DrGRPOLoss",
    "GMPOLoss",
    "GRPOLoss",
    "GSPOLoss",
    "LUSPOLoss",
    "LossOutput",
    "MismatchCorrection",
    "PPOLoss",
    "PolicyLoss",
    "RLOOLoss",
    "ReinforceLoss",
    "SAPOLoss",
    "SFTLoss",
    "Sequences",
    "SimpleGRPOLoss",
    "Tokens",
    "VESPOLoss",
    "ValueLoss",
    "add_effective_sample_size",
    "build_loss",
    "step_normalizer",
]
