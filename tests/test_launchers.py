"""Job scripts, site profiles, the foreground launcher, and what Slurm is asked before a job is queued."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forge_hpc.config import Config, UserError
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import partitions
from forge_hpc.slurm.partitions import Kind, Partition
from forge_hpc.slurm.site import site_overrides
from launchers.command import job_command, run_command, with_setup
from launchers.local import run_here
from launchers.slurm import RunExecutor

PROJECT = Path(__file__).resolve().parents[1]


def options(script: str) -> dict[str, str | bool]:
    """The #SBATCH options of a job script."""
    flags = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    pairs = [flag.removeprefix("--").partition("=") for flag in flags]
    return {name: value if equals else True for name, equals, value in pairs}


def render(tmp_path: Path, **keys) -> str:
    cfg = Config(name="a-run")
    cfg.cluster.nodes = keys.pop("nodes", 4)
    cfg.cluster.gpus_per_node = keys.pop("gpus_per_node", None)
    cfg.cluster.spare_nodes = keys.pop("spare_nodes", 0)
    for key, value in keys.items():
        setattr(cfg.slurm, key, value)
    return RunExecutor(cfg, tmp_path / "run").script()


def test_the_script_asks_for_whole_nodes_a_warning_and_a_requeue(tmp_path):
    script = render(tmp_path, gpus_per_node=8, partition="gpu", account="me", qos="high", constraint="h100")
    assert script.startswith("#!/bin/bash\n")
    assert options(script) == {
        "job-name": "a-run",
        "nodes": "4",
        "ntasks-per-node": "1",
        "exclusive": True,
        "mem": "0",
        "gpus-per-node": "8",
        "time": "24:00:00",
        "partition": "gpu",
        "account": "me",
        "qos": "high",
        "constraint": "h100",
        "signal": "USR2@300",
        "requeue": True,
        "open-mode": "append",
        "output": str(tmp_path / "run" / "logs" / "slurm-%j.out"),
    }
    assert "umask 077" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_job_starts_the_run_itself_once_a_node_and_no_pickle(tmp_path):
    last = render(tmp_path).rstrip().splitlines()[-1]
    words, after = (shlex.split(part) for part in last.split("||"))
    assert words[0] == "srun"
    assert {"--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(words)
    run = [sys.executable, "-u", "-m", "forge_hpc.run", "--run-dir", str(tmp_path / "run")]
    assert words[-6:] == run
    assert after == [*run, "--after", "$?"]
    assert "submitit.core" not in last


@pytest.mark.parametrize("setup", [[], ["echo setup"]])
def test_the_job_script_hands_the_exit_code_of_srun_on_where_it_is_not_0(tmp_path, setup):
    cfg = Config()
    cfg.slurm.setup = setup
    line = job_command(cfg, tmp_path / "it's a run").replace(sys.executable, "python")
    (tmp_path / "srun").write_text("#!/bin/sh\nexit $SRUN_CODE\n")
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 9\n')
    for program in ("srun", "python"):
        (tmp_path / program).chmod(0o700)
    run = [*(["setup"] if setup else []), *run_command(tmp_path / "it's a run")[1:]]
    for code, end, said in (("0", 0, []), ("137", 9, run)):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SRUN_CODE": code}
        done = subprocess.run(["bash", "-c", line], env=env, text=True, capture_output=True, check=False)
        assert done.returncode == end, done.stderr
        assert done.stdout.splitlines() == [*said, *(["--after", code] if said else [])]


def test_a_job_with_spare_nodes_outlives_a_node(tmp_path):
    script = render(tmp_path, nodes=5, spare_nodes=1)
    assert options(script)["no-kill"] is True
    assert "--no-kill" in shlex.split(script.rstrip().splitlines()[-1])
    assert "no-kill" not in render(tmp_path)


def test_nothing_is_asked_for_that_was_not_given(tmp_path):
    script = render(tmp_path, exclusive=False, gpus_per_node=0)
    names = options(script).keys()
    assert not {"exclusive", "mem", "gpus-per-node", "partition", "account", "wckey"} & names


@pytest.mark.parametrize("choice", ["successor", "never"])
def test_a_job_that_another_follows_or_none_is_not_requeued(tmp_path, choice):
    names = options(render(tmp_path, requeue=choice)).keys()
    assert "no-requeue" in names and "requeue" not in names


def test_extra_options_have_the_last_word(tmp_path):
    found = options(
        render(tmp_path, extra={"mail_type": "END", "--exclude": "n1", "overcommit": True, "requeue": False})
    )
    assert (found["mail-type"], found["exclude"], found["overcommit"]) == ("END", "n1", True)
    assert "requeue" not in found


def test_a_path_with_blanks_survives_the_script(tmp_path):
    cfg = Config()
    run_dir = tmp_path / "my runs" / "it's"
    script = RunExecutor(cfg, run_dir).script()
    assert shlex.split(script.rstrip().splitlines()[-1].partition("||")[0])[-1] == str(run_dir)
    assert options(script)["output"] == str(run_dir / "logs" / "slurm-%j.out")


def test_setup_lines_run_before_the_command_and_each_must_succeed(tmp_path):
    command = with_setup(["python3", "-c", "import os; print(os.environ['A'], 'it\\'s')"], ["export A=1", "true"])
    assert subprocess.run(command, text=True, capture_output=True, check=True).stdout == "1 it's\n"
    failed = subprocess.run(with_setup(["echo", "reached"], ["false"]), text=True, capture_output=True, check=False)
    assert (failed.returncode, failed.stdout) == (1, "")
    cfg = Config()
    cfg.slurm.setup = ["module load cuda"]
    words = shlex.split(job_command(cfg, tmp_path).partition("||")[0])
    assert words[-2].startswith("set -e\nmodule load cuda\nexec ")
    assert run_command(tmp_path)[-1] == str(tmp_path)


def test_a_site_profile_becomes_overrides_that_keep_their_text(tmp_path, monkeypatch):
    site = tmp_path / "site.yaml"
    site.write_text(
        "slurm:\n  partition: gpu\n  time: 24:00:00\n  setup:\n  - module load cuda\n  extra: {nice: 5}\n"
        "cluster: {gpus_per_node: 8}\nsandbox: {runtime: apptainer, image: x.sif, limits: {wall_s: 5}}\n"
    )
    from forge_hpc.config import load_config

    monkeypatch.setenv("FORGE_HPC_SITE", str(site))
    cfg = load_config(None, [*site_overrides(None), "slurm.partition=mine"])
    assert (cfg.slurm.partition, cfg.slurm.time, cfg.slurm.setup) == ("mine", "24:00:00", ["module load cuda"])
    assert (cfg.slurm.extra, cfg.cluster.gpus_per_node) == ({"nice": "5"}, 8)
    assert (cfg.sandbox.runtime, cfg.sandbox.image, cfg.sandbox.limits.wall_s) == ("apptainer", "x.sif", 5)

    folder = tmp_path / "xdg" / "forge_hpc" / "sites"
    folder.mkdir(parents=True)
    site.rename(folder / "alps.yaml")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert "slurm.partition=gpu" in site_overrides("alps")
    with pytest.raises(UserError) as error:
        site_overrides("alp")
    assert "alps" in error.value.hint


@pytest.mark.parametrize("text", ["slurm: [1]", "model: {path: x}", "slurm: {", "just text"])
def test_a_broken_site_profile_is_a_user_error(tmp_path, text):
    site = tmp_path / "site.yaml"
    site.write_text(text)
    with pytest.raises(UserError, match="site"):
        site_overrides(str(site))


def test_jobs_that_no_partition_can_run_are_refused():
    known = [
        Partition("cpu", True, True, 3600, (Kind(8, 0),)),
        Partition("gpu", False, True, float("inf"), (Kind(4, 8),)),
    ]
    cfg = Config()
    cfg.slurm.time, cfg.cluster.nodes = "30", 8
    partitions.check_job(cfg, known)
    cfg.slurm.partition = "gpu,cpu"
    partitions.check_job(cfg, known)
    for key, value, message in [
        ("nodes", 9, "9 nodes asked for, partition cpu has 8"),
        ("time", "2:00:00", "longer than partition cpu allows \\(01:00:00\\)"),
        ("time", "0", "longer"),
        ("partition", "fast", "no partition fast"),
        ("gpus", 2, "8 nodes with 2 GPUs asked for, partition cpu has 0 of them"),
    ]:
        cfg = Config()
        cfg.slurm.time, cfg.cluster.nodes = "30", 8
        if key == "nodes":
            cfg.cluster.nodes = value
        elif key == "gpus":
            cfg.cluster.gpus_per_node = value
        else:
            setattr(cfg.slurm, key, value)
        with pytest.raises(UserError, match=message):
            partitions.check_job(cfg, known)


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:h100:8(S:0-1)", 8), ("gpu:4,nvme:1", 4), ("(null)", 0), ("gpu:a:2,gpu:b:2", 4), ("nvme:2", 0)],
)
def test_gpus_are_read_from_generic_resources(gres, gpus):
    assert partitions._gpus(gres) == gpus


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_in_the_foreground_gets_our_signals_once_and_gives_its_exit_code(tmp_path, signum):
    run = "trap 'echo signal; exit 7' INT TERM HUP; echo ready; while true; do sleep 0.05; done"
    code = (
        "import sys; from pathlib import Path\n"
        "from forge_hpc.config import Config; from launchers.local import run_here\n"
        f"cfg = Config(); cfg.slurm.setup = [{run!r}]; sys.exit(run_here(cfg, Path({str(tmp_path)!r})))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signum)
    assert process.communicate(timeout=20)[0] == "signal\n"
    assert process.returncode == 7


def test_a_run_in_the_foreground_ends_with_a_killed_launcher(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from forge_hpc.config import Config; from launchers.local import run_here\n"
        f"cfg = Config(); cfg.slurm.setup = ['echo $$; exec sleep 600']; run_here(cfg, Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.PIPE, text=True
    )
    assert int(process.stdout.readline()) > 0
    process.kill()
    # the pipe closes when the last process that holds it, the run, has ended
    assert process.communicate(timeout=20)[0] == ""


def test_a_run_in_the_foreground_knows_of_no_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NNODES", "4")
    cfg = Config()
    cfg.slurm.setup = [f"env > {tmp_path}/env; exit 3"]
    assert run_here(cfg, tmp_path) == 3
    assert "SLURM_" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize(
    ("end", "code", "how"), [("kill -KILL $$", 137, "by SIGKILL"), ("exit 3", 3, "with 3"), ("exit 0", 1, "with 0")]
)
def test_a_run_that_dies_without_a_word_has_failed(tmp_path, end, code, how):
    run_dir = RunDir(tmp_path / "r").create()
    run_dir.write_status(state="running")
    cfg = Config()
    cfg.slurm.setup = [end]
    assert run_here(cfg, run_dir.path) == code
    status = run_dir.read_status()
    assert status.state == "failed" and f"ended {how}" in status.message


def test_the_state_of_another_run_in_the_directory_is_not_touched(tmp_path):
    run_dir = RunDir(tmp_path / "r").create()
    run_dir.write_status(state="running")
    cfg = Config()
    cfg.slurm.setup = ["exit 2"]
    with run_dir.lock():
        assert run_here(cfg, run_dir.path) == 2
    assert run_dir.read_status().state == "running"


@pytest.mark.slurm
def test_slurm_says_what_its_partitions_are(slurm_cluster, monkeypatch):
    for key, value in slurm_cluster.env.items():
        monkeypatch.setenv(key, value)
    assert partitions.slurm_is_here()
    assert partitions.partitions() == [
        Partition("main", True, True, float("inf"), (Kind(4, 0),)),
        Partition("short", False, True, 600, (Kind(4, 0),)),
        Partition("spot", False, True, float("inf"), (Kind(4, 0),)),
        Partition("urgent", False, True, float("inf"), (Kind(4, 0),)),
    ]


def test_launchers_load_no_torch():
    modules = "launchers.slurm, launchers.local, forge_hpc.slurm.partitions"
    code = f"import sys, json, {modules}; print(json.dumps(list(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True)
    assert not {"torch", "vllm", "monarch", "torchtitan", "numpy"} & set(json.loads(done.stdout))
