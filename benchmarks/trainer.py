"""The trainer alone on one GPU, beside TorchTitan's own model, loss and step on the same packed documents.

    python benchmarks/trainer.py                        # Qwen3 0.6B with random weights; ratios, interleaved A B A B
    python benchmarks/trainer.py --rows 1 4 --ac full   # some shapes only
    python benchmarks/trainer.py --tiny                 # the same code on two CPU cores, for its own sake

Ours is `TrainEngine.train_step`: log-probabilities, entropies, the GRPO loss and its metrics. Theirs is TorchTitan's
Qwen3, compiled, with its chunked cross-entropy: no log-probabilities, no metrics. Prints one JSON object a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import row

import forge_hpc.models  # noqa: F401  (before torchtitan is imported)
from forge_hpc.config import load_config
from forge_hpc.data.packing import pack
from forge_hpc.data.types import Document
from forge_hpc.models.attention import attention_inputs
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

CONFIG = Path(__file__).parents[1] / "configs/grpo/qwen3_0_6b.yaml"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[4], help="rows of a microbatch; 0: as the plan has it")
    parser.add_argument("--ac", nargs="*", default=["none"], help="activation checkpointing: none, selective, full")
    parser.add_argument("--their-rows", type=int, help="TorchTitan's, where they are others")
    parser.add_argument("--their-ac")
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each, after two that are not")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--profile", type=Path, help="write a table of one step's kernels here")
    parser.add_argument("--long", action="store_true", help="one document that fills a row of --seq-len")
    parser.add_argument("--head", type=int, metavar="TOKENS", help="the head alone on so many tokens: memory and time")
    parser.add_argument("--tiny", action="store_true", help="a small model and few documents")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.head:
        return head(args.head, 512 if args.tiny else 151936)
    with tempfile.TemporaryDirectory() as directory:
        init_distributed(Path(directory) / "store", rank=0, world_size=1, local_rank=0)
        model_dir = write_model(Path(directory) / "model", args.tiny)
        vocab_size, num = (512, 16) if args.tiny else (151600, args.documents)
        documents = make_documents(num, vocab_size, args.seq_len)
        if args.long:
            documents = [make_document(np.random.default_rng(0), 100, args.seq_len - 99, vocab_size)]
        for rows in args.rows:
            for mode in args.ac:
                compare(args, model_dir, documents, rows, mode)


def compare(args: argparse.Namespace, model_dir: Path, documents: list[Document], rows: int, mode: str) -> None:
    """Interleaved steps of both, one JSON line."""
    num_tokens = sum(len(document.token_ids) for document in documents)
    result: dict[str, Any] = {"rows": rows, "ac": mode, "tokens": num_tokens}
    try:
        ours = Ours(args, model_dir, rows, mode)
        plan = ours.engine.microbatch
        result |= {"rows": plan.num_rows, "ac": plan.mode, "planned_gib": round(plan.activation_bytes / 2**30, 1)}
        rows, mode = args.their_rows or plan.num_rows, args.their_ac or plan.mode
        theirs = None if args.ours_only else Theirs(ours.engine, documents, rows, mode)
        steps = {"ours": lambda: ours.step(documents)} | ({} if theirs is None else {"theirs": theirs.step})
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 2):
            for name, step in steps.items():
                free()
                seconds, gib = timed(step)
                if number == 0:
                    result[f"{name}/first_s"] = round(seconds, 2)
                elif number > 1:
                    times[name].append(seconds)
                    result[f"{name}/peak_gib"] = round(gib, 2)
        for name, found in times.items():
            result[f"{name}/tokens_per_s"] = round(num_tokens / statistics.median(found))
        if theirs is not None:
            result["ours / theirs"] = round(result["ours/tokens_per_s"] / result["theirs/tokens_per_s"], 3)
        result |= {name: round(value, 4) for name, value in ours.metrics.items() if name in ("loss", "tokens/fill")}
        if args.profile is not None:
            args.profile.write_text(profile(lambda: ours.step(documents)))
    except torch.OutOfMemoryError as error:
        result["error"] = str(error).split(".")[0]
    print(json.dumps(result), flush=True)
    what = f"trainer, {result['rows']} rows of {args.seq_len}, activation checkpointing {result['ac']}"
    peak = f"{result['ours/peak_gib']} GiB at most" if "ours/peak_gib" in result else ""
    row(what, result.get("ours/tokens_per_s"), result.get("theirs/tokens_per_s"),
        target=None if args.ours_only else 0.97, unit="tokens/s", peer="TorchTitan",
        note=result.get("error", peak))  # fmt: skip
    ours = theirs = steps = None  # type: ignore[assignment]
    free()


class Ours:
    """The engine of a shipped configuration."""

    def __init__(self, args: argparse.Namespace, model_dir: Path, rows: int, mode: str) -> None:
        overrides = [
            f"trainer.training.local_batch_size={rows or 'null'}",
            f"trainer.activation_checkpoint.mode={mode}",
        ]
        overrides += [f"model.path={model_dir}", f"trainer.training.seq_len={args.seq_len}", *args.overrides]
        self.engine = TrainEngine(load_config(CONFIG, overrides), model_dir)
        self.metrics: dict[str, float] = {}

    def step(self, documents: list[Document]) -> None:
        self.metrics = self.engine.train_step(documents)


class Theirs:
    """TorchTitan's model of the same dimensions, compiled and with its chunked loss, on the same rows."""

    def __init__(self, engine: TrainEngine, documents: list[Document], rows: int, mode: str) -> None:
        from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
        from torchtitan.config import CompileConfig, TrainingConfig
        from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
        from torchtitan.models.common import Linear
        from torchtitan.tools.utils import set_default_dtype

        cfg, spec, parallelism = engine.cfg.trainer, engine.spec, parallelism_of(engine)
        head = spec.config.lm_head
        plain = Linear.Config(in_features=head.in_features, out_features=head.out_features, param_init=head.param_init)
        config = dataclasses.replace(spec.config, lm_head=plain)
        with torch.device("meta"), set_default_dtype(torch.float32):
            model = config.build()
        on_gpu = DEVICE.type == "cuda"
        compile_config = CompileConfig(enable=on_gpu, components=["model", "loss"])
        parallelize: Any = spec.parallelize
        self.model = parallelize(
            model,
            parallel_dims=engine.parallel_dims,
            training=TrainingConfig(dtype="float32", mixed_precision_param="bfloat16" if on_gpu else "float32"),
            parallelism=parallelism,
            compile_config=compile_config,
            ac_config={"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}[mode],
            dump_folder="",
        )
        self.model.to_empty(device=DEVICE)
        with torch.no_grad():
            self.model.init_weights()
        self.model._skip_lm_head = True
        self.loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()).build(compile_config=compile_config)
        self.loss.set_lm_head(self.model.lm_head)
        self.optimizers = optimizers_of(engine, self.model)
        self.spec = spec
        batch = pack(documents, cfg.training.seq_len, num_rows_multiple=rows, row_len_multiple=128)
        self.microbatches = [batch.rows(start, start + rows) for start in range(0, batch.num_rows, rows)]
        self.num_trained = float(batch.num_trained_tokens)

    def step(self) -> None:
        with torchs_attention():
            self._step()

    def _step(self) -> None:
        from torchtitan.components.loss import IGNORE_INDEX
        from torchtitan.distributed import utils as dist_utils

        valid = torch.tensor(self.num_trained, device=DEVICE)
        self.optimizers.zero_grad()
        for rows in self.microbatches:
            labels = np.where(rows["mask"], rows["labels"], IGNORE_INDEX)
            hidden = self.model(
                torch.from_numpy(rows["input_ids"]).to(DEVICE),
                positions=torch.from_numpy(rows["positions"]).to(DEVICE),
                attention_masks=attention_inputs(self.spec.inner_attention, rows["positions"], DEVICE),
            )
            loss, _ = self.loss(hidden, torch.from_numpy(labels).to(DEVICE), valid)
            loss.backward()
        dist_utils.clip_grad_norm_(list(self.model.parameters()), 1.0, foreach=True)
        self.optimizers.step()


