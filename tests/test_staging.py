"""The environment on each node's own disk: a small environment, which finds torch and the like where they are."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from disks import small_disk
from runs import PROJECT, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster

BIG = Path(importlib.util.find_spec("torch").origin).resolve().parents[1]  # type: ignore[union-attr,arg-type]
"""Torch and the like stay where they are."""
START = PROJECT / "forge_hpc/staging/start.sh"
WHERE = "import sys, json, forge_hpc; print(sys.executable, json.__file__, forge_hpc.__file__, sep='\\n')"
ARCHIVES = """
from forge_hpc.staging.pack import environment_archive, make, project_archive
for archive in (environment_archive(), project_archive()):
    make(archive, print)
    print(archive.name, archive.path)
"""


def clean_environ() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PYTHON", "FORGE_"))}
    return kept | {"PYTHONPATH": str(PROJECT)}


@dataclass
class Small:
    """An environment, and its archives."""

    python: Path
    archives: Path
    env: str
    code: str

    def pack(self) -> str:
        command = [str(self.python), "-c", ARCHIVES]
        done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True, cwd="/")
        lines = done.stdout.splitlines()
        self.env, self.code = (line.split()[0] for line in lines if line.startswith(("env-", "code-")))
        return done.stdout

    def start(self, root: Path, code: str = WHERE) -> subprocess.CompletedProcess[str]:
        """What a node does; the code is run in the project's folder, as a job is that was submitted there."""
        command = ["bash", str(START), "run", str(root), str(self.archives), "tar.zst", self.env, self.code]
        command += [str(self.python), "-c", code]
        return subprocess.run(command, env=clean_environ(), capture_output=True, text=True, cwd=PROJECT, check=False)

    def lacks(self, root: Path) -> str:
        command = ["bash", str(START), "look", str(root), self.env, self.code]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    folder = tmp_path_factory.mktemp("environment") / "venv"
    base = Path(sys.base_prefix) / "bin" / "python3"
    subprocess.run([str(base), "-m", "venv", "--without-pip", str(folder)], check=True)
    [packages] = folder.glob("lib/python3*/site-packages")
    (packages / "big.pth").write_text(f"{BIG}\n")
    made = Small(folder / "bin/python", folder / ".staged", "", "")
    assert "packing the environment" in made.pack()
    return made


def check_staged(done: subprocess.CompletedProcess[str], root: Path) -> None:
    assert done.returncode == 0, done.stderr
    paths = [line for line in done.stdout.splitlines() if line.startswith("/")]
    assert len(paths) == 3 and all(path.startswith(f"{root}/") for path in paths), done.stdout


def test_python_its_library_and_the_project_are_imported_from_the_folder(small: Small, tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert [line.split()[1] for line in small.lacks(root).splitlines()] == [small.env, small.code]
    check_staged(small.start(root), root)
    assert small.lacks(root) == "" and root.stat().st_mode & 0o777 == 0o700
    inode = (root / small.env).stat().st_ino
    again = small.start(root, f"import os; os.system({f'{sys.executable} -c pass'!r}); {WHERE}")
    check_staged(again, root)
    assert (root / small.env).stat().st_ino == inode, "what is there is used as it is"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'forge_hpc.cli', '--help'], check=True)"
    assert "usage: forge-hpc" in small.start(root, child).stdout
    maps = small.start(root, "print(open('/proc/self/maps').read())").stdout
    assert not [line for line in maps.splitlines() if "libpython" in line and str(root) not in line]


def test_what_lacks_a_file_or_is_of_another_boot_is_unpacked_anew(small: Small, tmp_path: Path) -> None:
    root = tmp_path / "root"
    small.start(root, "")
    [decoder] = (root / small.env).glob("base/lib/python3*/json/decoder.py")
    decoder.unlink()  # somebody tidies /tmp
    assert small.lacks(root).split() == ["lacks", small.env]
    check_staged(small.start(root), root)
    (root / small.env / "BOOT").write_text("another\n")  # the node has crashed
    assert small.lacks(root).split() == ["lacks", small.env]
    (root / f".{small.env}.new.1").mkdir()  # and a start was killed while it unpacked
    check_staged(small.start(root), root)
    assert small.lacks(root) == "" and not list(root.glob(".*"))


