"""Model-written code in a process tree of its own: no network, no files of the user, limits on all that it takes."""

from forge_hpc.sandbox.results import Case, Limits, Report, Result, SandboxError, Verdict
from forge_hpc.sandbox.sandbox import Sandbox

__all__ = ["Case", "Limits", "Report", "Result", "Sandbox", "SandboxError", "Verdict"]
