"""Rewards and environments on all nodes of a run, on a real Slurm cluster."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from runs import PROJECT, check_contract, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster
from test_slurm_runs import environment, log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
STEPS = 8
USER = """
import os, socket, time
from pathlib import Path
from forge_hpc.environments import Step

PLACE = Path(__file__).parent

def note(file):
    with open(PLACE / file, "a") as lines:
        lines.write(f"{socket.gethostname()} {os.getpid()}\\n")
    time.sleep(0.1)

def length(prompt, response, target, **fields):
    note("rewards")
    return len(response) / 6

class Talk:
    async def reset(self, prompt):
        return prompt.question

    async def step(self, response):
        note("environments")
        return Step("", reward=0.0, done=True)

    async def close(self):
        pass
"""


def noted(file: Path) -> dict[str, set[int]]:
    """Processes by host."""
    found: dict[str, set[int]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        host, pid = line.split()
        found.setdefault(host, set()).add(int(pid))
    return found


def test_rewards_and_environments_run_on_both_nodes_and_a_node_s_processes_may_die(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir, user = tmp_path / "run", tmp_path / "user.py"
    user.write_text(USER)
    options = [item for item in small_run(tmp_path, STEPS) if not item.startswith("reward=")]
    options += [f"reward=[{{name: {user}:length}}]", f"environment.name={user}:Talk", "environment.max_turns=1"]
    options += ["rollout.prompts_per_step=8", "data.chat_template=false"]
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *options]
    job = slurm_cluster.run(*command, env=environment(slurm_cluster), cwd=PROJECT).stdout.strip()
    wait_for(lambda: len(read(run_dir)) >= 2 or status(run_dir).get("state") == "failed", "two steps", 400)
    hosts = {name: sorted(noted(tmp_path / name)) for name in ("rewards", "environments")}
    assert hosts["rewards"] == hosts["environments"] and len(hosts["rewards"]) == 2, log(run_dir)
    other = hosts["rewards"][1]  # the first one holds the run
    killed = {name: noted(tmp_path / name)[other] for name in hosts}
    for pid in set().union(*killed.values()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: slurm_cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), "the end", 400)
    check_contract(run_dir, STEPS)
    for record in read(run_dir):
        assert record["episodes/failed"] == 0
        assert not [key for key in record if key.startswith("rewards/failed_") and record[key]]
    for name, pids in killed.items():
        assert noted(tmp_path / name)[other] - pids, f"no new processes of {name}"
