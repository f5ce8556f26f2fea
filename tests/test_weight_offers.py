"""Where the weights lie, of many ranks, in few bytes; and how seldom that is said."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from runs import PROJECT

from forge_hpc.controller.trainers import Trainers
from forge_hpc.weights import IncompleteVersionError, Offer, Part, Place, VersionNotFoundError
from forge_hpc.weights.layout import Manifest, Shard, build_index
from forge_hpc.weights.memory import Handle
from forge_hpc.weights.offers import _decoded, encoded
from forge_hpc.wire.messages import Address

sys.path.append(str(PROJECT / "benchmarks"))
from offers import manifest, shapes_8b


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 100])
def test_manifests_come_back_as_they_were(num_ranks: int) -> None:
    shapes = {"embed": (130, 6, 2), "norm": (9,), "tail": (3, 5)}  # a hundred ranks have not all of each
    manifests = [manifest(rank, num_ranks, shapes) for rank in range(num_ranks)]
    assert _decoded(encoded(manifests)) == manifests
    assert build_index(_decoded(encoded(manifests))).tensors == build_index(manifests).tensors


def test_manifests_of_other_dtypes_and_none_come_back_too() -> None:
    several = [
        Manifest(0, 0, (Shard("a", torch.float32, (4,), (0,), (4,), 0, 0),), (64,)),
        Manifest(0, 1, (), ()),
        Manifest(0, 2, (Shard("b", torch.bfloat16, (2, 2), (1, 0), (1, 2), 0, 64),), (128,)),
    ]
    assert _decoded(encoded(several)) == several and _decoded(encoded([])) == []


def test_what_many_ranks_of_8b_say_is_small() -> None:
    manifests = [manifest(rank, 256, shapes_8b()) for rank in range(256)]
    assert sum(len(pickle.dumps(each)) for each in manifests) > 5e6
    assert len(encoded(manifests)) < 60_000


def place(rank: int, num_ranks: int, shapes: dict[str, tuple[int, ...]]) -> Place:
    laid = manifest(rank, num_ranks, shapes)
    handle = Handle("host", "cpu", sum(laid.bucket_bytes), f"/proc/{rank}/fd/3")
    return Place(handle, laid, Address("127.0.0.1", 1000 + rank, f"{rank:032x}"))


def test_a_brief_is_small_whatever_the_number_of_ranks() -> None:
    offer = Offer.of([Part(7, place(rank, 64, {"w": (640, 3)}), None) for rank in range(64)])
    assert len(pickle.dumps(offer.brief)) < 1000 < len(pickle.dumps(offer)) < 64 * 400
    assert pickle.loads(pickle.dumps(offer)).places.key == offer.places.key


def test_ranks_that_publish_nothing_are_left_out_and_missing_ones_are_seen() -> None:
    shapes = {"w": (6, 2)}
    nothing = Place(Handle("host", "cpu", 64, "/proc/9/fd/3"), Manifest(0, 0, (), ()), None)  # copies of the others
    places = [nothing, place(0, 2, shapes), nothing, place(1, 2, shapes)]
    parts = [Part(3, each, None) for each in places]
    offer = Offer.of(parts)
    assert offer.places.ranks == (1, 3) and offer.has_streams and len(offer.checksums) == 2
    assert [rank for rank, _ in offer.places.index.tensors["w"]] == [0, 1]
    with pytest.raises(IncompleteVersionError, match="w of version 0"):
        _ = Offer.of(parts[:3]).places.index


class Mesh:
    """Two ranks, each with a block of memory for odd versions and one for even ones."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_gone = False

    def __getattr__(self, endpoint: str) -> Any:
        async def call(_: Any, *args: Any) -> list[tuple[None, Any]]:
            self.asked.append(endpoint)
            version = args[1] if endpoint == "publish" else args[0]
            parts = [Part(version, place(10 * (version % 2) + rank, 20, {"w": (40, 1)}), None) for rank in range(2)]
            if endpoint == "publish":
                return [(None, part.brief) for part in parts]
            if self.is_gone:
                raise VersionNotFoundError("gone")
            return [(None, part.place) for part in parts]

        return type("Endpoint", (), {"call": staticmethod(call)})


def test_trainers_are_asked_where_their_weights_lie_once_a_block_of_memory() -> None:
    async def scenario() -> list[Sequence[Any]]:
        mesh = Mesh()
        trainers = Trainers(mesh, 60.0, asyncio.get_running_loop().create_future())
        offers = [await trainers.publish(None, version) for version in range(1, 6)]
        assert all(offer is not None for offer in offers)
        assert mesh.asked == ["publish", "place", "publish", "place", "publish", "publish", "publish"]
        return [offer.places.handles for offer in offers if offer is not None]

    first, second, *others = asyncio.run(scenario())
    assert others == [first, second, first] and first != second


def test_a_version_that_is_gone_before_it_could_be_told_where_it_lies_is_an_error() -> None:
    async def scenario() -> None:
        mesh = Mesh()
        mesh.is_gone = True
        trainers = Trainers(mesh, 60.0, asyncio.get_running_loop().create_future())
        with pytest.raises(VersionNotFoundError):
            await trainers.publish(None, 1)

    asyncio.run(scenario())
