"""Log-probabilities and entropies of tokens, from logits that may be split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_CHUNK_ELEMENTS = 2**25  # float32 logits at a time (128 MiB), whatever the vocabulary


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


def token_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, truncation: Truncation = NOTHING_CUT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each label, and entropy of its distribution, at a temperature.

    With z = logits / temperature and p = softmax(z): log p_label = z_label - logsumexp(z), H = logsumexp(z) - sum p z.
    Computed in float32 a chunk of tokens at a time, forward and backward, so that no float32 copy of all logits ever
    exists; with a vocabulary split over ranks, only three numbers a token travel.

    With a truncation the sums are over the tokens that it leaves, and the label: a sampled token was one of those of
    the generator, and may have left them since. A vocabulary that is split is then put together first.

    Args:
        logits: [R, T, V], a tensor or a DTensor sharded over the vocabulary on a one-dimensional mesh.
        labels: [R, T] int64.

    Returns:
        (logprobs, entropies): [R, T] float32 each, differentiable, the same on all tensor-parallel ranks.
    """
    group, offset = None, 0
    if isinstance(logits, DTensor):
        mesh = logits.device_mesh
        if logits.placements == (Shard(2),) and truncation == NOTHING_CUT:
            _, offsets = compute_local_shape_and_global_offset(logits.shape, mesh, logits.placements)
            group, offset = mesh.get_group(), offsets[2]
            logits = logits.to_local()
        else:
            logits = logits.full_tensor()
    logprobs, entropies = _TokenLogprobs.apply(
        logits.flatten(0, 1), labels.flatten(), temperature, truncation, group, offset
    )
    return logprobs.view_as(labels), entropies.view_as(labels)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        truncation: Truncation,
        group: dist.ProcessGroup | None,
        offset: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens, vocab_size = logits.shape
        local_labels = labels - offset
        is_local = (local_labels >= 0) & (local_labels < vocab_size)
        local_labels = torch.where(is_local, local_labels, 0)
        largest, total, label_logit, weighted = (logits.new_empty(num_tokens, dtype=torch.float32) for _ in range(4))
        for chunk in _chunks(num_tokens, vocab_size):
            largest[chunk] = logits[chunk].amax(-1).float() / temperature
        if group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group)
        threshold = None if truncation == NOTHING_CUT else torch.empty_like(largest)
        for chunk in _chunks(num_tokens, vocab_size):
            z = logits[chunk].float() / temperature
            if threshold is not None:
                threshold[chunk] = truncation.threshold(z).squeeze(1)
                is_cut = _is_cut(z, threshold[chunk], local_labels[chunk])
            z -= largest[chunk, None]
            label_logit[chunk] = z.gather(1, local_labels[chunk, None]).squeeze(1)
            weights = z.exp()
            if threshold is not None:
                weights.masked_fill_(is_cut, 0)
            total[chunk] = weights.sum(-1)
            weighted[chunk] = weights.mul_(z).sum(-1)
        label_logit *= is_local
        if group is not None:
            sums = torch.stack([total, label_logit, weighted])
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
            total, label_logit, weighted = sums.unbind()
        log_total = total.log()
        mean_logit = weighted / total
        ctx.save_for_backward(logits, local_labels, is_local, largest + log_total, mean_logit + largest, threshold)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return label_logit - log_total, log_total - mean_logit

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        """d log p_label / dz = onehot(label) - p and dH / dz = -p (z - sum p z), each over the temperature."""
        grad_logprobs, grad_entropies = grads
        logits, labels, is_local, log_total, mean_logit, threshold = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for chunk in _chunks(*logits.shape):
            z = logits[chunk].float() / ctx.temperature
            p = (z - log_total[chunk, None]).exp_()
            if threshold is not None:
                p.masked_fill_(_is_cut(z, threshold[chunk], labels[chunk]), 0)
            grad = torch.zeros_like(p)
            if grad_entropies is not None:
                grad -= p * (z - mean_logit[chunk, None]) * grad_entropies[chunk, None]
            if grad_logprobs is not None:
                grad -= p * grad_logprobs[chunk, None]
                grad.scatter_add_(1, labels[chunk, None], (grad_logprobs[chunk] * is_local[chunk])[:, None])
            grad_logits[chunk] = grad / ctx.temperature
        return grad_logits, None, None, None, None, None


def _is_cut(z: torch.Tensor, threshold: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N, V]: what is not sampled from."""
    return (z < threshold[:, None]).scatter_(1, labels[:, None], False)


def _chunks(num_tokens: int, vocab_size: int) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]
