"""Columns and groups of documents: from a recipe through rows, microbatches and ranks to a loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_hpc.config.errors import UserError
from forge_hpc.data.packing import pack, unpack
from forge_hpc.data.types import Document
from forge_hpc.losses import PolicyLoss, ValueLoss, step_normalizer
from forge_hpc.losses.base import accepted, columns_of


def document(num_tokens: int, **fields: Any) -> Document:
    return Document(np.arange(num_tokens, dtype=np.int32), np.arange(num_tokens) >= 2, **fields)


def test_a_column_stands_at_the_label_that_it_is_of_and_a_number_at_all_of_the_document() -> None:
    returns = [np.arange(6) / 4, np.arange(4) / 8]
    documents = [
        document(6, columns={"returns": returns[0], "chosen": 1.0}),
        document(4, columns={"returns": returns[1], "chosen": -1}),
    ]
    batch = pack(documents, 16)
    arrays = batch.rows(0, batch.num_rows)
    for own, label, back in zip(documents, (1.0, -1.0), unpack(arrays["returns"], batch, documents), strict=True):
        np.testing.assert_array_equal(back[1:], np.asarray(own.columns["returns"])[1:].astype(np.float32))
        row, start = batch.placements[0 if own is documents[0] else 1]
        slots = slice(start, start + len(own.token_ids) - 1)
        assert (arrays["chosen"][row, slots] == label).all()
    assert arrays["returns"].dtype == np.float32
    assert (arrays["chosen"][arrays["segment_ids"] == 0] == 0).all()


def test_advantages_of_tokens_take_the_place_of_the_documents_advantage() -> None:
    batch = pack([document(5, advantage=3.0, columns={"advantages": np.arange(5.0)})], 8)
    assert batch.rows(0, 1)["advantages"][0, :4].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"returns": np.zeros(4)}, "document 0 has 5 tokens but 4 entries in returns"),
        ({"returns": np.array([0, 0, np.nan, 0, 0])}, "document 0 has returns that are not finite"),
        ({"weight": float("inf")}, "document 0 has weight that are not finite"),
        ({"label": np.array("good")}, "document 0 has label that are no numbers"),
        ({"number": 2**24 + 1}, "document 0 has number too large to be exact: columns are float32"),
        ({"mask": np.zeros(5)}, "document 0 has a column 'mask', which is no name for one: give it another name"),
        ({"ref_logprobs": np.zeros(5)}, "which is no name for one: set Document.ref_logprobs"),
    ],
)
def test_a_column_that_cannot_be_packed_is_named(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([document(5, columns=columns)], 8)


def test_a_column_that_only_some_documents_have_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 documents have returns: all or none must"):
        pack([document(5, columns={"returns": np.zeros(5)}), document(5)], 8)


def test_the_documents_of_a_group_stand_in_one_row_whatever_the_rows_and_ranks() -> None:
    rng = np.random.default_rng(0)
    for num_rows_multiple in (1, 2, 3, 4):
        lengths = rng.integers(3, 9, 40)
        documents = [document(int(n), group=i // 2 if i < 30 else None) for i, n in enumerate(lengths)]
        batch = pack(documents, 24, num_rows_multiple=num_rows_multiple)
        assert batch.num_rows % num_rows_multiple == 0
        arrays = batch.rows(0, batch.num_rows)
        ids = [int(arrays["group_ids"][place]) for place in batch.placements]
        for i in range(0, 30, 2):
            assert batch.placements[i][0] == batch.placements[i + 1][0] and ids[i] == ids[i + 1]
        groups = [(row, number) for (row, _), number in zip(batch.placements, ids, strict=True)]
        assert len(set(groups)) == batch.num_trained_groups == 15 + 10
        assert batch.num_trained_sequences == 40
        segments = arrays["segment_ids"][0]
        assert sorted(np.unique(segments)[1:]) == list(range(1, segments.max() + 1))
        back = unpack(arrays["labels"], batch, documents)
        assert all((own[1:] == d.token_ids[1:]).all() for own, d in zip(back, documents, strict=True))


def test_a_pair_longer_than_a_row_is_a_user_error_that_names_the_length() -> None:
    with pytest.raises(UserError, match=r"the 2 documents of group 3 take 18 slots, .* trainer.training.seq_len=16"):
        pack([document(10, group=3), document(10, group=3)], 16)


def test_a_mask_of_floats_is_taken_like_one_of_bools() -> None:
    numbers = Document(np.arange(5, dtype=np.int32), np.array([0.0, 0.0, 1.0, 0.0, 1.0]))
    assert pack([numbers], 8).rows(0, 1)["mask"][0, :4].tolist() == [False, True, False, True]


def test_a_loss_is_asked_which_columns_it_takes() -> None:
    def plain(*, logprobs: Any, mask: Any, normalizer: Any, weight: Any, scale: float = 1.0, **rest: Any) -> Any: ...

    def critic(values: Any, mask: Any, returns: Any, old_values: Any) -> Any: ...

    assert columns_of(plain) == ("weight",)
    assert columns_of(critic, "value") == ("returns", "old_values")
    assert columns_of(critic) == ("values", "returns", "old_values")
    assert columns_of(ValueLoss(), "value") == ("returns",)
    assert accepted(critic, {"values": 1, "mask": 2, "normalizer": 3}) == {"values": 1, "mask": 2}
    assert accepted(plain, {"segment_ids": 1}) == {"segment_ids": 1}


def test_a_policy_loss_gets_the_columns_that_it_names_and_nothing_of_what_is_not_trained() -> None:
    class Weighted(PolicyLoss):
        columns = ("weight",)

        def term(self, x: Any) -> Any:
            return -x.columns["weight"] * x.logprobs, {}

    tensors = {name: torch.tensor([[-1.0, -2.0, -3.0]]) for name in ("logprobs", "old_logprobs", "advantages")}
    mask, weight = torch.tensor([[True, True, False]]), torch.tensor([[0.5, 2.0, float("nan")]])
    assert Weighted()(**tensors, mask=mask, weight=weight).loss.item() == pytest.approx((0.5 + 4) / 2)
    with pytest.raises(ValueError, match="weight"):
        Weighted()(**tensors, mask=mask)


def loss_of_the_page() -> Any:
    page = (Path(__file__).parents[1] / "docs/own-loss.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    exec(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[-1], namespace)
    return namespace["PairLoss"](beta=0.5)


def test_a_loss_finds_its_pairs_by_group_ids_however_they_are_packed() -> None:
    rng = np.random.default_rng(1)
    documents = []
    for pair in range(6):
        for chosen in (1.0, -1.0):
            num_tokens = int(rng.integers(4, 12))
            ref = rng.normal(size=num_tokens).astype(np.float32)
            own = rng.normal(size=num_tokens).astype(np.float32)
            documents.append(document(num_tokens, group=pair, ref_logprobs=ref, columns={"chosen": chosen, "own": own}))
    differences = [float((d.columns["own"] - d.ref_logprobs)[d.loss_mask].sum()) for d in documents]  # type: ignore
    margins = np.array(differences[::2]) - np.array(differences[1::2])
    expected = float(np.mean(np.log1p(np.exp(-0.5 * margins))))
    pair_loss = loss_of_the_page()
    assert columns_of(pair_loss) == ("chosen",)
    assert step_normalizer(pair_loss, 100, 12, 6) == 6
    for seq_len in (24, 60, 200):
        batch = pack(documents, seq_len)
        total = 0.0
        for row in range(batch.num_rows):  # each row a microbatch
            t = {name: torch.from_numpy(array) for name, array in batch.rows(row, row + 1).items()}
            given = {name: t[name] for name in ("ref_logprobs", "mask", "group_ids", "chosen")}
            total += float(pair_loss(logprobs=t["own"], **given, normalizer=batch.num_trained_groups).loss)
        assert total == pytest.approx(expected, abs=1e-5)
