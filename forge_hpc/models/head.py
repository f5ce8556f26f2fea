"""The output layer, and the log-probabilities of tokens under it without the logits of all of them.

Between the hidden states [N, D] and one log-probability a token stand logits [N, V], with a vocabulary of 152 k by far
the largest tensor of a step. They are made a chunk of tokens at a time, in both passes; what is kept from one to the
other are three numbers a token, and the logits themselves only where they are small. Untrained tokens, prompts for
the most part, have none at all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torchtitan.distributed import ParallelDims
from torchtitan.models.common import Linear

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**29}
"""Logits of a chunk, by device."""
KEPT_BYTES = 2**30
"""Logits of a microbatch up to this size are kept for the backward pass, larger ones are computed again."""


class Truncation(NamedTuple):
    """Which tokens of a distribution are sampled from, as ``rollout.sampling`` has it: what min_p leaves, of that the
    top_k most likely, of those the fewest that have the probability top_p together."""

    min_p: float = 0.0
    top_k: int = -1
    top_p: float = 1.0

    def threshold(self, z: torch.Tensor) -> torch.Tensor:
        """The smallest logit that is sampled from, of each token: [N, 1] for z [N, V]."""
        least = z.amax(-1, keepdim=True) + (math.log(self.min_p) if self.min_p > 0 else -math.inf)
        ordered = z[:, :0]
        if 0 < self.top_k < z.shape[1]:
            ordered = z.topk(self.top_k).values
            least = torch.maximum(least, ordered[:, -1:])
        elif self.top_p < 1:
            ordered = z.sort(descending=True).values
        if self.top_p < 1:
            p = torch.where(ordered >= least, ordered, -math.inf).softmax(-1)
            num_kept = (p.cumsum(-1) - p < self.top_p).sum(-1, keepdim=True)
            least = torch.maximum(least, ordered.gather(1, num_kept - 1))
        return least


NOTHING_CUT = Truncation()


class LogprobHead(Linear):
    """A linear layer without bias whose forward pass gives logits or, with ``labels``, log-probabilities of them."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass

    logits_dtype: torch.dtype | None = None
    """Of the logits that log-probabilities are made of; None: that of the hidden states. float32 above bfloat16 on a
    GPU keeps the sums as the matrix product has them, instead of rounding them to 8 bits."""

    as_vllm: bool = False
    """Whether log-probabilities come from the kernels of vLLM's sampler, so that they equal its own to the last bit: of
    a distribution of which nothing is cut."""

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Split the weight by vocabulary. The forward pass does the rest: its results are not those of a Linear."""
        self._parallelized = True
        if self._sharding_config is not None:
            self._distribute_states(parallel_dims)

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        temperature: float = 1.0,
        truncation: Truncation = NOTHING_CUT,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of hidden states; with labels their log-probabilities and the entropies of their distributions.

        With z = logits / temperature and p = softmax(z): log p_label = z_label - logsumexp(z) and
        H = logsumexp(z) - sum p z, in float32. With a vocabulary split over ranks, four numbers a token travel.

        With a truncation the sums are over the tokens that it leaves, and the label: a sampled token was among those of
        the generator, and may have left them since. A vocabulary that is split is then put together first.

        Args:
            hidden: [R, T, D]; under tensor parallelism a replicated DTensor.
            labels: [N] int64.
            slots: [N] int64, which of the R * T hidden states the labels belong to; needed with labels.

        Returns:
            (logprobs, entropies): [N] float32 each, differentiable, the same on all tensor-parallel ranks.
        """
        weight = self.weight
        if labels is None:
            return F.linear(hidden, weight)
        group, offset = None, 0
        if isinstance(weight, DTensor) and truncation != NOTHING_CUT:
            weight = weight.full_tensor()
            hidden = hidden.full_tensor() if isinstance(hidden, DTensor) else hidden
        elif isinstance(weight, DTensor):
            shape, mesh, placements = weight.shape, weight.device_mesh, weight.placements
            group, offset = mesh.get_group(), compute_local_shape_and_global_offset(shape, mesh, placements)[1][0]
            weight = weight.to_local()
        if isinstance(hidden, DTensor):
            hidden = hidden.to_local(grad_placements=[Partial()])
        assert slots is not None
        hidden = hidden.flatten(0, 1).index_select(0, slots)
        options = temperature, truncation, group, offset, self.logits_dtype, self.as_vllm
        return _HeadLogprobs.apply(hidden, weight, labels, *options)


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        truncation: Truncation,
        group: dist.ProcessGroup | None,
        offset: int,
        logits_dtype: torch.dtype | None,
        as_vllm: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        vocab_size = weight.shape[0]
        logits_dtype = logits_dtype or hidden.dtype
        labels = labels - offset
        is_local = (labels >= 0) & (labels < vocab_size)
        labels = torch.where(is_local, labels, 0)
        kept: list[torch.Tensor] | None = None
        if any(ctx.needs_input_grad) and hidden.shape[0] * vocab_size * logits_dtype.itemsize <= KEPT_BYTES:
            kept = []
        stats, parts, thresholds, logprobs = _on(hidden.device, _stats), [], [], []
        for chunk in _chunks(hidden, vocab_size, logits_dtype):
            logits = _logits(hidden[chunk], weight, logits_dtype)
            if truncation != NOTHING_CUT:
                thresholds.append(truncation.threshold(logits.float() / temperature).squeeze(1))
            parts.append(stats(logits, labels[chunk], temperature, thresholds[-1] if thresholds else None))
            if as_vllm:
                logprobs.append(_vllm_logprobs(logits, labels[chunk], temperature))
            if kept is not None:
                kept.append(logits)
            del logits  # or two chunks of them are held at a time
        largest, total, label_logit, weighted = (torch.cat(columns) for columns in zip(*parts, strict=True))
        if group is not None:
            largest, total, label_logit, weighted = _over_ranks(group, largest, total, label_logit, weighted, is_local)
        log_total, mean_logit = total.log(), weighted / total
        threshold = torch.cat(thresholds) if thresholds else None
        from_zero = (log_total + largest, mean_logit + largest)
        ctx.save_for_backward(hidden, weight, labels, is_local, *from_zero, threshold, *(kept or ()))
        ctx.temperature, ctx.logits_dtype = temperature, logits_dtype
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs) if as_vllm else label_logit - log_total, log_total - mean_logit

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """d log p_label / dz = onehot(label) - p and dH / dz = -p (z - sum p z), each over the temperature."""
        hidden, weight, labels, is_local, log_total, mean_logit, threshold, *kept = ctx.saved_tensors
        grad_logprobs, grad_entropies = grads
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_total)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight: torch.Tensor | None = None
        tokens = (labels, is_local, log_total, grad_logprobs, mean_logit, grad_entropies, threshold)
        logits_grad = _on(hidden.device, _logits_grad)
        for number, chunk in enumerate(_chunks(hidden, weight.shape[0], ctx.logits_dtype)):
            logits = kept[number] if kept else _logits(hidden[chunk], weight, ctx.logits_dtype)
            # In their place, where it fits.
            grad = logits if logits.dtype == weight.dtype else torch.empty_like(logits, dtype=weight.dtype)
            logits_grad(grad, logits, ctx.temperature, *(None if x is None else x[chunk] for x in tokens))
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[chunk])
            if ctx.needs_input_grad[1]:
                grad_weight = _add_weight_grad(grad_weight, grad, hidden[chunk])
            del logits, grad
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *(None,) * 7


