"""A judge on a node of its own, asked from all nodes of the run, on a real Slurm cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import PROJECT, left_over, read, small_run, status
from slurm_cluster import SlurmCluster
from test_served import LIKELY, TINY, likeliest
from test_slurm_runs import environment, log

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
WHERE = """
    async def __call__(self, prompt, response, target, **fields):
        import os, pathlib
        with open(pathlib.Path(__file__).parent / "asked", "a") as file:
            file.write(os.environ["SLURMD_NODENAME"] + "\\n")
"""


def test_rewards_of_all_nodes_ask_a_judge_on_a_node_of_its_own(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    head, tail = LIKELY.split("    async def __call__(self, prompt, response, target, **fields):\n")
    (tmp_path / "likely.py").write_text(head + WHERE.lstrip("\n") + tail)
    run_dir = tmp_path / "run"
    overrides = [
        f"served=[{{name: judge, path: '{TINY}', dtype: float32, max_tokens: 64, nodes: 1}}]",
        "served.0.engine.kv_cache_memory_gib=0.25",
        f"reward=[{{name: '{tmp_path / 'likely.py'}:Likely', workers: 3}}]",
        "rollout.prompts_per_step=8",
        "evaluation.num_prompts=0",
        "logging.num_rollouts_per_step=8",
    ]
    command = ["sbatch", "--wait", "--nodes=3", f"--output={tmp_path}/slurm-%j.out", "sbatch/grpo.sh"]
    command += ["--run-dir", str(run_dir), *small_run(tmp_path, 3, "", *overrides)]
    env = environment(slurm_cluster)
    result = slurm_cluster.run(*command, env=env, cwd=PROJECT, timeout_s=800, check=False)
    assert result.returncode == 0, result.stderr + log(run_dir)
    assert status(run_dir)["state"] == "completed" and not left_over(run_dir)
    [start] = [path for path in (run_dir / "logs").iterdir() if path.is_dir()]
    controller = (start / "controller.log").read_text()
    assert "node 2         judge       1 replica, CPU, served" in controller
    assert "judge is served at https://" in controller and "127.0.0.1" not in controller.partition("served at")[2][:30]
    assert len({*(tmp_path / "asked").read_text().split()}) == 3
    assert sum(record["served/judge/requests"] for record in read(run_dir)) == 3 * 8 * 8
    expected = likeliest(next((run_dir / "served-judge").iterdir()))
    for rollout in read(run_dir, "rollouts.jsonl"):
        assert rollout["reward"] == pytest.approx(expected(rollout["prompt"] + rollout["completion"]), abs=1e-4)
