"""Which operations of vLLM's model and of the trainer's come to different results from the same inputs.

    python benchmarks/operations.py [--prompts 16] [--layers 4] [--family qwen3] [--invariant]

vLLM prefills prompts and decodes a token of each, not compiled, and what its modules take and give is written down in a
few layers of 0.6B's dimensions with random weights in bfloat16; with ``--invariant`` as ``model.batch_invariant``
has them (on the CPU, which has no such attention, the others). Then each operation of the trainer's model, not compiled
either, gets the very same inputs, prompts and decoded tokens in one batch, as a trainer has them. A line an
operation: of prompts' values and of decoded tokens' the share that is not the same to the last bit, and the root mean
square of what they differ by, relative to theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_weights import SHAPES
from experts import alone
from mismatch import FAMILIES, configuration, write_model
from rows import PROJECT, row

from forge_hpc.data.types import Prompt
from forge_hpc.generation.invariant import replace_operations
from forge_hpc.invariance import prepare_invariance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = {
    "input_layernorm": "norm", "self_attn.qkv_proj": "qkv", "self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm",
    "self_attn.rotary_emb": "rotation", "self_attn.attn": "attention", "self_attn.o_proj": "out",
    "post_attention_layernorm": "norm2", "mlp.gate_up_proj": "gate_up", "mlp.act_fn": "silu", "mlp.down_proj": "down",
}  # fmt: skip


def tensors(value: Any) -> list[torch.Tensor]:
    """Copies of the tensors of arguments or of a result."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [each.detach().clone().cpu() for each in values if isinstance(each, torch.Tensor)]


def watch(worker: Any) -> None:
    """Write down all calls from now on."""
    worker.calls = defaultdict(list)
    taken: dict[str, list[torch.Tensor]] = {}  # copied before the call: some operations write where they read
    watched = set()
    for number, block in enumerate(worker.model_runner.get_model().model.layers):
        modules = dict(block.named_modules(remove_duplicate=False))
        for path, operation in MODULES.items():
            module = modules.get(path)
            if module is None or module in watched:  # the rotation is one for all layers
                continue
            watched.add(module)

            def before(_: Any, args: Any, kwargs: Any, name: str = f"{number}.{operation}") -> None:
                taken[name] = tensors((*args, *kwargs.values()))

            def after(_: Any, args: Any, kwargs: Any, out: Any, name: str = f"{number}.{operation}") -> None:
                worker.calls[name].append((taken.pop(name), tensors(out)))

            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)


def generate(model_dir: Path, args: argparse.Namespace, file: Path, results: Any) -> None:
    """The calls of vLLM's modules for all prompts in one step, and for one more token of each in the next."""
    from forge_hpc.generation import GenerationEngine

    invariant = ["model.batch_invariant=true"] if args.invariant and DEVICE == "cuda" else []
    if args.invariant:
        replace_operations()
    cfg = configuration(model_dir, args, ["generator.engine.enforce_eager=true", *invariant])
    engine = GenerationEngine(model_dir, cfg, device=DEVICE)
    draw = np.random.default_rng(0)
    prompts = [Prompt(i, "", draw.integers(0, 60, 64 + i).tolist(), "") for i in range(args.prompts)]
    try:
        asyncio.run(engine.generate_batch(prompts[:1], 1, seed=0, max_tokens=2))  # what is set up at a first step
        engine._engine.collective_rpc(watch)
        asyncio.run(engine.generate_batch(prompts[1:], 1, seed=0, max_tokens=2))
        [calls] = engine._engine.collective_rpc(lambda worker: dict(vars(worker)["calls"]))
    finally:
        engine.close()
    torch.save(calls, file)
    results.put(len(calls))


def trainer_model(model_dir: Path, args: argparse.Namespace) -> Any:
    """The trainer's model of a directory as one rank computes with it, in bfloat16."""
    from torchtitan.config import ParallelismConfig
    from torchtitan.tools.utils import set_default_dtype

    from forge_hpc.models import flash3
    from forge_hpc.models.attention import inner_attention_config
    from forge_hpc.models.spec import load_hf_weights, load_spec

    if args.invariant and DEVICE == "cuda":
        prepare_invariance("a trainer")
        flash3.activate()
    spec = load_spec(
        model_dir,
        max_positions=1024,
        inner_attention=inner_attention_config(torch.bfloat16),
        parallelism=ParallelismConfig(),
    )
    with torch.device("meta"), set_default_dtype(torch.bfloat16):
        model: Any = spec.config.build()
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        model.init_weights()
    load_hf_weights(model, spec, model_dir)
    return model


