"""The built-in rewards on known values, and how rewards are found and checked before a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from forge_hpc import rewards
from forge_hpc.config.errors import UserError
from forge_hpc.config.load import load_config
from forge_hpc.config.registry import REWARDS
from forge_hpc.config.rewards import check_reward
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.config.validate import validate
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import (
    CodeReward,
    ExactReward,
    FormatReward,
    LengthReward,
    LLMJudgeReward,
    MathReward,
    NumericReward,
    RepetitionReward,
    RewardError,
    RewardPool,
    ThinkingReward,
)
from forge_hpc.rewards.load import load_reward

BAD = Path(__file__).parent / "bad_rewards.py"


def test_exact_wants_the_target_and_forgives_white_space_around_it():
    assert ExactReward()("", " 58\n", "58") == 1.0
    assert ExactReward()("", "581", "58") == 0.0
    assert ExactReward()("", "", "58") == 0.0


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("so 6 * 12 = 72\n#### 72", 1.0),
        ("#### $72.00", 1.0),
        ("The answer is 72.", 1.0),
        ("first #### 12, no: #### 72", 1.0),
        ("#### 72 of 100", 1.0),
        ("between 70-72", 1.0),
        ("<answer>72</answer> or was it 71", 1.0),
        ("<answer>71</answer><answer> $72 </answer>", 1.0),
        ("<answer>71</answer> 72", 0.0),
        ("72.0000001", 1.0),
        ("72.001", 0.0),
        ("-72", 0.0),
        ("#### 71", 0.0),
        ("72 or 73", 0.0),
        ("", 0.0),
        ("none", 0.0),
    ],
)
def test_numeric_compares_final_numbers(response: str, value: float):
    assert NumericReward()("", response, "He has 60 + 12 = 72.\n#### 72") == value


def test_numeric_reads_thousands_separators_and_signs():
    assert NumericReward()("", "it costs $1,234.5", "#### 1234.50") == 1.0
    assert NumericReward()("", "x = -5", "#### -5") == 1.0
    assert NumericReward(tolerance=0.5)("", "about 3.2", "3") == 1.0


def test_numeric_refuses_a_target_without_a_number():
    with pytest.raises(ValueError, match="no number"):
        NumericReward()("", "7", "seven")


@pytest.fixture(scope="module")
def math() -> MathReward:
    return MathReward()


@pytest.mark.parametrize(
    ("response", "target", "value"),
    [
        (r"so it is \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2}", "x^2", 1.0),
        (r"\boxed{2}", "x^2", 0.0),
        (r"$(x+1)^2$", "x^2+2x+1", 1.0),
        (r"\boxed{\{2, 1\}}", r"$\{1,2\}$", 1.0),
        ("The answer is 72.", "72", 1.0),
        ("<think>72</think> <answer>72</answer>", "72", 1.0),
        ("<answer>1/2</answer>", "0.5", 1.0),
        (r"<answer>\boxed{\frac{1}{2}}</answer>", "0.5", 1.0),
        ("<answer>$1,000.00</answer>", "1000", 1.0),
        ("<answer>72.0000001</answer>", "72", 1.0),
        ("<answer>72.1</answer>", "72", 0.0),
        (r"<think>\boxed{72}</think> It is 71.", "72", 0.0),
        ("... \n#### 72", "60 + 12 = <<60+12=72>>72\n#### 72", 1.0),
        (r"We get \boxed{12}", r"Adding up, $5+7=\boxed{12}$.", 1.0),
        (r"\boxed{71}", "72", 0.0),
        ("", "72", 0.0),
    ],
)
def test_math_compares_answers_as_mathematics(math: MathReward, response: str, target: str, value: float):
    assert math("", response, target) == value


def test_math_gives_partial_credit_for_the_right_number_in_the_wrong_place():
    reward = MathReward(partial_credit=0.1)
    assert reward("", "<answer>71</answer> or 72", "72") == 0.1
    assert reward("", "<answer>71</answer> or 172", "72") == 0.0
    assert reward("", "<answer>72</answer>", "72") == 1.0


def test_math_refuses_a_target_that_is_no_mathematics(math: MathReward):
    with pytest.raises(ValueError, match="no mathematics"):
        math("", "72", "")


HOSTILE = {
    "a tower": r"\boxed{10^{10^{10^{10}}}}",
    "a tower in plain text": "the answer is 10**10**10**10",
    "a factorial": r"\boxed{(10^9)!}",
    "nested fractions": r"\boxed{" + r"\frac{1}{" * 400 + "x" + "}" * 400 + "}",
    "nested brackets": r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "open braces": r"\boxed{" + "{" * 20000,
    "dollars": "$" * 20000,
    "digits": r"\boxed{" + "9" * 200_000 + "}",
}


def test_math_is_done_with_hostile_answers_within_its_limit():
    """They are wrong, or their time is up; either way the next answer is judged."""

    async def main() -> None:
        config = Config(reward=[RewardConfig("math", args={"limit_s": 1}, timeout_s=4)])
        async with RewardPool(config, num_workers=2) as pool:
            scores = (pool.score(prompt("72"), completion(text)) for text in HOSTILE.values())
            results = await asyncio.gather(*scores, return_exceptions=True)
            for name, result in zip(HOSTILE, results, strict=True):
                wrong = not isinstance(result, BaseException) and result[0] == 0.0
                assert wrong or (isinstance(result, RewardError) and result.kind == "timeout"), (name, result)
            assert (await pool.score(prompt("72"), completion(r"\boxed{72}")))[0] == 1.0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>because</think> 4", 1.0),
        ("< Think >\nbecause\n</ THINK > 4", 1.0),
        ("<think>a <think>b</think> c", 1.0),
        ("<think></think><think>x</think>", 1.0),
        ("<think> \n </think> 4", 0.2),
        ("<think>because", 0.2),
        ("because</think> 4", 0.2),
        ("</think>because<think>", 0.2),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_thinking_wants_a_closed_block_with_something_in_it(response: str, value: float):
    assert ThinkingReward()("", response) == value


def test_thinking_takes_its_values_and_its_tag_and_knows_a_prompt_that_opens_the_block():
    reward = ThinkingReward(partial_reward=0.3, full_reward=0.9, tag="plan")
    assert [reward("", text) for text in ("<plan>x</plan>", "<plan>", "<think>x</think>")] == [0.9, 0.3, 0.0]
    assert ThinkingReward()("2+2=<think>\n", "because</think> 4") == 1.0
    assert ThinkingReward()("2+2=<think>\n", "4") == 0.2


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("<think>a</think><answer>4</answer>", 1.0),
        (" <think>\na\n</think>\n<answer>4</answer>\n", 1.0),
        ("<think></think><answer>4</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<think>a</think> so <answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer>.", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_format_wants_thoughts_and_then_an_answer(response: str, value: float):
    assert FormatReward()("", response, "") == value


def test_format_takes_a_pattern_and_knows_a_prompt_that_opens_the_block():
    assert FormatReward()("2+2=<think>\n", "a</think><answer>4</answer>", "") == 1.0
    reward = FormatReward(pattern=r"Answer: \d+.*")
    assert [reward("", text, "") for text in ("Answer: 4\n(or 5)", "Answer: four", "The Answer: 4")] == [1, 0, 0]
    with pytest.raises(ValueError, match="no regular expression"):
        FormatReward(pattern="(")


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 1), (80, 1), (85, 0.75), (90, 0.5), (100, 0), (1000, 0)])
def test_length_goes_down_in_a_line_before_its_limit(num_tokens: int, value: float):
    assert LengthReward(max_tokens=100, ramp_tokens=20)("", "", "", num_tokens=num_tokens) == pytest.approx(value)


def test_length_without_a_ramp_is_a_step():
    assert [LengthReward(100)("", "", "", num_tokens=n) for n in (100, 101)] == [1.0, 0.0]
    with pytest.raises(ValueError, match="ramp_tokens=101"):
        LengthReward(100, 101)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a b c d", 1.0), ("a b a b", 2 / 3), ("A a a a", 1 / 3), ("a", 1.0), ("", 1.0), ("na " * 101, 1 / 100)],
)
def test_repetition_is_the_share_of_different_ngrams(text: str, value: float):
    assert RepetitionReward(ngram_size=2)("", text, "") == pytest.approx(value)


def test_repetition_may_count_characters():
    assert RepetitionReward(ngram_size=2, characters=True)("", "哈哈哈", "") == 0.5
    with pytest.raises(ValueError, match="ngram_size=0"):
        RepetitionReward(ngram_size=0)


@pytest.mark.parametrize(
    "text", ["<think>" * 20_000, "<" * 100_000, "#### " * 20_000, "<answer>" * 20_000, "9" * 99_999]
)
def test_inline_rewards_are_quick_whatever_the_response(text: str):
    """They run in the controller itself: each is linear in the response (a quadratic one would take minutes here)."""
    for name in ("exact", "numeric", "gsm8k", "thinking", "repetition"):
        load_reward(name)("", text, "1", {"num_tokens": 1})


# --- names, files and signatures


def test_all_rewards_are_public_documented_and_have_a_name():
    classes = [rewards.__dict__[name] for name in rewards.__all__ if name.endswith("Reward")]
    assert {CodeReward, LLMJudgeReward, MathReward} < set(classes)
    named = {value.rpartition(":")[2] for value in REWARDS.values()}
    assert named == {cls.__name__ for cls in classes}
    for cls in classes:
        assert cls.__doc__ and len(cls.__doc__) > 60


def test_a_reward_is_found_by_name_module_or_file(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text("def length(prompt, response, target, *, scale=1.0, **fields):\n    return len(response) * scale\n")
    assert isinstance(load_reward("exact").function, ExactReward)
    assert isinstance(load_reward("forge_hpc.rewards.numeric:NumericReward", {"tolerance": 1}).function, NumericReward)
    assert load_reward(f"{file}:length")("", "abc", "", {"scale": 7}) == 21  # a field of the example
    assert load_reward(f"{file}:length", {"scale": 2})("", "abc", "", {"scale": 7}) == 6  # args win


@pytest.mark.parametrize("name", ["exakt", "no_such_module:f", "missing.py:f", "forge_hpc.rewards.exact:nothing"])
def test_a_reward_that_is_not_there_is_the_users_error(name: str):
    with pytest.raises(UserError) as error:
        load_reward(name)
    assert error.value.hint


def test_an_unknown_name_lists_the_names():
    with pytest.raises(UserError) as error:
        validate(load_config(None, ["reward=[{name: zzz}]"]))
    assert all(name in (error.value.hint or "") for name in REWARDS)


SOURCE = """
import functools
from math import gcd