def test_two_starts_on_a_node_unpack_once(small: Small, tmp_path: Path) -> None:
    root = tmp_path / "root"
    command = ["bash", str(START), "run", str(root), str(small.archives), "tar.zst", small.env, small.code]
    both = [subprocess.Popen([*command, str(small.python), "-c", "import time; time.sleep(1)"]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert small.lacks(root) == "" and not list(root.glob(".*"))


def test_where_it_cannot_be_staged_the_shared_environment_is_used_with_a_warning(small: Small, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8_000_000) as disk:
        done = small.start(disk / "root")
        assert list((disk / "root").glob("env-*/")) == [] and not list((disk / "root").glob(".*"))
    assert done.returncode == 0 and done.stdout.splitlines()[0] == str(small.python)
    assert "No space left on device" in done.stderr and "the environment is not staged" in done.stderr
    others = tmp_path / "others"
    others.mkdir(mode=0o777)
    others.chmod(0o777)
    done = small.start(others)
    assert done.stdout.splitlines()[0] == str(small.python)
    assert f"{others} is not a folder of yours alone" in done.stderr and list(others.iterdir()) == []


def test_what_no_start_has_used_for_days_is_deleted_unless_a_run_uses_it(small: Small, tmp_path: Path) -> None:
    root, old = tmp_path / "root", time.time() - 8 * 86400
    small.start(root, "")
    (root / "env-used").mkdir()
    (root / ".code-1.7.tar").touch()
    for path in (root / small.env, root / "env-used", root / ".code-1.7.tar"):
        os.utime(path, (old, old))
    with subprocess.Popen(["flock", "-s", str(root / "env-used.lock"), "sleep", "60"]) as run:
        wait_for(
            lambda: psutil.Process(run.pid).children() or "sleep" in psutil.Process(run.pid).name(), "the lock", 30
        )
        small.lacks(root)
        for process in [*psutil.Process(run.pid).children(), run]:
            process.kill()
    assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == [small.code, "env-used"]


def test_a_version_is_packed_once_and_another_package_makes_another(small: Small, tmp_path: Path) -> None:
    assert "packing" not in small.pack()
    copy = tmp_path / "venv"
    shutil.copytree(small.python.parents[1], copy, symlinks=True, ignore=shutil.ignore_patterns(".staged"))
    other = Small(copy / "bin/python", copy / ".staged", "", "")
    names = "from forge_hpc.staging.pack import *; print(environment_archive().name, project_archive().name)"

    def name() -> list[str]:
        command = [str(other.python), "-c", names]
        return subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True).stdout.split()

    before = name()
    assert name() == before and before[1] == small.code
    [packages] = copy.glob("lib/python3*/site-packages")
    (packages / "thing-1.0.dist-info").mkdir()
    assert name()[0] != before[0] and name()[1] == before[1]


# -- on a cluster


@pytest.fixture(scope="module")
def disks() -> Iterator[SlurmCluster]:
    """Hosts that have a disk of their own each."""
    with SlurmCluster(nodes=4, own_disks=True) as cluster:
        yield cluster


def environment(cluster: SlurmCluster) -> dict[str, str]:
    return clean_environ() | {"SLURM_CONF": cluster.env["SLURM_CONF"], "OMP_NUM_THREADS": "1"}


def submit(cluster: SlurmCluster, small: Small, *arguments: str) -> str:
    """The id of a job whose run uses the small environment."""
    command = [str(small.python), "-m", "forge_hpc.submit", *arguments]
    command += [f"slurm.stage_environment={cluster.disk}"]
    said = cluster.run(*command, env=environment(cluster), cwd=PROJECT, timeout_s=600).stdout
    return next(line.split()[1] for line in said.splitlines() if line.startswith("job "))


@pytest.mark.slurm
def test_a_job_broadcasts_what_a_node_lacks_and_nothing_twice(
    disks: SlurmCluster, small: Small, tmp_path: Path
) -> None:
    stage = f"{small.python} -m forge_hpc.staging.broadcast {disks.disk} srun --ntasks-per-node=1"
    srun = "srun --ntasks-per-node=1 --label"
    (tmp_path / "where.py").write_text(WHERE)
    start = f"exec $0 {small.python} {tmp_path}/where.py"
    script = f'#!/bin/bash\nstaged=$({stage} | tail -n 1)\n{srun} bash -c {start!r} "$staged"\n'
    (tmp_path / "job.sh").write_text(script)
    command = ["sbatch", "--wait", "--nodes=4", f"--output={tmp_path}/%j.out", str(tmp_path / "job.sh")]

    def run() -> str:
        said = disks.run(*command, env=environment(disks), cwd=PROJECT, timeout_s=280).stdout
        return (tmp_path / f"{said.split()[-1]}.out").read_text()

    first, root = run(), f"{disks.disk}/forge-hpc-env-{os.getuid()}"
    assert "GB to the nodes" in first and "warning" not in first, first
    for task in range(4):
        paths = [line.split()[1] for line in first.splitlines() if line.startswith(f"{task}: /")]
        assert len(paths) == 3 and all(path.startswith(root) for path in paths), first
    for host in disks.hosts:  # each on its own disk; what was sent is gone
        names = {path.name for path in (disks.disk_of(host) / Path(root).name).iterdir() if path.suffix != ".lock"}
        assert names == {small.env, small.code}
    again = run()
    assert "GB to the nodes" not in again and again.count(f"environment from {root}") == 4, again
    shutil.rmtree(disks.disk_of(disks.hosts[1]) / Path(root).name)
    full = disks.disk_of(disks.hosts[1]) / Path(root).name
    full.mkdir(mode=0o755)  # not to be trusted: this node goes without
    one = run()
    assert one.count(f"environment from {root}") == 3 and "1: warning:" in one and f"1: {small.python}" in one, one
    full.rmdir()


def imported_from(run_dir: Path) -> dict[str, set[str]]:
    """By name of a process of the run the folders of the Python, and of the code of ours, that it has open or runs."""
    found: dict[str, set[str]] = {}
    for process in processes(run_dir):
        with contextlib.suppress(OSError, psutil.Error):  # one that has just ended
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            paths = {path for line in lines if "python3" in (path := line.split(maxsplit=5)[-1])}
            if paths:
                found[f"{process.pid} {' '.join(process.cmdline()[:4])}"] = paths
    return found


@pytest.mark.slurm
@pytest.mark.training
@pytest.mark.timeout(1500)
def test_a_run_on_four_nodes_imports_from_their_disks_and_comes_back_there_after_preemption(
    disks: SlurmCluster, small: Small, tmp_path: Path
) -> None:
    run_dir, root = tmp_path / "run", f"{disks.disk}/forge-hpc-env-{os.getuid()}"
    overrides = [*small_run(tmp_path, 60), "checkpoint.interval=1", "algorithm.max_steps_without_signal=1000"]
    overrides += ["cluster.trainer_nodes=2", "cluster.rollout_nodes=2", "slurm.partition=spot"]
    job = submit(disks, small, "--nodes", "4", "--run-dir", str(run_dir), *overrides)
    wait_for(lambda: len(read(run_dir)) >= 3, "three steps", 600)

    def check() -> None:
        running = imported_from(run_dir)
        staged = {name: paths for name, paths in running.items() if "srun" not in name and "bash" not in name}
        assert len(staged) >= 4 * 2 + 4, running
        for name, paths in staged.items():
            assert any(path.startswith(root) for path in paths), (name, paths)
            assert all(path.startswith((root, str(BIG))) for path in paths), (name, paths)

    check()
    urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true"]
    disks.run(*urgent, f"--output={tmp_path}/urgent.out", env=environment(disks), timeout_s=600)
    steps = len(read(run_dir))
    wait_for(lambda: len(read(run_dir)) >= steps + 2, "steps after the preemption", 600)
    check()
    wait_for(lambda: disks.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end", 600)
    log = "".join(path.read_text() for path in (run_dir / "logs").glob("slurm-*.out"))
    assert status(run_dir)["state"] == "completed", log
    assert log.count("GB to the nodes") == 1 and log.count(f"environment from {root}") == 8, log
