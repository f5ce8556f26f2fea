"""A job with a node that is not fit, on a real Slurm cluster: a spare node takes its place, or the job comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from disks import small_disk
from runs import PROJECT, left_over, read, small_run, wait_for
from sandboxes import needs_bubblewrap, without_bubblewrap
from slurm_cluster import SlurmCluster
from test_slurm_runs import environment, log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def submit(
    cluster: SlurmCluster, directory: Path, disk: Path, sick: str, nodes: int, *overrides: str, setup: str = ":"
) -> str:
    """A job whose node ``sick`` has ``disk`` for its temporary files; its id."""
    setup = f"if [ $SLURMD_NODENAME = {sick} ]; then export TMPDIR={disk}; fi; {setup}"
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={directory}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(directory / "run"), f'slurm.setup=["{setup}"]', *small_run(directory), *overrides]
    return cluster.run(*command, env=environment(cluster), cwd=PROJECT).stdout.strip()


def starts(run_dir: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in read(run_dir, "starts.jsonl") if record["event"] == event]


def test_nodes_with_a_full_disk_or_no_sandbox_are_left_out_and_spare_ones_take_their_place(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    needs_bubblewrap()
    run_dir, sick, bare = tmp_path / "run", slurm_cluster.hosts[1].name, slurm_cluster.hosts[2].name
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        options = ["cluster.spare_nodes=2", "cluster.trainer_nodes=1"]
        options += [f"reward=[{{name: {tmp_path}/reward.py:length}},{{name: code}}]"]
        setup = f"if [ $SLURMD_NODENAME = {bare} ]; then export PATH={without_bubblewrap(tmp_path / 'bin')}; fi"
        job = submit(slurm_cluster, tmp_path, disk, sick, 4, *options, setup=setup)
        [left_out] = wait_for(lambda: starts(run_dir, "left out"), "the verdict")
        [begin] = starts(run_dir, "begin")
        problem = f"its temporary directory {disk} is full: 8 MiB are free"
        assert left_out["nodes"].pop(f"node 1 ({sick})") == problem
        [(node, problem)] = left_out["nodes"].items()
        assert node == f"node 2 ({bare})"
        assert problem.startswith("its sandbox does not work: bubblewrap is not installed here")
        # Four supervisors share this machine's cores: there the gate waits for all of them, and nothing else.
        print(f"named {left_out['time'] - begin['time']:.1f} s after the start had begun")

        def attached() -> bool:
            return any("attached to 2 nodes" in path.read_text() for path in run_dir.glob("logs/*/controller.log"))

        wait_for(attached, "the start on the others")
        [controller_log] = run_dir.glob("logs/*/controller.log")
        assert "spares" not in controller_log.read_text()
        assert slurm_cluster.job(job)["JobState"] == "RUNNING", log(run_dir)
        slurm_cluster.run("scancel", job)
        wait_for(lambda: slurm_cluster.job(job)["JobState"] == "CANCELLED", "the cancellation", 60)
    assert not left_over(run_dir)


def test_without_a_spare_node_the_job_comes_back_without_the_one_that_is_not_fit(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir, sick = tmp_path / "run", slurm_cluster.hosts[0].name  # the first: it cannot be left out
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        job = submit(slurm_cluster, tmp_path, disk, sick, 2)
        [end] = wait_for(lambda: starts(run_dir, "end"), "the end of the first start")
        assert (end["state"], end["cause"]) == ("preempted", "gate"), log(run_dir)
        assert f"({sick}) is not fit: its temporary directory {disk} is full" in end["message"]
        wait_for(lambda: slurm_cluster.job(job)["ExcNodeList"] == sick, "the exclusion", 60)
        slurm_cluster.run("scancel", job)
        wait_for(lambda: slurm_cluster.job(job)["JobState"] == "CANCELLED", "the cancellation", 60)
    assert not left_over(run_dir)
