"""The host memory that saves are staged in."""

from __future__ import annotations

from pathlib import Path

import torch

from forge_hpc.training.staging import Staging

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


def test_a_save_is_staged_in_huge_pages_where_the_kernel_has_them_and_in_the_same_ones_again() -> None:
    state = {"model": {"large": torch.arange(16 << 20), "small": torch.ones(3)}, "step": 7}
    staging = Staging()
    copies = staging.copy(state)
    large = copies["model"]["large"]
    assert torch.equal(large, state["model"]["large"]) and torch.equal(copies["model"]["small"], torch.ones(3))
    assert copies["step"] == 7
    if ENABLED.exists():
        assert "hg" in flags_of(large.data_ptr() + large.nbytes // 2)
    state["model"]["large"].zero_()
    again = staging.copy(state)
    assert again["model"]["large"].data_ptr() == large.data_ptr() and not large.any()
