"""Packing of documents into rows."""

from __future__ import annotations

import numpy as np
import pytest

from forge_hpc.data.packing import PackedBatch, balanced, pack, unpack
from forge_hpc.data.types import Document


def arrays_of(batch: PackedBatch) -> dict[str, np.ndarray]:
    return batch.rows(0, batch.num_rows)


def documents_of(lengths: list[int], **fields: object) -> list[Document]:
    return [
        Document(token_ids=np.arange(100 * i, 100 * i + n, dtype=np.int32), loss_mask=np.arange(n) >= 2, **fields)
        for i, n in enumerate(lengths)
    ]


def test_every_document_lies_whole_in_one_row_with_labels_shifted_by_one() -> None:
    documents = documents_of([5, 9, 3, 7, 12, 2])
    batch = pack(documents, 16)
    arrays = arrays_of(batch)
    for document, (row, start) in zip(documents, batch.placements, strict=True):
        n = len(document.token_ids) - 1
        slots = (row, slice(start, start + n))
        np.testing.assert_array_equal(arrays["input_ids"][slots], document.token_ids[:-1])
        np.testing.assert_array_equal(arrays["labels"][slots], document.token_ids[1:])
        np.testing.assert_array_equal(arrays["positions"][slots], np.arange(n))
        np.testing.assert_array_equal(arrays["mask"][slots], document.loss_mask[1:])
        assert len(set(arrays["segment_ids"][slots])) == 1
    assert batch.num_slots_used == sum(len(d.token_ids) - 1 for d in documents) == (arrays["segment_ids"] > 0).sum()
    assert batch.num_trained_tokens == sum(d.loss_mask[1:].sum() for d in documents)


def test_padding_is_a_segment_of_its_own_and_is_not_trained() -> None:
    arrays = arrays_of(pack(documents_of([4, 5]), 32))
    padding = arrays["segment_ids"] == 0
    assert padding.any() and not arrays["mask"][padding].any()
    np.testing.assert_array_equal(arrays["positions"][padding], np.arange(padding.sum()))


def test_rows_are_the_same_in_whatever_parts_they_are_made() -> None:
    batch = pack(documents_of([5, 9, 3, 7, 12, 2, 8, 8], advantage=0.5), 16, num_rows_multiple=2)
    whole = arrays_of(batch)
    for row in range(batch.num_rows):
        for name, array in batch.rows(row, row + 1).items():
            assert array.dtype == whole[name].dtype
            np.testing.assert_array_equal(array[0], whole[name][row])


def test_advantages_and_logprobs_stand_at_the_slot_that_predicts_the_token() -> None:
    logprobs = np.array([0, 0, -1, -2, -3], np.float32)
    document = documents_of([5], generator_logprobs=logprobs, ref_logprobs=logprobs - 1, advantage=0.5)
    batch = pack(document, 8)
    assert set(batch.columns) == {"advantages", "generator_logprobs", "ref_logprobs"}
    arrays = arrays_of(batch)
    np.testing.assert_array_equal(arrays["generator_logprobs"][0, :4], logprobs[1:])
    np.testing.assert_array_equal(arrays["ref_logprobs"][0, :4], logprobs[1:] - 1)
    np.testing.assert_array_equal(arrays["advantages"][0, :4], [0.5] * 4)


def test_unpack_puts_values_back_at_the_tokens() -> None:
    documents = documents_of([5, 9, 3, 7])
    batch = pack(documents, 16)
    for document, values in zip(documents, unpack(arrays_of(batch)["labels"], batch, documents), strict=True):
        np.testing.assert_array_equal(values[1:], document.token_ids[1:])
        assert values[0] == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seq_len", [256, 512])
@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_fill_is_high_on_many_short_documents(seed: int, seq_len: int, multiple: int) -> None:
    lengths = np.random.default_rng(seed).integers(12, 21, 256).tolist()
    batch = pack(documents_of(lengths), seq_len, num_rows_multiple=multiple)
    assert batch.fill >= 0.9
    assert batch.num_rows % multiple == 0
    assert batch.row_len <= seq_len


def test_documents_that_fill_rows_exactly_are_packed_without_waste() -> None:
    batch = pack(documents_of([33, 33, 17, 17, 17, 17]), 32)
    assert batch.fill == 1.0 and batch.num_rows == 4


def test_rows_are_added_until_long_documents_fit() -> None:
    batch = pack(documents_of([21] * 5), 32)  # two never share a row
    assert batch.num_rows == 5 and batch.row_len == 24


