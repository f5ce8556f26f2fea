"""The figures of an evaluation, against what they estimate; what may be asked for; where it runs; how it is shown."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from forge_hpc.config import Config, UserError, load_config, plan, read_config, save_config, validate
from forge_hpc.config.schema import LoggingConfig
from forge_hpc.config.sources import held_out_sets
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.prompts import evaluation_prompts
from forge_hpc.data.types import HELD_OUT
from forge_hpc.evaluation.figures import (
    Graded,
    best_of_k,
    bootstrap_interval,
    evaluation_seed,
    figures_of_sets,
    greedy_figures,
    majority_at_k,
    pass_at_k,
    sampled_figures,
    wilson_interval,
)
from forge_hpc.generation.seeds import sample_seed
from forge_hpc.hub.assets import assets_of
from forge_hpc.observability.logger import MetricLogger
from forge_hpc.observability.report import render_report
from forge_hpc.observability.summary import final_summary
from forge_hpc.observability.watching import render_status
from forge_hpc.run_dir import RunDir

RIGHT, WRONG = Graded(True, 1.0), Graded(False, 0.0)


# ---------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize(("num", "num_right", "k"), [(5, 2, 1), (5, 2, 3), (6, 1, 4), (4, 0, 2), (4, 4, 2), (5, 3, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(num: int, num_right: int, k: int):
    samples = [True] * num_right + [False] * (num - num_right)
    choices = list(itertools.combinations(samples, k))
    assert pass_at_k(num, num_right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_is_unbiased_and_takes_many_samples():
    draws = np.random.default_rng(0)
    estimates = [pass_at_k(8, int(right), 4) for right in draws.binomial(8, 0.2, size=20_000)]
    assert np.mean(estimates) == pytest.approx(1 - 0.8**4, abs=0.005)
    assert pass_at_k(4000, 1, 2000) == pytest.approx(0.5)


def graded(text: str) -> list[Graded]:
    """A letter an answer, R and r are right ones, a dot none at all."""
    return [Graded(letter in "Rr", float(i), None if letter == "." else letter) for i, letter in enumerate(text)]


@pytest.mark.parametrize("text", ["RaR.bb", "Raabb", "RrRrab", "aaaR", "....", "R...", "RRaabbcR"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_majority_and_best_of_k_are_means_over_all_choices_of_k_samples(text: str, k: int):
    samples = graded(text)
    majorities, best = [], []
    for choice in itertools.combinations(samples, k):
        votes = Counter(sample.answer for sample in choice if sample.answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        majorities.append(sum(answer in "Rr" for answer in winners) / len(winners) if winners else 0.0)
        best.append(max(sample.reward for sample in choice))
    assert majority_at_k(samples, k) == pytest.approx(np.mean(majorities, dtype=np.float64), rel=1e-12)
    assert best_of_k([sample.reward for sample in samples], k) == pytest.approx(np.mean(best), rel=1e-12)


def test_best_of_k_with_rewards_of_0_and_1_is_pass_at_k_and_both_take_many_samples():
    assert best_of_k([0.0, 1.0, 0.0, 1.0, 0.0], 3) == pytest.approx(pass_at_k(5, 2, 3))
    many = [Graded(i % 3 == 0, float(i % 3 == 0), str(i % 3)) for i in range(128)]  # 43 of 0, 43 of 1, 42 of 2
    assert 1 / 3 < majority_at_k(many, 3) < majority_at_k(many, 64) < majority_at_k(many, 127) == pytest.approx(0.5)
    assert majority_at_k(many, 128) == 0.5
    more = [Graded(i < 601, float(i < 601), str(i < 601)) for i in range(1201)]  # beyond what float64 can count
    assert 0.5 < majority_at_k(more, 599) < majority_at_k(more, 1199) < majority_at_k(more, 1201) == 1.0
    assert best_of_k([1.0] * 600 + [0.0] * 601, 600) == pytest.approx(1.0)


def test_majority_and_best_are_left_out_where_nobody_knows_them():
    figures = sampled_figures([[RIGHT, WRONG], [Graded(), RIGHT]], (1, 2), seed=3)
    assert "maj@2" not in figures and (figures["best@2"], figures["best@2_low"]) == (1.0, 1.0)  # of the first prompt
    figures = sampled_figures([graded("Ra"), graded("ab"), graded("..")], (1, 2), seed=3)
    assert (figures["maj@2"], figures["best@2"]) == (pytest.approx(0.5 / 3), 1.0) and "best@1" not in figures


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_more_than_was_sampled_is_refused(k: int):
    with pytest.raises(ValueError, match="from 1 to 4"):
        pass_at_k(4, 2, k)
    with pytest.raises(ValueError, match="from 1 to 4"):
        best_of_k([1.0] * 4, k)
    with pytest.raises(ValueError, match="from 1 to 4"):
        majority_at_k([RIGHT] * 4, k)


def test_wilsons_interval_has_published_values_and_is_never_empty():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4901625, abs=1e-6), pytest.approx(0.9433178, abs=1e-6))
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.1611252, abs=1e-6))
    assert wilson_interval(20, 20) == (pytest.approx(1 - 0.1611252, abs=1e-6), 1.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draws, truth = np.random.default_rng(1), 0.3
    wilson, bootstrap = [], []
    for trial in range(300):
        values = draws.binomial(1, truth, size=100)
        wilson.append(wilson_interval(int(values.sum()), 100))
        means = draws.binomial(4, draws.beta(3, 7, size=60)) / 4  # prompts of different difficulty, 0.3 on average
        bootstrap.append(bootstrap_interval(means, trial))
    for intervals in (wilson, bootstrap):
        assert 0.90 <= np.mean([low <= truth <= high for low, high in intervals]) <= 0.99


def test_the_bootstrap_repeats_and_is_not_certain_where_all_prompts_are_equal():
    values = [0.0, 0.25, 0.5, 1.0]
    assert bootstrap_interval(values, 7) == bootstrap_interval(values, 7)
    assert bootstrap_interval([0.0] * 20, 7) == wilson_interval(0, 20)
    low, high = bootstrap_interval([0.5] * 5, 7)
    assert low < 0.5 < high


def test_an_answer_without_a_reward_is_wrong_and_left_out_of_the_mean():
    figures = greedy_figures([RIGHT, Graded(False, 0.5), Graded(), RIGHT])
    assert (figures["accuracy"], figures["reward"]) == (0.5, pytest.approx(2.5 / 3))
    assert figures["accuracy_low"] < 0.5 < figures["accuracy_high"]
    assert "reward" not in greedy_figures([Graded()])


def test_sampled_figures_are_means_over_prompts():
    figures = sampled_figures([[RIGHT, RIGHT, WRONG, Graded()], [WRONG] * 4], (1, 2), seed=3)
    assert figures["pass@1"] == pytest.approx(0.25) and figures["pass@2"] == pytest.approx((1 - 1 / 6) / 2)
    assert figures["pass@2_low"] <= figures["pass@2"] <= figures["pass@2_high"]
    assert figures["reward_sampled"] == pytest.approx(2 / 7)


def test_each_of_several_sets_has_its_figures_beside_those_of_all_prompts():
    labels, greedy = ["a", "b", "a", "b", "b"], [[RIGHT], [WRONG], [RIGHT], [RIGHT], [WRONG]]
    sampled = [[RIGHT, WRONG], [WRONG, WRONG], [RIGHT, RIGHT], [WRONG, WRONG], [WRONG, RIGHT]]
    figures = figures_of_sets(labels, greedy, sampled, (1,), seed=3)
    assert (figures["accuracy"], figures["a/accuracy"], figures["b/accuracy"]) == (0.6, 1.0, pytest.approx(1 / 3))
    assert (figures["pass@1"], figures["a/pass@1"], figures["b/pass@1"]) == (0.4, 0.75, pytest.approx(1 / 6))
    assert (figures["a/num_prompts"], figures["b/num_prompts"]) == (2, 3)
    own = greedy_figures([RIGHT, RIGHT]) | sampled_figures([sampled[0], sampled[2]], (1,), 3)
    assert {key: figures[f"a/{key}"] for key in own} == own
    only = figures_of_sets([""] * 5, greedy, sampled, (1,), seed=3)
    counts = {"num_prompts": 5, "num_failed": 0}
    assert only == greedy_figures([one for [one] in greedy]) | sampled_figures(sampled, (1,), 3) | counts


def test_evaluations_have_seeds_of_their_own():
    seeds = {evaluation_seed(run, step) for run in range(20) for step in range(20)}
    training = {sample_seed(run, place, sample) for run in range(20) for place in range(20) for sample in range(8)}
    assert len(seeds) == 400 and not seeds & training and evaluation_seed(1, 2) == evaluation_seed(1, 2)


# ---------------------------------------------------------------------------------------------------- configuration
SETS = ["evaluation.num_prompts=9", "evaluation.sets=[{label: a, path: 'builtin:addition'}, {label: b, path: org/hub}]"]


def test_a_held_out_set_takes_from_data_what_it_leaves_out(tmp_path: Path):
    changes = ["data.system_prompt=Think.", "data.name=main", "evaluation.sets.1.num_prompts=3", "data.eval_split=dev"]
    cfg = load_config(
        None, [*SETS, *changes, "evaluation.sets.0.split=hard", "evaluation.sets.0.reward=[{name: math}]"]
    )
    validate(cfg)
    a, b = held_out_sets(cfg)
    assert (a.label, a.num_prompts, a.config.data.eval_path, a.config.data.eval_split) == (
        "a",
        9,
        "builtin:addition",
        "hard",
    )
    assert [reward.name for reward in a.rewards] == ["math"] and not b.rewards
    assert (b.num_prompts, b.config.data.eval_path, b.config.data.eval_split, b.config.data.system_prompt) == (
        3,
        "org/hub",
        "dev",
        "Think.",
    )
    assert b.config.data.name is None and {str(asset) for asset in assets_of(cfg)} == {"data set org/hub"}
    save_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == cfg
    assert held_out_sets(load_config(None)) == []


def test_prompts_of_several_sets_have_positions_apart():
    config = Config()
    examples = [{"question": f"{i}?", "answer": "1"} for i in range(3)]
    config.data.chat_template = False
    tokenizer = char_tokenizer()
    positions = [
        [prompt.position for prompt in evaluation_prompts(examples, tokenizer, config, 3, number)]
        for number in (0, 1, 63)
    ]
    assert positions[0] == [HELD_OUT, HELD_OUT + 1, HELD_OUT + 2] and len({p for s in positions for p in s}) == 9
    assert positions[2][-1] < 2 * HELD_OUT


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["evaluation.samples=4"], "evaluation.num_prompts=0 switches evaluation off"),
        (
            ["evaluation.sets=[{label: a, path: 'builtin:addition'}]"],
            "evaluation.num_prompts=0 switches evaluation off",
        ),
        ([*SETS, "evaluation.sets.1.label=a"], "two of evaluation.sets have the label 'a'"),
        ([*SETS, "evaluation.sets.1.label=a/b"], "evaluation.sets.1.label is 'a/b'"),
        (["evaluation.num_prompts=9", "evaluation.sets=[{label: a}]"], "evaluation.sets.0 has no path"),
        ([*SETS, "evaluation.sets.1.path=nowhere.jsonl"], "evaluation.sets.1.path: no such file: nowhere.jsonl"),
        ([*SETS, "evaluation.sets.1.reward=[{name: exat}]"], "evaluation.sets.1.reward.0.name is 'exat'"),
        ([*SETS, "evaluation.sets.1.reward=[{name: exact}, {name: exact}]"], "reward 'exact' is given twice"),
        (
            [*SETS, "evaluation.interval=5", "checkpoint.best=c/accuracy"],
            "of a held-out set that there is not",
        ),
        (["recipe=eval"], "does nothing else"),
        (["evaluation.num_prompts=9", "evaluation.k=[1, 4]"], "evaluation.k is for sampled answers"),
        (["evaluation.num_prompts=9", "evaluation.temperature=1"], "evaluation.temperature is for sampled answers"),
        (["evaluation.num_prompts=9", "evaluation.samples=4", "evaluation.k=[1, 8]"], "evaluation.k is [1, 8]"),
        (["evaluation.num_prompts=9", "evaluation.samples=4", "evaluation.k=[2, 2]"], "evaluation.k is [2, 2]"),
        (["evaluation.num_prompts=9", "evaluation.samples=4", "evaluation.k=[]"], "evaluation.k is []"),
        (["evaluation.num_prompts=9", "evaluation.samples=4", "evaluation.temperature=0"], "is greedy"),
        (["recipe=eval", "evaluation.num_prompts=9", "cluster.nodes=4", "cluster.trainer_nodes=2"], "on every node"),
        (["recipe=eval", "evaluation.num_prompts=9", "reward=[]"], "no reward"),
        (["recipe=nowhere.py:f"], "recipe: no such file: nowhere.py"),
        (["recipe='nowhere.py:'"], "recipe is 'nowhere.py:'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(overrides: list[str], words: str):
    with pytest.raises(UserError) as caught:
        validate(load_config(None, overrides))
    assert words in caught.value.message and caught.value.hint


def test_a_list_of_numbers_is_called_so():
    with pytest.raises(UserError, match="must be a list of whole numbers"):
        load_config(None, ["evaluation.k=[one]"])


def test_an_evaluation_generates_on_every_node_and_every_gpu():
    overrides = ["recipe=eval", "evaluation.num_prompts=9", "cluster.nodes=4", "cluster.spare_nodes=1"]
    cfg = load_config(None, [*overrides, "generator.engine.tensor_parallel_size=2"])
    placement = plan(cfg, 8)
    assert (placement.trainer_nodes, placement.rollout_nodes) == (range(0), range(3))
    assert placement.replica_gpus == ((0, 1), (2, 3), (4, 5), (6, 7)) and placement.trainer_procs == 0
    assert "trainers" not in placement.describe() and "12 replicas" in placement.describe()
    assert plan(load_config(None, [*overrides[:2], "generator.replicas=3"]), 0).replicas == 3


# ---------------------------------------------------------------------------------------------------- what is shown
def test_an_evaluation_alone_is_reported_without_steps(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.config.write_text("recipe: eval\ntrainer:\n  training:\n    steps: 100\n")
    figures = greedy_figures([RIGHT, WRONG]) | sampled_figures([[RIGHT], [WRONG]], (1,), 0)
    with MetricLogger(run_dir, LoggingConfig(console="none")) as logger:
        logger.log_evaluation(0, figures | {"num_prompts": 2})
    run_dir.write_status(state="completed", total_steps=0)
    for text in (final_summary(run_dir), render_report(run_dir)):
        assert "completed" in text and "step" not in text
        assert "| greedy accuracy  | 0.500 | 0.095 to 0.905 |" in text and "| pass@1 " in text
    assert "step" not in render_status(run_dir)


def test_the_evaluations_of_a_training_have_a_line_each(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run").create()
    with MetricLogger(run_dir, LoggingConfig(console="none")) as logger:
        logger.log_evaluation(0, greedy_figures([RIGHT, WRONG]))
        logger.log_evaluation(5, greedy_figures([RIGHT, RIGHT]))
    run_dir.write_status(state="running", step=5)
    assert "| 5    | 1.000 (0.342 to 1.000) |  1.000 |" in render_report(run_dir)


def test_report_and_status_show_the_accuracy_of_each_set(tmp_path: Path):
    run_dir = RunDir(tmp_path / "run").create()
    figures = figures_of_sets(["gsm8k", "math"], [[RIGHT], [WRONG]], [], (), 0)
    with MetricLogger(run_dir, LoggingConfig(console="none")) as logger:
        logger.log_evaluation(0, figures)
        logger.log_evaluation(5, figures)
    run_dir.write_status(state="running", step=5)
    report = render_report(run_dir)
    assert " gsm8k/accuracy |" in report and " math/accuracy |" in report and " 1.000 (0.207 to 1.000) |" in report
    assert "accuracy 0.500  gsm8k/accuracy 1.000  math/accuracy 0.000  after step 5" in render_status(run_dir)
