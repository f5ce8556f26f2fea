"""Weights that are read where the trainers put them: blocks of memory and their readers, without processes or GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from forge_hpc.controller.generators import WeightSync
from forge_hpc.generation.replay import Recorder, Replay
from forge_hpc.weights import (
    UNKNOWN,
    Brief,
    CorruptWeightsError,
    Offer,
    Part,
    Place,
    Places,
    Snapshots,
    Unreachable,
    VersionNotFoundError,
    opened,
)
from forge_hpc.weights import memory as memory_module
from forge_hpc.weights.checksum import Checksum, checksum
from forge_hpc.weights.layout import Manifest, Shard
from forge_hpc.weights.snapshots import Opened

CPU = torch.device("cpu")


KEPT: list[Snapshots] = []  # a part is readable as long as its owner lives


def snapshots(dtype: torch.dtype = torch.float32) -> Snapshots:
    KEPT.append(Snapshots(0, dtype, CPU, 1 << 20))
    return KEPT[-1]


def take(copies: Snapshots, version: int, weights: dict[str, torch.Tensor], **options: Any) -> Part:
    part = copies.take(version, lambda: weights, weights.values(), **options)
    assert part is not None
    return part


def read(part: Part) -> dict[str, torch.Tensor]:
    offer = Offer.of([part])
    with opened(offer) as weights:
        weights.verify()
        return {name: weights.tensor(name).clone() for name in offer.shapes}


def test_the_weights_arrive_in_the_stored_dtype_and_a_tied_head_lies_there_once() -> None:
    embedding = torch.randn(10, 6)
    weights = {"embed": embedding, "norm": torch.randn(7), "head": embedding}
    part = take(snapshots(torch.bfloat16), 1, weights, with_checksum=True)
    found = read(part)
    assert list(found) == ["embed", "norm", "head"]
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in weights.items())
    assert part.place.handle.num_bytes == 128 + 64  # 10 * 6 * 2 and 7 * 2 bytes, each begun at a multiple of 64
    assert part.checksum == checksum([embedding.bfloat16(), weights["norm"].bfloat16()])


def test_every_version_is_in_the_same_block_and_what_was_read_does_not_change_with_the_weights() -> None:
    copies, weights = snapshots(), {"w": torch.zeros(5)}
    first = take(copies, 1, weights)
    weights["w"].fill_(3)
    assert read(first)["w"].tolist() == [0] * 5
    second = take(copies, 2, weights)
    assert second.place is first.place and second.brief.key == first.brief.key
    assert read(second)["w"].tolist() == [3] * 5


def test_a_version_that_is_still_read_stays_and_the_next_ones_go_into_a_second_block() -> None:
    copies = snapshots()
    first = take(copies, 1, {"w": torch.full((5,), 1.0)})
    second = take(copies, 2, {"w": torch.full((5,), 2.0)}, in_use={1})
    third = take(copies, 3, {"w": torch.full((5,), 3.0)}, in_use={1})
    assert second.place is third.place and second.place.handle != first.place.handle
    assert second.brief.key != first.brief.key
    assert read(first)["w"].tolist() == [1] * 5 and read(third)["w"].tolist() == [3] * 5
    assert copies.take(4, lambda: {"w": torch.zeros(5)}, [], in_use={1, 3}) is None  # a third is never made
    assert take(copies, 5, {"w": torch.zeros(5)}).place is first.place
    assert copies.find(1) is None and copies.find(3) is not None


def test_without_memory_there_is_no_part_and_nobody_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, weights = snapshots(), {"w": torch.zeros(5)}
    monkeypatch.setattr(memory_module, "allocate", lambda num_bytes, device: None)
    assert copies.take(1, lambda: weights, []) is None and not copies.is_possible
    monkeypatch.undo()
    assert copies.take(2, lambda: weights, []) is None
    later = snapshots()
    first = take(later, 1, weights)
    monkeypatch.setattr(memory_module, "allocate", lambda num_bytes, device: None)
    assert later.take(2, lambda: weights, [], in_use={1}) is None  # this one goes through the store
    assert take(later, 3, weights).place is first.place


def test_memory_that_cannot_be_shared_is_as_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(memory: torch.Tensor) -> Any:
        raise memory_module.Unreachable("RuntimeError: no IPC here")

    copies, weights = snapshots(), {"w": torch.zeros(5)}
    monkeypatch.setattr(memory_module, "share", refuse)
    assert copies.take(1, lambda: weights, []) is None and not copies.is_possible
    assert "it cannot be shared, RuntimeError: no IPC here" in caplog.text


def test_the_weights_are_asked_for_once_where_they_are_views_of_the_parameters() -> None:
    parameter = torch.arange(6.0)
    asked: list[int] = []

    def weights(merge: bool) -> dict[str, torch.Tensor]:
        asked.append(version)
        return {"w": parameter.view(2, 3), "v": parameter + 1 if merge else parameter[:1]}

    for merges, expected in ((False, [0]), (True, [0, 1, 2])):  # an adapter that is merged makes new tensors
        asked.clear()
        copies = snapshots()
        for version in range(3):
            parameter += 1
            part = copies.take(version, partial(weights, merges), [parameter])
            assert part is not None and torch.equal(read(part)["w"], parameter.view(2, 3))
        assert asked == expected


def test_what_was_changed_on_the_way_is_refused() -> None:
    copies = snapshots()
    part = take(copies, 7, {"w": torch.ones(4), "v": torch.zeros(4)}, with_checksum=True)
    found = copies.find(7)
    assert found is not None
    found[1][1] ^= 1
    with pytest.raises(CorruptWeightsError, match="version 7"):
        read(part)


def test_memory_whose_owner_is_gone_is_unreachable() -> None:
    copies = snapshots()
    part = take(copies, 1, {"w": torch.ones(4)})
    copies._blocks.clear()
    with pytest.raises(Unreachable):
        read(part)


def test_a_checksum_does_not_depend_on_how_tensors_are_cut_and_sees_one_bit() -> None:
    tensor = torch.randn(3000, 2000).bfloat16()
    whole = checksum([tensor])
    assert whole == checksum([tensor[:1], torch.zeros(9).bfloat16()]) + checksum([tensor[1:, :7], tensor[1:, 7:]])
    tensor.view(torch.int16)[77, 7] ^= 1
    assert checksum([tensor]) != whole and checksum([]) == Checksum()
    for dtype in (torch.float64, torch.int64, torch.float32, torch.int8):
        before = torch.arange(9).to(dtype)
        tensor = before.clone()
        assert checksum([tensor]) == checksum([tensor]) and torch.equal(tensor, before)


class Fused(nn.Module):
    """Loads as vLLM does: two tensors into one parameter, half of a third, and a vocabulary that is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.zeros(8, 3), requires_grad=False)
        self.output = nn.Parameter(torch.zeros(3, 2), requires_grad=False)
        self.vocabulary = nn.Parameter(torch.full((8, 3), 9.0), requires_grad=False)
        self.more = False

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name in "qk":
                self.qk.data.narrow(0, "qk".index(name) * 4, 4).copy_(tensor)
            elif name == "o":
                self.output.data.copy_(tensor.narrow(1, 2, 2))
            else:
                self.vocabulary[:5].data.copy_(tensor)
                self.vocabulary[5:].data.fill_(0)
            if self.more:
                self.output.data.mul_(2)


