"""The one place that decides between the CPU with gloo and CUDA with NCCL.

Everything else asks here. torchtitan reads the device once, when it is first imported, so ``forge_hpc.models`` calls
``prepare_torchtitan`` before any module of ours imports torchtitan.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys

import numpy as np
import torch

from forge_hpc.cluster.given_gpus import CPU_BUILD, is_cpu_build, unusable
from forge_hpc.cluster.worker import visible_gpus


def device_type() -> str:
    """``cuda`` where a CUDA device is visible, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_gpus(role: str) -> None:
    """See that a process has what it is to compute on: every actor that may be given GPUs asks as it starts.

    Raises:
        UnusableGpus: it is given GPUs, and torch can use none. It would go on on the CPU.
    """
    if (gpus := visible_gpus()) and not torch.cuda.is_available():
        raise unusable(f"{role} on {socket.gethostname()}", gpus, torch.__version__, _why_none())


def _why_none() -> str:
    """Why torch finds no GPU, in its own words where it has any (``is_available`` says no, and not why)."""
    if is_cpu_build(torch.version.cuda, torch.version.hip):
        return CPU_BUILD
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError of a driver that is too old, missing or broken; others of other builds
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[0]
    return "it finds no such GPU"


def dist_backend() -> str:
    """Backend for ``init_process_group``. CUDA jobs keep gloo for CPU tensors: checkpoints coordinate over it."""
    return "cpu:gloo,cuda:nccl" if device_type() == "cuda" else "gloo"


def local_device() -> torch.device:
    """This process's device: the CUDA device of its local rank (``LOCAL_RANK``), or the CPU."""
    if device_type() == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # A launcher may have masked the process down to a single device.
    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array there: on the CPU its own memory, on a GPU a copy, in order with the device's work.

    The host does not wait for it, as it would where memory is not page-locked: what the next microbatch needs comes
    after all the work of this one.
    """
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def prepare_torchtitan() -> None:
    """Make torchtitan 0.3.0 take the device of this module. Harmless when repeated.

    - Without an accelerator ``torchtitan.tools.utils.device_type`` falls back to "cuda"; it can go when torchtitan
      asks torch for the CPU instead.
    - On Hopper and newer, varlen attention insists on FlashAttention 3 or 4. Where their module is missing, vLLM's 3
      serves (``models.flash3``), and torch's own 2 where that is not to be had. It can go when torchtitan looks for the
      module itself.

    Raises RuntimeError if torchtitan was imported before with the wrong device.
    """
    if device_type() == "cpu":
        torch._utils._get_available_device_type = lambda: "cpu"
        utils = sys.modules.get("torchtitan.tools.utils")
        if utils is not None and utils.device_type != "cpu":
            raise RuntimeError(
                "torchtitan was imported before forge_hpc.models and took a CUDA device that is not there"
            )
    elif importlib.util.find_spec("flash_attn_interface") is None:
        import torchtitan.tools.utils

        from forge_hpc.models import flash3

        torchtitan.tools.utils.get_cuda_flash_attention_impl = lambda: flash3.NAME if flash3.serves() else None
