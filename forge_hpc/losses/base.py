"""What every loss is: a callable, its result, and the ratio of two policies.

A loss is called with keyword arguments, those of these that it has parameters for, and returns a LossOutput. Tensors
are per token, [B, T], padded or packed:

- logprobs: of the policy that is trained, with gradient; old_logprobs: of the policy that the ratio is taken against;
- advantages: of the token, or of its sequence; for padded rows [B] or [B, 1] will do;
- mask: True, or any number but 0, where a token is trained; what the others hold never matters;
- weights: the factor of each token's term, from the documents' column of that name; None, and 1, where they have none;
- generator_logprobs, ref_logprobs: as the generator sampled it, and of the reference model; None where not given;
- entropy: of the policy's distribution, with gradient;
- segment_ids: the token's sequence within its row (see ``reduction.Sequences``); None: one sequence a row;
- group_ids: the token's group (``Document.group``) within its row, a sequence without one being its own;
- normalizer: what sums are divided by, counted over all microbatches and ranks of the step, so that losses and metrics
  add up to the step's. By default counted here.

In place of logprobs, old_logprobs and entropy the loss of a value head gets ``values``, with gradient.

Every other argument that it cannot do without is a column of the documents (``Document.columns``): ``returns``, say.
A class may list them in an attribute ``columns``. Two more attributes tell the engine what to hand over; a loss may
leave them out:

- normalization: ``token`` (the default) has the step's trained tokens as normalizer, ``sequence`` and ``constant`` its
  sequences with a trained token, ``group`` its groups with one;
- old_logprobs_from: ``generator`` (the default) or ``trainer``, whose log-probabilities ``old_logprobs`` are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from forge_hpc.config.columns import ARGUMENTS, OUTPUTS

MAX_LOG_RATIO = 20.0


@dataclass
class LossOutput:
    """A microbatch's share of the step's loss and metrics."""

    loss: torch.Tensor
    """Scalar with gradient."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """Scalars without gradient, the same names in each call. They are added up over microbatches and ranks, so they are
    sums over trained tokens divided by the normalizer: means of the step."""


def log_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """log(pi / pi_old), kept within +-20 so that its exponential stays finite."""
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def columns_of(loss_fn: Callable[..., Any], head: str = "lm") -> tuple[str, ...]:
    """The columns of documents that a loss takes: those of its attribute ``columns``, else every parameter that has no
    default and is none of ``ARGUMENTS`` and the ``OUTPUTS`` of the head."""
    if (columns := getattr(loss_fn, "columns", None)) is not None:
        return tuple(columns)
    parameters = inspect.signature(loss_fn).parameters.values()
    open_ones = (p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return tuple(name for name in open_ones if name not in (*ARGUMENTS, *OUTPUTS[head]))


def accepted(loss_fn: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a loss can be called with."""
    parameters = inspect.signature(loss_fn).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}
