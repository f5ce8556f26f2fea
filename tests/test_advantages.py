"""Advantages on known values."""

from __future__ import annotations

import numpy as np
import pytest

from forge_hpc.advantages import (
    advantage_function,
    batch_mean_std,
    group_mean,
    group_mean_batch_std,
    group_mean_mean,
    group_mean_std,
    leave_one_out,
)
from forge_hpc.config.errors import UserError
from forge_hpc.config.registry import ADVANTAGES


def test_group_mean_subtracts_the_mean() -> None:
    np.testing.assert_allclose(group_mean([0, 0, 0, 1]), [-0.25, -0.25, -0.25, 0.75])


def test_group_mean_std_divides_by_the_population_standard_deviation() -> None:
    np.testing.assert_allclose(group_mean_std([1, 0, 1, 0]), [1, -1, 1, -1], rtol=1e-5)
    np.testing.assert_allclose(group_mean_std([0, 0, 3]), np.array([-1, -1, 2]) / np.sqrt(2), rtol=1e-5)


def test_group_mean_mean_divides_by_the_share_of_right_answers() -> None:
    np.testing.assert_allclose(group_mean_mean([0, 0, 0, 1]), [-1, -1, -1, 3], rtol=1e-5)
    np.testing.assert_allclose(group_mean_mean([1, 1, 0, 1]), [1 / 3, 1 / 3, -1, 1 / 3], rtol=1e-5)
    np.testing.assert_allclose(group_mean_mean([-3, 1]), [-1, 1], rtol=1e-5)  # never the other way round


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    np.testing.assert_allclose(leave_one_out([0, 0, 0, 1]), [-1 / 3, -1 / 3, -1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(leave_one_out([1, 3]), [-2, 2])


def test_group_mean_batch_std_divides_by_the_standard_deviation_of_the_whole_step() -> None:
    first, second = group_mean_batch_std([[1, 0], [5, 5, 5, 5]])  # centred: 0.5, -0.5 and four zeros
    std = np.sqrt(0.5 / 6)
    np.testing.assert_allclose(first, np.array([0.5, -0.5]) / std, rtol=1e-5)
    np.testing.assert_array_equal(second, np.zeros(4))


def test_batch_mean_std_compares_with_the_whole_step() -> None:
    first, second = batch_mean_std([[1, 1], [0, 0, 1, 3]])  # mean 1, variance 1
    np.testing.assert_array_equal(first, [0, 0])
    np.testing.assert_allclose(second, [-1, -1, 0, 2], rtol=1e-5)
    right, wrong = batch_mean_std([[1, 1], [0, 0]])
    np.testing.assert_allclose([*right, *wrong], [1, 1, -1, -1], rtol=1e-5)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_no_advantage(name: str) -> None:
    for values in advantage_function(name)([[0.1] * 7, [0.1], [0.1] * 3]):
        np.testing.assert_array_equal(values, np.zeros(len(values)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_a_step_sum_to_zero(name: str) -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 16)).tolist()
    groups = advantage_function(name)([rewards[0], rewards[1][:5], rewards[2]])
    assert [(values.dtype, len(values)) for values in groups] == [(np.float32, n) for n in (16, 5, 16)]
    assert abs(sum(values.sum() for values in groups)) < 1e-4


@pytest.mark.parametrize("name", ["group_mean_std", "group_mean", "group_mean_mean", "leave_one_out"])
def test_what_compares_in_a_group_does_not_look_at_others(name: str) -> None:
    function = advantage_function(name)
    np.testing.assert_array_equal(function([[1, 2, 4]])[0], function([[9, 0], [1, 2, 4]])[1])


def test_an_unknown_name_is_a_user_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="median") as error:
        advantage_function("median")
    assert "leave_one_out" in (error.value.hint or "") and "batch_mean_std" in (error.value.hint or "")
