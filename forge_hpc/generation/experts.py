"""Mixtures of experts in vLLM: their weights on the CPU, and which experts computed each token.

On CUDA vLLM returns the routes itself (``enable_return_routed_experts``). That takes Triton, which the CPU does not
have; there an engine that runs in this process is watched. All of this runs in vLLM's workers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch


def set_up_experts_anew(worker: Any) -> None:
    """Have every load of weights lay out the experts as the CPU's kernel reads them.

    vLLM 0.32.0 does so at the first load alone: after ``reload_weights`` the experts lie as they came, the kernel takes
    them for laid out, and nothing says that log-probabilities are off by nats. It can go when a test without it passes.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def set_up(method: UnquantizedFusedMoEMethod, *args: Any, **options: Any) -> None:
        method.moe_kernel = None
        UnquantizedFusedMoEMethod._setup_kernel(method, *args, **options)

    for module in worker.model_runner.get_model().modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            cast(Any, method)._setup_kernel = partial(set_up, method)


class RouteRecorder:
    """Which experts computed each token of the requests under way, in the runner of an engine without prefix cache."""

    def __init__(self, worker: Any) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._runner = worker.model_runner
        self._of_step: dict[int, torch.Tensor] = {}
        self._routes: dict[str, list[np.ndarray]] = {}
        for module in self._runner.get_model().modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(partial(self._of_step.__setitem__, module.layer_id))
        self._execute = self._runner.execute_model
        self._runner.execute_model = self._recorded

    def _recorded(self, scheduled: Any, *args: Any, **options: Any) -> Any:
        result = self._execute(scheduled, *args, **options)
        if scheduled.total_num_scheduled_tokens:
            rows = torch.stack([self._of_step[layer] for layer in sorted(self._of_step)], 1).to(torch.int16).numpy()
            first = 0
            for internal_id in self._runner.input_batch.req_ids:
                num = scheduled.num_scheduled_tokens[internal_id]
                have = self._routes.setdefault(internal_id.partition("-")[0], [])
                # After a preemption tokens are computed again: what sampled the next one counts.
                again = sum(map(len, have)) - self._runner.requests[internal_id].num_computed_tokens
                have.append(rows[first + again : first + num].copy())  # not a view, which keeps the rows of all
                first += num
        return result

    def take(self, request_id: str, num_routed: int) -> np.ndarray:
        """Routes of a request that has ended: int16 [tokens, layers, experts a token], of all its tokens but the first
        ``num_routed``, whose routes are known, and the last one, which was sampled and never computed."""
        return np.concatenate(self._routes.pop(request_id))[num_routed:]

    def drop(self, request_id: str) -> None:
        """Forget a request that was aborted."""
        self._routes.pop(request_id, None)


def record_routes(worker: Any) -> RouteRecorder:
    """A recorder in the worker of an engine that runs in this process."""
    return RouteRecorder(worker)