def cut_into_ranks(full: dict[str, torch.Tensor], num: int) -> Opened:
    """What ``num`` ranks offer of these tensors, cut along the first dimension as FSDP does."""
    parts = []
    for rank in range(num):
        chunks = {name: tensor.tensor_split(num)[rank] for name, tensor in full.items()}
        copies = snapshots()
        part = take(copies, 1, chunks)
        shards, done = [], copies._manifest
        assert done is not None
        for shard in done.shards:
            first = sum(len(chunk) for chunk in full[shard.name].tensor_split(num)[:rank])
            offsets = (first, *([0] * (full[shard.name].dim() - 1)))
            shards.append(
                Shard(
                    shard.name, shard.dtype, tuple(full[shard.name].shape), offsets, shard.shape, 0, shard.start_bytes
                )
            )
        manifest = Manifest(0, rank, tuple(shards), done.bucket_bytes)
        parts.append(Part(1, Place(part.place.handle, manifest), None))
    return Opened(Offer.of(parts), [memory_module.open_memory(part.place.handle) for part in parts])


def full_weights() -> dict[str, torch.Tensor]:
    return {"q": torch.randn(4, 3), "k": torch.randn(4, 3), "o": torch.randn(3, 4), "embed": torch.randn(5, 3)}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_load_that_was_watched_once_is_repeated_to_the_last_bit(num_ranks: int) -> None:
    model, first = Fused(), cut_into_ranks(full_weights(), num_ranks)
    with Recorder(model) as recorder:
        model.load_weights(recorder.tensors((name, first.tensor(name)) for name in first._offer.shapes))
    copies = recorder.copies()
    assert copies is not None
    replay = Replay(model, copies, recorder.padding, first._offer.places.layout)
    for _ in range(2):
        full = full_weights()
        second = cut_into_ranks(full, num_ranks)
        assert replay.fits(model, second._offer.places.layout)
        replay.load(second, torch.float32)
        expected = Fused()
        expected.load_weights(full.items())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    model.output.data = torch.zeros(3, 2)
    assert not replay.fits(model, first._offer.places.layout)


