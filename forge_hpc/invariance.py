"""What generators and trainers prepare for ``model.batch_invariant``, before their first matrix product."""

from __future__ import annotations

import os
import socket

import torch

from forge_hpc.cluster.given_gpus import INVARIANT, not_invariant


def prepare_invariance(role: str) -> None:
    """Have products of this process add up alike for any number of rows: none splits its sums over several blocks, as
    cuBLAS has it do where there are few rows. Its workspace is what that takes; these sizes (KiB) are too small for it.

    Raises:
        UserError: the GPU is not one whose kernels are known to do so, or there is none.
    """
    if not torch.cuda.is_available():
        has = "computes on the CPU"
    elif (capability := torch.cuda.get_device_capability())[0] != INVARIANT:
        has = f"has a {torch.cuda.get_device_name()}, of compute capability {'.'.join(map(str, capability))}"
    else:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
        os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"
        matmul = torch.backends.cuda.matmul
        matmul.allow_bf16_reduced_precision_reduction = (False, False)  # type: ignore[assignment]  # nor splits
        torch.backends.cuda.preferred_blas_library("cublaslt")
        return
    raise not_invariant(f"{role} on {socket.gethostname()}", has)