def compute(model_dir: Path, args: argparse.Namespace, file: Path, results: Any) -> None:
    """Compare all operations."""
    calls = torch.load(file, weights_only=True)
    model = trainer_model(model_dir, args)
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for number, block in model.layers.items():
            found_here = {name: calls.get(f"{number}.{name}") for name in MODULES.values()}
            steps = {name: each for name, each in found_here.items() if each is not None}
            steps["rotation"] = calls["0.rotation"][int(number) :: len(model.layers)]
            if [len(taken) for taken in steps.values()] != [2] * len(steps):
                raise SystemExit(f"vLLM took {len(steps['norm'])} steps, not one of prompts and one of a token each")
            for operation, theirs, ours in compared(block, steps, args):
                found[operation].append((theirs, ours))
    num_prompt_tokens = len(calls["0.norm"][0][0][0])
    told = {name: figures(pairs, num_prompt_tokens) for name, pairs in found.items()}
    results.put((told, far_gradients() if DEVICE == "cuda" else None))


def far_gradients() -> float:
    """How far gradients through vLLM's forward pass are from those through torch's, relative (root mean square): the
    farthest of queries, keys and values, of both sizes of heads, in documents and in pieces with fewer queries than
    keys, as ranks have them that share a row. Both go back by torch's."""
    from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl
    from torch.nn.attention.varlen import varlen_attn

    from forge_hpc.models import flash3

    def grads(given: list[torch.Tensor], grad: torch.Tensor, bounds: list[torch.Tensor], longest: int) -> Any:
        qkv = [x.clone().requires_grad_() for x in given]
        options: dict[str, Any] = {"window_size": (-1, 0), "enable_gqa": True, "num_splits": 1}
        out: Any = varlen_attn(qkv[0], qkv[1], qkv[2], bounds[0], bounds[1], longest, longest, **options)
        return [each.double() for each in torch.autograd.grad(out, qkv, grad)]

    torch.manual_seed(0)
    farthest = 0.0
    for dim in flash3.HEAD_DIMS:
        for num_queries, num_keys in (((1, 130, 7, 374),) * 2, ((1, 64, 7, 100), (1, 130, 7, 374))):
            sizes = [(sum(num_queries), 16), (sum(num_keys), 8), (sum(num_keys), 8)]
            given = [torch.randn(*size, dim, device=DEVICE).bfloat16() for size in sizes]
            each = torch.randn_like(given[0])
            bounds = [
                torch.tensor([0, *np.cumsum(num)], dtype=torch.int32, device=DEVICE) for num in (num_queries, num_keys)
            ]
            flash3.activate()
            assert current_flash_attention_impl() == flash3.NAME
            ours = grads(given, each, bounds, max(num_keys))
            restore_flash_attention_impl()
            theirs = grads(given, each, bounds, max(num_keys))
            farthest = max(farthest, *(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True)))
    return farthest