def test_a_load_that_does_more_than_copy_is_not_repeated() -> None:
    model, weights = Fused(), cut_into_ranks(full_weights(), 2)
    model.more = True
    with Recorder(model) as recorder:
        model.load_weights(recorder.tensors((name, weights.tensor(name)) for name in weights._offer.shapes))
    assert recorder.copies() is None


class Parts:
    """Trainers, store and generators in one. ``answers`` are what each generator says of an offer."""

    def __init__(self, *answers: str | None, offers: bool = True) -> None:
        self.answers, self.offers = list(answers), offers
        self.calls: list[Any] = []
        self.told: list[str] = []
        self.timeout_s = 60.0
        self.spec: str | None = None
        self.generators: Any = self
        self.load: Any = self
        self.gate: asyncio.Event | None = None
        self.knows_nothing = False

    async def publish(self, spec: Any, version: int, in_use: Any, *, stores: bool, with_checksum: bool) -> Any:
        self.calls.append(("publish", version, sorted(in_use), stores, with_checksum))
        return Offer(version, Places.of([]), ()) if self.offers else None

    async def store(self, spec: Any, version: int) -> None:
        assert spec is not None
        self.calls.append(("store", version))

    async def commit(self, version: int) -> None:
        self.calls.append(("commit", version))

    async def open(self) -> Any:
        self.spec = self.spec or "the store"
        return self.spec

    async def fanout(
        self, spec: Any, version: int, told: Offer | Brief | None, again: bool = False
    ) -> list[str | None]:
        assert spec is not None or told is not None
        if self.knows_nothing:
            self.calls.append(("load", version, type(told).__name__, again))
            if isinstance(told, Brief):
                return [UNKNOWN for _ in self.answers]
        else:
            self.calls.append(("load", version, told is not None, again))
        if told is not None:
            return list(self.answers)
        return ["messages" if not again or answer is None else "" for answer in self.answers]

    def sync(self) -> WeightSync:
        parts: Any = self
        return WeightSync(parts, parts, parts, None, self.told.append)


async def bring(weights: WeightSync, version: int) -> None:
    weights.is_changed = True
    await weights.publish(version)
    await weights.delivered()


