"""The memory of the nodes themselves: what a run keeps there is known before it starts, and is what it then takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import PROJECT
from test_before_queue import QWEN3_8B
from test_gate import MIB, cgroup
from test_trainer_checkpoint import engine_on, on_ranks, train

from forge_hpc.before_queue import asked_memory, look_ahead
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.config import Config, UserError, load_config, plan, save_config
from forge_hpc.config.recipes import needs_of
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.gate import memory
from forge_hpc.gate.memory import cgroup_limits, memory_limit
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.host import HostPlan, Room, plan_host
from forge_hpc.sizing.memory import GIB
from forge_hpc.sizing.model import model_size, num_params, sizes_with
from forge_hpc.sizing.table import host_table
from forge_hpc.supervisor import node as node_module
from forge_hpc.supervisor.ending import Cause, Exit
from forge_hpc.supervisor.fit import Fit, look_at_fit
from forge_hpc.supervisor.gate import Verdict, open_gate
from forge_hpc.supervisor.node import Node
from forge_hpc.training.staging import tensors_of

PARAMS = num_params(QWEN3_8B)


@pytest.fixture
def eight_b(tmp_path: Path) -> Path:
    """The shape of Qwen3 8B, without its weights."""
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    return folder


def large(model: Path, *overrides: str, config: str = "grpo/qwen3_8b") -> Config:
    return load_config(PROJECT / f"configs/{config}.yaml", [f"model.path={model}", *overrides])


def host(cfg: Config, gpus: int = 8) -> HostPlan:
    found = plan_host(cfg, needs_of(cfg), plan(cfg, gpus), sizes_with(cfg.model.path))
    assert found is not None
    return found


def gib(cfg: Config, gpus: int = 8) -> list[dict[str, float]]:
    """Of each node, by what takes it, without processes."""
    nodes = host(cfg, gpus).nodes
    return [{need.what: need.num_bytes / GIB for need in needs if need.what != "processes"} for needs in nodes]


# ---- the estimate


def test_a_rank_stages_weights_and_two_moments_of_its_shard(eight_b: Path) -> None:
    saves = 12 * PARAMS / GIB
    assert gib(large(eight_b)) == [{"staged saves": pytest.approx(saves)}]
    assert gib(large(eight_b, "trainer.training.dtype=bfloat16")) == [{"staged saves": pytest.approx(saves / 2)}]
    assert gib(large(eight_b, "trainer.parallelism.data_parallel_replicate_degree=2")) == [
        {"staged saves": pytest.approx(2 * saves)}
    ]
    for without in ("checkpoint.async_save=false", "trainer.lora.enable=true"):
        assert gib(large(eight_b, without)) == [{}]


def test_hosts_of_their_own_have_generators_weights_once_and_trainers_send_them_from_page_locked_memory(
    eight_b: Path,
) -> None:
    weights = 2 * PARAMS / GIB
    trainers, *generators = gib(large(eight_b, "cluster.nodes=3", "cluster.trainer_nodes=1"))
    assert generators == [{"weights received": pytest.approx(weights)}] * 2
    assert trainers == {"staged saves": pytest.approx(12 * PARAMS / GIB), "weights to send": 8 * 2.0}  # of 1.91 each
    nccl = gib(large(eight_b, "cluster.nodes=3", "cluster.trainer_nodes=1", "generator.weight_transport=nccl"))
    assert [*nccl[0]] == ["staged saves"] and nccl[1:] == [{}, {}]
    adapters = ("trainer.lora.enable=true", "trainer.lora.publish=adapters")
    assert gib(large(eight_b, "cluster.nodes=2", *adapters)) == [{}, {}]


def test_what_sleeps_at_level_1_and_what_is_offloaded_is_in_host_memory(eight_b: Path) -> None:
    turns = ("cluster.colocate=true", "rollout.max_staleness=0", "checkpoint.async_save=false")
    assert gib(large(eight_b, *turns)) == [{}]
    [asleep] = gib(large(eight_b, *turns, "generator.engine.sleep_level=1"))
    assert asleep == {"sleep": pytest.approx(8 * 2 * PARAMS / GIB)}
    offloaded = ("reference.enable=true", "algorithm.kl_coef=0.1", "reference.device=cpu")
    assert gib(large(eight_b, *offloaded, "checkpoint.async_save=false")) == [
        {"frozen models": pytest.approx(2 * PARAMS / GIB)}
    ]


def test_on_the_cpu_the_models_themselves_are_there(eight_b: Path) -> None:
    [node] = gib(large(eight_b, "generator.engine.kv_cache_memory_gib=3", "generator.replicas=2"), gpus=0)
    assert node == {
        "training state": pytest.approx(16 * PARAMS / GIB),
        "staged saves": pytest.approx(12 * PARAMS / GIB),
        "weights to send": pytest.approx(2 * PARAMS / GIB),
        "engines": pytest.approx(2 * 2 * PARAMS / GIB),
        "KV cache": 6.0,
    }


def test_where_a_size_or_the_gpus_are_not_known_there_is_no_estimate(eight_b: Path) -> None:
    cfg = large(eight_b)
    assert plan_host(cfg, needs_of(cfg), plan(cfg, None), sizes_with(str(eight_b))) is None
    assert plan_host(cfg, needs_of(cfg), plan(cfg, 8), sizes_with("a/phi")) is None
    assert host_table(None) == host_table(host(large(eight_b, "trainer.lora.enable=true"))) == []


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def measured_on_rank(rank: int, model_dir: Path, directory: Path) -> dict[str, int]:
    begin = anonymous()
    engine = engine_on(model_dir)
    train(engine)
    trained = anonymous()
    engine.save(directory / "trainer")
    engine.wait_for_save()
    buffers = sum(tensor.nbytes for tensor in tensors_of(engine._checkpointer._staging._copies))
    return {"training state": trained - begin, "staged saves": anonymous() - trained, "buffers": buffers}


@pytest.mark.slow
def test_trainers_take_what_was_estimated(tmp_path: Path) -> None:
    model_dir = write_tiny_qwen3(tmp_path / "model", 0, dim=512, num_layers=10, hidden_dim=2048)
    for num_ranks in (1, 2):
        (tmp_path / f"saved-{num_ranks}").mkdir()
        work = measured_on_rank, model_dir, tmp_path / f"saved-{num_ranks}"
        ranks = on_ranks(num_ranks, tmp_path / f"ranks-{num_ranks}", *work)
        overrides = [f"model.path={model_dir}", f"trainer.processes_per_node={num_ranks}"]
        [needs] = host(load_config(PROJECT / "configs/sft/demo.yaml", overrides), gpus=0).nodes
        estimated = {need.what: need.num_bytes for need in needs if need.what != "processes"}
        assert sum(rank["buffers"] for rank in ranks) == pytest.approx(estimated["staged saves"], rel=0.01)
        if num_ranks == 1:  # several gather weights, whose memory is used again
            for what, num_bytes in estimated.items():
                assert ranks[0][what] == pytest.approx(num_bytes, rel=0.1), what


# ---- what a node may have


def test_the_limit_of_a_job_is_the_least_of_its_groups_whatever_is_in_use(tmp_path: Path) -> None:
    cgroup(tmp_path / "job_7", memory__max=16 << 30, memory__current=9 << 30, memory__stat="")
    cgroup(tmp_path / "job_7/step_0", memory__max="max")
    cgroup(tmp_path / "job_7/step_0/task", memory__max=32 << 30)
    assert [*cgroup_limits("0::/job_7/step_0/task\n", tmp_path)] == [32 << 30, 16 << 30]
    cgroup(tmp_path / "one/memory/job_7", memory__limit_in_bytes=8 << 30)
    assert [*cgroup_limits("4:cpu,memory:/job_7\n0::/\n", tmp_path / "one")] == [8 << 30]


def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """This process is in a group that may have so much memory."""
    cgroup(tmp_path / "groups/job", memory__max=num_bytes, memory__current=MIB, memory__stat="")
    cgroup(tmp_path, own="0::/job")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")


def test_this_machine_has_its_memory_or_what_its_group_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    swap = psutil.swap_memory().total
    limited(tmp_path, monkeypatch, GIB)
    assert memory_limit() == (GIB + swap, True)
    monkeypatch.setattr(memory, "OWN", tmp_path / "none")
    assert memory_limit() == (psutil.virtual_memory().total + swap, False)


# ---- before it is queued

SHARED = ("slurm.exclusive=false", "slurm.cpus_per_task=4")


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        (["slurm.mem=64G"], (64 << 30, "slurm.mem=64G")),
        (["slurm.mem='64000'"], (64000 << 20, "slurm.mem=64000")),
        (["slurm.mem=1G", "slurm.extra={mem: 64G}"], (64 << 30, "slurm.extra.mem=64G")),
        (["slurm.extra={--mem: 64G}"], (64 << 30, "slurm.extra.--mem=64G")),
        (["slurm.mem=1G", "slurm.extra={mem: null}"], (1 << 30, "slurm.mem=1G")),  # which is asked for then
        # Of as many GPUs, or cores, as Slurm gives.
        (["slurm.mem=64G", "slurm.exclusive=false", "slurm.extra={mem_per_gpu: 30G}"], None),
        (["slurm.cpus_per_task=4", "slurm.extra={mem-per-cpu: 1T}"], None),
        (["slurm.mem='0'"], None),
        ([], None),
    ],
)
def test_the_memory_that_a_job_asks_for_is_read_as_slurm_reads_it(
    eight_b: Path, overrides: list[str], asked: tuple[int, str] | None
) -> None:
    cfg = large(eight_b, "cluster.gpus_per_node=8", *overrides)
    room = asked_memory(cfg)
    assert (room and (room.num_bytes, room.what)) == asked


def test_a_job_that_asks_for_too_little_memory_is_refused_and_one_that_may_is_warned(
    eight_b: Path, tmp_path: Path
) -> None:
    def outlook(mem: str) -> Any:
        cfg = large(eight_b, "cluster.gpus_per_node=8", f"slurm.mem={mem}")
        return look_ahead(cfg, RunDir(tmp_path / "run"), (), for_slurm=True)

    with pytest.raises(UserError) as raised:
        outlook("64G")
    assert raised.value.message == (
        "node 0 is to keep 91.5 GiB in its memory (staged saves 91.5) and may have 64.0 (slurm.mem=64G)"
    )
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("raise slurm.mem; or checkpoint.async_save=false stages none")
    [said] = [text for text in outlook("96G").warnings if "memory" in text]
    assert said.startswith(
        "warning: node 0 takes about 99.5 GiB of its memory (staged saves 91.5, processes 8.0) and has 96.0"
    )
    enough = outlook("128G")
    assert not [text for text in enough.warnings if "memory" in text]
    assert "# | node 0 |         91.5 |       8.0 |  99.5 |" in enough.table("# ")


def test_this_machine_is_held_against_a_run_on_it(
    eight_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outlook(gib: int) -> Any:
        limited(tmp_path, monkeypatch, gib * GIB)
        cfg = large(eight_b, "cluster.gpus_per_node=0", "checkpoint.async_save=false", "data.path=builtin:addition")
        return look_ahead(cfg, RunDir(tmp_path / "run"), (), for_slurm=False, here=True)

    with pytest.raises(UserError, match=r"^node 0 is to keep 153\.6 GiB in its memory \(training state 122"):
        outlook(4)
    monkeypatch.setattr("forge_hpc.before_queue.memory_limit", lambda: (200 * GIB, False))
    [said] = [text for text in outlook(4).warnings if "memory" in text]
    assert "available now): processes may be killed (take a node with more memory; or more trainer nodes" in said


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    line = [sys.executable, "-m", "forge_hpc.cli", *arguments]
    return subprocess.run(line, env=env | {"PYTHONPATH": str(PROJECT)}, text=True, capture_output=True, check=False)


def test_plan_shows_the_memory_of_nodes_beside_that_of_gpus_and_proposes_no_split_that_does_not_fit(
    eight_b: Path,
) -> None:
    file = str(PROJECT / "configs/grpo/qwen3_8b.yaml")
    given = ["--config", file, "--gpu", "h200", f"model.path={eight_b}", "cluster.gpus_per_node=8"]
    shown = command("plan", *given, "--nodes", "2")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    row = next(line for line in lines if line.startswith("| where "))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "where", "staged saves", "weights to send", "weights received", "processes", "total"
    ]  # fmt: skip
    refused = command("plan", *given, "--nodes", "2", "slurm.mem=32G")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "may have 32.0 (slurm.mem=32G)\nhint: raise slurm.mem; or" in refused.stderr


# ---- at the gate


def report(limit_gib: float, **more: Any) -> dict[str, Any]:
    limit = {"num_bytes": int(limit_gib * GIB), "is_cgroups": True}
    gpus = {"gpus": 8, "gpu_names": [*map(str, range(8))], "cpu_build": None, "gpu_kinds": []}
    return {"memory_bytes": int(limit_gib * GIB), "memory_limit": limit} | gpus | more


def fit(cfg: Config, *reports: dict[str, Any], left_out: int = 0) -> Fit:
    run_dir = RunDir(Path("nowhere"))
    return look_at_fit(cfg, run_dir, dict(enumerate(reports)), left_out, lambda node: f"node {node} (n{node})")


def test_where_no_node_has_enough_the_run_is_refused_and_where_one_has_less_it_is_left_out(eight_b: Path) -> None:
    cfg = large(eight_b, "cluster.nodes=5", "cluster.trainer_nodes=2", "cluster.spare_nodes=1")
    enough, little, tiny = report(200), report(32), report(8)
    assert fit(cfg, enough, enough, little, little, little) == Fit()
    found = fit(cfg, little, little, little, little, little)
    assert found.refused is not None and found.unfit == {}
    assert found.refused.message == (
        "node 0 (n0) is to keep 53.8 GiB in its memory (staged saves 45.8, weights to send 8.0) and may have 32.0 "
        "(the limit of its cgroup)"
    )
    assert (found.refused.hint or "").startswith("raise slurm.mem, or the container's limit; or checkpoint.async_save")
    found = fit(cfg, enough, little, enough, enough, enough)
    assert found.refused is None and [*found.unfit] == [1]
    assert found.unfit[1].startswith("it is to keep 53.8 GiB in its memory (")
    assert [*fit(cfg, little, little, little, little, enough).unfit] == [0, 1], "a spare one can take their place"
    many = large(eight_b, "cluster.nodes=9", "cluster.trainer_nodes=6")
    few = fit(many, *[tiny] * 8, enough)
    assert few.refused is not None and few.unfit == {}, "others like these would be left out one after the other"
    assert [*fit(cfg, enough, enough, tiny, enough, enough).unfit] == [2], "the spare one keeps nothing"
    assert fit(cfg, enough, enough, enough, enough, tiny) == Fit()


def test_memory_that_others_have_now_is_a_remark(eight_b: Path) -> None:
    cfg = large(eight_b, "cluster.nodes=6", "cluster.trainer_nodes=3")
    enough, crowded, more = report(200), report(200, memory_bytes=40 * GIB), report(200, memory_bytes=30 * GIB)
    [said] = fit(cfg, crowded, enough, more, enough, enough, enough).remarks
    assert said.startswith("node 2 (n2), and so do 1 more: each takes about") and "and has 30.0 (available now)" in said
    [said] = fit(large(eight_b), report(200, memory_bytes=70 * GIB)).remarks
    assert said.startswith("node 0 (n0) takes about 99.5 GiB of its memory (staged saves 91.5, processes 8.0) and has")
    assert "and has 70.0 (available now): processes may be killed (raise slurm.mem" in said


def test_gpus_are_held_against_the_run_and_of_several_kinds_the_largest_counts(eight_b: Path) -> None:
    def kinds(*gib: int) -> list[dict[str, Any]]:
        return [{"name": "GPU", "memory_bytes": each * GIB} for each in gib]

    small = fit(large(eight_b), report(200, gpu_kinds=kinds(*[24] * 8))).refused
    assert small is not None and "weights and optimizer take 38.1 GiB of each GPU, which has 24.0" in small.message
    assert fit(large(eight_b), report(200, gpu_kinds=kinds(*[80] * 8))) == Fit()
    assert fit(large(eight_b), report(200, gpu_kinds=kinds(24, *[80] * 7))) == Fit()
    other = fit(large(eight_b, "generator.engine.tensor_parallel_size=8"), report(200)).refused
    assert other is not None and "cannot be split" in other.message
    more = fit(large(eight_b, "cluster.gpus_per_node=16"), report(200)).refused
    assert more is not None and more.message == "cluster.gpus_per_node is 16, a node has 8"


def test_the_gate_of_a_job_with_too_little_memory_ends_the_start_as_wrong_usage(
    eight_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(tmp_path, monkeypatch, 4 * GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(node_module, "end_descendants", lambda grace_s: 0)  # those of this process are other tests'
    node = Node(RunDir(tmp_path / "run").create(), Allocation("7", 0, 1, 0))
    _, verdict = open_gate(node, large(eight_b, "cluster.gpus_per_node=0"), node.rendezvous(), lambda: None)
    ending = verdict.ending(0)
    assert ending is not None and (ending.cause, ending.exit) == (Cause.FAILED, Exit.USAGE)
    assert "(the limit of its cgroup)" in ending.message and ending.hint
    node.close()


def test_who_is_left_out_for_its_memory_has_another_in_its_place() -> None:
    verdict = Verdict([0, 1, 2], {}, {node: {} for node in range(3)}, {}).without({1: "is too small"})
    assert verdict.members == [*verdict.introductions] == [0, 2] and verdict.unfit == {1: "is too small"}
    assert verdict.ending(1) is None
    ending = verdict.ending(0)
    assert ending is not None and ending.cause is Cause.GATE


@pytest.mark.slow
def test_no_warm_start_is_made_for_a_run_that_no_machine_can_hold(tmp_path: Path) -> None:
    huge = QWEN3_8B | {"num_hidden_layers": 10**6}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge/config.json").write_text(json.dumps(huge))
    run = RunDir(tmp_path / "run").create()
    save_config(load_config(PROJECT / "configs/grpo/demo.yaml", [f"name=run-{tmp_path.name}"]), run.config)
    warm = load_config(PROJECT / "configs/sft/demo.yaml", [f"model.path={tmp_path / 'huge'}"])
    save_config(warm, RunDir(run.warmstart).create().config)
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    line = [sys.executable, "-m", "forge_hpc.run", "--run-dir", str(run)]
    done = subprocess.run(line, env=env | {"PYTHONPATH": str(PROJECT)}, text=True, capture_output=True, timeout=120)
    assert done.returncode == Exit.USAGE, done.stderr
    assert "GiB in its memory (training state" in done.stderr and "hint: " in done.stderr
    assert not RunDir(run.warmstart).status.exists()


def test_what_nobody_knows_is_not_counted(eight_b: Path, tmp_path: Path) -> None:
    def columns(*overrides: str) -> set[str]:
        planned = host(large(eight_b, "cluster.gpus_per_node=0", "generator.replicas=2", *overrides), 0)
        return {need.what for needs in planned.nodes for need in needs}

    assert {"engines", "KV cache"} <= columns()
    for value in ("null", "4GiB", "'4000000000'"):  # vLLM's own, in its own way
        assert "KV cache" not in columns(f"generator.engine.extra={{kv_cache_memory_bytes: {value}}}")
    assert "engines" not in columns("generator.engine.extra={quantization: fp8}")
    small = report(200, gpu_kinds=[{"name": "GPU", "memory_bytes": 16 * GIB}] * 8)
    as_is, given = ["recipe=eval"], ["recipe=eval", "generator.engine.extra={quantization: fp8}"]
    refused = fit(large(eight_b, *as_is), small).refused
    assert refused is not None and "a generator's weights take 15.3 GiB" in refused.message
    assert fit(large(eight_b, *given), small).refused is None
    assert fit(large(eight_b, *as_is, "cluster.gpu_memory_gib=80"), small).refused is None, "the user knows"
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_text(json.dumps(QWEN3_8B | {"quantization_config": {"quant_method": "awq"}}))
    assert model_size(str(quantized)) is None and model_size(str(eight_b)) is not None
    (quantized / "config.json").write_text(json.dumps(QWEN3_8B | {"head_dim": None, "num_attention_heads": 0}))
    assert model_size(str(quantized)) is None


def test_changes_alone_are_sent_from_two_copies(eight_b: Path) -> None:
    def sent(*overrides: str) -> int:
        planned = host(large(eight_b, "cluster.nodes=2", "cluster.trainer_nodes=1", *overrides))
        return sum(need.num_bytes for need in planned.nodes[0] if need.what == "weights to send")

    assert sent("generator.send_changes=true") == 2 * sent() > 0


def test_a_room_says_whose_it_is(eight_b: Path) -> None:
    plan_of = host(large(eight_b))
    assert plan_of.refusal(0, Room(92 << 30, "all that it has"), "node 0") is None
    error = plan_of.refusal(0, Room(90 << 30, "all that it has", "take another"), "node 0")
    assert error is not None and error.message.endswith("may have 90.0 (all that it has)")
