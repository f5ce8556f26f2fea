"""A run inside a real Apptainer image on a real Slurm cluster: ``make test-apptainer``, some four minutes.

The image is small and has no Slurm; the project, its environment and the Python behind it are mounted into it.
"""

from __future__ import annotations

import os
import shutil
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
MOUNTS = [f"{path}:{path}:ro" for path in dict.fromkeys((str(Path(sys.prefix).resolve()), sys.base_prefix))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """Two hosts. As with control groups, and unlike the other tests' tracking of processes, the one that serves a SIF
    file is not signalled."""
    with SlurmCluster(nodes=2, options={"ProctrackType": "proctrack/pgid"}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def own_disks() -> Iterator[SlurmCluster]:
    """Four hosts, each with a disk of its own: all have a folder for data there, and the image."""
    with SlurmCluster(nodes=4, options={"ProctrackType": "proctrack/pgid"}, own_disks=True) as cluster:
        for disk in (cluster.disk, *map(cluster.disk_of, cluster.hosts)):
            (disk / "data").mkdir(parents=True)
            shutil.copy(SIF, disk / "image.sif")  # a link would be resolved on the login node
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
    result = cluster.run(*command, env=environment(cluster), cwd=PROJECT, check=False, timeout_s=240)
    assert result.returncode == 0, result.stderr
    job_id: str = status(run_dir)["job_id"]
    return job_id


def starts(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read(run_dir, "starts.jsonl") if record["event"] == event]


def is_over(cluster: SlurmCluster, job: str) -> bool:
    return cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED")


def is_contained(pid: int) -> bool:
    return Path(f"/proc/{pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink()


@pytest.mark.parametrize("image", [FOLDER, SIF], ids=["folder", "SIF"])
def test_a_run_in_a_container_is_preempted_and_goes_on(cluster: SlurmCluster, image: str, tmp_path: Path) -> None:
    steps, run_dir = 30, tmp_path / "run"
    job = submit(
        cluster, run_dir, "--nodes", "2", *small_run(tmp_path, steps), *in_container(image), "slurm.partition=spot",
        "algorithm.max_steps_without_signal=1000", "checkpoint.interval=1",
    )  # fmt: skip
    wait_for(lambda: len(read(run_dir)) >= 3 or is_over(cluster, job), "three steps", 300)
    assert not is_over(cluster, job), log(run_dir)
    contained = [is_contained(process.pid) for process in processes(run_dir)]
    assert len(contained) >= 4 and all(contained)

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


def test_a_run_in_a_container_is_looked_at_and_cancelled_and_saves(cluster: SlurmCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(
        cluster,
        run_dir,
        "--nodes",
        "2",
        *small_run(tmp_path, 2000),
        *in_container(FOLDER),
        "checkpoint.interval=1000",
        "algorithm.max_steps_without_signal=1000",
    )
    wait_for(lambda: len(read(run_dir)) >= 2 or is_over(cluster, job), "two steps", 300)
    assert not is_over(cluster, job), log(run_dir)

    def tool(*arguments: str) -> str:
        command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
        return cluster.run(*command, env=environment(cluster), cwd=PROJECT, timeout_s=180).stdout

    assert "trainer-0" in tool("stacks", str(run_dir))
    look = ["sh", "-c", f"hostname; echo $APPTAINER_NAME; ls {run_dir}"]
    attached = tool("attach", str(run_dir), "--node", "1", "--", *look)
    assert attached.split()[:2] == [cluster.hosts[1].name, Path(FOLDER).name] and "config.yaml" in attached
    doctor = tool("attach", str(run_dir), "--", sys.executable, "-m", "forge_hpc.cli", "doctor")
    print(doctor)
    assert f"this is inside {Path(FOLDER).name}" in doctor
    assert "cancelled" in tool("cancel", str(run_dir))
    # Apptainer passes SIGINT on, too; twice would mean: at once, without a save.
    assert "which is saved" in status(run_dir)["message"], status(run_dir)
    assert not left_over(run_dir)


def test_nodes_that_lack_image_mount_or_runtime_are_named_and_left_out(own_disks: SlurmCluster, tmp_path: Path) -> None:
    run_dir, hosts, disk = tmp_path / "run", own_disks.hosts, own_disks.disk
    without_image, without_mount = (own_disks.disk_of(host) for host in hosts[1:3])
    (without_image / "image.sif").unlink()
    (without_mount / "data").rmdir()
    setup = f"if [ $SLURMD_NODENAME = {hosts[3].name} ]; then export PATH=/nowhere; fi"
    container = in_container(f"{disk}/image.sif", f"slurm.container.mounts=[{','.join([*MOUNTS, f'{disk}/data'])}]")
    container += [f'slurm.setup=["export APPTAINER_USERNS=1","{setup}"]', "cluster.spare_nodes=3"]
    job = submit(own_disks, run_dir, "--nodes", "4", *small_run(tmp_path), *container)
    wait_for(lambda: starts(run_dir, "left out") or is_over(own_disks, job), "the verdict", 300)
    [left_out] = starts(run_dir, "left out")
    assert left_out["nodes"] == {
        f"node 1 ({hosts[1].name})": f"slurm.container.image={disk}/image.sif is not there",
        f"node 2 ({hosts[2].name})": f"slurm.container.mounts: {disk}/data is not there",
        f"node 3 ({hosts[3].name})": "apptainer is not installed here, or not on the PATH after slurm.setup",
    }

    def attached() -> bool:
        return any("attached to 1 nodes" in path.read_text() for path in run_dir.glob("logs/*/controller.log"))

    wait_for(attached, "the start on the node that is left", 300)
    own_disks.run("scancel", job)
    wait_for(lambda: is_over(own_disks, job), "the cancellation", 120)
    shutil.copy(SIF, without_image / "image.sif")
    (without_mount / "data").mkdir()


@pytest.mark.parametrize("sick", [0, 1])
def test_a_node_whose_container_does_not_start_is_named_in_apptainer_s_words(
    own_disks: SlurmCluster, tmp_path: Path, sick: int
) -> None:
    run_dir, host = tmp_path / "run", own_disks.hosts[sick]
    image = own_disks.disk_of(host) / "image.sif"
    image.write_bytes(b"no image" * 1000)
    idle = ("sinfo", "--noheader", "--partition=main", "--format=%t")
    wait_for(lambda: own_disks.run(*idle).stdout.split() == ["idle"], "the first two nodes for the job", 120)
    job = submit(own_disks, run_dir, "--nodes", "2", *small_run(tmp_path), *in_container(f"{own_disks.disk}/image.sif"))
    [end] = wait_for(lambda: starts(run_dir, "end"), "the end of the first start", 300)
    assert (end["state"], end["cause"]) == ("preempted", "gate"), log(run_dir)
    named = f"node {sick} ({host.name}) is not fit: the container {own_disks.disk}/image.sif does not start: "
    assert end["message"].startswith(named), end
    assert "image format not recognized" in end["message"], end
    wait_for(lambda: own_disks.job(job)["ExcNodeList"] == host.name, "the exclusion", 60)
    own_disks.run("scancel", job)
    wait_for(lambda: is_over(own_disks, job), "the cancellation", 60)
    shutil.copy(SIF, image)
