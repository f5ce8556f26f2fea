"""Runs in containers, as far as no container is needed: what is rendered, checked, mounted, relayed, and told where one
cannot start. The real thing: tests/test_containers_apptainer.py."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT, read, small_run, status, wait_for
from slurm_cluster import SlurmCluster, missing_requirement

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.container.mounts import Mount, all_mounts, site_mounts
from forge_hpc.container.outside import container_of
from forge_hpc.container.problems import check_container, problems_here
from forge_hpc.container.relay import Relay, answer
from forge_hpc.container.runtimes import apptainer, environment
from forge_hpc.run_dir import RunDir
from forge_hpc.slurm import outside
from forge_hpc.slurm.client import SlurmAbsent, SlurmRefused, SlurmSilent, ask
from launchers.command import job_command, start_in_allocation


def contained(runtime: str = "apptainer", image: str = "/images/a.sif", **keys: Any) -> Config:
    cfg = Config(name="a-run")
    cfg.slurm.container.runtime, cfg.slurm.container.image = runtime, image
    for key, value in keys.items():
        setattr(cfg.slurm.container, key, value)
    return cfg


# ---- the command


def test_with_apptainer_the_job_script_is_the_same_as_without(tmp_path: Path) -> None:
    assert job_command(contained(), tmp_path) == job_command(Config(), tmp_path)


def test_with_pyxis_srun_starts_the_run_in_the_image_beside_somebody_who_asks_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))  # else the run is seen with /tmp
    cfg = contained("pyxis", "nvcr.io#team/forge:1", mounts=["/data:/mnt/data:ro"])
    cfg.slurm.setup = ["export A=1"]
    start = job_command(cfg, tmp_path / "run").partition("\n")[2]
    words, after = (shlex.split(part) for part in start.rsplit(" || ", 1))
    assert words[:4] == [sys.executable, "-m", "forge_hpc.container.relay", "srun"]
    assert {"--container-image=nvcr.io#team/forge:1", "--no-container-remap-root"} <= set(words)
    [mounts] = [word.partition("=")[2].split(",") for word in words if word.startswith("--container-mounts=")]
    assert {"/data:/mnt/data:ro", f"{tmp_path}/run:{tmp_path}/run", f"{PROJECT}:{PROJECT}"} <= set(mounts)
    assert mounts[:2] == ["/tmp:/tmp", f"{Path.home()}:{Path.home()}"], "they hide no other mount"
    assert words[-4:-1] == ["bash", "-c", words[-2]]
    command = words[-2].splitlines()[-1]
    assert f"PYTHONPATH={PROJECT} " in command and f"python3 -u -m forge_hpc.run --run-dir {tmp_path}/run" in command
    assert sys.executable in after[2] and "--after" in after[2], "what follows is outside"
    [*_, last] = start_in_allocation(cfg, tmp_path / "run", {}).command[:4]
    assert last == "srun"


def test_a_path_that_pyxis_would_cut_in_two_is_refused() -> None:
    with pytest.raises(UserError, match=r"pyxis cannot show .*/my run inside"):
        job_command(contained("pyxis"), Path("/project/my run"))


def test_apptainer_gets_the_mounts_and_a_clean_python(tmp_path: Path) -> None:
    mounts = [Mount("/a,b", "/c", True), Mount(str(tmp_path), str(tmp_path))]
    line = apptainer(contained(), mounts, ["python3", "-c", "pass"])
    assert line[1] == "exec" and line[-4:] == ["/images/a.sif", "python3", "-c", "pass"]
    given = [line[i + 1] for i, word in enumerate(line) if word == "--mount"]
    assert given == [
        'type=bind,"source=/a,b",destination=/c,ro',
        f"type=bind,source={tmp_path},destination={tmp_path}",
    ]
    assert line[line.index("--pwd") + 1] == str(Path.cwd())
    env = environment({"A": "1"}, {"LD_PRELOAD": "x", "PYTHONPATH": "y", "HF_HOME": "/hf", "SLURM_JOB_ID": "7"})
    assert env["APPTAINERENV_PYTHONPATH"] == str(PROJECT) and env["APPTAINERENV_A"] == "1"
    assert (env["HF_HOME"], env["SLURM_JOB_ID"]) == ("/hf", "7") and "LD_PRELOAD" not in env


def test_what_the_configuration_and_the_environment_name_is_seen_inside(tmp_path: Path, monkeypatch) -> None:
    for name in ("model", "hf", "mine", "run", "teacher"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine/reward.py").write_text("")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "hf"))
    overrides = [
        f"model.path={tmp_path}/model",
        f"reward=[{{name: {tmp_path}/mine/reward.py:f}}]",
        "recipe=distillation",
        f"recipe_args.teachers=[{tmp_path}/teacher, 'builtin:qwen3-small']",
        "slurm.container={runtime: apptainer, image: a, mounts: [$DATA/x, '/b:/c:ro']}",
    ]
    found = all_mounts(load_config(None, overrides), tmp_path / "run")
    assert found[:2] == [Mount("/data/x", "/data/x"), Mount("/b", "/c", True)]
    seen = {mount.source for mount in found if mount.source == mount.target}
    assert {str(tmp_path / name) for name in ("model", "hf", "mine", "run", "teacher")} <= seen
    assert str(PROJECT) in seen
    inner = [mount for mount in found if mount.source == f"{tmp_path}/run/logs"]
    assert not inner


# ---- what is said beforehand


@pytest.mark.parametrize("text", ["data", "/a:b", "/a:/b:rx", "/a:/b:ro:x", "/a,b", "$NOT_SET/a"])
def test_a_mount_that_cannot_be_read_is_refused(text: str, monkeypatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match=r"slurm\.container\.mounts"):
        site_mounts(contained(mounts=[text]).slurm.container)


def test_a_runtime_without_an_image_is_refused() -> None:
    with pytest.raises(UserError, match="needs an image"):
        validate(load_config(None, ["slurm.container.runtime=apptainer"]))


@pytest.mark.parametrize("image", ["/absent/a.sif", "images/a.sif"])
def test_submit_refuses_an_image_that_is_not_there_and_makes_nothing(image: str, tmp_path: Path) -> None:
    overrides = ["slurm.container.runtime=apptainer", f"slurm.container.image={image}"]
    command = [
        sys.executable,
        "-m",
        "forge_hpc.submit",
        "--dry-run",
        "--nodes",
        "2",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run([*command, *overrides], text=True, capture_output=True, check=False, cwd=PROJECT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: slurm.container.image={image} is not there" in done.stderr and "hint: " in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mount_that_is_not_on_the_login_node_is_a_warning(tmp_path: Path) -> None:
    cfg = contained(image=str(tmp_path), mounts=[f"{tmp_path}/none", str(tmp_path)])
    [warning] = check_container(cfg)
    assert warning == f"slurm.container.mounts: {tmp_path}/none is not on this machine; nodes without it are left out"
    for image in ("docker://debian", "docker-archive:img.tar", "oci-archive:x.tar", "oci:folder"):
        assert check_container(contained(image=image)) == []
    assert check_container(Config()) == []


def test_a_node_says_all_that_it_lacks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = problems_here(contained(image=f"{tmp_path}/a.sif", mounts=[f"{tmp_path}/data:/data"]))
    assert found == [
        "apptainer is not installed here, or not on the PATH after slurm.setup",
        f"slurm.container.image={tmp_path}/a.sif is not there",
        f"slurm.container.mounts: {tmp_path}/data is not there",
    ]


def test_only_a_step_of_slurm_goes_into_a_container_and_only_once(tmp_path: Path, monkeypatch) -> None:
    from forge_hpc.cluster.allocation import Allocation
    from forge_hpc.config import save_config

    run_dir, here = RunDir(tmp_path), Allocation("local", 0, 1, 0)
    step = Allocation("7", 0, 1, 0)
    save_config(contained(), run_dir.config)
    assert container_of(run_dir, step) is not None and container_of(run_dir, here) is None
    monkeypatch.setenv(outside.RELAY, "/tmp/x")
    assert container_of(run_dir, step) is None
    monkeypatch.delenv(outside.RELAY)
    save_config(contained("pyxis"), run_dir.config)
    assert container_of(run_dir, step) is None


# ---- Slurm and signals from inside


@pytest.fixture
def slurm_outside(tmp_path: Path, monkeypatch) -> Path:
    """A folder of commands that only the process outside has on its PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "scontrol": 'echo "$@"; echo said >&2; [ "$2" != bad ] || { echo Invalid job id >&2; exit 1; }',
        "sbatch": 'pwd; env | grep -E "^(SLURM_|SBATCH_|FORGE_|MINE|HERE)" | sort',
        "squeue": "exec sleep 60",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def from_inside(relay: Relay, code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PROJECT), **relay.variables, **env},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_slurm_is_asked_outside_with_the_environment_that_is_there(slurm_outside: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", f"{slurm_outside}:{os.environ['PATH']}")
    for name, value in {"SLURM_JOB_ID": "7", "SBATCH_X": "1", "MINE": "outside", "HERE": "outside"}.items():
        monkeypatch.setenv(name, value)
    with Relay() as relay:
        asked = "from forge_hpc.slurm.client import ask_both; print(ask_both('scontrol', 'show', 'job 7'))"
        assert from_inside(relay, asked) == "('show job 7\\n', 'said\\n')\n"
        # As slurm/successor.py does it: nothing of this job's, something of its own.
        submitted = (
            "import os; from forge_hpc.slurm.client import ask; env = {k: v for k, v in os.environ.items() "
            "if not k.startswith('SLURM_')} | {'FORGE_HPC_CONTINUE': 'D', 'SLURM_CONF': '/c'}; "
            "print(ask('sbatch', 'x', env=env, cwd='/usr'), end='')"
        )
        said = from_inside(relay, submitted, MINE="inside", SLURM_STEP_ID="0").splitlines()
    # What differs only between inside and outside is as outside.
    assert said == ["/usr", "FORGE_HPC_CONTINUE=D", "HERE=outside", "MINE=outside", "SLURM_CONF=/c"]


def test_what_slurm_refuses_is_refused_inside_and_nothing_else_is_run(slurm_outside: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", f"{slurm_outside}:{os.environ['PATH']}")
    assert answer({"ask": ["sh", "-c", "true"], "timeout_s": 1, "env": None, "cwd": None})["kind"] == "SlurmRefused"
    with Relay() as relay:
        for name, value in relay.variables.items():
            monkeypatch.setenv(name, value)
        # In this process inside and outside are the same: the relay's own calls must not come back to it.
        monkeypatch.setattr(outside, "is_inside", lambda: threading.current_thread() is threading.main_thread())
        with pytest.raises(SlurmRefused, match="Invalid job id"):
            ask("scontrol", "show", "bad")
        with pytest.raises(SlurmSilent, match="does not answer within 1 s"):
            ask("squeue", timeout_s=1)
        with pytest.raises(SlurmAbsent):
            ask("sacctmgr", env={"PATH": "/none"})
    with pytest.raises(SlurmAbsent, match="nobody outside the container answers"):
        ask("scontrol", "show", "job")


def test_each_signal_comes_in_once_also_one_that_came_before_anybody_listened() -> None:
    code = (
        "import os, signal, time; from forge_hpc.run_dir import RunDir; from forge_hpc.supervisor.job import OwnJob; "
        "from forge_hpc.cluster.allocation import Allocation; from forge_hpc.supervisor.signals import StopRequests; "
        "requests = StopRequests(RunDir('/tmp'), OwnJob(Allocation('local', 0, 1, 0))); "
        "os.kill(os.getpid(), signal.SIGINT); end = time.monotonic() + 30\n"
        "while len(requests._signals) < 2 and time.monotonic() < end: time.sleep(0.05)\n"
        "time.sleep(0.3); print([number for number, _ in requests._signals])"
    )
    with Relay() as relay:
        relay.signal(signal.SIGTERM)
        threading.Timer(2.0, relay.signal, [signal.SIGUSR2]).start()
        said = from_inside(relay, code, **{outside.SIGNALS: "1"})
        assert relay.has_run.is_set()
    assert json.loads(said) == [signal.SIGTERM, signal.SIGUSR2]


def test_a_relay_hands_on_the_exit_code_and_its_folder_goes_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "forge_hpc.container.relay", "sh", "-c", "echo $FORGE_HPC_OUTSIDE; exit 7"]
    done = subprocess.run(command, text=True, capture_output=True, check=False, cwd=PROJECT)
    assert done.returncode == 7 and done.stdout.startswith("/tmp/forge-hpc-"), done.stderr
    assert not Path(done.stdout.strip()).exists()
    deep = tmp_path / ("a" * 100)  # longer than a socket's name may be
    deep.mkdir()
    with Relay(str(deep)) as relay, pytest.MonkeyPatch.context() as patch:
        patch.setenv(outside.RELAY, relay.variables[outside.RELAY])
        found = outside.ask_outside(["sh"], 10, None, None)
        assert found["refused"] == "sh is no command of Slurm"
    assert list(deep.iterdir()) == []


# ---- on a cluster whose nodes have no Apptainer


def submit_where_there_is_no_apptainer(cluster: SlurmCluster, run_dir: Path, nodes: int) -> str:
    """The job's id."""
    command = [sys.executable, "-m", "forge_hpc.submit", "--nodes", str(nodes), "--run-dir", str(run_dir)]
    command += [*small_run(run_dir.parent), "slurm.container.runtime=apptainer", "cluster.max_restarts=1"]
    command += [f"slurm.container.image={run_dir.parent}", "slurm.setup=[export PATH=/usr/bin:/bin]"]
    cluster.run(*command, env={**cluster.env, "PYTHONPATH": str(PROJECT)}, cwd=PROJECT)
    job_id: str = status(run_dir)["job_id"]
    return job_id


def ends(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read(run_dir, "starts.jsonl") if record["event"] == "end"]


@pytest.mark.slurm
def test_the_first_node_is_shut_out_too_where_its_container_does_not_start(tmp_path: Path) -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    run_dir = tmp_path / "run"
    # As with control groups, all that the job script has started is killed with it: by the requeue.
    with SlurmCluster(nodes=2, options={"ProctrackType": "proctrack/pgid"}) as cluster:
        job = submit_where_there_is_no_apptainer(cluster, run_dir, nodes=1)
        [end] = wait_for(lambda: ends(run_dir), "the end of the first start")
        node = cluster.hosts[0].name
        assert (end["state"], end["cause"]) == ("preempted", "gate"), end
        assert end["message"].startswith(f"node 0 ({node}) is not fit: apptainer is not installed here"), end
        wait_for(lambda: cluster.job(job)["ExcNodeList"] == node, "the exclusion", 60)


@pytest.mark.slurm
def test_nodes_without_the_runtime_are_named_and_the_job_does_not_come_back_for_ever(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit_where_there_is_no_apptainer(slurm_cluster, run_dir, nodes=2)
    wait_for(lambda: slurm_cluster.job(job)["JobState"] == "FAILED", "the end of both starts", 200)
    first, second = ends(run_dir)
    assert (first["state"], first["cause"]) == ("preempted", "gate"), first
    missing = "is not fit: apptainer is not installed here, or not on the PATH after slurm.setup"
    assert first["message"].startswith("node 0 (") and first["message"].count(missing) == 2, first
    # All of several lack it: none is to blame, and none is shut out.
    assert slurm_cluster.job(job).get("ExcNodeList") in (None, "(null)")
    assert (second["state"], status(run_dir)["state"]) == ("failed", "failed")
    assert "2 failures without progress" in status(run_dir)["message"]
