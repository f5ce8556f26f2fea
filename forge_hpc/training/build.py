"""Building a model on this rank's device: its shape from a directory, its shards from the degrees of the run."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.compile import apply_compile
from torchtitan.tools.utils import set_default_dtype

from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config
from forge_hpc.config.split import plan as placement
from forge_hpc.config.split import takes_turns
from forge_hpc.models.attention import inner_attention_config
from forge_hpc.models.device import device_type, local_device
from forge_hpc.models.head import LogprobHead
from forge_hpc.models.spec import ModelSpec, load_spec
from forge_hpc.models.value_head import with_value_head
from forge_hpc.sizing.microbatch import (
    RESERVE_BYTES,
    MicrobatchPlan,
    WholeBytes,
    compiles,
    plan_microbatch,
    plan_shared,
    trainer_share,
)
from forge_hpc.training.lora import add_adapters

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all models of a run share: the degrees, the compute dtype, and how long rows may be."""

    cfg: Config
    parallelism: ParallelismConfig
    dims: ParallelDims
    param_dtype: torch.dtype
    """Of the parameters in the forward pass: the compute dtype."""
    row_len_multiple: int

    @classmethod
    def of(cls, cfg: Config) -> Shape:
        """Raises UserError: degrees that do not fit the number of ranks."""
        parallelism = _parallelism_config(cfg)
        dims = _parallel_dims(parallelism, cfg.trainer.parallelism.context_parallel_degree)
        name = "float32" if device_type() == "cpu" else cfg.trainer.training.mixed_precision_param
        # On a GPU few lengths of rows: each new one is another shape to compile, or to allocate, for.
        row_len_multiple = dims.cp * math.lcm(128 if device_type() == "cuda" else 8, dims.tp)
        return cls(cfg, parallelism, dims, TORCH_DTYPE_MAP[name], row_len_multiple)

    def spec(self, model_dir: Path) -> ModelSpec:
        """The model of a directory, not yet built. Raises UserError: one that cannot be trained here."""
        return load_spec(
            model_dir,
            max_positions=_round_up(self.cfg.trainer.training.seq_len, self.row_len_multiple),
            inner_attention=inner_attention_config(self.param_dtype, self.dims.cp),
            parallelism=self.parallelism,
        )

    def state_bytes(self, spec: ModelSpec, need: ModelNeed, *, between_steps: bool = False) -> int:
        """What a model takes of this rank's GPU beside its activations. Weights, gradients and two moments in the
        training dtype, weights in the compute dtype where one rank keeps them, and those that generators read; a frozen
        one has the weights in the compute dtype alone. Between steps there are no gradients (``Models.release``)."""
        if need.offload:
            return 0
        with torch.device("meta"):
            num_params = sum(parameter.numel() for parameter in spec.config.build().parameters())
        num_copies = (2 if self.cfg.trainer.lora.enable else 3 if between_steps else 4) if need.trained else 0
        itemsize = TORCH_DTYPE_MAP[self.cfg.trainer.training.dtype].itemsize
        # What generators read is a copy (`weights.snapshots`), made when weights are published first.
        is_published = need.trained and need.path is None and needs_of(self.cfg).generators == "beside"
        copy = TORCH_DTYPE_MAP[self.cfg.model.dtype].itemsize if is_published else 0
        num_shards = self.dims.dp_shard * self.dims.cp * self.dims.tp
        return num_params * (num_copies * itemsize + 2 + copy) // num_shards

    def activation_bytes(self, models: Mapping[str, tuple[Path, ModelNeed]]) -> int:
        """GPU memory that the models, none of which is built yet, leave for activations, the same on all ranks: the one
        with the least decides. 0 on the CPU, where nothing depends on it. A collective call."""
        if device_type() == "cpu":
            return 0
        free, total = torch.cuda.mem_get_info()
        # One that takes turns sleeps while this is asked.
        if self._shares_gpu(models) and not takes_turns(self.cfg):
            free = min(free, int(total * (1 - self.cfg.generator.engine.gpu_memory_utilization)))
        states = sum(self.state_bytes(self.spec(directory), need) for directory, need in models.values())
        available = torch.tensor(free - states - RESERVE_BYTES, device=local_device())
        dist.all_reduce(available, dist.ReduceOp.MIN)
        return int(available)

    def _shares_gpu(self, models: Mapping[str, tuple[Path, ModelNeed]]) -> bool:
        """Whether a generator is on this rank's GPU too."""
        if not any(need.trained for _, need in models.values()):  # it has processes of its own
            return False
        gpus = self.cfg.cluster.gpus_per_node
        return bool(placement(self.cfg, gpus if gpus is not None else torch.cuda.device_count()).shared_gpus)

    def share_gpu(self, models: Mapping[str, tuple[Path, ModelNeed]]) -> str:
        """Have this process keep to its part of a GPU that it shares with a generator. Returns how it is shared, in a
        line; empty where it is not. Raises UserError: there is not enough of it."""
        if device_type() == "cpu":
            return ""
        shares, in_turns = self._shares_gpu(models), takes_turns(self.cfg)
        _, total = torch.cuda.mem_get_info()
        share = self.cfg.generator.engine.gpu_memory_utilization
        # Beside one that is awake, so that another one in its place finds its part free; a process that an earlier run
        # has left forgets that run's part.
        part = trainer_share(total, share) if shares and not in_turns else 1.0
        torch.cuda.set_per_process_memory_fraction(part, local_device())
        if not shares:
            return ""
        states = (self.state_bytes(self.spec(place), need, between_steps=in_turns) for place, need in models.values())
        said = plan_shared(total, share, sum(states), in_turns=in_turns)
        logger.info("%s", said)
        return said

    def plan(self, spec: ModelSpec, available_bytes: int, *, trained: bool = True) -> MicrobatchPlan:
        """What a microbatch of the model is, which is trained or only asked."""
        training, mode = self.cfg.trainer.training, self.cfg.trainer.activation_checkpoint.mode
        if device_type() == "cpu":
            return MicrobatchPlan(training.local_batch_size or 1, "none" if mode == "auto" else mode, 0, 0)
        with torch.device("meta"):
            num_params = sum(parameter.numel() for parameter in spec.config.build().parameters())
        dims, lora = self.dims, self.cfg.trainer.lora.enable
        itemsize, shards = self.param_dtype.itemsize, dims.dp_shard * dims.cp
        whole = WholeBytes.of(num_params, shards, itemsize, tensor_parallel=dims.tp, lora=lora)
        plan = plan_microbatch(
            spec.hf_config,
            num_params,
            training.seq_len,
            available_bytes,
            num_rows=training.local_batch_size,
            mode=mode,
            tensor_parallel=self.dims.tp,
            context_parallel=self.dims.cp,
            compiled=compiles(self.cfg, "cuda"),
            whole=whole if trained else None,
        )
        logger.info("%s", plan)
        return plan

    def with_parts(self, spec: ModelSpec, need: ModelNeed) -> ModelSpec:
        """The model with what training adds: adapters, a value head."""
        if need.trained and self.cfg.trainer.lora.enable:
            spec = add_adapters(spec, self.cfg.trainer.lora)
        return with_value_head(spec) if need.head == "value" else spec

    def build(self, spec: ModelSpec, need: ModelNeed, checkpointing: str) -> Any:
        """The model's shards on this rank, with weights that are still to be loaded. A collective call.

        A trained one is in ``trainer.training.dtype``, a frozen one in the compute dtype. ``checkpointing`` is the mode
        of ``trainer.activation_checkpoint``.
        """
        cfg, dims = self.cfg.trainer, self.dims
        device = local_device()
        offloads = need.offload and device.type != "cpu"
        dtype = TORCH_DTYPE_MAP[cfg.training.dtype] if need.trained else self.param_dtype
        with torch.device("meta"), set_default_dtype(dtype):
            model: Any = spec.config.build()
        ac_config = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[checkpointing]
        compile_config = CompileConfig(enable=compiles(self.cfg, device.type), components=["model"])
        if dims.world_size == 1 and self.param_dtype == dtype and not offloads:
            # Nothing to shard and nothing to cast: FSDP would only cost time.
            if ac_config is not None:
                ac_config.build(dump_folder="").apply(model)
            if compile_config.enable:
                apply_compile(model, compile_config=compile_config, parallel_dims=dims)
        else:
            if model.enable_weight_tying:
                _keep_tied(model)
            model = spec.parallelize(
                model,
                parallel_dims=_as_data_parallel(dims),
                training=TrainingConfig(
                    dtype=str(dtype).removeprefix("torch."),
                    mixed_precision_param=str(self.param_dtype).removeprefix("torch."),
                    enable_cpu_offload=offloads,
                ),
                parallelism=self._resharding() if offloads else self.parallelism,
                compile_config=compile_config,
                ac_config=ac_config,
                dump_folder="",
            )
            if device.type == "cpu":
                _use_plain_sums(model)
        model.to_empty(device="cpu" if offloads else device)
        with torch.no_grad():
            model.init_weights(buffer_device=device if offloads else None)
        if isinstance(model.lm_head, LogprobHead) and device.type == "cuda":
            model.lm_head.logits_dtype = TORCH_DTYPE_MAP[self.cfg.model.head_dtype]
            model.lm_head.as_vllm = self.cfg.model.batch_invariant
        model._skip_lm_head = True  # the heads are applied to what is trained
        return model.train() if need.trained else model.requires_grad_(False).eval()

    def _resharding(self) -> ParallelismConfig:
        """What has visited the GPU leaves it again, on one rank too."""
        return dataclasses.replace(self.parallelism, fsdp_reshard_after_forward="always")


