"""What a microbatch is on a GPU, by arithmetic: here against what was measured on one."""

from __future__ import annotations

from typing import Any

import pytest

from forge_hpc.sizing.microbatch import WholeBytes, plan_microbatch, token_bytes

GIB = 2**30
QWEN3_0_6B = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
}
QWEN3_8B = {**QWEN3_0_6B, "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 12288}
QWEN3_8B["num_hidden_layers"] = 36


def plan(hf: dict[str, Any], num_params: float, seq_len: int, gib: float, **given: Any) -> tuple[int, str]:
    result = plan_microbatch(hf, int(num_params), seq_len, int(gib * GIB), **given)
    return result.num_rows, result.mode


@pytest.mark.parametrize(("mode", "measured_mib"), [("none", 1.20), ("selective", 0.50), ("full", 0.09)])
def test_activations_of_a_token_are_those_that_were_measured(mode: str, measured_mib: float) -> None:
    assert token_bytes(QWEN3_0_6B, mode) / 2**20 == pytest.approx(measured_mib, rel=0.25)


def test_what_is_not_compiled_keeps_more() -> None:
    measured_mib = 1.20 + (56.97 - 50.29) * 1024 / (8 * 4096)  # an H200: 8 rows of 4096 took so much more
    assert token_bytes(QWEN3_0_6B, "none", compiled=False) / 2**20 == pytest.approx(measured_mib, rel=0.1)


@pytest.mark.parametrize(
    ("hf", "num_params", "seq_len", "gib", "expected"),
    [
        (QWEN3_0_6B, 6e8, 4096, 60, (8, "none")),  # many rows keep a GPU busy with a small model
        (QWEN3_0_6B, 6e8, 4096, 30, (8, "selective")),
        (QWEN3_0_6B, 6e8, 4096, 10, (8, "full")),
        (QWEN3_0_6B, 6e8, 4096, 2, (3, "full")),  # what fits
        (QWEN3_0_6B, 6e8, 131072, 60, (1, "full")),  # one long row
        (QWEN3_8B, 8.2e9, 4096, 40, (1, "none")),  # one row of a larger model is work enough
        (QWEN3_8B, 8.2e9, 4096, 10, (1, "selective")),
        (QWEN3_8B, 8.2e9, 4096, -5, (1, "full")),  # only a try tells
    ],
)
def test_the_least_is_computed_again_of_what_fits(
    hf: dict[str, Any], num_params: float, seq_len: int, gib: float, expected: tuple[int, str]
) -> None:
    assert plan(hf, num_params, seq_len, gib) == expected


def test_ranks_that_share_a_row_hold_a_part_of_it_and_keys_of_the_whole() -> None:
    assert plan(QWEN3_0_6B, 6e8, 65536, 60) == (1, "selective")
    assert plan(QWEN3_0_6B, 6e8, 65536, 60, context_parallel=2) == (1, "none")
    assert plan(QWEN3_8B, 8.2e9, 65536, 90) == (1, "full")
    assert plan(QWEN3_8B, 8.2e9, 65536, 90, context_parallel=2) == (1, "selective")
    one, shared = (token_bytes(QWEN3_0_6B, "none", ranks) for ranks in (1, 2))
    keys = 2 * 8 * 128
    assert shared - one == 2 * (28 * 1.5 * keys + 2 * keys)  # kept by layers, and gathered by one


def test_what_is_given_stands() -> None:
    assert plan(QWEN3_0_6B, 6e8, 4096, 1, num_rows=64, mode="none") == (64, "none")
    assert plan(QWEN3_0_6B, 6e8, 4096, 60, num_rows=16) == (16, "selective")
    assert plan(QWEN3_0_6B, 6e8, 4096, 60, mode="full") == (8, "full")
    assert plan(QWEN3_8B, 8.2e9, 4096, 10, tensor_parallel=2) == (1, "none")


@pytest.mark.parametrize(
    ("gib", "num_shards", "expected"),
    [
        (45, 4, (True, True)),  # 40.8 GiB of activations; 0.8 for 3/4 of 0.6 G weights, 1.7 for their gradients
        (42, 4, (True, False)),  # the weights alone
        (41, 4, (False, False)),  # not for fewer rows, nor for more to compute again
        (41, 1, (True, True)),  # one rank has them whole
        (40, 4, (True, True)),  # with checkpoints there is room again
        (2, 4, (False, False)),
    ],
)
def test_weights_are_gathered_once_a_step_where_that_takes_no_rows(
    gib: float, num_shards: int, expected: tuple[bool, bool]
) -> None:
    whole = WholeBytes.of(600_000_000, num_shards, 2)
    assert whole == (600_000_000 * 2 * (num_shards - 1) // num_shards, 600_000_000 * 4 * (num_shards - 1) // num_shards)
    result = plan_microbatch(QWEN3_0_6B, 600_000_000, 4096, int(gib * GIB), whole=whole)
    assert (result.gathers_once, result.sums_once) == expected
    assert result.whole_bytes == whole.weights * expected[0] + whole.gradients * expected[1]
    assert (result.num_rows, result.mode) == plan(QWEN3_0_6B, 6e8, 4096, gib)
    assert ("gathered" in str(result)) is (expected[0] and num_shards > 1)
    assert ("summed" in str(result)) is (expected[1] and num_shards > 1)


def test_adapters_have_few_gradients_and_tensor_parallel_ranks_a_part() -> None:
    assert WholeBytes.of(8_000, 4, 2, lora=True) == (12_000, 0)
    assert WholeBytes.of(8_000, 4, 2, tensor_parallel=2) == (6_000, 12_000)
    assert WholeBytes.of(8_000, 4, 4) == (24_000, 24_000)