def test_few_documents_leave_rows_empty_rather_than_breaking_the_multiple() -> None:
    batch = pack(documents_of([5]), 32, num_rows_multiple=4)
    assert batch.num_rows == 4
    assert (arrays_of(batch)["positions"][:, 0] == 0).all()


def test_the_same_documents_give_the_same_rows() -> None:
    lengths = np.random.default_rng(0).integers(5, 30, 64).tolist()
    assert pack(documents_of(lengths), 64).placements == pack(documents_of(lengths), 64).placements


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "no documents"),
        (documents_of([5, 40]), "document 1 has 40 tokens, more than fit"),
        (documents_of([1]), "document 0 has 1 token"),
        (documents_of([3], generator_logprobs=np.array([0, np.nan, 0], np.float32)), "document 0 .* not finite"),
        (documents_of([3], advantage=float("nan")), "document 0 has an advantage that is not finite"),
        (documents_of([3], generator_logprobs=np.zeros(2, np.float32)), "2 entries in generator_logprobs"),
        (documents_of([3]) + documents_of([3], ref_logprobs=np.zeros(3, np.float32)), "1 of 2 documents have ref"),
    ],
)
def test_documents_that_cannot_be_packed_are_refused_by_name(documents: list[Document], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(documents, 32)


def test_sequences_are_counted_that_have_a_trained_token() -> None:
    documents = documents_of([5, 9, 3, 7])
    documents[2].loss_mask[:] = False
    documents[3].loss_mask[1:] = False  # the first token is predicted by nothing
    assert pack(documents, 10).num_trained_sequences == 2
    assert pack(documents, 32).num_trained_sequences == 2


def test_the_longest_document_that_fits_has_one_token_more_than_the_row() -> None:
    assert pack(documents_of([33]), 32).fill == 1.0


def lognormal_documents(num: int, seed: int) -> list[Document]:
    """Of 2 to 2049 tokens, mean 200, sigma 1."""
    lengths = np.random.default_rng(seed).lognormal(np.log(200) - 0.5, 1.0, num).clip(1, 2048).astype(int)
    return [Document(np.zeros(n + 1, np.int32), np.ones(n + 1, bool), None, 1.0) for n in lengths]


def attention_costs(batch: PackedBatch, num_ranks: int, num_together: int) -> np.ndarray:
    """Of each rank: the squares of its documents' lengths."""
    costs = np.zeros(num_ranks)
    for row, ids in enumerate(arrays_of(batch)["segment_ids"]):
        costs[row // num_together % num_ranks] += (np.bincount(ids)[1:].astype(float) ** 2).sum()
    return costs


@pytest.mark.parametrize("seed", range(3))
def test_lognormal_lengths_fill_rows_and_cost_all_ranks_the_same(seed: int) -> None:
    documents = lognormal_documents(1024, seed)
    assert pack(documents, 2048).fill >= 0.97
    for num_ranks, num_together in ((2, 1), (4, 1), (8, 1), (2, 4), (8, 4)):
        options = {"num_rows_multiple": num_ranks * num_together}
        plain, dealt = pack(documents, 2048, **options), pack(documents, 2048, **options, num_ranks=num_ranks)
        costs = attention_costs(dealt, num_ranks, num_together)
        assert costs.max() / costs.mean() <= 1.03, (num_ranks, num_together)
        assert costs.sum() == attention_costs(plain, 1, 1).sum() and dealt.fill == plain.fill
        positions = arrays_of(dealt)["positions"]
        for document, (row, start) in zip(documents, dealt.placements, strict=True):
            num_slots = len(document.token_ids) - 1
            assert (positions[row, start : start + num_slots] == np.arange(num_slots)).all()


def test_rows_of_one_rank_stay_where_they_are() -> None:
    documents = lognormal_documents(64, 0)
    assert pack(documents, 2048, num_ranks=1).placements == pack(documents, 2048).placements


def test_equal_parts_are_found_where_the_costliest_first_does_not_find_them() -> None:
    parts = balanced([8, 7, 6, 5, 4, 3, 2, 1, 9, 9], 2)
    assert sorted(map(len, parts)) == [5, 5] and sorted(index for part in parts for index in part) == list(range(10))
    costs = [8, 7, 6, 5, 4, 3, 2, 1, 9, 9]
    assert [sum(costs[index] for index in part) for part in parts] == [27, 27]
    assert balanced([5, 0, 0, 0], 4) == [[0], [1], [2], [3]]
