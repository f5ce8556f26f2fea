"""Where kept engines are found: ``runs/.engines/PLACE``, a directory of the user's alone.

    engines.json   what they were started with: a run that would start other ones does not take them
    state.json     what they do, and until when they are kept
    mailbox/       requests of submits, and the keeper's answers
    config.yaml, status.json, rendezvous/, tls/, logs/   as of a run: nodes find each other there

PLACE is this machine's name, or the allocation's job. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config.errors import UserError
from forge_hpc.files import atomic_write_json, is_there, read_text
from forge_hpc.run_dir import RunDir

ENGINES = ".engines"
_UNITS = {"s": 1, "m": 60, "h": 3600}
_OF_THE_SHELL = re.compile(
    r"_|PWD|OLDPWD|SHLVL|TERM|COLUMNS|LINES|COLORTERM|DISPLAY|WINDOWID|PS\d|HIST.*|SSH_.*|TMUX.*|STY|XDG_SESSION_.*"
    r"|DBUS_.*|PYTEST_CURRENT_TEST"
)
"""Variables that no process of a run looks at."""


def keep_s_of(text: str) -> float:
    """Seconds of ``90s``, ``30m`` or ``2h``. Raises UserError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or not float(found[1]):
        raise UserError(f"--keep-engines {text} is no time", "90s, 30m or 2h")
    return float(found[1]) * _UNITS[found[2]]


class EnginesDir:
    """The directory of the engines that are kept in one place."""

    def __init__(self, path: Path) -> None:
        self.run_dir = RunDir(path)
        self.path = self.run_dir.path
        self.output = self.path / "keeper.out"

    @classmethod
    def here(cls, job_id: str | None, runs: Path = Path("runs")) -> EnginesDir:
        """That of this machine, or of an allocation."""
        return cls(runs / ENGINES / (f"job-{job_id}" if job_id else socket.gethostname()))

    @classmethod
    def below(cls, runs: Path) -> list[EnginesDir]:
        """All that have engines, as far as they have not died without a word."""
        folder = runs / ENGINES
        found = [cls(path) for path in sorted(folder.iterdir())] if is_there(folder) else []
        return [engines for engines in found if engines.origin() is not None]

    @property
    def mailbox(self) -> Rendezvous:
        """Where submits and the keeper write to each other."""
        return Rendezvous(self.path / "mailbox")

    def origin(self) -> dict[str, Any] | None:
        """What the engines were started with (``origin_of``); None where there are none."""
        return self._read("engines.json")

    def state(self) -> dict[str, Any] | None:
        """What the keeper says of itself: ``pid``, ``host``, ``since``, ``run`` (None while they wait), ``ends`` (unix
        time; None while a run goes on), ``what``."""
        return self._read("state.json")

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """``engines`` or ``state``."""
        atomic_write_json(self.path / f"{name}.json", record)

    def forget(self) -> None:
        """The engines have ended."""
        for name in ("engines.json", "state.json"):
            (self.path / name).unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads(read_text(self.path / name))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None


def origin_of(command: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """What engines are started with: command, environment (hashed: it may hold secrets) and this project's code."""
    salt = secrets.token_hex(8)
    return {"command": list(command), "salt": salt, "environment": _hashed(environ, salt), "code": _code()}


def why_not(origin: Mapping[str, Any], command: Sequence[str], environ: Mapping[str, str]) -> str:
    """Why a run cannot take engines that were started with ``origin``; empty where it can."""
    if origin.get("command") != list(command):
        return "the nodes, their set-up or the Python are others"
    if origin.get("code") != _code():
        return "the code of forge_hpc has changed"
    then, now = origin.get("environment", {}), _hashed(environ, origin.get("salt", ""))
    if names := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        return f"the environment has changed ({', '.join(names[:4])}{', …' * (len(names) > 4)})"
    return ""


def _hashed(environ: Mapping[str, str], salt: str) -> dict[str, str]:
    return {
        name: hashlib.sha256(f"{salt}{value}".encode(errors="surrogateescape")).hexdigest()[:16]
        for name, value in environ.items()
        if not _OF_THE_SHELL.fullmatch(name)
    }


def _code() -> str:
    """Changes with any file of this project that processes may have loaded."""
    files = sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    stamps = [(str(file), seen.st_mtime_ns, seen.st_size) for file in files if (seen := file.stat())]
    return hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
