"""The one client of Slurm's commands: everything that forge_hpc asks Slurm goes through `ask`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from forge_hpc.config.errors import UserError
from forge_hpc.slurm import outside

ANSWER_S = 10.0
"""How long Slurm may take for an answer; KillWait may be all the time that there is."""
PATIENT_S = 30.0
"""The same where somebody waits at a terminal."""
_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SILENCE = re.compile(
    r"unable to contact|timed? ?out|zero bytes|communication|connection (refused|reset)|standby mode|temporarily", re.I
)


class SlurmRefused(Exception):
    """Slurm did not do what it was asked for; the text is its own."""


class SlurmSilent(SlurmRefused):
    """Slurm does not answer, or not now: slurmctld is down, busy, or being taken over by its backup."""


class SlurmAbsent(SlurmRefused):
    """There is no such command here."""


def is_unknown(refused: SlurmRefused) -> bool:
    """Whether Slurm refuses because it does not know the job (any more). A task of an array that waits and is cancelled
    is gone at once: it is "not found"."""
    return re.search(r"Invalid job id|Job \S+ not found", str(refused)) is not None


def ask(
    *command: str, timeout_s: float = ANSWER_S, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> str:
    """What a command of Slurm prints. Raises SlurmRefused with what it says where it fails, SlurmSilent where Slurm
    does not answer."""
    return ask_both(*command, timeout_s=timeout_s, env=env, cwd=cwd)[0]


def ask_both(
    *command: str, timeout_s: float = ANSWER_S, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> tuple[str, str]:
    """The same with what it prints on stderr."""
    name = " ".join(command[:2])
    if outside.is_inside():
        return _ask_outside(name, command, timeout_s, env, cwd)
    # Slurm signals every process of a step, this command too: it is born with the signals blocked.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _OURS)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "%s"} if env is None else env,
            cwd=cwd,
        )
    except FileNotFoundError:
        raise SlurmAbsent(f"there is no {command[0]} here") from None
    except OSError as error:
        raise SlurmRefused(f"{name}: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{name} does not answer within {timeout_s:.0f} s") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        said = " ".join((err or out).split()) or f"exit code {process.returncode}"
        raise (SlurmSilent if _SILENCE.search(said) else SlurmRefused)(f"{name}: {said}")
    return out, err


def _ask_outside(
    name: str, command: tuple[str, ...], timeout_s: float, env: Mapping[str, str] | None, cwd: str | None
) -> tuple[str, str]:
    try:
        answer = outside.ask_outside(command, timeout_s, env, cwd)
    except TimeoutError:
        raise SlurmSilent(f"{name} does not answer within {timeout_s:.0f} s") from None
    except OSError as error:
        raise SlurmAbsent(f"{name}: nobody outside the container answers: {error}") from None
    if "refused" in answer:
        kinds = {kind.__name__: kind for kind in (SlurmAbsent, SlurmSilent)}
        raise kinds.get(answer["kind"], SlurmRefused)(answer["refused"])
    return answer["out"], answer["err"]


@contextmanager
def at_a_terminal(hint: str | None = None) -> Iterator[None]:
    """What Slurm refuses is a UserError for whoever waits at a terminal."""
    try:
        yield
    except SlurmRefused as refused:
        silent = "Slurm does not answer: " if isinstance(refused, SlurmSilent) else ""
        raise UserError(f"{silent}{refused}", hint) from None
