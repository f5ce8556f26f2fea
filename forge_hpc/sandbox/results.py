"""What goes into a sandbox and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from forge_hpc.config.schema import SandboxLimits as Limits

__all__ = ["Case", "Limits", "Report", "Result", "SandboxError", "Verdict"]


class SandboxError(RuntimeError):
    """The sandbox did not start. Nothing was run, and nothing is known about the program."""


@dataclass(frozen=True)
class Result:
    """How a program ended."""

    exit_code: int | None
    """Its exit code, minus the signal that ended it, or None where the sandbox ended it."""
    stdout: str
    """At most ``Limits.output_kb``; what is not UTF-8 is replaced."""
    stderr: str
    """Likewise."""
    killed_by: str | None
    """The limit that it passed: wall, cpu, memory, processes, output or disk; ``sandbox`` where the sandbox itself
    was ended (by the host's out-of-memory killer, say); else None."""
    wall_s: float
    """Seconds from its start to its end, without the start of the sandbox."""
    cpu_s: float
    """CPU seconds of it and all that it started."""

    @property
    def truncated(self) -> bool:
        """It printed more than was kept."""
        return self.killed_by == "output"


@dataclass(frozen=True)
class Case:
    """A test of a whole program: on this standard input it must print this."""

    stdin: str
    expected: str
    """Compared without white space at the ends of lines and of the text."""


@dataclass(frozen=True)
class Verdict:
    """How one test went."""

    passed: bool
    reason: str
    """Why it did not pass, for people; empty where it did."""


@dataclass(frozen=True)
class Report:
    """How a program did on its tests."""

    verdicts: tuple[Verdict, ...]
    """One a test, in their order."""
    wall_s: float
    """Seconds of all tests, without the start of the sandbox."""

    @property
    def num_passed(self) -> int:
        return sum(verdict.passed for verdict in self.verdicts)

    @property
    def share(self) -> float:
        """Tests passed, of all; from 0 to 1."""
        return self.num_passed / len(self.verdicts)
