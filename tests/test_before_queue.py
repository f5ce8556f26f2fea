"""What `submit` says before a job is queued: directories, memory, accounts, when it would start."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT
from slurm_cluster import SlurmCluster, missing_requirement
from test_gate import FakeNvml

from forge_hpc import before_queue
from forge_hpc import cli as commands
from forge_hpc.before_queue import check_writable, look_ahead
from forge_hpc.config import Config, UserError, load_config
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing import gpus_here
from forge_hpc.sizing.gpus import gpu_named
from forge_hpc.sizing.model import model_size, num_params
from forge_hpc.slurm import SlurmRefused, accounts
from forge_hpc.slurm import expected_start as starting
from forge_hpc.slurm.expected_start import _when, expected_start
from forge_hpc.slurm.partitions import Kind, Partition
from forge_hpc.submission import Place

QWEN3_8B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache that has the shape of Qwen3 8B."""
    folder = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-8B"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(QWEN3_8B))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def large(*overrides: str) -> Config:
    return load_config(PROJECT / "configs/grpo/qwen3_8b.yaml", overrides)


def outlook(cfg: Config, tmp_path: Path, known: tuple[Partition, ...] = ()):
    return look_ahead(cfg, RunDir(tmp_path / "run"), known, for_slurm=True)


