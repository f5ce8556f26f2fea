"""The doors: submit, sbatch scripts, and the commands for a run that exists."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from forge_hpc.config import UserError, read_config
from forge_hpc.finding import find_run
from forge_hpc.run_dir import RunDir

PROJECT = Path(__file__).resolve().parents[1]
# Ends the job before the run itself starts: these tests are about how it gets there.
SETUP = "slurm.setup=['echo started on $(hostname) as $SLURM_PROCID; exit 0']"


def clean_env(**changes: str) -> dict[str, str]:
    """An environment outside any Slurm job and cluster, in which the project can be imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "FORGE_HPC_"))}
    return {**env, "PYTHONPATH": str(PROJECT), "PATH": str(Path(sys.executable).parent), **changes}


def cli(*arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 60):
    return subprocess.run(
        [sys.executable, "-m", "forge_hpc.cli", *arguments],
        cwd=cwd,
        env=env or clean_env(),
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


@pytest.fixture
def slurm_env(slurm_cluster) -> dict[str, str]:
    """As on a login node of the cluster."""
    env = clean_env(PATH=os.environ["PATH"], SLURM_CONF=slurm_cluster.env["SLURM_CONF"])
    return {**env, "VIRTUAL_ENV": sys.prefix, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


# -- without Slurm


def test_a_dry_run_of_64_nodes_takes_less_than_a_second_of_cpu_and_no_torch(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "forge_hpc.submit", "--nodes", "64", "--dry-run"],
        cwd=tmp_path,
        env=clean_env(),
        text=True,
        capture_output=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"dry run: {cpu_s:.2f} s of CPU")
    assert cpu_s < 1.0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    heavy = {"torch", "vllm", "monarch", "torchtitan", "torchstore", "transformers", "omegaconf", "huggingface_hub"}
    assert not heavy & imported
    assert "#SBATCH --nodes=64\n" in done.stdout
    assert "64 nodes" in done.stdout
    assert "checks" in done.stderr and "left out" in done.stderr
    assert "configs/grpo/demo.yaml" in done.stderr
    assert list(tmp_path.iterdir()) == []
    subprocess.run(["/bin/bash", "-n"], input=done.stdout, text=True, check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.optimizer.lrr=1"], ["trainer.optimizer.lrr", "did you mean trainer.optimizer.lr"]),
        (["trainer.training.steps=many"], ["trainer.training.steps"]),
        (["--config", "absent.yaml"], ["absent.yaml"]),
        (["--nodes", "0"], ["--nodes 0"]),
        (["--nodes", "x"], ["--nodes"]),
        (["--nodez", "2"], ["--nodez"]),
        (["--nodes", "2"], ["2 nodes need Slurm"]),
        (["--nodes", "2", "--cluster", "local"], ["--cluster local"]),
        (["--cluster", "slurm"], ["there is no Slurm here"]),
        (["--run-dir", "/dev/null/run"], ["/dev/null/run"]),
        (["--site", "nowhere"], ["nowhere"]),
        (["--name", "a b"], ["a b"]),
        (["nonsense"], ["key=value"]),
    ],
)
def test_what_a_user_gets_wrong_is_named_in_one_line(tmp_path, arguments, words):
    assert_user_error(cli("submit", *arguments, cwd=tmp_path), *words)
    assert list(tmp_path.iterdir()) == []