@contextmanager
def torchs_attention() -> Iterator[None]:
    """Attention as torch brings it, which is what TorchTitan has without more packages."""
    from torch.nn.attention import (
        activate_flash_attention_impl,
        current_flash_attention_impl,
        restore_flash_attention_impl,
    )

    active = current_flash_attention_impl()
    if active is None:
        yield
        return
    restore_flash_attention_impl()
    try:
        yield
    finally:
        activate_flash_attention_impl(active)


def parallelism_of(engine: TrainEngine) -> Any:
    from forge_hpc.training.build import _parallelism_config

    return _parallelism_config(engine.cfg)


def optimizers_of(engine: TrainEngine, model: Any) -> Any:
    from forge_hpc.training.engine import _build_optimizers

    return _build_optimizers(engine.cfg, model)


def write_model(directory: Path, tiny: bool) -> Path:
    """A Qwen3 0.6B with random weights in Hugging Face format, or a tiny one."""
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072}
    sizes |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    if tiny:
        sizes |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    config = Qwen3Config(
        **sizes,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    torch.manual_seed(0)
    with DEVICE:
        model = Qwen3ForCausalLM(config).bfloat16()
    weights = {k: v.cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def make_documents(num: int, vocab_size: int, seq_len: int) -> list[Document]:
    """Prompts of 60 to 200 tokens, answers of log-normal length (median 300, sigma 0.6)."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(num):
        prompt = int(rng.integers(60, 200))
        answer = int(np.clip(rng.lognormal(np.log(300), 0.6), 16, min(1024, seq_len - prompt)))
        documents.append(make_document(rng, prompt, answer, vocab_size))
    return documents


def make_document(rng: np.random.Generator, prompt: int, answer: int, vocab_size: int) -> Document:
    mask = np.arange(prompt + answer) >= prompt
    return Document(
        token_ids=rng.integers(0, vocab_size, len(mask)).astype(np.int32),
        loss_mask=mask,
        generator_logprobs=np.where(mask, -np.log(vocab_size), 0).astype(np.float32),
        advantage=float(rng.normal()),
    )


def head(num_tokens: int, vocab_size: int) -> None:
    """Forward and backward pass of the head, a random gradient for each token: GiB above its inputs, and seconds."""
    from forge_hpc.models.head import LogprobHead

    layer = LogprobHead.Config(in_features=1024, out_features=vocab_size).build().to(DEVICE, torch.bfloat16)
    hidden = torch.randn(1, num_tokens, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels, slots = torch.randint(0, vocab_size, (num_tokens,), device=DEVICE), torch.arange(num_tokens, device=DEVICE)
    weights = torch.randn(num_tokens, device=DEVICE)

    def step() -> None:
        layer.weight.grad = hidden.grad = None
        logprobs, _ = layer(hidden, labels, slots)
        (logprobs * weights).sum().backward()

    times = [timed(step) for _ in range(4)]
    inputs = sum(x.numel() * x.element_size() for x in (hidden, layer.weight)) / 2**30
    seconds = statistics.median(seconds for seconds, _ in times[1:])
    result = {"head": num_tokens, "vocab": vocab_size, "gib_above_inputs": round(times[-1][1] - inputs, 2)}
    print(json.dumps(result | {"ms": round(1000 * seconds, 1), "first_s": round(times[0][0], 2)}), flush=True)
    row(f"memory of the head above its inputs, {num_tokens:,} tokens, vocabulary of {vocab_size:,}",
        result["gib_above_inputs"], target=1.4, better="less", unit="GiB")  # fmt: skip


def timed(step: Any) -> tuple[float, float]:
    """Seconds, and the GPU's peak in GiB."""
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30


def profile(step: Any) -> str:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    with torch_profile(activities=activities) as profiler:
        timed(step)
    key = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=80)


def free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
