"""`forge-hpc plan`: which nodes should train and which generate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from runs import PROJECT
from test_gate import FakeNvml

from forge_hpc import cli
from forge_hpc.config import Config, UserError, load_config, save_config
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing import gpus_here
from forge_hpc.sizing.memory import MemoryPlan, RoleMemory
from forge_hpc.sizing.proposal import Proposal, proposals
from forge_hpc.sizing.speed import Speed, measured
from forge_hpc.slurm import partitions


def speed(generated_per_s: float, trained_per_s: float) -> Speed:
    return Speed(generated_per_s, trained_per_s, generated=1000, trained=1000, source="a test")


def splits(cfg: Config, measured_speed: Speed) -> list[Proposal]:
    return proposals(cfg, measured_speed, lambda config, placement: None)


def nodes(number: int, *overrides: str) -> Config:
    return load_config(
        None, ["rollout.max_staleness=1", "cluster.gpus_per_node=1", f"cluster.nodes={number}", *overrides]
    )


def test_the_side_that_is_slower_gets_more_nodes() -> None:
    best = splits(nodes(8), speed(generated_per_s=1, trained_per_s=3))[0]
    assert best.overrides == ("cluster.rollout_nodes=6", "cluster.trainer_nodes=2")
    assert best.step_s == pytest.approx(max(1000 / 6, 1000 / 6))
    other = splits(nodes(8), speed(generated_per_s=3, trained_per_s=1))[0]
    assert other.overrides == ("cluster.rollout_nodes=2", "cluster.trainer_nodes=6")


def test_in_turns_both_times_add_up_and_all_gpus_do_both_where_that_is_quicker() -> None:
    cfg = nodes(2, "rollout.max_staleness=0", "cluster.gpus_per_node=8")
    apart, together = sorted(splits(cfg, speed(10, 10)), key=lambda each: each.placement.takes_turns)
    assert apart.step_s == pytest.approx(apart.generate_s + apart.train_s)
    assert together.overrides == ("cluster.colocate=true",)
    assert together.step_s < apart.step_s


@pytest.mark.parametrize(("staleness", "awake"), [(0, ("generator.engine.sleep_level=0",)), (1, ())])
def test_all_gpus_do_both_at_once_where_their_memory_is_known_to_be_enough(
    staleness: int, awake: tuple[str, ...]
) -> None:
    cfg = nodes(2, f"rollout.max_staleness={staleness}", "cluster.gpus_per_node=8", "rollout.prompts_per_step=64")
    trainers, answers = RoleMemory({"weights": 1.0, "activations": 20.0}), 64 * 8 // 16
    room = MemoryPlan(80.0, {"trainers": trainers, "generators": RoleMemory(sequences=answers)})
    few = MemoryPlan(80.0, {"trainers": trainers, "generators": RoleMemory(sequences=answers - 1)})
    unknown = MemoryPlan(80.0, {"trainers": RoleMemory({"weights": 1.0}), "generators": RoleMemory(sequences=answers)})

    def best(memory: MemoryPlan | None) -> Proposal:
        return proposals(cfg, speed(10, 20), lambda config, placement: memory)[0]

    both = best(room)
    share = "generator.engine.gpu_memory_utilization=0.45"
    assert both.overrides == ("cluster.colocate=true", *awake, share)
    assert both.placement.shared_gpus == tuple(range(8)) and not both.placement.takes_turns
    assert both.step_s == pytest.approx(both.generate_s + both.train_s)
    for memory in (few, unknown, dataclasses.replace(room, warnings=("too little",)), None):
        assert share not in best(memory).overrides


def test_what_was_given_for_another_split_is_taken_back() -> None:
    given = nodes(2, "rollout.max_staleness=0", "cluster.gpus_per_node=8", "cluster.trainer_nodes=1")
    together, apart = splits(given, speed(10, 10))
    assert together.overrides == ("cluster.colocate=true", "cluster.trainer_nodes=null")
    assert load_config(None, together.overrides).cluster.trainer_nodes is None
    assert apart.overrides == ("cluster.rollout_nodes=1", "cluster.trainer_nodes=1")
    in_turns = nodes(1, "rollout.max_staleness=0", "cluster.gpus_per_node=2", "cluster.colocate=true")
    assert splits(in_turns, speed(10, 10))[-1].overrides == ("cluster.rollout_ratio=0.5", "cluster.colocate=false")


def test_what_was_given_for_gpus_in_common_is_taken_back_for_others_and_no_split_comes_twice() -> None:
    share, awake = "generator.engine.gpu_memory_utilization=0.45", "generator.engine.sleep_level=0"
    usual, asleep = "generator.engine.gpu_memory_utilization=0.85", "generator.engine.sleep_level=2"
    ahead = nodes(1, "cluster.gpus_per_node=2", "cluster.colocate=true", share)
    apart = next(each for each in splits(ahead, speed(10, 10)) if not each.placement.shares_at_once)
    assert apart.overrides == ("cluster.rollout_ratio=0.5", usual, "cluster.colocate=false")
    given = ("rollout.max_staleness=0", "cluster.gpus_per_node=2", "cluster.colocate=true", share, awake)
    found = [each.overrides for each in splits(nodes(1, *given), speed(10, 10))]
    assert sorted(found) == [
        ("cluster.colocate=true", usual, asleep),
        ("cluster.colocate=true", awake),
        ("cluster.rollout_ratio=0.5", usual, "cluster.colocate=false"),
    ]
    more = nodes(1, "cluster.gpus_per_node=2", "cluster.colocate=true", "generator.engine.gpu_memory_utilization=0.6")
    assert all("utilization" not in str(each.overrides) for each in splits(more, speed(10, 10)))
    one = nodes(1, "cluster.gpus_per_node=1", "cluster.colocate=true", share)
    assert [each.overrides for each in splits(one, speed(10, 10))] == [("cluster.colocate=true",)]
    cpu = nodes(1, "cluster.gpus_per_node=0", "cluster.colocate=true", share)
    assert [each.overrides for each in splits(cpu, speed(10, 10))] == [
        ("cluster.rollout_ratio=0.5", "cluster.colocate=false")
    ]
    halves = nodes(1, "cluster.gpus_per_node=8", "generator.engine.tensor_parallel_size=4")
    assert len(splits(halves, speed(10, 10))) == 1  # four GPUs and four, by whatever ratio


def test_what_a_run_does_is_among_the_proposals_though_its_memory_is_not_known() -> None:
    ours = nodes(1, "cluster.gpus_per_node=2", "cluster.colocate=true")
    assert sorted(each.placement.shares_at_once for each in splits(ours, speed(10, 10))) == [False, True]
    assert [each.placement.shares_at_once for each in splits(nodes(1, "cluster.gpus_per_node=2"), speed(10, 10))] == [
        False
    ]


def test_a_split_that_submit_would_refuse_is_not_proposed() -> None:
    adapters = ("trainer.lora.enable=true", "trainer.lora.publish=adapters")
    cfg = nodes(1, "rollout.max_staleness=0", "cluster.gpus_per_node=2", *adapters)
    assert not any(each.placement.takes_turns for each in splits(cfg, speed(10, 10)))


def test_speeds_of_gpus_that_did_both_are_not_added_up_again(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    options = ["cluster.gpus_per_node=2", "rollout.max_staleness=1", "cluster.colocate=true"]
    cfg = load_config(PROJECT / "configs/grpo/demo.yaml", options)
    save_config(cfg, run_dir.config)
    found = measured(run_dir, cfg)
    assert found.together and found.source.endswith("apart each does more")
    best = next(each for each in splits(cfg, found) if each.placement.shares_at_once)
    assert (best.generate_s, best.train_s, best.step_s) == (pytest.approx(2.0), pytest.approx(4.0), pytest.approx(4.0))
    assert best.waits == "nobody"


def test_of_two_that_take_as_long_the_one_with_memory_enough_comes_first() -> None:
    cfg = nodes(1, "rollout.max_staleness=1")

    def memory(config: Config, placement: object) -> MemoryPlan:
        roles = {"trainers": RoleMemory({"activations": 1.0}), "generators": RoleMemory(sequences=1000)}
        return MemoryPlan(80.0, roles, () if config.cluster.colocate else ("little",))

    first, second = proposals(cfg, speed(10, 10), memory)
    assert first.step_s == second.step_s and first.config.cluster.colocate and not second.config.cluster.colocate


def test_spares_stay_out_of_the_split_and_a_split_that_does_not_fit_is_left_out() -> None:
    cfg = nodes(4, "cluster.spare_nodes=1")
    assert {each.placement.spare_nodes for each in splits(cfg, speed(1, 1))} == {range(3, 4)}

    def refuse(config: Config, placement: object) -> None:
        if config.cluster.rollout_nodes == 2:
            raise UserError("too large")

    [left] = proposals(cfg, speed(1, 1), refuse)
    assert left.config.cluster.rollout_nodes == 1
    with pytest.raises(UserError, match="no generators beside trainers"):
        splits(load_config(PROJECT / "configs/sft/demo.yaml"), speed(1, 1))


def finished_run(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    save_config(load_config(PROJECT / "configs/grpo/demo.yaml"), run_dir.config)
    record = {
        "perf/trainer_tokens_per_s": 500.0,
        "perf/generator_tokens_per_s": 300.0,
        "tokens/generated": 1200,
        "time/train_s": 4.0,
    }
    run_dir.metrics.write_text("".join(json.dumps({"step": step} | record) + "\n" for step in range(1, 5)))
    return run_dir


def test_a_run_that_has_measured_its_speed_says_it_for_another_batch(tmp_path: Path) -> None:
    run_dir = finished_run(tmp_path)
    cfg = load_config(PROJECT / "configs/grpo/demo.yaml", ["rollout.prompts_per_step=128"])  # twice the run's
    found = measured(run_dir, cfg)
    assert (found.generated_per_s, found.trained_per_s) == (300, 500)
    assert (found.generated, found.trained) == (2400, 4000)
    run_dir.metrics.unlink()
    with pytest.raises(UserError, match="has measured no perf/trainer_tokens_per_s"):
        measured(run_dir, cfg)


def test_the_command_explains_what_it_proposes_and_how_to_submit_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--nodes", "4", "--from", str(finished_run(tmp_path).path), "slurm.time=60"]) == 0
    said = capsys.readouterr().out
    assert "4 nodes, no GPU" in said
    assert f"measured: the median of the last 4 steps of {tmp_path / 'run'}" in said
    assert said.splitlines()[-1].endswith("--nodes 4 slurm.time=60 cluster.rollout_nodes=2 cluster.trainer_nodes=2")
    assert f" --config {tmp_path / 'run' / 'config.yaml'} --nodes 4 " in said.splitlines()[-1]
    given = ["plan", "--nodes", "4", "--from", str(finished_run(tmp_path).path), "cluster.rollout_nodes=2"]
    assert cli.main(given) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" 4 cluster.rollout_nodes=2 cluster.trainer_nodes=2")
    config = str(PROJECT / "configs/grpo/qwen3_8b.yaml")
    assert cli.main(["plan", "--config", config, "--gpu", "h100"]) == 0
    assert "an estimate: docs/performance.md has 75,600 tokens/s trained" in capsys.readouterr().out
    assert cli.main(["plan", "--config", config, "--gpu", "abacus"]) == 2
    assert "no such GPU is known here" in capsys.readouterr().err


def test_without_slurm_a_plan_for_one_node_is_for_this_machine_s_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    monkeypatch.setattr(gpus_here, "load", lambda name: FakeNvml({}, {}, {}))
    monkeypatch.setattr(partitions, "slurm_is_here", lambda: False)
    given = ["plan", "--config", str(PROJECT / "configs/grpo/qwen3_8b.yaml")]
    small = ["model.path=a/Model-1B", "cluster.gpus_per_node=null"]
    measured_in = ["--from", str(finished_run(tmp_path).path)]
    assert cli.main([*given, *measured_in, *small]) == 0
    assert "1 node, 2 GPUs each of 80 GiB; estimated GiB of each" in capsys.readouterr().out
    assert cli.main([*given, *measured_in, *small, "--nodes", "2"]) == 2, "other nodes are not this machine"
    assert "how many GPUs a node has is not known here" in capsys.readouterr().err
    assert cli.main([*given, *small]) == 2
    assert "which GPUs the nodes have is not known here" in capsys.readouterr().err, "how fast they are"
