"""A program to write that has to pass tests, with a sandbox to run it in and what failed as the observation."""

from __future__ import annotations

from typing import Any

from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Step
from forge_hpc.rewards.code import read_tests
from forge_hpc.rewards.program import find_program
from forge_hpc.sandbox import Sandbox

_MAX_REASON_CHARS = 300


class Code:
    """Runs the program in a response against the prompt's tests; both are read as ``CodeReward`` reads them.

    Args:
        tests_field: the field of the example that holds the tests; without it, the target does.
        max_failures: so many failed tests are shown to the policy: the text of a test or what its program was to read,
            and why it failed.
        sandbox: the fields of ``SandboxConfig``; ``parallel`` holds for all episodes together.

    The episode's reward is the largest share of tests that any of its programs passed; passing all ends it.
    """

    def __init__(
        self, tests_field: str = "tests", max_failures: int = 3, sandbox: dict[str, Any] | None = None
    ) -> None:
        self._sandbox = Sandbox.of(sandbox or {})
        self.concurrency = self._sandbox.parallel
        self._tests_field, self._max_failures = tests_field, max_failures
        self._best = 0.0

    async def reset(self, prompt: Prompt) -> None:
        """The prompt stays as it is. Raises ValueError where it has no tests that can be read."""
        self._prompt = prompt.text
        self._tests = read_tests(prompt.fields.get(self._tests_field, prompt.target))

    async def step(self, response: str) -> Step:
        report = await self._sandbox.run_tests(find_program(self._prompt, response), self._tests)
        gain, self._best = max(0.0, report.share - self._best), max(report.share, self._best)
        failures = [
            f"{test if isinstance(test, str) else test.stdin}\n{verdict.reason[:_MAX_REASON_CHARS]}"
            for test, verdict in zip(self._tests, report.verdicts, strict=True)
            if not verdict.passed
        ]
        passed = f"{report.num_passed} of {len(self._tests)} tests passed."
        return Step(
            observation="\n\n".join([passed, *failures[: self._max_failures]]),
            reward=gain,
            done=not failures,
            info={"passed": report.num_passed, "tests": len(self._tests)},
        )

    async def close(self) -> None:
        pass