def _keep_tied(model: Any) -> None:
    """Tie the embeddings again once tensor parallelism has distributed both modules, before FSDP sees them.

    TorchTitan 0.3.0 ties them after FSDP, which then keeps two parameters with one tensor: it is gathered twice, and
    where a shard is padded one of the two stays what it was before the first step.
    """
    parallelize = model.parallelize

    def parallelize_and_tie(dims: ParallelDims) -> None:
        parallelize(dims)
        model.tok_embeddings.weight = model.lm_head.weight

    model.parallelize = parallelize_and_tie


def _use_plain_sums(model: torch.nn.Module) -> None:
    """gloo knows no PREMUL_SUM, which FSDP of torch 2.13 takes for a gradient factor that is not the world size."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def _parallelism_config(cfg: Config) -> ParallelismConfig:
    degrees = cfg.trainer.parallelism
    return ParallelismConfig(
        spmd_backend="partial_dtensor",  # the one that works with gloo on torch 2.13
        # One rank has nothing to gather: its parameters in the compute dtype stay until the backward pass.
        fsdp_reshard_after_forward="never" if dist.get_world_size() == 1 else "default",
        data_parallel_replicate_degree=degrees.data_parallel_replicate_degree,
        data_parallel_shard_degree=degrees.data_parallel_shard_degree,
        tensor_parallel_degree=degrees.tensor_parallel_degree,
        expert_parallel_degree=degrees.expert_parallel_degree,
    )


def _parallel_dims(parallelism: ParallelismConfig, context_parallel: int) -> ParallelDims:
    dist_utils.set_spmd_backend(parallelism.spmd_backend)
    degrees = dataclasses.replace(parallelism, context_parallel_degree=context_parallel)
    try:
        dims = ParallelDims.from_config(degrees, dist.get_world_size())
    except AssertionError as error:
        raise UserError(
            f"trainer.parallelism does not fit {dist.get_world_size()} trainer ranks: {error}",
            "replicate * shard * context * tensor degree must be the number of ranks; a shard degree of -1 takes what "
            "is left",
        ) from error
    dims.build_mesh()
    return dims


def _as_data_parallel(dims: ParallelDims) -> ParallelDims:
    """The same meshes for who shares the weights, among whom ranks of a row are as good as others: TorchTitan 0.3.0
    refuses context parallelism with attention of packed rows, and ours sees to it by itself (``models.context``)."""
    same = copy.copy(dims)
    same.dp_shard, same.cp = dims.dp_shard * dims.cp, 1
    return same


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
