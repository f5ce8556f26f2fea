"""A head that gives one number a token: what a critic has in the place of the output layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import spmd_types as spmd
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchtitan.distributed import ParallelDims
from torchtitan.models.common import Linear
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.protocols.sharding import ShardingConfig

from forge_hpc.config.models import VALUE_HEAD
from forge_hpc.models.spec import ModelSpec


class ValueHead(Linear):
    """A linear layer to one number, whole on each tensor-parallel rank; 0 before the first step."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Every rank computes the same from the same, so nothing of it travels."""
        self._parallelized = True
        self._distribute_states(parallel_dims)

    def forward(self, hidden: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[N] float32 for hidden states [R, T, D], of which ``slots`` [N] says which of the R * T."""
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        hidden = hidden.to_local() if isinstance(hidden, DTensor) else hidden
        return F.linear(hidden.flatten(0, 1).index_select(0, slots).float(), weight.float()).squeeze(1)


def with_value_head(spec: ModelSpec) -> ModelSpec:
    """The model with a value head in the place of its output layer."""
    head = ValueHead.Config(
        in_features=spec.config.dim,
        out_features=1,
        param_init={"weight": nn.init.zeros_},
        sharding_config=ShardingConfig(state_shardings={"weight": dense_param_placement(tp=spmd.R)}),
    )
    config = dataclasses.replace(spec.config, lm_head=head, enable_weight_tying=False)
    adapter = type(spec.adapter)(config)
    del adapter.from_hf_map["lm_head.weight"]
    adapter.from_hf_map[VALUE_HEAD] = "lm_head.weight"
    return dataclasses.replace(spec, config=config, adapter=adapter)
