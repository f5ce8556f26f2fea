"""A mixture of experts: expert parallelism beside one rank, and what replayed routes are worth.

    python benchmarks/experts.py [--ranks 2] [--experts 64] [--per-token 2] [--layers 4] [--steps 4]

A Qwen3 MoE with random weights, on one rank, over several by FSDP alone, and with its experts over them: losses of the
same rows, tokens a second. What FSDP alone changes is the rounding of rows that are put together otherwise.
Then vLLM samples (bfloat16) after an update of its weights and says which experts it took, and the trainer computes the
mismatch with those (`algorithm.routing_replay`) and with its own. Without a GPU it is a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from rows import PROJECT, row
from trainer import make_documents, timed

from forge_hpc.config import load_config
from forge_hpc.config.schema import Config
from forge_hpc.data.types import Completion, Document, Prompt
from forge_hpc.training.distributed import init_distributed

VOCAB_SIZE = 4096
NUM_DOCUMENTS = 256


def write_model(directory: Path, seed: int, args: argparse.Namespace) -> Path:
    """A random Qwen3 MoE in float32, with a tokenizer."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from forge_hpc.data.builtin import char_tokenizer

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=args.hidden, num_hidden_layers=args.layers, **{"head_dim": args.head_dim},
        num_attention_heads=args.hidden // args.head_dim, num_key_value_heads=max(1, args.hidden // args.head_dim // 2),
        num_experts=args.experts, num_experts_per_tok=args.per_token, moe_intermediate_size=args.hidden // 2,
        intermediate_size=args.hidden * 2, norm_topk_prob=True, max_position_embeddings=8192, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    char_tokenizer().save_pretrained(directory)
    return directory


def configuration(model_dir: Path, ranks: int, experts_over: int, args: argparse.Namespace) -> Config:
    gpus = 2 * ranks if torch.cuda.is_available() else 0  # those of generators, which are not here
    overrides = [f"model.path={model_dir}", f"cluster.gpus_per_node={gpus}", "trainer.training.seq_len=4096"]
    overrides += ["trainer.training.local_batch_size=2", "trainer.activation_checkpoint.mode=none"]
    overrides += [f"trainer.parallelism.expert_parallel_degree={experts_over}", "rollout.max_prompt_tokens=64"]
    overrides += ["rollout.max_response_tokens=64", "generator.engine.gpu_memory_utilization=0.3"]
    overrides += ["generator.engine.enforce_eager=true"]
    if not gpus:
        overrides += ["model.dtype=float32", "trainer.training.seq_len=512"]
    return load_config(PROJECT / "configs/grpo/qwen3_0_6b.yaml", [*overrides, *args.overrides])


def train(rank: int, ranks: int, experts_over: int, directory: Path, args: argparse.Namespace, results: Any) -> None:
    init_distributed(directory / f"store-{ranks}-{experts_over}", rank=rank, world_size=ranks, local_rank=rank)
    from forge_hpc.training.engine import TrainEngine

    cfg = configuration(directory / "model", ranks, experts_over, args)
    engine = TrainEngine(cfg, directory / "model")
    documents = make_documents(args.documents, VOCAB_SIZE, cfg.trainer.training.seq_len)
    losses, times = [engine.eval_loss(documents)], []
    for number in range(args.steps + 2):
        found: dict[str, float] = {}
        seconds, _ = timed(lambda found=found: found.update(engine.train_step(documents)))
        if not number:
            losses += [found["loss"], found["entropy/mean"]]
        if number > 1:
            times.append(seconds)
    if rank == 0:
        tokens = sum(len(document.token_ids) for document in documents)
        results.put(
            {
                "ranks": ranks,
                "experts over": experts_over,
                "losses": losses,
                "tokens_per_s": tokens / statistics.median(times),
            }
        )


