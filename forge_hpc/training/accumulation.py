"""The microbatches of an optimizer step on weights that FSDP shards.

By itself FSDP gathers a layer's weights in each pass of each microbatch, and sums its gradients over the ranks after
each. The weights are the same in all of them, and so is the sum of sums: here both are done once a step, for the memory
of the whole weights in the compute dtype and of the whole gradients in float32 (``sizing.microbatch.whole_bytes``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def accumulation(model: nn.Module, *, gathers_once: bool, is_sharded: bool) -> Iterator[Callable[[bool], None]]:
    """The body runs an optimizer step's forward and backward passes. It calls what this gives before each microbatch,
    and says whether that is the last one: after its backward pass the gradients are those of the step, and the
    weights sharded again.

    After an error in the body nothing is left of the step but gradients that are summed already.

    Args:
        model: under FSDP; any other is left alone.
        gathers_once: False leaves it to FSDP.
        is_sharded: the weights are, and not only replicated.
    """
    if not gathers_once or not isinstance(model, FSDPModule):
        yield lambda is_last: None
        return

    def begin(is_last: bool) -> None:
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)

    if is_sharded:
        model.set_reshard_after_forward(False)
    try:
        yield begin
    except BaseException:
        model.reset_iter_state()
        _forget_gradients(model)
        raise
    finally:
        begin(True)
        if is_sharded:  # a forward pass without a backward pass would leave weights that the next step makes stale
            model.set_reshard_after_forward(True)


def _forget_gradients(model: nn.Module) -> None:
    """Those that wait for their sum over ranks. ``reset_iter_state`` of torch 2.13 is to do it, and does not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in module._get_fsdp_state()._fsdp_param_groups:
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if hasattr(parameter, "_unsharded_param"):  # it has been gathered before
                        parameter._unsharded_param.grad = None