def _stats(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float, threshold: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Of each token, with m = max z: m, sum e^(z - m), z_label - m, sum (z - m) e^(z - m)."""
    z = logits.float() / temperature
    largest = z.amax(-1, keepdim=True)
    weights = (z - largest).exp()
    if threshold is not None:
        weights = weights.masked_fill(_is_cut(z, labels, threshold), 0)
    z = z - largest
    label_logit = z.gather(1, labels[:, None])
    return largest.squeeze(1), weights.sum(-1), label_logit.squeeze(1), (weights * z).sum(-1)


def _vllm_logprobs(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """[N] float32, by vLLM's own kernels: of the temperature, and of the log-probabilities of what it leaves."""
    from vllm.v1.worker.gpu.sample.gumbel import apply_temperature
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    z = logits.float()
    if temperature != 1:
        z = z.clone()  # it writes in their place, and the backward pass reads them
        request = torch.zeros(len(z), dtype=torch.int32, device=z.device)
        apply_temperature(z, request, torch.full((1,), temperature, device=z.device))
    return compute_token_logprobs(z, labels[:, None]).squeeze(1)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == hidden.dtype:
        return hidden @ weight.t()
    if hidden.device.type == "cuda":
        return torch.mm(hidden, weight.t(), out_dtype=dtype)
    return hidden.to(dtype) @ weight.t().to(dtype)


def _logits_grad(
    grad_logits: torch.Tensor,
    logits: torch.Tensor,
    temperature: float,
    labels: torch.Tensor,
    is_local: torch.Tensor,
    log_total: torch.Tensor,
    grad_logprobs: torch.Tensor,
    mean_logit: torch.Tensor,
    grad_entropies: torch.Tensor | None,
    threshold: torch.Tensor | None,
) -> None:
    """Write the gradient of the logits, which may be in their place."""
    z = logits.float() / temperature
    p = (z - log_total[:, None]).exp()
    if threshold is not None:
        p = p.masked_fill(_is_cut(z, labels, threshold), 0)
    grad = -p * grad_logprobs[:, None]
    if grad_entropies is not None:
        grad = -p * (z - mean_logit[:, None]) * grad_entropies[:, None] + grad
    hit = _is_label(z, labels) & is_local[:, None]
    grad_logits.copy_((grad + torch.where(hit, grad_logprobs[:, None], 0)) / temperature)


def _is_label(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.arange(z.shape[1], device=z.device) == labels[:, None]


def _is_cut(z: torch.Tensor, labels: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """[N, V]: what is not sampled from."""
    return (z < threshold[:, None]) & ~_is_label(z, labels)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU compiled: one kernel that reads the logits once or twice, instead of a dozen that write copies."""
    return _compiled(function) if device.type == "cuda" else function


def _add_weight_grad(total: torch.Tensor | None, grad: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """total + grad^T hidden, [V, D], in float32, which a sum over chunks needs."""
    if grad.device.type == "cuda" and grad.dtype != torch.float32:
        if total is None:
            return torch.mm(grad.t(), hidden, out_dtype=torch.float32)
        return torch.addmm(total, grad.t(), hidden, out_dtype=torch.float32, out=total)
    product = (hidden.t().float() @ grad.float()).t()
    return product if total is None else total.add_(product)


def _over_ranks(
    group: dist.ProcessGroup,
    largest: torch.Tensor,
    total: torch.Tensor,
    label_logit: torch.Tensor,
    weighted: torch.Tensor,
    is_local: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``_stats`` over the whole vocabulary from those of each rank's part, one of which has the label."""
    overall = largest.clone()
    dist.all_reduce(overall, dist.ReduceOp.MAX, group)
    shift = largest - overall
    scale = shift.exp()
    sums = torch.stack([total * scale, (label_logit + shift) * is_local, (weighted + shift * total) * scale])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total, label_logit, weighted = sums.unbind()
    return overall, total, label_logit, weighted


def _chunks(hidden: torch.Tensor, vocab_size: int, logits_dtype: torch.dtype) -> Iterator[slice]:
    size = max(1, CHUNK_BYTES[hidden.device.type] // (vocab_size * logits_dtype.itemsize))
    return (slice(start, start + size) for start in range(0, hidden.shape[0], size))
