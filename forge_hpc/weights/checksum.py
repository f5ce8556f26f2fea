"""A checksum of weights that both sides of a transfer can compute, whatever each has made of the tensors.

It is a sum over elements, so it does not matter how they are cut into shards, nor that an engine keeps query, key and
value in one tensor. Values that changed places within what is summed are not seen; the comparison of log-probabilities
sees them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_MODULUS = 1 << 64


class CorruptWeightsError(RuntimeError):
    """What has arrived is not what was sent."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """Sums of the elements' bits, read as whole numbers, and of their squares, modulo 2^64."""

    total: int = 0
    squares: int = 0

    def __add__(self, other: Checksum) -> Checksum:
        return Checksum((self.total + other.total) % _MODULUS, (self.squares + other.squares) % _MODULUS)

    def __str__(self) -> str:
        return f"{self.total:016x}{self.squares:016x}"


def checksum(tensors: Iterable[torch.Tensor]) -> Checksum:
    """Of all elements of tensors of one device; zeros count nothing. Needs 64 MiB beside a contiguous tensor."""
    sums: list[torch.Tensor] = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_WHOLE_NUMBERS[tensor.dtype.itemsize])
        for chunk in bits.split(_CHUNK):
            wide = chunk.to(torch.int64)
            sums.append(torch.stack([wide.sum(), wide.square().sum()]))
    if not sums:
        return Checksum()
    total, squares = torch.stack(sums).sum(0).tolist()
    return Checksum(total % _MODULUS, squares % _MODULUS)


def compare(found: Checksum, sent: Checksum | None, version: int) -> None:
    """Raises CorruptWeightsError where two checksums differ; None is not compared."""
    if sent is not None and found != sent:
        raise CorruptWeightsError(
            f"the weights of version {version} have the checksum {found}, and the trainers sent {sent}: generators "
            "would sample from another model"
        )
