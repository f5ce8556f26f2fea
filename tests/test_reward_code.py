"""Programs are rewarded for the tests that they pass, in the sandbox and nowhere else."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rewards.code import read_tests
from forge_hpc.rewards.program import find_program

pytest.importorskip("forge_hpc.sandbox")


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\nprint(1)\n```\nor rather\n```\nprint(2)\n```\n", "print(2)\n"),
        ("<think>```\nprint(1)\n```</think>print(2)", "print(2)"),
        ("```py\nprint('```')\n```", "print('```')\n"),
        ("```python\nprint(1)", "```python\nprint(1)"),
        ("print(1)", "print(1)"),
        ("<think>```\nprint(1)\n```\nI go on", ""),
    ],
)
def test_the_program_is_the_last_closed_block_after_the_thinking(response: str, program: str):
    assert find_program("", response) == program


def test_tests_are_read_in_every_form():
    from forge_hpc.sandbox import Case

    cases = [Case("1\n", "2"), Case("3\n", "4")]
    assert read_tests([{"input": "1\n", "output": "2"}, {"input": "3\n", "output": 4}]) == cases
    assert read_tests(json.dumps({"inputs": ["1\n", "3\n"], "outputs": ["2", "4"]})) == cases
    assert read_tests(["assert f(1) == 2", "assert f(3) == 4"]) == ["assert f(1) == 2", "assert f(3) == 4"]
    assert read_tests("assert f(1) == 2") == ["assert f(1) == 2"]
    for nothing in (None, "", [], "[]", {"inputs": [], "outputs": []}, {"fn_name": "f", "inputs": [1], "outputs": [1]}):
        with pytest.raises(ValueError, match="no tests"):
            read_tests(nothing)


ADD = """```python
def add(a, b):
    return a + b

if __name__ == "__main__":
    print(add(*map(int, input().split())))
```"""
ASSERTS = ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(1, 1) == 3", "assert add('a', 'b') == 'ab'"]


def test_programs_are_rewarded_for_the_share_of_tests_that_they_pass():
    async def main() -> list[Any]:
        rewards = [RewardConfig("code", args={"test_s": 5})]
        async with asyncio.timeout(120), RewardPool(Config(reward=rewards)) as pool:

            async def share(response: str, tests: Any, target: str = "") -> float:
                fields = {} if tests is None else {"tests": tests}
                completion = Completion(0, response, [1], [0], "stop", (0, 0))
                return (await pool.score(Prompt(0, "", [], target, fields), completion))[0]

            return await asyncio.gather(
                share(ADD, ASSERTS),
                share(ADD, [{"input": "1 2", "output": "3"}, {"input": "1 2", "output": "4"}]),
                share(ADD, None, target=ASSERTS[0]),
                share("while True: pass", [ASSERTS[0]]),
                share("import os\nos._exit(0)", [ASSERTS[0]]),
                share("no program at all", ASSERTS),
                share(ADD, None),
                return_exceptions=True,
            )

    *shares, error = asyncio.run(main())
    assert shares == [0.75, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert isinstance(error, RewardError) and "no tests" in str(error)


def test_all_tests_may_be_asked_for():
    async def main() -> list[float]:
        rewards = [RewardConfig("code", args={"require_all": True, "tests_field": "checks"})]
        async with RewardPool(Config(reward=rewards)) as pool:
            completion = Completion(0, ADD, [1], [0], "stop", (0, 0))
            prompts = [Prompt(0, "", [], "", {"checks": checks}) for checks in (ASSERTS, ASSERTS[:2])]
            return [(await pool.score(prompt, completion))[0] for prompt in prompts]

    assert asyncio.run(main()) == [0.0, 1.0]
