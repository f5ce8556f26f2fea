"""A rollout node dies under a run that has a spare one, on a real Slurm cluster of its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import PROJECT, REWARD, left_over, read, small_run, status, wait_for
from slurm_cluster import Host, SlurmCluster, missing_requirement, pids_in
from test_slurm_runs import environment, log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    """Four hosts; Slurm takes one for dead that has been silent for 45 s (at 15 s 24.11 takes healthy ones, too)."""
    if (reason := missing_requirement()) and os.environ.get("CI"):
        pytest.fail(reason)
    elif reason:
        pytest.skip(reason)
    with SlurmCluster(options={"SlurmdTimeout": "45"}) as cluster:
        yield cluster


def power_off(host: Host) -> None:
    """End all that runs on a host, slurmd included."""
    while pids := pids_in(host.netns):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_generators_of_a_dead_node_move_to_the_spare_node_and_training_goes_on(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    options = ["cluster.spare_nodes=1", "cluster.trainer_nodes=1", "rollout.max_staleness=1"]
    options += ["algorithm.max_steps_without_signal=1000", "generator.timeout_s=60"]
    command = ["sbatch", "--parsable", "--nodes=4", "--no-kill", f"--output={tmp_path}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *small_run(tmp_path, 3000, REWARD, *options)]
    job = cluster.run(*command, env=environment(cluster), cwd=PROJECT).stdout.strip()

    def wait(condition: Callable[[], bool], what: str) -> None:
        wait_for(lambda: condition() or cluster.job(job)["JobState"] not in ("PENDING", "RUNNING"), what, 400)
        assert cluster.job(job)["JobState"] == "RUNNING", log(run_dir)

    def steps() -> int:
        return len(read(run_dir))

    def controller_log() -> str:
        return "".join(path.read_text() for path in run_dir.glob("logs/*/controller.log"))

    wait(lambda: steps() >= 3, "three steps")
    power_off(cluster.hosts[2])  # node 0 trains, 1 and 2 generate, 3 is spare
    wait(lambda: "generator 1 is lost" in controller_log(), "the detection")
    known = steps()
    wait(lambda: "generator 1 is replaced after" in controller_log(), "the replacement")
    assert "node 3 takes its place" in controller_log()
    replaced = steps()
    assert replaced > known, "training went on meanwhile"
    wait(lambda: steps() >= replaced + 3 and cluster.job(job)["NumNodes"] == "3", "Slurm's own verdict")
    assert cluster.job(job)["Restarts"] == "0"
    assert read(run_dir)[-1]["recoveries/generators"] == 1
    cluster.run("scancel", job)
    wait_for(lambda: status(run_dir)["state"] == "cancelled", "the cancellation", 30)
    assert not left_over(run_dir)
