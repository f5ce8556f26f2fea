"""Advantages on known values."""

from __future__ import annotations

import numpy as np
import pytest

from forge_hpc.advantages import ADVANTAGES, advantage_function, group_mean, group_mean_std, leave_one_out
from forge_hpc.config.errors import UserError


def test_group_mean_subtracts_the_mean() -> None:
    np.testing.assert_allclose(group_mean([0, 0, 0, 1]), [-0.25, -0.25, -0.25, 0.75])


def test_group_mean_std_divides_by_the_population_standard_deviation() -> None:
    np.testing.assert_allclose(group_mean_std([1, 0, 1, 0]), [1, -1, 1, -1], rtol=1e-5)
    np.testing.assert_allclose(group_mean_std([0, 0, 3]), np.array([-1, -1, 2]) / np.sqrt(2), rtol=1e-5)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    np.testing.assert_allclose(leave_one_out([0, 0, 0, 1]), [-1 / 3, -1 / 3, -1 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(leave_one_out([1, 3]), [-2, 2])


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("rewards", [[0.1] * 7, [1.0], [0.0, 0.0]])
def test_equal_rewards_give_no_advantage(name: str, rewards: list[float]) -> None:
    np.testing.assert_allclose(advantage_function(name)(rewards), np.zeros(len(rewards)), atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero(name: str) -> None:
    advantages = advantage_function(name)(np.random.default_rng(0).normal(size=16).tolist())
    assert advantages.dtype == np.float32
    assert abs(advantages.sum()) < 1e-5


def test_an_unknown_name_is_a_user_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="median") as error:
        advantage_function("median")
    assert "leave_one_out" in (error.value.hint or "")
