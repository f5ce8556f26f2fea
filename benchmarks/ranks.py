"""The trainer on several GPUs of one host beside one: tokens a second of each GPU, and its memory beside the plan.

    python benchmarks/ranks.py [--ranks 1 2 4] [--copies 1] [--recipe grpo sft] [--model 0.6b|1.7b|8b|tiny] [--steps 5]

Each rank is a process with the TrainEngine of a shipped configuration of that model, its weights from a seed: FSDP over
all, or with several ``--copies`` of the model HSDP, each of them over a part. A step has 128,000 tokens a rank in
packed rows; the first two of each are not counted. Without a GPU it runs on the CPU (``tiny``), for its own sake.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from engine_weights import SHAPES, write_model
from rows import PROJECT, row
from trainer import make_documents, timed

from forge_hpc.config import load_config
from forge_hpc.training.distributed import init_distributed

MODELS = dict(SHAPES) | {
    "1.7b": {**SHAPES["0.6b"], "hidden_size": 2048, "intermediate_size": 6144},
}
CONFIGS = {
    ("grpo", "tiny"): "grpo/qwen3_0_6b.yaml",
    ("grpo", "0.6b"): "grpo/qwen3_0_6b.yaml",
    ("grpo", "1.7b"): "grpo/qwen3_1_7b.yaml",
    ("grpo", "8b"): "grpo/qwen3_8b.yaml",
    ("sft", "tiny"): "sft/qwen3_1_7b.yaml",
    ("sft", "0.6b"): "sft/qwen3_1_7b.yaml",
    ("sft", "1.7b"): "sft/qwen3_1_7b.yaml",
    ("sft", "8b"): "sft/llama3_8b.yaml",
}
DOCUMENTS = 256


def train(rank: int, ranks: int, directory: Path, recipe: str, args: argparse.Namespace, results: Any) -> None:
    on_gpu = torch.cuda.is_available()
    init_distributed(directory / f"store-{recipe}-{ranks}", rank=rank, world_size=ranks, local_rank=rank)
    from forge_hpc.training.engine import TrainEngine

    model_dir = directory / "model"
    overrides = [f"model.path={model_dir}", f"cluster.gpus_per_node={8 if on_gpu else 0}", *args.overrides]
    if ranks > 1:
        overrides.append(f"trainer.parallelism.data_parallel_replicate_degree={args.copies}")
    if not on_gpu:
        overrides += ["model.dtype=float32", "trainer.training.seq_len=512"]
    cfg = load_config(PROJECT / "configs" / CONFIGS[recipe, args.model], overrides)
    engine = TrainEngine(cfg, model_dir)
    torch.manual_seed(rank)
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            local = getattr(parameter, "_local_tensor", parameter)
            local.fill_(1.0) if "norm" in name else local.normal_(0, 0.02)
    vocab_size = MODELS[args.model]["vocab_size"]
    documents = make_documents(DOCUMENTS * ranks if on_gpu else 8, vocab_size - 100 if on_gpu else 60,
                               cfg.trainer.training.seq_len)  # fmt: skip
    if recipe == "sft":
        documents = [dataclasses.replace(document, generator_logprobs=None) for document in documents]
    tokens, times, peak = sum(len(document.token_ids) for document in documents), [], 0.0
    for number in range(args.steps + 2):
        seconds, gib = timed(lambda: engine.train_step(documents))
        if number > 1:
            times.append(seconds)
            peak = max(peak, gib)
    if rank == 0:
        state = engine.shape.state_bytes(engine.spec, engine.need) / 2**30
        plan = engine.microbatch
        results.put({
            "recipe": recipe, "model": args.model, "ranks": ranks, "rows": plan.num_rows, "ac": plan.mode,
            "tokens_per_s_a_gpu": round(tokens / ranks / statistics.median(times)), "peak_gib": round(peak, 2),
            "planned_gib": round(state + (plan.activation_bytes + plan.whole_bytes) / 2**30, 2), "tokens": tokens,
            "gathers_once": plan.gathers_once, "sums_once": plan.sums_once,
            "state_gib": round(state, 2), "activations_gib": round(plan.activation_bytes / 2**30, 2),
        })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="The trainer on several GPUs beside one.")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--recipe", nargs="*", choices=("grpo", "sft"), default=["grpo", "sft"])
    parser.add_argument("--model", choices=MODELS, default="0.6b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if any(ranks % args.copies for ranks in args.ranks if ranks > 1):
        parser.error(f"--copies {args.copies} does not divide --ranks {' '.join(map(str, args.ranks))}")
    how = f"HSDP in {args.copies} copies" if args.copies > 1 else "FSDP"
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-ranks-") as name:
        directory = Path(name)
        write_model(directory / "model", MODELS[args.model], "bfloat16" if torch.cuda.is_available() else "float32")
        for recipe in args.recipe:
            one: float | None = None
            for ranks in args.ranks:
                given = (ranks, directory, recipe, args, results)
                mp.spawn(train, given, nprocs=ranks)  # type: ignore[no-untyped-call]
                found = results.get()
                print(json.dumps(found), flush=True)
                one = one or (found["tokens_per_s_a_gpu"] if ranks == 1 else None)
                if ranks > 1:
                    row(f"{how} over {ranks}, {recipe} {args.model}: tokens/s a GPU", found["tokens_per_s_a_gpu"], one,
                        target=0.95, peer="on one GPU")  # fmt: skip
                note = f"{found['rows']} rows, checkpointing {found['ac']}"
                row(f"memory of a trainer, {recipe} {args.model}, {ranks} ranks", found["peak_gib"],
                    found["planned_gib"], unit="GiB", peer="planned", note=note)  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