def fine(prompt, response, target, **fields): return 1.0
async def fine_too(*args, **fields): return 1.0
def wants_a_field(prompt, response, target, difficulty, **fields): return 1.0
@functools.cache
def decorated(*anything): return 1.0
def no_fields(prompt, response, target): return 1.0
def too_few(prompt, **fields): return 1.0
class Fine:
    def __init__(self, scale, *, limit, offset=0): pass
    async def __call__(self, prompt, response, target, **fields): return 1.0
class Inherits(Fine): pass
class Plain:
    def __call__(self, prompt, response, target, **fields): return 1.0
class NoFields:
    def __call__(self, prompt, response, target): return 1.0
class NoCall: pass
instance = Plain()
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.py"
    file.write_text(SOURCE)
    return file


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fine", {}),
        ("fine", {"anything": 1}),
        ("fine_too", {}),
        ("wants_a_field", {}),
        ("decorated", {}),
        ("gcd", {}),
        ("instance", {}),
        ("Fine", {"scale": 1, "limit": 2}),
        ("Inherits", {"whatever": 1}),
        ("Plain", {}),
    ],
)
def test_what_may_be_right_passes_without_being_run(source: Path, name: str, args: dict[str, Any]):
    source.write_text(SOURCE + "\nraise SystemExit('it was run')\n")
    check_reward("reward.0", RewardConfig(f"{source}:{name}", args=args))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("no_fields", {}, "no_fields does not take \\*\\*fields"),
        ("too_few", {}, "too few arguments"),
        ("NoFields", {}, "NoFields.__call__ does not take \\*\\*fields"),
        ("NoCall", {}, "NoCall has no __call__"),
        ("Fine", {"limit": 1}, "reward.0.args: Fine needs scale"),
        ("Fine", {"scale": 1, "limit": 1, "ofset": 1}, "Fine has no argument 'ofset'"),
        ("Plain", {"scale": 1}, "Plain takes no arguments"),
        ("nothing", {}, "has no 'nothing'"),
    ],
)
def test_what_is_certainly_wrong_is_told_before_anything_is_queued(source: Path, name: str, args: Any, message: str):
    with pytest.raises(UserError, match=message) as error:
        check_reward("reward.0", RewardConfig(f"{source}:{name}", args=args))
    assert error.value.hint


