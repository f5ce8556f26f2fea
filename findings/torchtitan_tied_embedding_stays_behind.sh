#!/usr/bin/env bash
# One would guess that tied weights stay one tensor when a model is sharded by tensor parallelism and FSDP. torchtitan
# 0.3.0 ties embedding and head after FSDP has made a parameter of each; where a shard is padded (the vocabulary over TP is
# not divisible by the FSDP degree), FSDP copies it for each of them, the optimizer changes one copy, and the embedding
# that the next forward pass gathers is still the one before the step. Gradients, checkpoints and full_tensor() look right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchtitan==0.3.0 triton==3.9.0

cat > tied.py <<'PYTHON'
import multiprocessing
import os
import sys
from types import SimpleNamespace

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes "cuda" where torch has no accelerator
import torch.distributed as dist
import torchtitan
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.models.qwen3 import qwen3_configs
from torchtitan.models.qwen3.parallelize import parallelize_qwen3


def tied_after_a_step(vocab_size, tensor_parallel):
    """Largest differences between embedding and head, which are one tensor, and of it from what was written to it."""
    degrees = ParallelismConfig(
        spmd_backend="partial_dtensor", data_parallel_shard_degree=-1, tensor_parallel_degree=tensor_parallel
    )
    dist_utils.set_spmd_backend(degrees.spmd_backend)
    dims = ParallelDims.from_config(degrees, dist.get_world_size())
    dims.build_mesh()
    config = qwen3_configs["debugmodel"]("flex")
    config.layers = config.layers[:1]
    config.vocab_size = config.tok_embeddings.num_embeddings = config.lm_head.out_features = vocab_size
    config.update_from_config(config=SimpleNamespace(parallelism=degrees))
    with torch.device("meta"):
        model = config.build()
    parallelize_qwen3(
        model, parallel_dims=dims, training=TrainingConfig(dtype="float32", mixed_precision_param="float32"),
        parallelism=degrees, compile_config=CompileConfig(enable=False), ac_config=None, dump_folder="",
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    embedding, head = model.tok_embeddings, model.lm_head
    assert embedding.weight is head.weight
    for step in range(2):  # the first is only a forward pass's gathering of the weights
        if step:
            with torch.no_grad():
                head.weight.to_local().add_(1)  # what an optimizer does: in place, to this rank's shard
        for part in parts:
            part.unshard()
        full = [getattr(x.weight.detach(), "full_tensor", x.weight.detach)() for x in (embedding, head)]
        for part in parts:
            part.reshard()
    return float((full[0] - full[1]).abs().max())


def rank_of_four(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    found = {key: tied_after_a_step(*key) for key in ((2048, 2), (2046, 2))}
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_of_four, args=(rank, os.path.abspath("store"), results)) for rank in range(4)]
    for process in ranks:
        process.start()
    found = results.get(timeout=600)
    for process in ranks:
        process.join()
    print(f"version    torchtitan {torchtitan.__version__}, torch {torch.__version__}")
    print("expected   tied weights are one tensor: embedding and head are equal after every step")
    for (vocab_size, degree), difference in found.items():
        print(f"seen       vocabulary {vocab_size}, TP {degree} x FSDP {4 // degree}: they differ by {difference:g}")
    as_described = found == {(2048, 2): 0, (2046, 2): 1}
    print("behaviour  the embedding stays what it was" if as_described else "behaviour  no longer so")
    sys.exit(not as_described)
PYTHON
venv/bin/python -W ignore tied.py
