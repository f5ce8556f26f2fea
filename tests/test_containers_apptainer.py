"""A run inside a real Apptainer image on a real Slurm cluster: ``make test-apptainer``, some four minutes.

The image is small and has no Slurm; the project, its environment and the Python behind it are mounted into it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, check_contract, left_over, processes, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster, missing_requirement
from test_slurm_runs import environment, log

FOLDER, SIF = (os.environ.get("FORGE_HPC_IMAGES") or "/opt/python:/opt/python.sif").split(":")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        shutil.which("apptainer") is None or not Path(SIF).exists() or missing_requirement() is not None,
        reason="no Apptainer beside a Slurm: see above",
    ),
]
PYTHON = [f"{Path(sys.prefix).resolve()}:ro", sys.base_prefix]
MOUNTS = [f"{path}:{path}:ro" for path in dict.fromkeys((str(Path(sys.prefix).resolve()), sys.base_prefix))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two hosts. As with control groups, and unlike the other tests' tracking, what Apptainer mounts the image with gets
    no signal."""
    with SlurmCluster(nodes=2, options={"ProctrackType": "proctrack/pgid"}) as cluster:
        yield cluster


def in_container(image: str, *more: str) -> list[str]:
    """Overrides. Root would not be rootless by itself."""
    return [
        "slurm.container.runtime=apptainer",
        f"slurm.container.image={image}",
        f"slurm.container.python={sys.executable}",
        f"slurm.container.mounts=[{','.join(MOUNTS)}]",
        "slurm.setup=[export APPTAINER_USERNS=1]",
        *more,
    ]


def submit(cluster: SlurmCluster, run_dir: Path, *overrides: str) -> str:
    """The job's id."""
    command = [sys.executable, "-m", "forge_hpc.submit", "--run-dir", str(run_dir), *overrides]
    result = cluster.run(*command, env=environment(cluster), cwd=PROJECT, check=False)
    assert result.returncode == 0, result.stderr
    job_id: str = status(run_dir)["job_id"]
    return job_id


def starts(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read(run_dir, "starts.jsonl") if record["event"] == event]


def is_over(cluster: SlurmCluster, job: str) -> bool:
    return cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED")


def root_of(pid: int) -> str:
    return subprocess.run(["findmnt", "--noheadings", "--output", "FSTYPE", "--task", str(pid), "/"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip


@pytest.mark.parametrize("image", [FOLDER, SIF], ids=["folder", "SIF"])
def test_a_run_in_a_container_is_preempted_and_goes_on(cluster: SlurmCluster, image: str, tmp_path: Path) -> None:
    steps, run_dir = 30, tmp_path / "run"
    job = submit(
        cluster, run_dir, "--nodes", "2", *small_run(tmp_path, steps), *in_container(image), "slurm.partition=spot",
        "algorithm.max_steps_without_signal=1000", "checkpoint.interval=1",
    )  # fmt: skip
    wait_for(lambda: len(read(run_dir)) >= 3 or is_over(cluster, job), "three steps", 300)
    assert not is_over(cluster, job), log(run_dir)
    assert all(Path(f"/proc/{p.pid}/root/opt").exists() is Path(image, "opt").exists() for p in processes(run_dir))
    inside = [process for process in processes(run_dir) if Path(f"/proc/{process.pid}/ns/mnt").readlink() !=
              Path("/proc/self/ns/mnt").readlink()]  # fmt: skip
    assert len(inside) == len(processes(run_dir)) >= 5

    urgent = ["sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true"]
    cluster.run(*urgent, f"--output={tmp_path}/urgent.out", env=environment(cluster), timeout_s=180)
    [end] = starts(run_dir, "end")
    assert (end["state"], end["cause"]) == ("preempted", "preempted"), end
    assert end["step"] == len(read(run_dir)), "the last step was saved"
    wait_for(lambda: is_over(cluster, job), "the end", 600)
    assert status(run_dir)["state"] == "completed", log(run_dir)
    assert cluster.job(job)["Restarts"] == "1"
    check_contract(run_dir, steps)
    assert not left_over(run_dir)