@pytest.mark.parametrize(
    ("reward", "message", "hint"),
    [
        ("{name: length}", "LengthReward needs max_tokens", "it takes max_tokens, ramp_tokens"),
        ("{name: math, args: {tolerence: 1}}", "MathReward has no argument 'tolerence'", "did you mean tolerance?"),
        ("{name: exact, args: {x: 1}}", "ExactReward takes no arguments", "it is given x"),
        ("{name: exact, workers: 0}", "reward.0.workers must be greater than 0", None),
        ("{name: exact, timeout_s: -1}", "reward.0.timeout_s must be greater than 0", None),
        (
            "{name: llm_judge, args: {model: m, base_url: u, api_key: sk-secret}}",
            "LLMJudgeReward has no argument 'api_key'",
            "did you mean api_key_env?",
        ),
    ],
)
def test_built_in_rewards_are_checked_before_anything_is_queued(reward: str, message: str, hint: str | None):
    with pytest.raises(UserError, match=message) as error:
        validate(load_config(None, [f"reward=[{reward}]"]))
    assert error.value.hint == hint and "sk-secret" not in str(error.value)


# --- the weighted sum


def prompt(target: str = "58", **fields: Any) -> Prompt:
    return Prompt(0, "72+85=", [1, 2], target, fields)


