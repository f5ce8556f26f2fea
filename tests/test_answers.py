"""What is read out of a response, and whether it is the target: a table of answers and verdicts, and its siblings."""

from __future__ import annotations

import signal
import time
from fractions import Fraction

import pytest
from answer_table import MATH, NUMERIC, PROGRAMS

from forge_hpc.rewards import MathReward, NumericReward
from forge_hpc.rewards.answers import after_thinking, final_answer, marked_answer
from forge_hpc.rewards.numbers import numbers, plain_number
from forge_hpc.rewards.program import find_program


@pytest.fixture(scope="module")
def math() -> MathReward:
    return MathReward()


@pytest.mark.parametrize("kind", MATH)
def test_math_gives_the_verdicts_of_a_careful_grader(math: MathReward, kind: str):
    verdicts = {(target, response): int(math("", response, target)) for target, response, _ in MATH[kind]}
    assert verdicts == {(target, response): verdict for target, response, verdict in MATH[kind]}


def test_numeric_gives_the_verdicts_of_a_careful_grader():
    verdicts = {(target, response): int(NumericReward()("", response, target)) for target, response, _ in NUMERIC}
    assert verdicts == {(target, response): verdict for target, response, verdict in NUMERIC}


def test_the_program_is_the_last_block_that_can_be_one():
    assert {response: find_program("", response) for response, _ in PROGRAMS} == dict(PROGRAMS)


def test_the_table_holds_enough_of_each_format_and_of_both_verdicts():
    rows = [row for rows in MATH.values() for row in rows] + NUMERIC
    assert len(rows) + len(PROGRAMS) >= 400
    assert sum(verdict == 0 for *_, verdict in rows) > 140


@pytest.mark.parametrize("opened", ["<think>", "<think>\n", "<|im_start|>assistant\n<think>\n\n", "[THINK]"])
def test_thinking_that_the_template_opened_and_nothing_closed_holds_no_answer(math: MathReward, opened: str):
    for reward in (math, NumericReward()):
        assert reward(f"1+1={opened}", r"It is \boxed{2}", "2") == 0.0
        assert reward(f"1+1={opened}", r"It is 3</think>\boxed{2}", "2") == 1.0
        assert reward(f"1+1={opened}", r"It is \boxed{2}[/THINK]</think>It is 3", "2") == 0.0
    assert find_program(f"Add.{opened}", "```python\nprint(2)\n```") == ""
    assert find_program(f"Add.{opened}", "Hm</think>```\nx\n```\n```python\nprint(2)\n```") == "print(2)\n"


def test_a_block_that_the_template_closed_is_no_thinking_that_goes_on(math: MathReward):
    assert math("1+1=<think>\n\n</think>\n\n", r"\boxed{2}", "2") == 1.0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-05", Fraction(5, 100000)),
        ("6.02e23", Fraction(602 * 10**21)),
        ("- 3", Fraction(-3)),
        (r"1\,234", Fraction(1234)),
        ("1,234", Fraction(1234)),
        ("1,2", None),
        ("1,23", None),
        ("12,34", None),
        ("1234,567", None),
        ("1e99999", None),
        ("9" * 2000, None),
        ("1/0", None),
        ("", None),
        (".", None),
    ],
)
def test_a_number_is_read_as_it_is_meant(text: str, value: Fraction | None):
    number = plain_number(text)
    assert (number and number.value) == value


def test_all_numbers_of_a_text_are_found_with_their_signs():
    text = "from -1 to 2, 3-4, x=-5, 1,234,567 or 6.5e-3, H2O, 3/4, 1 1/2 and (-7)."
    expected = [-1, 2, 3, 4, -5, 1234567, Fraction(13, 2000), Fraction(3, 4), Fraction(3, 2), -7]
    assert [number.value for number in numbers(text)] == expected