def sample(directory: Path, args: argparse.Namespace, results: Any) -> None:
    """What vLLM samples with the model's weights, which it gets by an update; then the trainer's mismatch."""
    from safetensors.torch import load_file

    from forge_hpc.generation import GenerationEngine
    from forge_hpc.training.engine import TrainEngine

    cfg = configuration(directory / "model", 1, 1, args)
    cfg.model.dtype, cfg.algorithm.routing_replay = "bfloat16", True
    engine = GenerationEngine(directory / "stale", cfg, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        weights = {
            name: value
            for file in (directory / "model").glob("*.safetensors")
            for name, value in load_file(file).items()
        }
        asyncio.run(engine.load_weights(1, weights.items()))
        draw = np.random.default_rng(0)
        prompts = [Prompt(i, "", draw.integers(0, VOCAB_SIZE, 8 + i % 8).tolist(), "") for i in range(32)]
        answers: Any = asyncio.run(
            engine.generate_batch(prompts, 4, seed=1, max_tokens=cfg.rollout.max_response_tokens)
        )
    finally:
        engine.close()
    documents = [document(prompt, each) for prompt, some in zip(prompts, answers, strict=True) for each in some]
    init_distributed(directory / "store-replay", rank=0, world_size=1, local_rank=0)
    trainer = TrainEngine(cfg, directory / "model")
    found = {"replayed": trainer.train_step(documents, update=False)["mismatch/logprob_abs_mean"]}
    cfg.algorithm.routing_replay = False
    trainer = TrainEngine(cfg, directory / "model")
    own = [dataclasses.replace(each, routes=None) for each in documents]
    found["without"] = trainer.train_step(own, update=False)["mismatch/logprob_abs_mean"]
    routes = documents[0].routes
    assert routes is not None
    results.put(found | {"documents": len(documents), "routes": list(routes.shape)})


def document(prompt: Prompt, completion: Completion) -> Document:
    ids = np.array([*prompt.token_ids, *completion.token_ids], np.int32)
    logprobs = np.zeros(len(ids), np.float32)
    logprobs[len(prompt.token_ids) :] = completion.logprobs
    mask = np.arange(len(ids)) >= len(prompt.token_ids)
    return Document(ids, mask, logprobs, advantage=1.0, routes=completion.routes)


def alone(target: Any, *arguments: Any) -> Any:
    """What a function puts into a queue, in a process of its own."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=target, args=(*arguments, results))
    process.start()
    while not (found := not results.empty()) and process.is_alive():
        time.sleep(0.1)
    result = results.get() if found or not results.empty() else None  # a large one is taken while it is written
    process.join()
    if process.exitcode:
        raise SystemExit(f"{target.__name__}: exit code {process.exitcode}")
    return result


def distance(run: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(ours - theirs) for ours, theirs in zip(run["losses"], other["losses"], strict=True))


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64 if on_gpu else 8)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4 if on_gpu else 2)
    parser.add_argument("--hidden", type=int, default=512 if on_gpu else 128)
    parser.add_argument("--head-dim", type=int, default=128 if on_gpu else 32)
    parser.add_argument("--documents", type=int, default=NUM_DOCUMENTS if on_gpu else 8)
    parser.add_argument("--steps", type=int, default=4 if on_gpu else 1)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-experts-") as name:
        directory = Path(name)
        write_model(directory / "model", 0, args)
        write_model(directory / "stale", 1, args)
        found = []
        for ranks, experts_over in ((1, 1), (args.ranks, 1), (args.ranks, args.ranks)):
            results = mp.get_context("spawn").SimpleQueue()
            told = (ranks, experts_over, directory, args, results)
            mp.spawn(train, told, nprocs=ranks)  # type: ignore[no-untyped-call]
            found.append(results.get())
            print(json.dumps(found[-1]), flush=True)
        replay = alone(sample, directory, args)
        print(json.dumps(replay), flush=True)
    one, fsdp, several = found
    over = f"experts over {args.ranks} ranks"
    row(f"{over}: losses beside those of FSDP alone", distance(several, fsdp), target=1e-3, better="less", unit="nats")
    row(f"{over}: losses beside one rank's", distance(several, one), unit="nats")
    row(f"FSDP alone over {args.ranks} ranks: losses beside one rank's", distance(fsdp, one), unit="nats")
    row(f"{over}: tokens/s of each", several["tokens_per_s"] / args.ranks, one["tokens_per_s"], unit="tokens/s",
        peer="one rank")  # fmt: skip
    row("mismatch with the generator's routes", replay["replayed"], replay["without"], target=0.3, better="less",
        unit="nats", peer="with the trainer's own")  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