def test_generators_in_reach_of_the_trainers_memory_leave_the_store_empty() -> None:
    async def scenario() -> None:
        parts = Parts("CUDA IPC", "CUDA IPC")
        weights = parts.sync()
        await bring(weights, 1)
        await bring(weights, 2)
        assert parts.calls == [
            ("publish", 1, [], False, True),  # the first is verified
            ("load", 1, True, False),
            ("publish", 2, [], False, False),
            ("load", 2, True, False),
        ]
        assert parts.told == ["weights: CUDA IPC"]
        assert parts.spec is None  # and it is not even started

    asyncio.run(scenario())


def test_who_does_not_know_where_the_weights_lie_is_told_the_whole_offer_and_may_take_the_store_then() -> None:
    async def scenario() -> None:
        parts = Parts("CUDA IPC", None)
        parts.knows_nothing = True
        weights = parts.sync()
        await bring(weights, 1)
        assert parts.calls[1:] == [
            ("load", 1, "Brief", False),
            ("load", 1, "Offer", True),
            ("store", 1),
            ("commit", 1),
            ("load", 1, "NoneType", True),
        ]
        assert parts.told == ["weights: CUDA IPC, messages"]

    asyncio.run(scenario())


def test_a_generator_out_of_reach_takes_the_store_from_then_on_and_the_others_read_in_place() -> None:
    async def scenario() -> None:
        parts = Parts("CUDA IPC", None)
        weights = parts.sync()
        await bring(weights, 1)
        assert parts.calls[1:] == [("load", 1, True, False), ("store", 1), ("commit", 1), ("load", 1, False, True)]
        parts.calls.clear()
        await bring(weights, 2)
        assert parts.calls[:3] == [("publish", 2, [], True, False), ("store", 2), ("commit", 2)]
        assert parts.told == ["weights: CUDA IPC, messages"]

    asyncio.run(scenario())


def test_where_a_rank_has_no_memory_for_a_copy_the_store_has_the_version() -> None:
    async def scenario() -> None:
        parts = Parts("", offers=False)
        weights = parts.sync()
        await bring(weights, 1)
        asked = ("publish", 1, [], False, True)  # and again, with a store
        assert parts.calls == [asked, asked, ("store", 1), ("commit", 1), ("load", 1, False, False)]
        parts.calls.clear()
        await bring(weights, 2)
        assert [call[0] for call in parts.calls] == ["publish", "store", "commit", "load"]
        assert parts.told == ["weights: messages"]

    asyncio.run(scenario())


def test_a_store_that_starts_while_a_version_is_published_has_not_got_it() -> None:
    async def scenario() -> None:
        parts = Parts("", offers=False)
        publish = parts.publish

        async def while_another_opens_it(*args: Any, **options: Any) -> Any:
            offer = await publish(*args, **options)
            await parts.open()  # for a generator that takes the version before
            return offer

        parts.publish = while_another_opens_it  # type: ignore[method-assign]
        await bring(parts.sync(), 1)
        assert [call[0] for call in parts.calls] == ["publish", "publish", "store", "commit", "load"]

    asyncio.run(scenario())


def test_a_late_reader_keeps_its_version_until_it_has_read_or_is_lost() -> None:
    async def scenario() -> None:
        parts = Parts("CUDA IPC")
        weights = parts.sync()
        await bring(weights, 1)
        lost = asyncio.Event()

        async def load(*args: Any) -> list[str | None]:
            await lost.wait()
            raise RuntimeError("the generator is lost")

        reader = asyncio.create_task(weights.give(load))
        await asyncio.sleep(0)
        await bring(weights, 2)
        assert ("publish", 2, [1], False, False) in parts.calls
        lost.set()
        with pytest.raises(RuntimeError, match="lost"):
            await reader
        await bring(weights, 3)
        assert ("publish", 3, [], False, False) in parts.calls

    asyncio.run(scenario())


def test_a_version_that_the_next_one_overwrites_is_given_to_nobody() -> None:
    async def scenario() -> None:
        parts = Parts("CUDA IPC")
        weights = parts.sync()
        await bring(weights, 1)
        weights._offer = None  # as ``publish`` leaves it until the next is whole
        with pytest.raises(VersionNotFoundError):
            await weights.give(parts.fanout)

    asyncio.run(scenario())