@pytest.mark.parametrize("reward", ["math", "numeric"])
def test_tolerances_have_a_relative_part_and_can_be_widened(math: MathReward, reward: str):
    exact = math if reward == "math" else NumericReward()
    wide = MathReward(tolerance=0.5) if reward == "math" else NumericReward(tolerance=0.5)
    assert exact("", "9e-7", "3e-7") == 0.0
    assert exact("", "3.0000001e-7", "3e-7") == 1.0
    assert exact("", "3.2", "3") == 0.0
    assert wide("", "3.2", "3") == 1.0
    assert wide("", "3.6", "3") == 0.0
    with pytest.raises(ValueError, match="tolerance"):
        NumericReward(tolerance=-1)


def test_a_target_that_is_empty_is_refused_not_answered(math: MathReward):
    for target in ("", "  ", "$$", r"\boxed{}"):
        with pytest.raises(ValueError, match="target"):
            math("", "", target)
        with pytest.raises(ValueError, match="target"):
            NumericReward()("", "", target)


@pytest.mark.parametrize("limit_s", [0.3, 2.0])
def test_the_limit_of_math_may_be_a_fraction_of_a_second_and_holds(limit_s: float):
    reward = MathReward(limit_s=limit_s)
    assert reward("", r"\boxed{x+1}", "1+x") == 1.0
    before = signal.getsignal(signal.SIGALRM)
    if limit_s < 1:
        started = time.process_time()
        assert reward("", r"\boxed{10^{10^{10^{10}}}}", "72") == 0.0
        assert time.process_time() - started < 20 * limit_s
    assert signal.getsignal(signal.SIGALRM) is before
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="limit_s"):
            MathReward(limit_s=wrong)


HOSTILE = ["<think>", "<", "#### ", "<answer>", "9", r"\boxed{", r"\boxed{1},", "$", "$a", r"\(", r"\[", "answer is "]
HOSTILE += [
    "Answer:\n",
    '{"answer":',
    '{"answer":[',
    " ",
    "\n",
    "#### a\n",
    "1,",
    "111,",
    "- ",
    "1 1/",
    r"\frac{1",
    "1e",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_reading_an_answer_is_linear_in_the_response(text: str):
    """The readers of numbers and marks run in the controller itself; a quadratic one would take minutes here."""
    started = time.process_time()
    long = text * (60_000 // len(text))
    final_answer(after_thinking(long, long))
    numbers(long)
    find_program("", long)
    assert time.process_time() - started < 20


def test_marks_within_marks_are_read_to_the_end():
    assert marked_answer(r"<answer>So \boxed{\frac{1}{2}}</answer>") == r"\frac{1}{2}"
    assert marked_answer("no mark") is None
    assert marked_answer(r"\boxed{5} and \boxed{") == ""


@pytest.mark.parametrize(
    ("words", "finish_reason", "stop_reason", "text"),
    [
        (["<think>", "72", "</think>", "72", "<eos>"], "stop", None, "<think>72</think>72"),
        (["<think>", "72", "</think>", "72", "<end_of_turn>"], "stop", 3, "<think>72</think>72"),
        (["<think>", "72"], "length", None, "<think>72"),
        (["72", "</think>"], "length", None, "72</think>"),
        (["72", "<think>"], "stop", "<think>", "72<think>"),
        (["<eos>"], "stop", None, ""),
    ],
)
def test_tags_that_are_special_tokens_stay_in_the_text_and_the_end_of_the_answer_does_not(
    words: list[str], finish_reason: str, stop_reason: int | str | None, text: str
):
    from forge_hpc.data.builtin import char_tokenizer
    from forge_hpc.generation.engine import said_text

    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<end_of_turn>"]})
    ids = [i for word in words for i in tokenizer.encode(word, add_special_tokens=False)]
    assert "<think>" not in tokenizer.decode(ids, skip_special_tokens=True)
    assert said_text(tokenizer, ids, finish_reason, stop_reason) == text