def compared(block: Any, steps: Any, args: argparse.Namespace) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Each operation of a layer: its name, vLLM's result and the trainer's, [tokens, values]; decoded tokens last."""

    def all_of(name: str, which: int, part: int) -> torch.Tensor:
        return torch.cat([call[which][part] for call in steps[name]]).to(DEVICE)

    def taken(name: str, part: int = 0) -> torch.Tensor:
        return all_of(name, 0, part)

    def gave(name: str, part: int = 0) -> torch.Tensor:
        return all_of(name, 1, part).flatten(1)

    attention, feed_forward = block.attention, block.feed_forward
    dim = attention.head_dim

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(1, len(x), -1, dim)

    positions = taken("rotation")
    for name, norm in (("norm", block.attention_norm), ("norm2", block.ffn_norm)):
        if len(steps[name][0][0]) > 1:  # the first one has nothing to add
            total = taken(name) + taken(name, 1)
            yield "residual stream", gave(name, 1), total
        else:
            total = taken(name)
        yield "norm of the stream, and sum before it", gave(name), norm(total)
    yield (
        "queries, keys, values",
        gave("qkv"),
        torch.cat([x.flatten(2) for x in attention.qkv_linear(taken("qkv")[None])], 2)[0],
    )
    for name in ("q_norm", "k_norm"):
        if name in steps:  # not in all families
            yield "norm of queries and keys", gave(name), getattr(attention, name)(taken(name)).flatten(1)
    rotated = attention.rope(by_head(taken("rotation", 1)), by_head(taken("rotation", 2)), positions[None])
    for part, ours in enumerate(rotated):
        yield "rotation", gave("rotation", part), ours[0].flatten(1)
    qkv = [by_head(taken("attention", i)) for i in range(3)]
    yield "attention", gave("attention"), attend(block, positions, *qkv)
    yield "output projection", gave("out"), attention.wo(taken("out"))
    x = taken("gate_up")
    yield "gate and up", gave("gate_up"), torch.cat([feed_forward.w1(x), feed_forward.w3(x)], -1)
    gate, up = taken("silu").chunk(2, -1)
    yield "SiLU and product", gave("silu"), torch.nn.functional.silu(gate) * up
    yield "down", gave("down"), feed_forward.w2(taken("down"))


def attend(block: Any, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The trainer's attention on documents, each a prompt and the token that was decoded after it."""
    from forge_hpc.models.attention import attention_inputs, inner_attention_config

    at = positions.cpu().numpy()
    starts = np.flatnonzero(at == 0)
    num = len(starts)
    prompts = np.split(np.arange(len(at) - num), starts[1:])
    order = np.concatenate([np.append(each, len(at) - num + i) for i, each in enumerate(prompts)])
    if (np.concatenate([np.arange(len(each) + 1) for each in prompts]) != at[order]).any():
        raise SystemExit("vLLM decoded the prompts in another order than it took them")
    inputs = attention_inputs(inner_attention_config(torch.bfloat16), at[order][None], torch.device(DEVICE))
    index = torch.from_numpy(order).to(DEVICE)
    out = block.attention.inner_attention(
        *(x[:, index] for x in (q, k, v)),
        attention_masks=inputs, scale=block.attention.scaling, enable_gqa=block.attention.enable_gqa,
    )  # fmt: skip
    back = torch.empty_like(index)
    back[index] = torch.arange(len(index), device=DEVICE)
    return out[0, back].flatten(1)


def figures(pairs: list[tuple[torch.Tensor, torch.Tensor]], num_prompt_tokens: int) -> list[float]:
    """Of prompts and of decoded tokens: the share of values that are not the same, and how far they are, relative."""
    result = []
    for rows in (slice(num_prompt_tokens), slice(num_prompt_tokens, None)):
        theirs = torch.cat([theirs[rows].flatten() for theirs, _ in pairs])
        ours = torch.cat([ours[rows].flatten() for _, ours in pairs])
        result.append(float((theirs != ours).float().mean()))
        result.append(float((theirs.float() - ours.float()).norm() / theirs.float().norm()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=17, help="the first one is not compared")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--invariant", action="store_true", help="with model.batch_invariant")
    args = parser.parse_args()
    args.tokens = 2
    with tempfile.TemporaryDirectory(prefix="forge-hpc-operations-") as name:
        shape = dict(SHAPES["0.6b"]) | {"num_hidden_layers": args.layers, "vocab_size": 512}
        model_dir = write_model(Path(name) / "model", args.family, shape)
        alone(generate, model_dir, args, Path(name) / "calls.pt")
        found, gradients = alone(compute, model_dir, args, Path(name) / "calls.pt")
    print(f"{'':40}{'prompts: other':>16}{'by':>10}{'decoded: other':>16}{'by':>10}")
    for operation, (share, far, decoded_share, decoded_far) in found.items():
        print(f"{operation:40}{share:16.4f}{far:10.5f}{decoded_share:16.4f}{decoded_far:10.5f}")
        row(
            f"{operation}: values that differ",
            share,
            target=0.0 if args.invariant and (DEVICE == "cuda" or operation != "attention") else None,
            better="less",
            unit="of prompts'",
            note=f"of decoded tokens' {decoded_share:.4f}",
        )

    if gradients is not None:
        row("gradients through vLLM's forward pass, beside those through torch's", gradients, target=0.01,
            better="less", unit="relative")  # fmt: skip


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
