"""The microbatches of an optimizer step on weights that FSDP shards.

By itself FSDP gathers a layer's weights in each pass of each microbatch, and sums its gradients over the ranks after
each. The weights are the same in all of them, and adding up microbatches before ranks gives the same total: here both
are done once a step, for the memory of the whole weights in the compute dtype and of the whole gradients in float32
(``sizing.microbatch.WholeBytes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def accumulation(
    model: nn.Module, *, gathers_once: bool, sums_once: bool, is_sharded: bool
) -> Iterator[Callable[[bool], None]]:
    """The body runs an optimizer step's forward and backward passes. It calls what this gives before each microbatch,
    and says whether that is the last one: after its backward pass the gradients are those of the step, and the
    weights sharded again.

    After an error in the body nothing is left of the step but gradients that are summed already.

    Args:
        model: under FSDP; any other is left alone.
        gathers_once: False leaves all of it to FSDP.
        sums_once: False leaves gradients to it.
        is_sharded: the weights are, and not only replicated.
    """
    if not gathers_once or not isinstance(model, FSDPModule):
        yield lambda is_last: None
        return

    def begin(is_last: bool) -> None:
        model.set_requires_gradient_sync(is_last or not sums_once)
        model.set_reshard_after_backward(is_last)

    groups = [group for module in model.modules() if isinstance(module, FSDPModule) for group in _groups_of(module)]
    before = [group.post_forward_mesh_info for group in groups]
    try:
        if is_sharded:
            model.set_reshard_after_forward(False)
        yield begin
    except Exception:
        for group in groups:
            _forget_gradients(group)
        forget_passes(model)
        raise
    finally:
        begin(True)
        for group, info in zip(groups, before, strict=True):  # passes without gradients gather as they did
            group.post_forward_mesh_info = info


def forget_passes(model: nn.Module) -> None:
    """Give up what FSDP has gathered for the passes before: the next one gathers anew, after all that the device has
    been given to do until then. Nothing for a model that it does not shard, or that has not run yet."""
    if isinstance(model, FSDPModule) and model._get_fsdp_state()._is_root is not None:
        model.reset_iter_state()


def _groups_of(module: FSDPModule) -> list[Any]:
    """FSDP's own records of the weights that the module's forward pass gathers together."""
    return list(module._get_fsdp_state()._fsdp_param_groups)


def _forget_gradients(group: Any) -> None:
    """Those that wait for their sum over ranks. ``reset_iter_state`` of torch 2.13 is to do it, and does not."""
    for parameter in group.fsdp_params:
        parameter.unsharded_accumulated_grad = None
        if hasattr(parameter, "_unsharded_param"):  # it has been gathered before
            parameter._unsharded_param.grad = None
