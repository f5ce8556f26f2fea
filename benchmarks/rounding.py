"""How far rounding to bfloat16 alone takes a model with random weights from its exact log-probabilities, on the CPU.

    python benchmarks/rounding.py [--model 0.6b 1.7b 8b] [--tokens 128]

One forward pass of a Qwen3 of those dimensions on random tokens, four ways at once: exactly (float32), with the result
of each operation rounded to bfloat16, with the roundings that compiled kernels leave (of matrix products, norms,
rotated queries and keys, attention, the residual stream), and with these once more, but that matrix products add up in
two halves, as a kernel for another number of rows may. Logits are in float32 each time. The second and the third differ
by what two sides differ by that compute in bfloat16 with kernels of their own, the last two by what two sides do that
round at the same places. Means of absolute differences at tokens that are sampled from the exact distribution, in nats.
A layer's weights exist while it computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from ranks import MODELS
from rows import PROJECT, row

STD = 0.02
"""Of the weights, as in the other benchmarks."""
EPS = 1e-6
THETA = 1e6
WAYS = ("exact", "each operation rounded", "as compiled kernels round", "the same, products in two halves")
Round = Callable[[torch.Tensor], torch.Tensor]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def exactly(x: torch.Tensor) -> torch.Tensor:
    return x


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.T


def product_in_halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    (x1, x2), (w1, w2) = x.chunk(2, -1), w.chunk(2, -1)
    return x1 @ w1.T + x2 @ w2.T


OPERATIONS: Mapping[str, tuple[Round, Round, Product]] = dict(
    zip(
        WAYS,
        [
            (exactly, exactly, product),
            (to_bfloat16, to_bfloat16, product),
            (to_bfloat16, exactly, product),
            (to_bfloat16, exactly, product_in_halves),
        ],
        strict=True,
    )
)
"""What is done to the results of kernels, and to those within one; and a matrix product."""


def weight(*shape: int) -> torch.Tensor:
    return to_bfloat16(torch.randn(*shape) * STD)


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


class Rotation:
    """Rotary position embeddings of so many positions."""

    def __init__(self, num: int, dim: int) -> None:
        angles = torch.arange(num)[:, None] * THETA ** (-torch.arange(0, dim, 2) / dim)
        self._cos, self._sin = angles.cos()[:, None], angles.sin()[:, None]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H, D] each."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self._cos - b * self._sin, b * self._cos + a * self._sin], -1)


def layer(streams: dict[str, torch.Tensor], shape: Mapping[str, Any], rotate: Rotation) -> None:
    """One layer on the residual stream [T, hidden] of each way, with the same random weights."""
    hidden, inner, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    wq, wk, wv = weight(heads * dim, hidden), weight(kv_heads * dim, hidden), weight(kv_heads * dim, hidden)
    wo, gate, up, down = (
        weight(hidden, heads * dim),
        weight(inner, hidden),
        weight(inner, hidden),
        weight(hidden, inner),
    )
    for way, x in streams.items():
        kernel, within, times = OPERATIONS[way]
        y, num = kernel(norm(x)), len(x)
        q, k, v = (kernel(times(y, w)).view(num, -1, dim) for w in (wq, wk, wv))
        q, k = (kernel(rotate(within(norm(each)))) for each in (q, k))
        q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        attention = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = kernel(x + within(times(kernel(attention.transpose(0, 1).reshape(num, -1)), wo)))
        y = kernel(norm(x))
        inside = kernel(within(torch.nn.functional.silu(kernel(times(y, gate)))) * kernel(times(y, up)))
        streams[way] = kernel(x + within(times(inside, down)))


def measure(name: str, num_tokens: int) -> None:
    shape = MODELS[name]
    torch.manual_seed(0)
    embeddings = weight(shape["vocab_size"], shape["hidden_size"])
    tokens = torch.randint(shape["vocab_size"], (num_tokens,))
    streams = {way: embeddings[tokens] for way in WAYS}
    head = embeddings if shape["tie_word_embeddings"] else weight(*embeddings.shape)
    del embeddings
    rotate = Rotation(num_tokens, shape["head_dim"])
    for _ in range(shape["num_hidden_layers"]):
        layer(streams, shape, rotate)
    logprobs = {way: torch.log_softmax(OPERATIONS[way][0](norm(x)) @ head.T, -1) for way, x in streams.items()}
    sampled = torch.multinomial(logprobs["exact"].exp(), 1)
    exact, rounded, compiled, halves = (logprobs[way].gather(1, sampled) for way in WAYS)
    scale = streams["exact"].pow(2).mean().sqrt()
    for what, a, b in ((f"{WAYS[1]}, exact", rounded, exact), (f"{WAYS[2]}, exact", compiled, exact),
                       ("the two", rounded, compiled), ("products whole and in halves", compiled, halves)):  # fmt: skip
        row(f"{name}, {what}", float((a - b).abs().mean()), unit="nats", note=f"residual stream {scale:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", choices=MODELS, default=["0.6b", "1.7b"])
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    with torch.no_grad():
        for name in args.model:
            measure(name, args.tokens)


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