def test_options_may_stand_among_overrides(tmp_path):
    done = cli("submit", "seed=7", "--nodes", "2", "rollout.group_size=4", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2\n" in done.stdout


def test_a_split_that_does_not_fit_the_nodes_is_made_to_fit_and_named(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("cluster: {nodes: 4, trainer_nodes: 1, rollout_nodes: 3}\n")
    done = cli("submit", "--config", str(config), "--nodes", "8", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trainer_nodes=1 and rollout_nodes=3" in done.stderr
    assert "nodes 0-1" in done.stdout and "nodes 2-7" in done.stdout
    by_hand = cli(
        "submit", "--config", str(config), "--nodes", "8", "--dry-run", "cluster.rollout_nodes=4", cwd=tmp_path
    )
    assert_user_error(by_hand, "1 trainer nodes and 4 rollout nodes")


def test_a_local_run_is_in_the_foreground_and_its_directory_is_private(tmp_path):
    env = clean_env(PATH=os.environ["PATH"])
    setup = "slurm.setup=['echo here; exit 5']"
    done = cli("submit", "--cluster", "local", "--run-dir", "r", setup, cwd=tmp_path, env=env)
    assert done.returncode == 5, done.stderr
    assert "here" in done.stdout
    run_dir = RunDir(tmp_path / "r")
    assert [stat.S_IMODE(p.stat().st_mode) for p in (run_dir.path, run_dir.config, run_dir.status)] == [
        0o700,
        0o600,
        0o600,
    ]
    status = run_dir.read_status()
    assert (status.state, status.message) == ("failed", "the run's process ended with 5, without a final state")
    assert read_config(run_dir.config).slurm.setup == ["echo here; exit 5"]

    # the same directory again, from its own configuration; another one is refused
    assert cli("resume", "r", "--cluster", "local", cwd=tmp_path, env=env).returncode == 5
    other = cli("submit", "--cluster", "local", "--run-dir", "r", "seed=7", "name=x", cwd=tmp_path, env=env)
    assert_user_error(other, "seed (42 there, 7 now)", "name (")

    # a completed run: nothing to do, or moved aside
    run_dir.write_status(state="completed", step=60)
    again = cli("submit", "--cluster", "local", "--run-dir", "r", cwd=tmp_path, env=env)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (
        cli("submit", "--cluster", "local", "--run-dir", "r", "--fresh", setup, cwd=tmp_path, env=env).returncode == 5
    )
    assert sorted(p.name[:2] for p in tmp_path.iterdir()) == ["r", "r-"]


def test_how_long_and_where_a_run_goes_on_may_change_and_is_said(tmp_path):
    env = clean_env(PATH=os.environ["PATH"])
    local = ("--cluster", "local", "--run-dir", "r")
    cli("submit", *local, "slurm.setup=['exit 5']", cwd=tmp_path, env=env)
    run_dir = RunDir(tmp_path / "r")
    run_dir.write_status(state="completed", step=60)
    fewer = cli("submit", *local, "trainer.training.steps=59", cwd=tmp_path, env=env)
    assert_user_error(fewer, "trainer.training.steps=59", "60 steps already")
    assert run_dir.read_status().state == "completed"
    keys = ["trainer.training.steps=70", "checkpoint.keep=1", "generator.replicas=1"]
    more = cli("submit", *local, *keys, cwd=tmp_path, env=env)
    assert more.returncode == 5, more.stderr
    said = [line for line in more.stderr.splitlines() if " -> " in line]
    assert said == [
        "generator.replicas: null -> 1 (may change the last bit)",
        "trainer.training.steps: 60 -> 70",
        "checkpoint.keep: 2 -> 1",
    ]
    cfg = read_config(run_dir.config)
    assert (cfg.trainer.training.steps, cfg.checkpoint.keep, cfg.generator.replicas) == (70, 1, 1)


def test_the_warm_start_is_checked_before_the_run_and_kept_with_it(tmp_path):
    env = clean_env(PATH=os.environ["PATH"])
    warm = tmp_path / "warm.yaml"
    warm.write_text("base: " + str(PROJECT / "configs" / "sft" / "demo.yaml") + "\n")
    run_dir = RunDir(tmp_path / "r")
    submit = ("submit", "--cluster", "local", "--run-dir", "r", f"warmstart.config={warm}", "slurm.setup=['exit 5']")
    for bad, word in [("trainer.optimizer.lrr=1", "lrr"), ("trainer.training.steps=0", "trainer.training.steps")]:
        assert_user_error(
            cli(*submit, f"warmstart.overrides=[{bad}]", cwd=tmp_path, env=env), "warmstart.config", "warm.yaml", word
        )
        assert not run_dir.exists
    assert cli(*submit, "warmstart.overrides=[trainer.training.steps=70]", cwd=tmp_path, env=env).returncode == 5
    saved = RunDir(run_dir.warmstart)
    assert read_config(saved.config).trainer.training.steps == 70
    assert [stat.S_IMODE(p.stat().st_mode) for p in (saved.path, saved.config)] == [0o700, 0o600]
    warm.unlink()
    resumed = cli("resume", "r", "--cluster", "local", cwd=tmp_path, env=env)
    assert resumed.returncode == 5, resumed.stderr


def test_shared_nodes_are_warned_of(tmp_path):
    part = ("slurm.exclusive=false", "slurm.cpus_per_task=4", "slurm.mem=8G")
    done = cli("submit", "--dry-run", *part, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("warning: slurm.exclusive=false")]) == 1
    assert "slurm.exclusive" not in cli("submit", "--dry-run", cwd=tmp_path).stderr


def test_a_complete_run_starts_nothing_in_a_job(tmp_path):
    env = clean_env(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2")
    arguments = ("prepare", "--run-dir", "r", "cluster.gpus_per_node=0")
    first = cli(*arguments, cwd=tmp_path, env=env)
    assert "\nsrun " in first.stdout, first.stderr
    run_dir = RunDir(tmp_path / "r")
    assert read_config(RunDir(run_dir.warmstart).config).recipe == "sft"
    run_dir.write_status(state="completed", step=60)
    for restarts in ("0", "1"):
        again = cli(*arguments, cwd=tmp_path, env={**env, "SLURM_RESTART_COUNT": restarts})
        assert (again.returncode, again.stdout) == (0, "true\n"), again.stderr
        assert "is complete: nothing to do" in again.stderr
    assert run_dir.read_status().state == "completed"


def test_who_follows_a_run_is_told_of_its_death(tmp_path, monkeypatch, capsys):
    from forge_hpc import control
    from forge_hpc.cli import main

    run_dir = RunDir(tmp_path / "r").create()
    (run_dir.create_log_dir(None, 0) / "controller.log").write_text("step 1\n")
    run_dir.write_status(state="running", step=1)
    monkeypatch.setattr(control, "_NO_HEARTBEAT_S", 0.5)
    for command in (["watch", "r"], ["logs", "--follow", "r"]):
        command[-1] = str(run_dir)
        assert main(command) == 1
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "no heartbeat" in errors[0]

    run_dir.write_status(job_id="7")
    monkeypatch.setattr(control.shutil, "which", lambda name: name)
    for state, lost in [(("RUNNING", "None"), None), (("FAILED", "NodeFail"), "job 7"), (None, "unknown to Slurm")]:
        monkeypatch.setattr(control, "job_state", lambda job_id, state=state: state)
        told = control.Liveness(run_dir).lost(run_dir.read_status())
        assert told is None if lost is None else lost in told


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_run_is_a_user_error(tmp_path):
    run_dir = RunDir(tmp_path / "private" / "r")
    run_dir.path.parent.mkdir(mode=0o700)
    run_dir.create()
    os.seteuid(65534)
    try:
        for read in (lambda: run_dir.exists, lambda: run_dir.has_config, run_dir.read_status, run_dir.lock_holder):
            with pytest.raises(UserError, match="no permission to read"):
                read()
        with pytest.raises(UserError, match="no permission to read"):
            find_run(run_dir.path)
    finally:
        os.seteuid(0)


def test_commands_find_the_newest_run_and_say_where_there_is_none(tmp_path):
    assert_user_error(cli("status", cwd=tmp_path), "no run")
    assert_user_error(cli("status", "nowhere", cwd=tmp_path), "no run in")
    assert_user_error(cli("dance", cwd=tmp_path), "unknown command dance")
    run_dir = RunDir(tmp_path / "runs" / "a").create()
    run_dir.write_status(state="running", step=3)
    shown = cli("status", cwd=tmp_path)
    assert shown.returncode == 0 and "running" in shown.stdout, shown.stderr
    assert cli("report", cwd=tmp_path).returncode == 0
    assert_user_error(cli("logs", cwd=tmp_path), "not begun yet")
    logs = run_dir.create_log_dir(None, 0)
    (logs / "controller.log").write_text("".join(f"line {i}\n" for i in range(100)))
    (logs / "trainer-0.log").write_text("a step\n")
    assert cli("logs", "-n", "2", cwd=tmp_path).stdout == "line 98\nline 99\n"
    assert cli("logs", "--role", "trainer-0", cwd=tmp_path).stdout == "a step\n"
    assert_user_error(cli("logs", "--role", "trainer-9", cwd=tmp_path), "controller, trainer-0")
    cancelled = cli("cancel", str(run_dir), cwd=tmp_path)
    assert cancelled.returncode == 0, cancelled.stderr
    assert run_dir.read_status().state == "cancelled"
    assert cli("watch", cwd=tmp_path).returncode == 1


def test_cancel_ends_a_local_run(tmp_path):
    code = (
        "import signal, sys, time; from forge_hpc.run_dir import RunDir; d = RunDir(sys.argv[1]).create()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "with d.lock():\n"
        "    d.write_status(state='running'); print('ready', flush=True)\n"
        "    try: time.sleep(600)\n"
        "    except KeyboardInterrupt: d.write_status(state='cancelled', message='by Ctrl-C')"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "r")], env=clean_env(), stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"ready\n"
        busy = cli("submit", "--cluster", "local", "--run-dir", "r", cwd=tmp_path)
        assert_user_error(busy, f"process {run.pid}", "already")
        done = subprocess.Popen(
            [sys.executable, "-m", "forge_hpc.cli", "cancel", "r"],
            cwd=tmp_path,
            env=clean_env(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert run.wait(20) == 0  # reaped here, so that it is gone for the other side too
        assert done.communicate(timeout=20)[0].strip().endswith("cancelled  by Ctrl-C")
    finally:
        run.kill()
        run.wait()
    assert RunDir(tmp_path / "r").read_status().message == "by Ctrl-C"


def test_doctor_says_what_is_here(tmp_path):
    done = cli("doctor", cwd=tmp_path, env=clean_env(PATH=os.environ["PATH"]))
    assert done.returncode in (0, 1)
    for subject in ("python", "torch", "vllm", "Slurm", "disk"):
        assert subject in done.stdout


def test_prepare_outside_a_job_is_refused(tmp_path):
    assert_user_error(cli("prepare", cwd=tmp_path), "not a Slurm job")


# -- on a real Slurm cluster


@pytest.mark.slurm
def test_submit_queues_a_job_that_starts_on_every_node(slurm_cluster, slurm_env, tmp_path):
    done = cli("submit", "--nodes", "4", "--run-dir", "r", SETUP, cwd=tmp_path, env=slurm_env)
    assert done.returncode == 0, done.stderr
    run_dir = RunDir(tmp_path / "r")
    job_id = run_dir.read_status().job_id
    assert f"job            {job_id}\n" in done.stdout
    assert str(run_dir) in done.stdout and "watch" in done.stdout
    job = slurm_cluster.wait_for_job(job_id)
    assert (job["NumNodes"], job["Requeue"], job["JobName"]) == ("4", "1", "demo")
    output = (run_dir.logs / f"slurm-{job_id}.out").read_text()
    started = sorted(line for line in output.splitlines() if line.startswith("started on"))
    assert started == [f"started on {host.name} as {i}" for i, host in enumerate(slurm_cluster.hosts)]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [*run_dir.path.rglob("*")] if p.is_file()}
    assert modes == {0o600}
    # the job has ended without a word of the run: that is told, and is no success
    followed = cli("resume", "r", "--follow", cwd=tmp_path, env=slurm_env)
    assert followed.returncode == 1
    assert "has left the queue" in followed.stderr


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "5"], ["5 nodes asked for, partition main has 4"]),
        (["--nodes", "1", "slurm.partition=absent"], ["no partition absent", "main, short"]),
        (["--nodes", "1", "slurm.partition=short"], ["longer than partition short allows (00:10:00)"]),
        (["--nodes", "1", "slurm.extra={licenses: absent}"], ["Slurm refused the job"]),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_made(slurm_env, tmp_path, arguments, words):
    assert_user_error(cli("submit", *arguments, cwd=tmp_path, env=slurm_env), *words)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.mark.slurm
def test_a_dry_run_that_asks_too_much_prints_the_script_and_fails(slurm_env, tmp_path):
    done = cli("submit", "--nodes", "64", "--dry-run", cwd=tmp_path, env=slurm_env)
    assert_user_error(done, "64 nodes asked for, partition main has 4")
    assert "#SBATCH --nodes=64\n" in done.stdout


@pytest.mark.slurm
def test_a_directory_with_a_queued_job_is_refused_and_cancel_frees_it(slurm_cluster, slurm_env, tmp_path):
    submitted = cli("submit", "--nodes", "4", "--run-dir", "r", "slurm.extra={hold: true}", cwd=tmp_path, env=slurm_env)
    assert submitted.returncode == 0, submitted.stderr
    job_id = RunDir(tmp_path / "r").read_status().job_id
    assert "PENDING" in cli("status", "r", cwd=tmp_path, env=slurm_env).stdout
    again = cli("submit", "--run-dir", "r", cwd=tmp_path, env=slurm_env)
    assert_user_error(again, f"job {job_id} works on")
    cancelled = cli("cancel", "r", cwd=tmp_path, env=slurm_env)
    assert cancelled.returncode == 0, cancelled.stderr
    assert slurm_cluster.job(job_id)["JobState"] == "CANCELLED"
    assert RunDir(tmp_path / "r").read_status().state == "cancelled"


@pytest.mark.slurm
@pytest.mark.parametrize("recipe", ["grpo", "sft", "eval"])
def test_the_job_scripts_take_the_nodes_of_their_allocation(slurm_cluster, slurm_env, recipe):
    output = slurm_cluster.state / f"{recipe}.out"
    run_dir = RunDir(slurm_cluster.state / f"run {recipe}")
    submitted = slurm_cluster.run(
        *("sbatch", "--parsable", "--nodes=3", f"--output={output}", f"sbatch/{recipe}.sh"),
        *("--run-dir", str(run_dir), SETUP),
        env=slurm_env,
        cwd=PROJECT,
    )
    job_id = submitted.stdout.strip()
    slurm_cluster.wait_for_job(job_id)
    text = output.read_text()
    assert sorted(line.split()[-1] for line in text.splitlines() if line.startswith("started")) == ["0", "1", "2"], text
    assert f"configs/{recipe}/demo.yaml" in text
    cfg = read_config(run_dir.config)
    assert (cfg.recipe, cfg.cluster.nodes) == (recipe, 3)
    assert run_dir.read_status().job_id == job_id


@pytest.mark.slurm
def test_doctor_says_the_release_of_slurm_and_what_is_known_of_it(slurm_cluster, slurm_env, tmp_path):
    release = slurm_cluster.run("scontrol", "--version").stdout.split()[1]
    done = cli("doctor", cwd=tmp_path, env=slurm_env)
    assert f"{release}: tested with" in done.stdout, done.stdout + done.stderr


@pytest.mark.slurm
def test_a_requeued_job_script_finds_its_run_again(slurm_cluster, slurm_env, tmp_path):
    # Submitted from elsewhere, so that the project is found through Slurm; the default run directory lies there too.
    setup = "slurm.setup=['echo start $SLURM_RESTART_COUNT; sleep 60 & wait']"
    output, script = tmp_path / "out", PROJECT / "sbatch" / "grpo.sh"
    config = tmp_path / "mine.yaml"
    config.write_text("name: mine\n")
    job_id = slurm_cluster.run(
        *("sbatch", "--parsable", "--nodes=2", f"--output={output}", str(script), "--config", str(config), setup),
        env=slurm_env,
        cwd=tmp_path,
    ).stdout.strip()
    slurm_cluster.wait_for(lambda: output.exists() and output.read_text().count("start") == 2)
    config.write_text("name: another\n")
    slurm_cluster.run("scontrol", "requeue", job_id)
    slurm_cluster.wait_for(lambda: output.read_text().count("start 1") == 2)
    slurm_cluster.run("scancel", job_id)
    slurm_cluster.wait_for_job(job_id, ["CANCELLED"])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [f"mine-{job_id}"]


@pytest.mark.slurm
def test_a_job_script_says_what_is_wrong_with_its_arguments(slurm_cluster, slurm_env, tmp_path):
    output = tmp_path / "out"
    done = slurm_cluster.run(
        *("sbatch", "--wait", f"--output={output}", "sbatch/grpo.sh", "--run-dir", str(tmp_path / "r"), "sed=1"),
        env=slurm_env,
        cwd=PROJECT,
        check=False,
    )
    assert done.returncode == 2
    assert "error: sed=1: unknown key sed" in output.read_text()
    assert not (tmp_path / "r").exists()
