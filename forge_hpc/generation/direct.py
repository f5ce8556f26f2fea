"""New weights for a vLLM worker on a GPU, read by the worker itself out of the trainers' memory.

Every tensor-parallel worker opens the offer and keeps its shard of each tensor. Into a model whose layers compute on
the parameters as they were loaded (dense, not quantized) they are copied in place, far faster than by vLLM's reload;
CUDA graphs read the same addresses. Other models go through the reload, which processes them again.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from forge_hpc.generation.checkpoint import EMBEDDING, TIED_HEAD
from forge_hpc.generation.replay import Recorder, Replay
from forge_hpc.weights.checksum import checksum, compare
from forge_hpc.weights.memory import Unreachable
from forge_hpc.weights.offers import Offer
from forge_hpc.weights.snapshots import opened

_replays: weakref.WeakKeyDictionary[nn.Module, Replay] = weakref.WeakKeyDictionary()
_IN_PLACE = {"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"}


def try_to_open(worker: Any, offer: Offer) -> str | None:
    """Why the weights cannot be read from this worker; None where they can."""
    del worker
    try:
        with opened(offer):
            return None
    except Unreachable as error:
        return str(error)


def load_offer(worker: Any, offer: Offer, dtype: torch.dtype, tied_head: bool) -> None:
    """Load the weights into the worker's model; all of them have been read when this returns. Where they come with a
    checksum it is verified, of what was read and, in an engine of one worker, of what the model holds.

    Raises:
        Unreachable: nothing has been loaded.
        CorruptWeightsError: what was read, or what the model holds now, is not what the trainers sent.
    """
    model = worker.model_runner.get_model()
    with opened(offer) as weights:
        sent = weights.verify()
        replay = _replays.get(model)
        in_place = _loads_in_place(model) if replay is None else True
        names = [name for name in offer.shapes if not (tied_head and name == TIED_HEAD)]
        tensors = ((name, weights.tensor(name).to(dtype)) for name in names)
        if replay is not None and replay.fits(model, offer.places.layout):
            with torch.no_grad():
                replay.load(weights, dtype)
        elif in_place:
            with torch.no_grad(), Recorder(model) as recorder:
                model.load_weights(recorder.tensors(tensors))
            if (copies := recorder.copies()) is not None and weights.dtypes == {dtype}:
                _replays[model] = Replay(model, copies, recorder.padding, offer.places.layout)
        else:
            head = ((TIED_HEAD, weights.tensor(EMBEDDING).to(dtype)) for _ in range(tied_head))
            worker.reload_weights(weights_iterator=itertools.chain(tensors, head))
        if in_place and tied_head:
            _tie(model)
        torch.cuda.current_stream().synchronize()
    if in_place and sent is not None and worker.parallel_config.tensor_parallel_size == 1:
        named = model.named_parameters()
        held = [parameter for name, parameter in named if not (tied_head and name == TIED_HEAD)]
        if all(parameter.dtype == dtype for parameter in held):
            compare(checksum(held), sent, offer.version)


def _loads_in_place(model: nn.Module) -> bool:
    """Whether vLLM derives nothing from the parameters once they are loaded."""
    methods = {type(method).__name__ for module in model.modules() if (method := getattr(module, "quant_method", None))}
    kinds = {type(module).__name__ for module in model.modules()}
    return methods <= _IN_PLACE and not any("MLA" in kind or "MoE" in kind or "Mamba" in kind for kind in kinds)


def _tie(model: nn.Module) -> None:
    """vLLM's reload makes the tied head a parameter of its own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    head, embedding = parameters.get(TIED_HEAD), parameters.get(EMBEDDING)
    if head is not None and embedding is not None and head.data_ptr() != embedding.data_ptr():
        head.data.copy_(embedding.data)
