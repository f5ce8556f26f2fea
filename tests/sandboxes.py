"""What the tests of the sandbox share."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.sandbox import Sandbox


@functools.cache
def why_not() -> str | None:
    """Why there is no sandbox on this machine."""
    try:
        Sandbox().check()
    except UserError as error:
        return error.message
    return None


def needs_bubblewrap() -> None:
    """Skip the test where there is no sandbox; in continuous integration fail."""
    if (reason := why_not()) is not None:
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)


def without_bubblewrap(folder: Path) -> str:
    """A PATH with all that this machine has but bwrap."""
    folder.mkdir()
    for program in (path for place in os.get_exec_path() if Path(place).is_dir() for path in Path(place).iterdir()):
        if program.name != "bwrap" and not (folder / program.name).is_symlink():
            (folder / program.name).symlink_to(program)
    return str(folder)


def processes_in_sandboxes() -> list[psutil.Process]:
    """All processes of this machine that have a process tree of their own, and run as who runs ours."""
    uid = 65534 if os.getuid() == 0 else os.getuid()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            other_tree = tree_of(process.pid) != tree_of(os.getpid())
            if other_tree and process.uids().real == uid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def nothing_is_left(deadline_s: float = 20.0) -> bool:
    end = time.monotonic() + deadline_s
    while left := processes_in_sandboxes():
        if time.monotonic() > end:
            print([(process.pid, process.cmdline()) for process in left])
            return False
        time.sleep(0.05)
    return True


def tree_of(pid: int) -> str:
    """The process tree (PID namespace) that a process is in."""
    return str(Path(f"/proc/{pid}/ns/pid").readlink())


def as_nobody(function: Callable[[], Any]) -> Any:
    """What `function` returns in a process of the user nobody, as JSON takes it."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.chdir("/")
            answer = {"value": function()}
        except BaseException as error:
            answer = {"error": repr(error)}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = json.loads(file.read())
    os.waitpid(pid, 0)
    assert "error" not in answer, answer
    return answer["value"]