def cli(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command, by itself and with no trace of an outer job."""
    outer = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "FORGE_"))}
    command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
    env = outer | {"PYTHONPATH": str(PROJECT)} | variables
    return subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, check=False)


# -- directories


def test_a_run_directory_that_cannot_be_made_is_refused_by_a_dry_run_too(tmp_path: Path) -> None:
    done = cli("submit", "--dry-run", "--run-dir", "/proc/x/run", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "error: run directory /proc/x/run: /proc cannot be written: No such file or directory",
        "hint: choose another --run-dir",
    ]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a directory"):
        check_writable(tmp_path / "file" / "run")


def test_looking_whether_a_directory_can_be_written_leaves_nothing_there(tmp_path: Path) -> None:
    check_writable(tmp_path / "not" / "yet")
    check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_on_a_disk_of_the_login_node_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = large("model.path=/dev/shm/model", "cluster.gpus_per_node=8")
    said = outlook(cfg, tmp_path).warnings
    assert [text.split(" is on a disk")[0] for text in said] == [
        f"warning: run directory {tmp_path / 'run'}",
        "warning: model.path=/dev/shm/model",
    ]
    monkeypatch.setattr(before_queue, "_own_disks", lambda: {"/dev/shm"})
    home = look_ahead(large(), RunDir(tmp_path / "run"), (), for_slurm=True)
    assert home.warnings == ()


# -- memory


def test_a_judge_without_its_key_is_told_of_before_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = "reward=[{name: llm_judge, args: {base_url: 'http://judge:8000/v1', model: m, api_key_env: JUDGE_KEY}}]"
    cfg = load_config(None, ["model.path=builtin:qwen3-tiny", judge])
    told = "takes its key from the environment variable JUDGE_KEY, which is not set"

    def warnings() -> str:
        return " ".join(look_ahead(cfg, RunDir(tmp_path / "run"), (), for_slurm=False).warnings)

    monkeypatch.delenv("JUDGE_KEY", raising=False)
    assert f"warning: the reward llm_judge {told}" in warnings()
    monkeypatch.setenv("JUDGE_KEY", "secret")
    assert told not in warnings() and "secret" not in warnings()


def test_the_parameters_of_a_model_are_counted_from_its_shape(model_dir: Path) -> None:
    small = QWEN3_8B | {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    }
    assert num_params(small) == 596_049_920  # of the safetensors of Qwen3 0.6B
    assert num_params(QWEN3_8B) == 8_190_735_360
    from safetensors import safe_open

    with safe_open(model_dir / "model.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    size = model_size(str(model_dir))
    assert size is not None
    assert size.num_params == sum(rows * (more[0] if more else 1) for rows, *more in shapes)


def test_a_model_that_was_never_fetched_has_the_size_that_its_name_says(hub: Path) -> None:
    for name, params in (("a/Llama-3.1-8B-Instruct", 8e9), ("a/Qwen2.5-0.5B", 5e8), ("a/M_70b", 7e10)):
        size = model_size(name)
        assert size is not None and (size.num_params, size.hf) == (params, None)
    assert model_size("a/phi") is None and model_size("builtin:qwen3-tiny") is None
    fetched = model_size("Qwen/Qwen3-8B")
    assert fetched is not None and fetched.hf is not None


@pytest.mark.parametrize(
    ("name", "gpu", "memory_gib"),
    [
        ("h100", "H100", 79.1),
        ("nvidia_h100_80gb_hbm3", "H100", 78.8),
        ("a100_40g", "A100", 39.4),
        ("a100", "A100", 0.0),
        ("h100_1g.10gb", "H100", 9.8),
        ("tesla", None, None),
    ],
)
def test_a_gpu_has_the_memory_that_its_type_says(name: str, gpu: str | None, memory_gib: float | None) -> None:
    found = gpu_named(name)
    assert (found and found.name, found and found.memory_gib) == (gpu, memory_gib)


def test_the_plan_says_what_each_gpu_holds(hub: Path, tmp_path: Path) -> None:
    plan = outlook(large(), tmp_path, (Partition("gpu", True, True, 1e9, (Kind(1, 8, gpu="h100"),)),)).memory
    assert plan is not None and plan.gpu_gib == 79.1
    trainers, generators = plan.roles["trainers"].gib, plan.roles["generators"].gib
    per_gpu = 8_190_735_360 / 4 / 2**30  # parameters, in GiB of one byte each
    assert trainers["weights"] == pytest.approx((4 + 2 + 2) * per_gpu)
    assert trainers["optimizer"] == pytest.approx(3 * 4 * per_gpu)
    assert generators["weights"] == pytest.approx(2 * 4 * per_gpu)
    assert sum(generators.values()) == pytest.approx(0.85 * 79.1)
    with_adapters = outlook(large("trainer.lora.enable=true", "cluster.gpu_memory_gib=79"), tmp_path).memory
    assert with_adapters is not None
    assert with_adapters.roles["trainers"].gib["optimizer"] == pytest.approx(4 * per_gpu)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.gpu_memory_gib=24"], "weights and optimizer take 38.1 GiB of each GPU, which has 24.0"),
        (
            ["cluster.gpu_memory_gib=16", "cluster.rollout_ratio=0.125", "trainer.lora.enable=true"],
            "a generator's weights take 15.3 GiB of each GPU, and vLLM may take 13.6",
        ),
        *(
            (
                [
                    *("cluster.nodes=2", "cluster.trainer_nodes=1", "generator.weight_transport=nccl"),
                    *("trainer.lora.enable=true", f"cluster.gpu_memory_gib={gib}"),
                ],
                "a generator's weights take 15.3 GiB of each GPU, and with generator.weight_transport=nccl all of "
                f"them come to a GPU beside its own, 15.3 more, where vLLM may take {share}",
            )
            for gib, share in ((30, "25.5"), (16, "13.6"))
        ),
        (
            ["cluster.gpu_memory_gib=45", "rollout.max_response_tokens=250000", "trainer.training.seq_len=260000"],
            "keys and values of one sequence of 250512 tokens take 34.4 GiB, and a generator has 23.0",
        ),
        (["cluster.gpu_memory_gib=79", "rollout.max_staleness=0", "cluster.colocate=true"], "GiB too much"),
        (["cluster.gpu_memory_gib=79", "rollout.max_staleness=1", "cluster.colocate=true"], "GiB too much"),
    ],
)
def test_what_cannot_fit_a_gpu_is_refused(hub: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        outlook(large(*overrides), tmp_path)
    assert error.value.hint


def test_trainers_that_have_less_beside_a_generator_that_is_awake_are_a_warning(hub: Path, tmp_path: Path) -> None:
    def slower(share: float) -> list[str]:
        shared = [
            "cluster.colocate=true",
            "cluster.gpu_memory_gib=79",
            f"generator.engine.gpu_memory_utilization={share}",
        ]
        return [text for text in outlook(large(*shared), tmp_path).warnings if "more slowly" in text]

    assert not slower(0.25)
    [said] = slower(0.55)
    assert "checkpointing selective, alone on a GPU 1 row a microbatch, checkpointing none" in said
    [said] = slower(0.45)  # as many rows, and nothing computed again
    assert "none, alone on a GPU" in said and "GiB gathered once a step: they compute more slowly" in said


def test_what_may_not_fit_is_a_warning_and_what_is_not_known_is_left_out(hub: Path, tmp_path: Path) -> None:
    tight = outlook(large("cluster.gpu_memory_gib=40"), tmp_path)
    assert any("a trainer takes about" in text for text in tight.warnings)
    unnamed = Partition("gpu", True, True, 1e9, (Kind(1, 8),))
    assert outlook(large(), tmp_path, (unnamed,)).memory is None
    assert outlook(large("slurm.constraint=h100"), tmp_path, (unnamed,)).memory is not None
    mixed = Partition("gpu", True, True, 1e9, (Kind(1, 8, gpu="h100"), Kind(1, 8, gpu="h200")))
    smallest = outlook(large(), tmp_path, (mixed,)).memory
    assert smallest is not None and smallest.gpu_gib == 79.1


class SizedNvml(FakeNvml):
    """A driver whose GPUs have so many GiB each."""

    def __init__(self, *gib: int) -> None:
        super().__init__(*({"gib": each, "lost": each == 0} for each in gib))

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory[0] = memory[2] = self._of(handle)["gib"] << 30  # all in use
        return 0


def here(monkeypatch: pytest.MonkeyPatch, visible: str, *gib: int) -> None:
    """This machine has GPUs of these sizes, and a run may use those that are visible; it has memory enough."""
    monkeypatch.setattr(before_queue, "memory_limit", lambda: (1 << 40, False))
    monkeypatch.setattr(before_queue, "available_memory", lambda: 1 << 40)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpus_here, "load", lambda name: SizedNvml(*gib))


def small(gpus: str = "2", *overrides: str) -> Config:
    return large("model.path=a/Model-1B", f"cluster.gpus_per_node={gpus}", *overrides)


def local_outlook(cfg: Config, tmp_path: Path) -> before_queue.Outlook:
    return look_ahead(cfg, RunDir(tmp_path / "run"), (), for_slurm=False, here=True)


def test_a_split_that_does_not_fit_this_machine_s_gpus_is_refused(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, "0,1", 80, 80)
    with pytest.raises(UserError, match=r"weights and optimizer take 152\.6 GiB of each GPU, which has 80\.0") as error:
        local_outlook(large("cluster.gpus_per_node=2"), tmp_path)
    assert error.value.hint
    here(monkeypatch, "0,1", 20, 20)
    assert any("a trainer takes about" in text for text in local_outlook(small(), tmp_path).warnings)


@pytest.mark.parametrize(
    ("visible", "gpus", "gib"),
    [
        ("1,3", "2", 80.0),  # the first one is not the run's
        ("3,1,2", "2", 80.0),  # the third one is not either
        ("3,1,2", "null", 48.0),
        ("1,4", "2", 80.0),  # one does not answer
        ("1", "2", None),
        ("4,5", "2", None),
        ("", "null", None),
        ("1,3", "0", None),
    ],
)
def test_the_memory_is_that_of_the_smallest_gpu_that_the_run_would_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, gpus: str, gib: float | None
) -> None:
    here(monkeypatch, visible, 24, 80, 48, 96, 0)
    memory = local_outlook(small(gpus), tmp_path).memory
    assert (memory and memory.gpu_gib) == gib


def test_what_the_configuration_says_of_the_memory_goes_before_the_driver_and_the_driver_before_a_constraint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, "0,1", 64, 64)
    said = [
        local_outlook(small("2", *given), tmp_path).memory
        for given in (["cluster.gpu_memory_gib=79"], ["slurm.constraint=h100"])
    ]
    assert [memory and memory.gpu_gib for memory in said] == [79.0, 64.0]


def test_a_driver_that_is_not_there_or_hangs_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, "0,1", 80, 80)
    monkeypatch.setattr(gpus_here, "load", lambda name: ctypes.CDLL("no-such-library.so"))
    assert local_outlook(small(), tmp_path).memory is None
    monkeypatch.setattr(gpus_here, "ANSWER_S", 0.1)
    monkeypatch.setattr(gpus_here, "load", lambda name: time.sleep(60))
    assert local_outlook(small(), tmp_path).memory is None


def test_this_machine_s_gpus_are_those_of_no_job_and_of_no_allocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(monkeypatch, "0,1", 80, 80)
    assert look_ahead(small(), RunDir(tmp_path / "run"), (), for_slurm=False).memory is None
    facts: Any = object()
    places = Place(as_jobs=False, on_slurm=False), Place(False, False, allocation=facts), Place(True, True)
    assert [place.is_here for place in places] == [True, False, False]


def test_a_dry_run_for_this_machine_refuses_it_and_shows_what_fits(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here(monkeypatch, "0,1", 80, 80)
    submit = ["submit", "--dry-run", "--cluster", "local", "--config", str(PROJECT / "configs/grpo/qwen3_8b.yaml")]
    submit += ["--run-dir", str(tmp_path / "run"), "cluster.gpus_per_node=2"]
    assert commands.main(submit) == 2
    assert "error: the trainers' weights and optimizer take 152.6 GiB of each GPU" in capsys.readouterr().err
    assert commands.main([*submit, "model.path=a/Model-1B"]) == 0
    assert "1 node, 2 GPUs each of 80 GiB; estimated GiB of each" in capsys.readouterr().out


# -- time


def test_a_job_that_ends_before_its_first_checkpoint_is_told_of(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run").create()
    run_dir.metrics.write_text("".join(json.dumps({"step": n, "time/step_s": 120.0}) + "\n" for n in (1, 2, 3)))
    cfg = load_config(PROJECT / "configs/grpo/demo.yaml", ["slurm.time=30", "model.path=builtin:qwen3-tiny"])
    [said] = [text for text in outlook(cfg, tmp_path).warnings if "checkpoint" in text]
    assert "checkpoint.interval=25 saves first after some 53 min (120.0 s a step, in the last start)" in said
    assert "checkpoint.interval=3 saves four times" in said
    cfg.slurm.time = "2:00:00"
    assert not [text for text in outlook(cfg, tmp_path).warnings if "checkpoint" in text]


def test_without_an_earlier_start_the_time_of_a_step_is_estimated(hub: Path, tmp_path: Path) -> None:
    said = outlook(large("slurm.constraint=h100", "slurm.time=20"), tmp_path).warnings
    assert any("estimated" in text and "checkpoint.interval=25" in text for text in said)


@pytest.mark.parametrize(
    ("text", "said"),
    [("1030", "at once"), ("1600", "in about 10 min ("), ("9000", "in about 2 h 13 min ("), ("200000", "2 d 7 h")],
)
def test_the_expected_start_is_told_in_words(text: str, said: str) -> None:
    assert said in (_when(text, now=1000.0) or "")


def test_what_slurm_does_not_know_of_a_start_is_no_time_and_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(text: str) -> str | None:
        def ask_both(*_: str, **__: float) -> tuple[str, str]:
            if "to start" in text:
                return "", text
            raise SlurmRefused(text)

        monkeypatch.setattr(starting, "ask_both", ask_both)
        return expected_start(["job.sh"], now=1000.0)

    line = "sbatch: Job 7 to start at {} a using 8 processors on nodes n[2-3] in partition main"
    assert answers(line.format(1000)) == "at once on n[2-3]"
    for seconds in (6 * 3600, 6 * 3600 - 3, 18 * 3600 - 1):  # jobs in the queue have no planned start
        assert answers(line.format(1000 + seconds)) is None
    assert (answers(line.format(1000 + 6 * 3600 + 60)) or "").startswith("in about 6 h 1 min")
    missing = "sbatch --test-only: allocation failure: Requested node configuration is not available"
    assert answers(missing) == "not on the nodes that are up now, or on none at all"
    with pytest.raises(SlurmRefused):
        answers(f"sbatch: error: Memory specification can not be satisfied\n{missing}")
    with pytest.raises(SlurmRefused):
        answers("sbatch --test-only: allocation failure: Invalid license specification")


# -- accounts


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the PATH for commands that no cluster of one machine has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def fake(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o700)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"account": "chemistry"}, "chemistry is none of your accounts"),
        ({"account": "physics", "qos": "long"}, "no QOS long with account physics"),
        ({"account": "physics", "qos": "high"}, "gpu does not take slurm.account=physics"),
        ({"account": "maths", "qos": "long"}, "gpu does not take slurm.qos=long"),
        ({"account": "maths"}, None),
        ({}, None),
    ],
)
def test_an_account_and_a_qos_are_held_against_what_the_user_has(
    tools: Path, keys: dict[str, str], message: str | None
) -> None:
    fake(tools, "sacctmgr", "printf 'physics||normal,high\\nmaths||normal,long\\n'")
    fake(tools, "scontrol", "echo PartitionName=gpu AllowAccounts=maths AllowQos=ALL DenyQos=long")
    cfg = Config()
    for key, value in keys.items():
        setattr(cfg.slurm, key, value)
    if message is None:
        accounts.check_account(cfg, ["gpu"])
        return
    with pytest.raises(UserError, match=message) as error:
        accounts.check_account(cfg, ["gpu"])
    assert error.value.hint


def test_where_sacctmgr_does_not_answer_nothing_is_said(tools: Path) -> None:
    cfg = Config()
    cfg.slurm.account = "anything"
    fake(tools, "scontrol", "exit 1")
    fake(tools, "sacctmgr", "echo 'You are not running a supported accounting_storage plugin' >&2; exit 1")
    accounts.check_account(cfg, ["gpu"])


# -- with a real Slurm

PARTITIONS = (
    "PartitionName=main Nodes={nodes} Default=YES MaxTime=UNLIMITED State=UP",
    "PartitionName=single Nodes={nodes} MaxNodes=1 AllowAccounts=physics State=UP",
)


@pytest.mark.slurm
def test_slurm_is_asked_before_a_job_is_queued(tmp_path: Path) -> None:
    if reason := missing_requirement():
        pytest.skip(reason)
    with SlurmCluster(nodes=2, partitions=PARTITIONS) as cluster:
        conf = {"SLURM_CONF": cluster.env["SLURM_CONF"]}
        start = cli("submit", "--dry-run", "--nodes", "2", cwd=tmp_path, **conf)
        assert start.returncode == 0, start.stderr
        assert f"starts         at once on {cluster.hosts[0].name[:-1]}" in start.stderr
        wide = ("submit", "--dry-run", "--nodes", "2", "slurm.partition=single")
        assert "allows 1 to one job" in cli(*wide, cwd=tmp_path, **conf).stderr
        closed = ("submit", "slurm.partition=single", "slurm.account=maths")
        assert "single does not take slurm.account=maths" in cli(*closed, cwd=tmp_path, **conf).stderr
        refused = ("submit", "slurm.extra={licenses: absent}")
        assert "Slurm refused the job" in cli(*refused, cwd=tmp_path, **conf).stderr
        assert list(tmp_path.iterdir()) == []
        blocker = ("--nodes=2", "--exclusive", "--time=90", "--output=/dev/null", "--wrap=sleep 600")
        cluster.wait_for_job(cluster.run("sbatch", "--parsable", *blocker).stdout.strip(), ["RUNNING"])
        later = cli("submit", "--run-dir", "r", "--nodes", "2", cwd=tmp_path, **conf)
        assert later.returncode == 0, later.stderr
        assert "starts         in about 1 h" in later.stdout
        cluster.run("scontrol", "update", f"NodeName={cluster.hosts[1].name}", "State=DRAIN", "Reason=a test")
        waits = cli("submit", "--run-dir", "w", "--nodes", "2", cwd=tmp_path, **conf)  # as sbatch has it
        assert waits.returncode == 0, waits.stderr
        assert "starts         not on the nodes that are up now, or on none at all, as things are\n" in waits.stdout


@pytest.mark.slurm
def test_the_type_that_slurm_gives_the_gpus_says_their_memory(gpu_cluster: SlurmCluster, hub: Path) -> None:
    config = str(PROJECT / "configs/grpo/qwen3_8b.yaml")
    variables = {"SLURM_CONF": gpu_cluster.env["SLURM_CONF"], "HF_HOME": str(hub)}
    overrides = ("cluster.gpus_per_node=4", "--nodes", "4")
    done = cli("submit", "--config", config, "--dry-run", *overrides, cwd=hub, **variables)
    assert done.returncode == 0, done.stderr
    assert "4 nodes, 4 GPUs each of 79.1 GiB; estimated GiB of each" in done.stdout
    assert "| KV cache |" in done.stdout
