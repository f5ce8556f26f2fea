"""The host memory that saves are staged in."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from forge_hpc.training.staging import Staging, _allocate

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def flags_of(address: int) -> list[str]:
    """What the kernel knows of the mapping in which an address is; ``hg``: huge pages are asked for."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(number, 16) for number in first.split("-"))
            is_inside = begin <= address < end
        elif is_inside and first == "VmFlags:":
            return rest
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.fixture
def state(process_group: None) -> dict[str, object]:
    shards = distribute_tensor(torch.arange(16 << 20), init_device_mesh("cpu", (1,)), [Shard(0)])
    return {"model": {"sharded": shards, "whole": torch.ones(16 << 20)}, "groups": [{"lr": 0.5, "betas": (0.9, 0.95)}]}


@pytest.mark.parametrize("is_reserved", [False, True])
def test_a_save_is_staged_in_huge_pages_where_the_kernel_has_them_and_in_the_same_ones_again(
    state: dict, is_reserved: bool
) -> None:
    staging = Staging()
    if is_reserved:
        staging.reserve(state)
    copies = staging.copy(state)
    sharded, whole = copies["model"]["sharded"], copies["model"]["whole"]
    assert isinstance(sharded, DTensor) and sharded._spec == state["model"]["sharded"]._spec
    assert torch.equal(sharded.to_local(), torch.arange(16 << 20)) and torch.equal(whole, torch.ones(16 << 20))
    assert copies["groups"] == state["groups"]
    if ENABLED.exists():
        for tensor in (sharded.to_local(), whole):
            assert "hg" in flags_of(tensor.data_ptr() + tensor.nbytes // 2)
    state["model"]["whole"].zero_()
    again = staging.copy(state)
    assert again["model"]["whole"].data_ptr() == whole.data_ptr() and not whole.any()


def test_no_byte_is_copied_or_touched_for_the_buffers_alone(state: dict) -> None:
    before = psutil.Process().memory_info().rss
    buffers = _allocate(state)
    assert psutil.Process().memory_info().rss - before < 16 << 20
    assert buffers["model"]["sharded"].to_local().nbytes == 128 << 20
