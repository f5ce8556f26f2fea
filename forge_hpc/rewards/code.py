"""Reward for a program that passes its tests, run in a sandbox."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from forge_hpc.rewards.program import find_program

if TYPE_CHECKING:
    from forge_hpc.sandbox import Case


class CodeReward:
    """The share of the example's tests that the program in the response passes, from 0.0 to 1.0.

    The program is Python: the last closed code block after the thinking that can be one, else all of it
    (``forge_hpc.rewards.program``). It runs in
    ``forge_hpc.sandbox`` and nowhere else. The tests are the field ``tests`` of the example, or the target where there
    is no such field, as data or as JSON: a list of ``{"input": …, "output": …}`` (what the program reads and must
    print) or of Python texts (``assert add(1, 2) == 3``), one such text, or ``{"inputs": […], "outputs": […]}``.

    Args:
        tests_field: the field that holds the tests.
        require_all: 1.0 where all tests pass, else 0.0.
        test_s: seconds for a single test; for all of them ``sandbox.limits`` holds.
        sandbox: the ``sandbox`` section of the configuration, which the reward pool hands in.
    Raises ValueError for an example without tests, UserError at the start where there is no way to make a sandbox.
    """

    timeout_s: ClassVar[float] = 120.0
    per_node: ClassVar[bool] = True  # it computes with the cores of its node

    def __init__(
        self,
        tests_field: str = "tests",
        require_all: bool = False,
        test_s: float | None = None,
        sandbox: Mapping[str, Any] | None = None,
    ) -> None:
        from forge_hpc.sandbox import Sandbox

        self.tests_field = tests_field
        self.require_all = require_all
        self.test_s = test_s
        self._sandbox = Sandbox.of(sandbox or {})
        # As many as the sandbox runs at once: waiting there would count as the call's time.
        self.concurrency = self._sandbox.parallel

    async def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        tests = read_tests(fields.get(self.tests_field, target))
        share = (await self._sandbox.run_tests(find_program(prompt, response), tests, test_s=self.test_s)).share
        return float(share == 1.0) if self.require_all else share

    def read_answer(self, prompt: str, response: str) -> str:
        """The program that a response is judged by."""
        return find_program(prompt, response)

    async def check(self) -> None:
        """Start a sandbox once. Raises UserError where that does not work."""
        await asyncio.to_thread(self._sandbox.check)


def read_tests(tests: Any) -> list[Case | str]:
    """Tests in any of the forms of ``CodeReward``. Raises ValueError for what is none of them."""
    from forge_hpc.sandbox import Case

    if isinstance(tests, str) and tests.lstrip().startswith(("[", "{")):
        tests = json.loads(tests)
    if isinstance(tests, str) and tests.strip():
        return [tests]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys() and "fn_name" not in tests:
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        tests = [{"input": stdin, "output": stdout} for stdin, stdout in pairs]
    if not isinstance(tests, Sequence) or not tests:
        raise ValueError(f"the example has no tests that can be read: {str(tests)[:80]!r}")
    return [test if isinstance(test, str) else Case(str(test["input"]), str(test["output"])) for test in tests]