def completion(text: str) -> Completion:
    return Completion(0, text, [3], [-0.1], "stop", (0, 0))


def test_the_total_is_the_weighted_sum_and_terms_are_unweighted():
    config = Config(reward=[RewardConfig("exact", 2.0), RewardConfig("gsm8k", 0.5)])
    total, terms = asyncio.run(RewardPool(config).score(prompt(), completion("it is 58")))
    assert terms == {"exact": 0.0, "gsm8k": 1.0}
    assert total == 0.5


def test_users_rewards_get_fields_and_arguments_sync_or_async(tmp_path: Path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompt, response, target, *, scale=1.0, **fields):\n    return len(response) * scale\n"
        "async def later(prompt, response, target, **fields):\n    return fields['difficulty'] + fields['num_tokens']\n"
    )

    async def main() -> tuple[float, dict[str, float]]:
        terms = [RewardConfig(f"{file}:length", args={"scale": 10.0}), RewardConfig(f"{file}:later", weight=4)]
        async with RewardPool(Config(reward=terms), num_workers=1) as pool:
            # Fields that are called as what a reward gets anyway must not come twice.
            return await pool.score(prompt(difficulty=0.25, response="?", target="?"), completion("58"))

    total, terms = asyncio.run(main())
    assert terms == {"length": 20.0, "later": 1.25}
    assert total == 25.0
