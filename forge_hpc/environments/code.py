"""A program to write that has to pass tests, with a sandbox to run it in and what failed as the observation."""

from __future__ import annotations

import re
from typing import Any

from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Step

_BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MAX_REASON_CHARS = 300


class Code:
    """Runs the last code block of a response (or all of it, where there is none) against the prompt's tests.

    Args:
        tests_field: the field of the example that holds the tests, a list of Python texts that raise on failure.
        max_failures: so many failed tests are shown to the policy.
        sandbox: the fields of ``SandboxConfig``.

    The episode's reward is the largest share of tests that any of its programs passed; passing all ends it.
    """

    def __init__(
        self, tests_field: str = "tests", max_failures: int = 3, sandbox: dict[str, Any] | None = None
    ) -> None:
        from omegaconf import OmegaConf

        from forge_hpc.config.schema import SandboxConfig
        from forge_hpc.sandbox import Sandbox

        config: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SandboxConfig), sandbox or {}))
        self._sandbox = Sandbox(config)
        self._tests_field, self._max_failures = tests_field, max_failures
        self._best = 0.0

    async def reset(self, prompt: Prompt) -> None:
        """The prompt stays as it is."""
        self._tests = prompt.fields[self._tests_field]
        if not self._tests:
            raise ValueError(f"the example at {prompt.position} has no tests in {self._tests_field!r}")

    async def step(self, response: str) -> Step:
        report = await self._sandbox.run_tests(extract_code(response), self._tests)
        gain, self._best = max(0.0, report.share - self._best), max(report.share, self._best)
        failures = [
            f"{test}\n{verdict.reason[:_MAX_REASON_CHARS]}"
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


def extract_code(response: str) -> str:
    """The last fenced block of a response, or the response."""
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else response
