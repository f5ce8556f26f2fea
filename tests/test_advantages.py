"""Advantages on known values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from forge_hpc.advantages import (
    advantage_function,
    batch_mean_std,
    gdpo,
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


def given(name: str, groups: list[list[float]]) -> list[Any]:
    """What an advantage gets of groups with one reward."""
    sees_terms = getattr(advantage_function(name), "sees_terms", False)
    return [{"exact": (2.0, rewards)} for rewards in groups] if sees_terms else groups


def plain_gdpo(groups: list[dict[str, tuple[float, list[float]]]]) -> list[np.ndarray]:
    """As the paper writes it, answer by answer."""
    summed = []
    for terms in groups:
        num = len(next(iter(terms.values()))[1])
        values = [0.0] * num
        for weight, rewards in terms.values():
            mean = sum(rewards) / num
            std = (sum((reward - mean) ** 2 for reward in rewards) / num) ** 0.5
            for i, reward in enumerate(rewards):
                values[i] += weight * (reward - mean) / (std + 1e-6)
        summed.append(values)
    every = [value for values in summed for value in values]
    mean = sum(every) / len(every)
    std = (sum((value - mean) ** 2 for value in every) / len(every)) ** 0.5
    return [np.array([(value - mean) / (std + 1e-6) for value in values]) for values in summed]


def test_gdpo_compares_each_reward_in_its_group_and_the_sums_over_the_step() -> None:
    rng = np.random.default_rng(0)
    weights = {"exact": 1.0, "length": 0.5, "judge": -0.2}
    groups = [
        {
            name: (weight, rng.normal(rng.normal(), 10 ** rng.uniform(-3, 3), size).tolist())
            for name, weight in weights.items()
        }
        for size in (8, 5, 2)
    ]
    groups.append({"exact": (1.0, [1.0, 0.0, 1.0])})  # of another source, with a reward of its own
    for ours, expected in zip(gdpo(groups), plain_gdpo(groups), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_gdpo_tells_answers_apart_whose_sums_are_equal_and_a_reward_counts_whatever_its_spread() -> None:
    exact, form = [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0]
    [apart] = gdpo([{"exact": (2.0, exact), "format": (1.0, form)}])
    assert apart[0] > 0.5 and np.ptp(apart[1:]) == 0
    [scaled] = gdpo([{"exact": (2.0, exact), "format": (1.0, [1000 * value for value in form])}])
    np.testing.assert_allclose(scaled, apart, rtol=1e-4)
    silent, _ = gdpo([{"exact": (1.0, [0.1] * 3), "format": (1.0, [0.7] * 3)}, {"exact": (1.0, [0.0, 1.0])}])
    np.testing.assert_array_equal(silent, np.zeros(3))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_equal_rewards_give_exactly_no_advantage(name: str) -> None:
    for values in advantage_function(name)(given(name, [[0.1] * 7, [0.1], [0.1] * 3])):
        np.testing.assert_array_equal(values, np.zeros(len(values)))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_a_step_sum_to_zero(name: str) -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 16)).tolist()
    groups = advantage_function(name)(given(name, [rewards[0], rewards[1][:5], rewards[2]]))
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
