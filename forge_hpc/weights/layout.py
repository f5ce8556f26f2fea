"""How one rank's shards lie in flat buffers, and how full tensors come back from the buffers of all ranks.

A rank packs the shards that it owns one after the other into *buckets* of bytes, so that a model moves in a few large
messages instead of one or two a tensor. The :class:`Manifest` of a rank says what lies where; the :class:`Index` of a
version joins the manifests of all ranks and has verified that every tensor is covered exactly once.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from forge_hpc.expert_stacks import STACKED
from forge_hpc.weights.checksum import Checksum

_ALIGNMENT_BYTES = 64


class IncompleteVersionError(RuntimeError):
    """The published shards do not make up every tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor, and where its elements lie (contiguous, row-major) in a bucket."""

    name: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    """First index of the box in the full tensor, a dimension each."""
    shape: tuple[int, ...]
    bucket: int
    start_bytes: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The shard as a view of its bucket (uint8, one dimension)."""
        return bucket[self.start_bytes : self.start_bytes + self.num_bytes].view(self.dtype).view(self.shape)


def distinct(shards: Iterable[Shard]) -> list[Shard]:
    """The shards of one rank without the second names of tensors that have two."""
    return list({(shard.bucket, shard.start_bytes): shard for shard in shards}.values())


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one rank publishes of one version."""

    version: int
    rank: int
    shards: tuple[Shard, ...]
    bucket_bytes: tuple[int, ...]
    """Size of each bucket."""
    checksum: Checksum | None = None
    """Of all that the rank publishes, where it is to be verified."""

    def bucket_starts(self) -> list[int]:
        """Where each bucket begins when all lie one after the other, and at last where they end; bytes."""
        return [0, *itertools.accumulate(self.bucket_bytes)]


@dataclass(frozen=True)
class Index:
    """A whole version: for each tensor the shards that make it up, each with the rank that holds it."""

    version: int
    tensors: dict[str, tuple[tuple[int, Shard], ...]]
    checksums: dict[int, Checksum]
    """By rank, of those that have one and are read whole."""

    @functools.cached_property
    def num_bytes(self) -> int:
        """Of all that a reader takes."""
        return sum(shard.num_bytes for shards in self._by_rank.values() for shard in shards)

    def buckets(self) -> dict[tuple[int, int], int]:
        """(rank, bucket) of everything that a reader needs, in a steady order, with the bytes that it needs of it."""
        ends: dict[tuple[int, int], int] = {}
        for parts in self.tensors.values():
            for rank, shard in parts:
                key = (rank, shard.bucket)
                ends[key] = max(ends.get(key, 0), shard.start_bytes + shard.num_bytes)
        return dict(sorted(ends.items()))

    def shards_of(self, rank: int) -> list[Shard]:
        """What a reader takes from a rank, each place once."""
        return self._by_rank.get(rank, [])

    @functools.cached_property
    def _by_rank(self) -> dict[int, list[Shard]]:
        found: dict[int, list[Shard]] = {}
        for parts in self.tensors.values():
            for rank, shard in parts:
                found.setdefault(rank, []).append(shard)
        return {rank: distinct(shards) for rank, shards in found.items()}


def _box(tensor: torch.Tensor, name: str, rank: int) -> tuple[torch.Tensor, tuple[int, ...]] | None:
    """The local tensor and its offsets, or None where another rank publishes the same values."""
    if not isinstance(tensor, DTensor):
        return (tensor, (0,) * tensor.dim()) if rank == 0 else None
    mesh_coordinate = tensor.device_mesh.get_coordinate()
    if mesh_coordinate is None:
        return None
    for position, placement in zip(mesh_coordinate, tensor.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"{name} is a pending sum over ranks ({placement}); redistribute it before publishing")
        if placement.is_replicate() and position != 0:
            return None
    local = tensor.to_local()
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if tuple(local.shape) != tuple(shape):
        raise ValueError(f"{name}: the local shard has shape {tuple(local.shape)}, its placement says {tuple(shape)}")
    return (local, tuple(offsets)) if local.numel() else None


def _parts(
    tensor: torch.Tensor, name: str, rank: int
) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """Name, global shape, offsets and local tensor of what this rank publishes of a tensor: one, of a stack many."""
    box = _box(tensor, name, rank)
    if box is None:
        return
    local, offsets = box
    if STACKED not in name:
        yield name, tuple(tensor.shape), offsets, local
        return
    for index, part in enumerate(local, offsets[0]):
        yield name.format(index), tuple(tensor.shape[1:]), offsets[1:], part


def plan(
    state_dict: Mapping[str, torch.Tensor],
    *,
    version: int,
    rank: int,
    dtype: torch.dtype | None,
    max_bucket_bytes: int,
) -> tuple[Manifest, dict[Shard, torch.Tensor]]:
    """Lay out what this rank publishes.

    Of a replicated tensor the first rank of its mesh publishes the values, of a plain tensor rank 0. Empty shards of an
    uneven split are left out. A tensor larger than ``max_bucket_bytes`` has a bucket of its own. A tensor that has two
    names (a tied head) lies there once. A stack (a name with ``{}``, see ``expert_stacks``) is published as the tensors
    that it is made of.

    Returns:
        The manifest, and for each shard that is to be written the local tensor (on its device, in its own dtype).

    Raises:
        ValueError: a tensor is a pending sum (``Partial``), or its shard does not have the shape of its placement.
    """
    shards: list[Shard] = []
    sources: dict[Shard, torch.Tensor] = {}
    bucket_bytes: list[int] = []
    written: dict[int, Shard] = {}
    for name, tensor in state_dict.items():
        if (same := written.get(id(tensor))) is not None:
            shards.append(replace(same, name=name))
            continue
        for part_name, global_shape, offsets, local in _parts(tensor, name, rank):
            stored_dtype = dtype if dtype is not None and local.is_floating_point() else local.dtype
            num_bytes = -(-local.numel() * stored_dtype.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            if not bucket_bytes or bucket_bytes[-1] + num_bytes > max_bucket_bytes:
                bucket_bytes.append(0)
            shard = Shard(
                name=part_name,
                dtype=stored_dtype,
                global_shape=global_shape,
                offsets=offsets,
                shape=tuple(local.shape),
                bucket=len(bucket_bytes) - 1,
                start_bytes=bucket_bytes[-1],
            )
            shards.append(shard)
            sources[shard] = local.detach()
            written[id(tensor)] = shard
            bucket_bytes[-1] += num_bytes
    return Manifest(version, rank, tuple(shards), tuple(bucket_bytes)), sources


def build_index(manifests: list[Manifest]) -> Index:
    """Join the manifests of all ranks of one version.

    Of equal shards (a tensor replicated over ranks that do not share a mesh) the lowest rank's is kept.

    Raises:
        IncompleteVersionError: a tensor is not covered exactly once, or its shards disagree on shape or dtype.
    """
    version = manifests[0].version
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, Shard]]] = {}
    partly_read: set[int] = set()
    for manifest in sorted(manifests, key=lambda manifest: manifest.rank):
        if manifest.version != version:
            raise IncompleteVersionError(f"rank {manifest.rank} published version {manifest.version}, not {version}")
        for shard in manifest.shards:
            kept = boxes.setdefault(shard.name, {}).setdefault((shard.offsets, shard.shape), (manifest.rank, shard))
            if kept[0] != manifest.rank:
                partly_read.add(manifest.rank)
    tensors = {name: tuple(found.values()) for name, found in boxes.items()}
    for name, parts in tensors.items():
        _check_covered(name, [shard for _, shard in parts], version)
    checksums = {
        manifest.rank: manifest.checksum
        for manifest in manifests
        if manifest.checksum is not None and manifest.rank not in partly_read
    }
    return Index(version, tensors, checksums)


def _check_covered(name: str, shards: list[Shard], version: int) -> None:
    """Device meshes cut a tensor into a grid: every cell of the grid has to be there, with its shape."""
    if len({(shard.global_shape, shard.dtype) for shard in shards}) != 1:
        raise IncompleteVersionError(f"{name} of version {version}: ranks disagree on its shape or dtype")
    global_shape = shards[0].global_shape
    starts = [sorted({shard.offsets[dim] for shard in shards}) for dim in range(len(global_shape))]
    covered = len(shards) == math.prod(len(column) for column in starts) and all(column[0] == 0 for column in starts)
    ends = [
        dict(zip(column, [*column[1:], size], strict=True)) for column, size in zip(starts, global_shape, strict=True)
    ]
    covered = covered and all(
        offset + size == ends[dim][offset]
        for shard in shards
        for dim, (offset, size) in enumerate(zip(shard.offsets, shard.shape, strict=True))
    )
    if not covered:
        raise IncompleteVersionError(
            f"{name} of version {version}: {len(shards)} shards do not cover its shape {list(global_shape)} exactly"
        )


class Assembly:
    """Full tensors of one version, filled bucket by bucket.

    A tensor that lies in one shard becomes a view of its bucket; one that is cut gets memory of its own.
    """

    def __init__(self, index: Index) -> None:
        self._parts: dict[tuple[int, int], list[Shard]] = {}
        for parts in index.tensors.values():
            for rank, shard in parts:
                self._parts.setdefault((rank, shard.bucket), []).append(shard)
        self._names = list(index.tensors)
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, rank: int, bucket: int, data: torch.Tensor) -> None:
        """Take over the bytes of a bucket (uint8, one dimension)."""
        for shard in self._parts.pop((rank, bucket)):
            view = shard.view(data)
            if shard.shape == shard.global_shape:
                self._tensors[shard.name] = view
                continue
            if shard.name not in self._tensors:
                self._tensors[shard.name] = torch.empty(shard.global_shape, dtype=shard.dtype)
            box = tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.shape, strict=True))
            self._tensors[shard.name][box].copy_(view)

    def result(self) -> dict[str, torch.Tensor]:
        """The tensors by name, on the CPU, in the order in which the lowest rank named them."""
        assert not self._parts, f"buckets are missing: {sorted(self._parts)}"
        return {name: self._tensors[name] for name in self._names}
