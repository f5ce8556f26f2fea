"""A model from a checkpoint, in one process on the CPU, while its run goes on or after it has ended."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig
from torchtitan.tools.utils import set_default_dtype

from forge_hpc.config.needs import POLICY
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config
from forge_hpc.data.hub import load_tokenizer
from forge_hpc.data.render import learned_ends
from forge_hpc.models.attention import inner_attention_config
from forge_hpc.models.spec import load_hf_weights, load_spec
from forge_hpc.models.value_head import with_value_head
from forge_hpc.training.checkpointer import TrainedWeights, ordinary_errors
from forge_hpc.training.export import export_model
from forge_hpc.training.lora import add_adapters


@torch.no_grad()
def export_checkpoint(cfg: Config, model_dir: Path, checkpoint: Path, directory: Path) -> None:
    """Write the weights of a checkpoint as the run itself would at that step: the same bytes, but for LoRA on several
    trainer ranks, where sums differ in their last bit.

    Takes the memory of the model in ``trainer.training.dtype``, and of one file (5 GB) that is written.

    Args:
        cfg: of the run at that step.
        model_dir: the model that training started from.
        checkpoint: the trainer's part of it.

    Raises:
        CheckpointError: it cannot be read, or belongs to another model.
        OSError: the directory cannot be written.
    """
    spec = load_spec(
        model_dir,
        max_positions=8,  # none is computed
        inner_attention=inner_attention_config(torch.float32),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
    )
    lora = cfg.trainer.lora
    needs = needs_of(cfg)
    if lora.enable:
        spec = add_adapters(spec, lora)
    if needs.models[POLICY].head == "value":
        spec = with_value_head(spec)
    with torch.device("meta"), set_default_dtype(TORCH_DTYPE_MAP[cfg.trainer.training.dtype]):
        model = spec.config.build()
    model.to_empty(device="cpu")
    if lora.enable:  # the frozen weights are in no checkpoint
        load_hf_weights(model, spec, model_dir)
    with ordinary_errors(f"cannot read {checkpoint}"), warnings.catch_warnings():
        # torch 2.13 warns that no processes are there, also where none are meant to be
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(TrainedWeights(model).state_dict(), checkpoint_id=checkpoint, no_dist=True)
    ends = learned_ends(load_tokenizer(model_dir), cfg) if needs.learns_from == "examples" else []
    export_model(model.state_dict(), spec, cfg, model_dir, directory, ends, owns_state=True)
