"""Published packages that the tests of others' environments install, each in a virtual environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT

TASKSETS = Path(__file__).parent / "verifiers_tasksets"
GYMS = ["reasoning-gym==0.1.25", "skyrl-gym==0.4.0", "textarena==0.7.4", "numpy", "psutil"]
VERIFIERS = ["verifiers==0.4.0", "numpy", "psutil", "uv"]


def installed(name: str, packages: list[str], paths: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the packages; PEERS_VENVS names the folder that keeps it for the next time."""
    venv = Path(os.environ.get("PEERS_VENVS") or paths.mktemp("peers")) / name
    if not (venv / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([venv / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        (venv / "installed").touch()
    return venv


def verifiers(paths: pytest.TempPathFactory) -> Path:
    """The interpreter that has verifiers and the tasksets of the tests."""
    venv = installed("verifiers", VERIFIERS, paths)
    [packages] = venv.glob("lib/python*/site-packages")
    (packages / "tasksets.pth").write_text(str(TASKSETS))
    return venv / "bin/python"


def at_home(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """verifiers and uv keep what they make in the home directory: beside the packages here."""
    home = python.parent.parent / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # each of its programs would compile them anew


def tasks(python: Path, *options: str) -> list[dict[str, str]]:
    """The lines that ``python -m forge_hpc.environments.verifiers`` writes."""
    command = [python, "-m", "forge_hpc.environments.verifiers", *options]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def write_tasks(python: Path, folder: Path) -> None:
    """Those of a taskset of the tests, as train.jsonl and test.jsonl."""
    rows = tasks(python, "sums-v1")
    for name, part in (("train", rows[:90]), ("test", rows[90:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def echo_server(python: Path, folder: Path) -> Iterator[str]:
    """The address of the server that the package's own ``openenv init`` makes, as it is shipped: one session."""
    subprocess.run([python.with_name("openenv"), "init", "echo_env"], cwd=folder, check=True, capture_output=True)
    yield from served(python, "server.app:app", folder / "echo_env")


def served(python: Path, app: str, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a server that runs until the caller is done."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command: list[Any] = [python, "-m", "uvicorn", app, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    process = subprocess.Popen([*command, "--log-level", "warning"], cwd=folder, env=env)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the server did not start"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).read()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
