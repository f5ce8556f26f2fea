"""The Slurm cluster that the other tests run on is a real one, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import HOSTS_FILE, PREFIX, SlurmCluster, clean_leftovers

pytestmark = pytest.mark.slurm


def _traces(cluster_id: str) -> list[str]:
    """Namespaces, links, names and processes that carry a cluster's id."""
    listings = [
        HOSTS_FILE.read_text(),
        subprocess.run(["ip", "netns"], text=True, capture_output=True, check=True).stdout,
        subprocess.run(["ip", "-o", "link"], text=True, capture_output=True, check=True).stdout,
        subprocess.run(["ps", "-eo", "args"], text=True, capture_output=True, check=True).stdout,
    ]
    return [line for text in listings for line in text.splitlines() if f"{PREFIX}{cluster_id}" in line]


def test_a_job_of_four_nodes_runs_on_four_hosts_with_names_and_addresses_of_their_own(slurm_cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=4 --ntasks-per-node=1 --exclusive --time=2\n"
        """srun bash -c 'echo "$(hostname) $(getent hosts $(hostname) | cut -d" " -f1)"'\n"""
    )
    output = tmp_path / "out"
    slurm_cluster.run("sbatch", "--wait", f"--output={output}", str(script))
    seen = sorted(output.read_text().split("\n"))[1:]
    assert seen == [f"{host.name} {host.address}" for host in slurm_cluster.hosts]
    assert slurm_cluster.startup_s < 30


def test_hosts_reach_each_other_by_name(slurm_cluster):
    first, last = slurm_cluster.hosts[0], slurm_cluster.hosts[-1]
    serve = "import socket as s, sys; l = s.create_server(('', 0)); print(l.getsockname()[1], flush=True); l.accept()"
    server = subprocess.Popen(
        slurm_cluster.on_host(last, sys.executable, "-c", serve), stdout=subprocess.PIPE, text=True
    )
    try:
        port = server.stdout.readline().strip()
        connect = f"import socket; socket.create_connection(('{last.name}', {port}), timeout=10)"
        slurm_cluster.run(*slurm_cluster.on_host(first, sys.executable, "-c", connect))
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()


def test_two_clusters_live_side_by_side_and_leave_nothing(slurm_cluster):
    with SlurmCluster(nodes=1) as other:
        assert other.run("srun", "hostname").stdout.split() == [other.hosts[0].name]
        # a job that is still running when the cluster goes is ended with it
        slurm_cluster.run("sinfo")
        other.run("sbatch", "--output=/dev/null", "--wrap", f"exec bash -c 'exec -a {PREFIX}{other.id}-x sleep 600'")
        other.wait_for_job(2, ["RUNNING"])
        assert _traces(other.id)
    assert _traces(other.id) == []
    assert not other.state.exists()
    assert _traces(slurm_cluster.id)


def test_a_killed_test_run_is_cleaned_up_by_the_next(slurm_cluster):
    code = (
        "import os, signal, slurm_cluster as s\n"
        "c = s.SlurmCluster(nodes=1); c.start(); print(c.id, c.state, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    here = Path(__file__).parent
    killed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here)},
        text=True,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cluster_id, state = killed.stdout.split()
    assert _traces(cluster_id)
    assert clean_leftovers() == [cluster_id]
    assert _traces(cluster_id) == []
    assert not Path(state).exists()
