"""Apptainer as the sandbox, with the real thing: ``make test-apptainer``; or, where it is installed, FORGE_HPC_IMAGES
names images with Python 3.10 or newer, folders and SIF files, separated by colons."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hostile_programs import CHEATS, PROGRAMS, Program
from sandboxes import nothing_is_left, processes_in_sandboxes
from test_sandbox import LIMITS, Host, host, how_it_ended  # noqa: F401  a fixture
from test_sandbox_run import UNPASSABLE

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import SandboxConfig
from forge_hpc.sandbox import Limits, Result, Sandbox, SandboxError, runtimes

IMAGES = os.environ.get("FORGE_HPC_IMAGES", "/opt/python:/opt/python.sif").split(":")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("apptainer") is None or not all(map(os.path.exists, IMAGES)), reason="no Apptainer: see above"
    ),
]


@pytest.fixture(params=IMAGES, ids=lambda image: "SIF" if image.endswith(".sif") else "folder")
def image(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param
    assert nothing_is_left()
    assert not helpers()


@pytest.fixture
def sandbox(image: str) -> Sandbox:
    return Sandbox(SandboxConfig(runtime="apptainer", image=image, parallel=3))


def helpers() -> list[str]:
    """What Apptainer runs beside a container."""
    names = ("squashfuse_ll", "squashfuse", "fuse-overlayfs", "starter")
    return [p.name() for p in psutil.process_iter() if p.name() in names and p.status() != psutil.STATUS_ZOMBIE]


OWN = ("files-etc", "files-system-folders", "writes-dev")
"""They ask for what an image has of its own (/etc, /var), and for a read-only /dev: here it lies in the file system of
/tmp, and counts with it."""
LOOSER = {"n > 40": "n > 16 + 2 + 64", "n > 2**24": "n > 2**27"}
"""Between two looks of process 1 the kernel holds processes with room for squashfuse's threads, /tmp at what the site's
configuration gives it (64 MiB), and /dev/shm not at all."""


def hostile() -> Iterator[Program]:
    for program in PROGRAMS:
        if program.name not in OWN:
            code = functools.reduce(lambda text, strict: text.replace(strict, LOOSER[strict]), LOOSER, program.code)
            yield dataclasses.replace(program, code=code)


HOSTILE = list(hostile())


def test_hostile_programs_are_held(sandbox: Sandbox, host: Host) -> None:  # noqa: F811
    async def one(program: Program) -> Result:
        return await sandbox.run(host.setting() + program.code, limits=LIMITS)

    async def all_of_them() -> list[Result]:
        return await asyncio.gather(*map(one, HOSTILE))

    bad = []
    for program, result in zip(HOSTILE, asyncio.run(all_of_them()), strict=True):
        output = result.stdout + result.stderr
        if "ESCAPED" in output or host.secret in output or not how_it_ended(result) & set(program.ends):
            bad.append(program.name)
            print(program.name, program.ends, result)
    assert not bad
    assert host.visitors == []


def test_a_pass_cannot_be_faked(sandbox: Sandbox) -> None:
    limits = Limits(wall_s=10, cpu_s=10, memory_mb=256)

    async def all_of_them() -> list[int]:
        runs = (sandbox.run_tests(cheat, UNPASSABLE, limits=limits) for cheat in CHEATS.values())
        return [report.num_passed for report in await asyncio.gather(*runs)]

    assert dict(zip(CHEATS, asyncio.run(all_of_them()), strict=True)) == dict.fromkeys(CHEATS, 0)


LOOK = """
import json, os
def read(path):
    try:
        with open(path, "rb") as file: return file.read(100_000).decode(errors="replace")
    except OSError: return ""
print(json.dumps({
    "environment": dict(os.environ), "first": read("/proc/self/environ"), "mounts": read("/proc/self/mountinfo"),
    "sys": os.listdir("/sys"), "home": os.listdir("/home"), "root": os.listdir("/"),
    "etc": [read(f"/etc/{name}") for name in ("passwd", "group", "resolv.conf")],
}))
"""


def test_a_program_sees_nothing_of_the_host(sandbox: Sandbox, image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPTAINER_BIND", "/var:/their-var")
    monkeypatch.setenv("APPTAINERENV_TOKEN", "secret")
    result = sandbox.run_sync(LOOK, limits=Limits(output_kb=256))
    seen = json.loads(result.stdout)
    assert (result.stderr, seen["sys"], seen["home"], seen["etc"]) == ("", [], [], ["", "", ""])
    expected = runtimes._ENVIRONMENT
    assert {key: value for key, value in seen["environment"].items() if key != "LC_CTYPE"} == expected
    assert "secret" not in result.stdout and image not in result.stdout and "their-var" not in result.stdout


def test_an_error_is_pythons_alone(sandbox: Sandbox) -> None:
    result = sandbox.run_sync("1 / 0")
    assert result.stderr.startswith("Traceback")
    with pytest.raises(SandboxError) as error:
        Sandbox(SandboxConfig(runtime="apptainer", image="/opt/none")).run_sync("")
    assert str(error.value).startswith("FATAL")


def test_it_can_be_checked(sandbox: Sandbox) -> None:
    assert sandbox.check().startswith("apptainer, Python 3.")


def test_what_is_killed_from_outside_leaves_nothing(sandbox: Sandbox) -> None:
    """Process 1 stands still, and hears nobody."""

    async def scenario() -> Result:
        running = asyncio.create_task(sandbox.run("import time\ntime.sleep(600)", limits=Limits(wall_s=3)))
        while not (found := [p for p in processes_in_sandboxes() if is_first(p.pid)]):
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        for process in found:
            process.send_signal(signal.SIGSTOP)
        return await running

    before = sorted(Path("/tmp").iterdir())
    assert asyncio.run(asyncio.wait_for(scenario(), 120)).killed_by == "wall"
    assert not helpers() and sorted(Path("/tmp").iterdir()) == before


def is_first(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [ids] = [line.split()[1:] for line in lines if line.startswith("NSpid:")]
    return len(ids) > 1 and ids[-1] == "1"


def test_what_is_written_anywhere_counts(sandbox: Sandbox) -> None:
    for folder in ("/tmp", "/var/tmp", "/dev", "/dev/shm"):
        code = f"import time\nfor i in range(3): open(f'{folder}/{{i}}', 'wb').write(bytes(2**22))\ntime.sleep(600)"
        assert sandbox.run_sync(code, limits=Limits(disk_mb=8, wall_s=30)).killed_by == "disk", folder


def test_a_program_may_have_as_many_processes_as_its_limit_says(sandbox: Sandbox) -> None:
    code = "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(600)\nprint('all')\nos.kill(-1, 9)"
    assert sandbox.run_sync(code, limits=Limits(processes=32, wall_s=30)).stdout == "all\n"


def test_a_disk_that_is_smaller_than_its_limit_is_refused(sandbox: Sandbox, image: str) -> None:
    with pytest.raises(SandboxError, match=r"its /tmp has 64 MiB, sandbox\.limits\.disk_mb is 65"):
        sandbox.run_sync("", limits=Limits(disk_mb=65))


def test_a_sif_file_is_not_unpacked_for_every_program(image: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "apptainer").symlink_to(shutil.which("apptainer") or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    runtimes._finds_squashfuse.cache_clear()
    config = SandboxConfig(runtime="apptainer", image=image)
    try:
        if image.endswith(".sif"):
            with pytest.raises(UserError, match="squashfuse is not installed"):
                runtimes.command(config, Limits(), tmp_path)
        else:
            assert runtimes.command(config, Limits(), tmp_path)
    finally:
        runtimes._finds_squashfuse.cache_clear()
