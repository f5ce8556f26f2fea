"""Where the difference between the generator's log-probabilities and the trainer's comes from: each side's distance
from the same model in float32, and each side's ways to compute.

    python benchmarks/mismatch.py [--prompts 32] [--tokens 256] [--model 0.6b] [--family qwen3]

vLLM samples, as shipped, without compilation and batch invariant; the trainer computes the log-probabilities of what
was sampled in these ways, and in float32. Means of absolute differences at the sampled tokens, in nats. A model of
0.6B's dimensions with random weights; without a GPU a tiny one, whose sides are in bfloat16 too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pickle
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_weights import SHAPES
from experts import alone, document
from rows import PROJECT, row

from forge_hpc.config import load_config
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Document, Prompt

GENERATORS: Mapping[str, list[str]] = {
    "as shipped": [],
    "not compiled": ["generator.engine.extra={compilation_config: {mode: 0, cudagraph_mode: FULL}}"],
    "all of vLLM's own kernels": ["generator.engine.extra={compilation_config: {custom_ops: [all]}}"],
    "batch invariant": ["model.batch_invariant=true"],
}
TRAINERS: Mapping[str, list[str]] = {
    "as shipped": [],
    "not compiled": ["trainer.compile.enable=false"],
    "batch invariant": ["model.batch_invariant=true"],
    "float32": [
        "trainer.training.mixed_precision_param=float32",
        "model.dtype=float32",
        "trainer.compile.enable=false",
    ],
}
FAMILIES: Mapping[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"head_dim": 64},
    "llama": {
        "head_dim": 64,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 1024},
    },
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
}  # fmt: skip
"""Supported families that are dense, and what of the shape they have otherwise."""


def configuration(model_dir: Path, args: argparse.Namespace, overrides: list[str]) -> Config:
    options = [f"model.path={model_dir}", f"cluster.gpus_per_node={torch.cuda.device_count()}"]
    options += ["rollout.max_prompt_tokens=128", f"rollout.max_response_tokens={args.tokens}"]
    options += ["generator.engine.gpu_memory_utilization=0.3", "trainer.training.seq_len=4096"]
    if not torch.cuda.is_available():
        options += ["trainer.training.seq_len=512"]
    return load_config(PROJECT / "configs/grpo/qwen3_0_6b.yaml", [*options, *overrides])


def write_model(directory: Path, family: str, shape: Mapping[str, Any]) -> Path:
    """A random model in bfloat16, so that both sides and float32 begin with the same numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from forge_hpc.data.builtin import char_tokenizer

    torch.manual_seed(0)
    given = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | dict(shape) | FAMILIES[family]
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.for_model(family, **given, max_position_embeddings=8192, **ends)
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # which are 1 and 0 in a new model
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    model.cpu().save_pretrained(directory)
    char_tokenizer().save_pretrained(directory)
    return directory


def sample(model_dir: Path, args: argparse.Namespace, overrides: list[str], results: Any) -> None:
    from forge_hpc.generation import GenerationEngine

    cfg = configuration(model_dir, args, overrides)
    engine = GenerationEngine(model_dir, cfg, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        draw = np.random.default_rng(0)
        prompts = [Prompt(i, "", draw.integers(0, 60, 64 + i % 64).tolist(), "") for i in range(args.prompts)]
        answers: Any = asyncio.run(engine.generate_batch(prompts, 4, seed=1, max_tokens=args.tokens))
    finally:
        engine.close()
    documents = [document(prompt, each) for prompt, some in zip(prompts, answers, strict=True) for each in some]
    results.put(pickle.dumps(documents))


def compute(
    model_dir: Path,
    args: argparse.Namespace,
    overrides: list[str],
    sets: list[list[Document]],
    store: Path,
    results: Any,
) -> None:
    """The trainer's log-probabilities of all documents."""
    from forge_hpc.training.distributed import init_distributed
    from forge_hpc.training.engine import TrainEngine

    init_distributed(store, rank=0, world_size=1, local_rank=0)
    engine = TrainEngine(configuration(model_dir, args, overrides), model_dir)
    results.put(pickle.dumps([engine.logprobs(documents) for documents in sets]))


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32 if on_gpu else 8)
    parser.add_argument("--tokens", type=int, default=256 if on_gpu else 24)
    parser.add_argument("--model", choices=SHAPES, default="0.6b" if on_gpu else "tiny")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--generators", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-mismatch-") as name:
        directory = Path(name)
        model_dir = write_model(directory / "model", args.family, SHAPES[args.model])
        sampled = {}
        for each in args.generators if on_gpu else ["as shipped"]:
            try:
                sampled[each] = pickle.loads(alone(sample, model_dir, args, GENERATORS[each]))
            except SystemExit as error:
                row(f"generator {each}", None, note=str(error))
        computed = {}
        for number, each in enumerate(args.trainers if on_gpu else ["as shipped", "not compiled", "float32"]):
            try:
                given = (model_dir, args, TRAINERS[each], list(sampled.values()), directory / f"store-{number}")
                computed[each] = dict(zip(sampled, pickle.loads(alone(compute, *given)), strict=True))
            except SystemExit as error:
                row(f"trainer {each}", None, note=str(error))
    report(sampled, computed)


def report(sampled: Mapping[str, list[Document]], computed: Mapping[str, Mapping[str, list[Any]]]) -> None:
    def far(ours: list[Any], documents: list[Document], theirs: list[Any]) -> float:
        total, num = 0.0, 0
        for a, b, each in zip(ours, theirs, documents, strict=True):
            mask = np.asarray(each.loss_mask)
            size = int(mask.sum())
            total += float(np.abs(np.asarray(a)[-size:] - np.asarray(b)[-size:]).sum())
            num += size
        return total / num

    for each, documents in sampled.items():
        said = [document.generator_logprobs for document in documents]
        found = {name: far(logprobs[each], documents, said) for name, logprobs in computed.items()}
        print(json.dumps({"generator": each, "beside the trainer": found}), flush=True)
        for name, value in found.items():
            # Others differ by their rounding, whatever is right about them.
            target = 0.003 if each == name == "batch invariant" else None
            row(f"generator {each}, trainer {name}", value, target=target, better="less", unit="nats")
    if "float32" in computed:
        for name, logprobs in computed.items():
            for each, documents in sampled.items():
                value = far(logprobs[each], documents, computed["float32"][each])
                print(json.dumps({"trainer": name, "of generator": each, "beside float32": value}), flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
