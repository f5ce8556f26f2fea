"""Placement: every node and every GPU has work, and the dry run says which."""

from __future__ import annotations

import copy
import functools
from itertools import product

import pytest
import yaml

from forge_hpc.config import Placement, UserError, load_config, plan

DEFAULTS = load_config(None, ["rollout.prompts_per_step=100000"])


def placed(gpus: int | None, *overrides: str) -> Placement:
    cfg = copy.deepcopy(DEFAULTS)
    for override in overrides:
        key, value = override.split("=")
        *parents, name = key.split(".")
        setattr(functools.reduce(getattr, parents, cfg), name, yaml.safe_load(value))
    return plan(cfg, gpus)


def refused(gpus: int | None, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        placed(gpus, *overrides)
    assert "\n" not in caught.value.message and caught.value.hint
    return caught.value


def gpus_in_use(placement: Placement, node: int) -> list[int]:
    used = [gpu for gpus in placement.trainer_gpus for gpu in gpus] if node in placement.trainer_nodes else []
    if node in placement.rollout_nodes:
        used += [gpu for gpus in placement.replica_gpus for gpu in gpus]
    return sorted(used)


CASES = [
    (nodes, spares, gpus, ratio, tp)
    for nodes, spares, gpus, ratio, tp in product(
        (1, 2, 3, 4, 7, 16, 64), (0, 1, 3), (1, 2, 4, 6, 8), (0.0, 0.25, 0.5, 0.8, 1.0), (1, 2, 4)
    )
    if nodes > spares
]


def test_every_node_and_every_gpu_is_used_exactly_once():
    accepted = 0
    for nodes, spares, gpus, ratio, tp in CASES:
        keys = {"cluster.nodes": nodes, "cluster.spare_nodes": spares, "cluster.rollout_ratio": ratio}
        overrides = [f"{k}={v}" for k, v in {**keys, "generator.engine.tensor_parallel_size": tp}.items()]
        working = nodes - spares
        fits = gpus % tp == 0 if working > 1 else (tp == 1 if gpus == 1 else gpus > tp)
        if not fits:
            refused(gpus, *overrides)
            continue
        accepted += 1
        p = placed(gpus, *overrides)
        if working > 1:
            assert [*p.trainer_nodes, *p.rollout_nodes, *p.spare_nodes] == list(range(nodes))
            assert abs(len(p.rollout_nodes) - min(max(ratio * working, 1), working - 1)) <= 0.5
        else:
            assert list(p.trainer_nodes) == list(p.rollout_nodes) == [0]
            assert list(p.spare_nodes) == list(range(1, nodes))
        for node in range(working):
            alone = working > 1 or gpus > 1
            assert gpus_in_use(p, node) == (list(range(gpus)) if alone else [0, 0])
        assert all(len(replica) == tp for replica in p.replica_gpus)
        assert p.replicas * tp == len(p.rollout_nodes) * (len(p.replica_gpus) * tp) and p.trainer_procs >= 1
        assert p.shared_gpus == ((0,) if working == gpus == 1 else ())
    assert accepted > 500


def test_nodes_are_placed_before_the_gpus_are_known_as_they_are_after():
    for nodes, spares, gpus, ratio, tp in CASES:
        overrides = [f"cluster.nodes={nodes}", f"cluster.spare_nodes={spares}", f"cluster.rollout_ratio={ratio}"]
        if gpus % tp == 0 and (nodes - spares > 1 or gpus > tp):
            before, after = placed(None, *overrides), placed(gpus, *overrides)
            assert before.trainer_nodes == after.trainer_nodes and before.rollout_nodes == after.rollout_nodes
            assert before.replicas == before.trainer_procs == 0


def test_a_given_number_of_nodes_leaves_the_rest_to_the_other_role():
    p = placed(0, "cluster.nodes=8", "cluster.trainer_nodes=3", "cluster.spare_nodes=1")
    assert (p.trainer_nodes, p.rollout_nodes, p.spare_nodes) == (range(3), range(3, 7), range(7, 8))
    p = placed(0, "cluster.nodes=8", "cluster.rollout_nodes=6")
    assert (p.trainer_nodes, p.rollout_nodes) == (range(2), range(2, 8))
    p = placed(0, "cluster.nodes=1", "cluster.rollout_nodes=1", "cluster.trainer_nodes=1")
    assert p.trainer_nodes == p.rollout_nodes == range(1)


def test_numbers_that_do_not_add_up_are_refused():
    refused(0, "cluster.nodes=4", "cluster.rollout_nodes=1", "cluster.trainer_nodes=2")
    refused(0, "cluster.nodes=4", "cluster.rollout_nodes=4")
    refused(0, "cluster.nodes=4", "cluster.trainer_nodes=0")
    refused(0, "cluster.nodes=1", "cluster.trainer_nodes=2")
    refused(0, "cluster.nodes=2", "cluster.spare_nodes=2")
    refused(8, "cluster.nodes=2", "generator.replicas=4")
    refused(8, "cluster.nodes=2", "trainer.processes_per_node=4")
    refused(8, "generator.replicas=8")
    refused(1, "generator.engine.tensor_parallel_size=2")
    refused(2, "generator.engine.tensor_parallel_size=2")
    refused(0, "generator.engine.tensor_parallel_size=2")


def test_replicas_that_do_not_spread_evenly_are_refused():
    error = refused(0, "cluster.nodes=4", "generator.replicas=3")
    assert "do not spread evenly over 2 rollout nodes" in error.message and error.hint == "give a multiple of 2"
    assert placed(0, "cluster.nodes=4", "generator.replicas=4").replicas_per_node == 2


def test_on_the_cpu_each_role_has_one_process_a_node_unless_told_otherwise():
    p = placed(0)
    assert (p.trainer_gpus, p.replica_gpus, p.replicas) == (((),), ((),), 1)
    p = placed(0, "generator.replicas=2", "trainer.processes_per_node=3")
    assert (p.trainer_procs, p.replicas, p.processes_on(0)) == (3, 2, 5)


def test_the_gpus_of_one_node_are_split_by_what_is_given():
    assert placed(8, "generator.replicas=6").replica_gpus == ((2,), (3,), (4,), (5,), (6,), (7,))
    assert placed(8, "trainer.processes_per_node=6").replica_gpus == ((6,), (7,))
    p = placed(8, "generator.engine.tensor_parallel_size=2", "trainer.parallelism.data_parallel_shard_degree=2")
    assert p.trainer_gpus == ((0,), (1,)) and p.replica_gpus == ((2, 3), (4, 5), (6, 7))
    p = placed(8, "trainer.parallelism.tensor_parallel_degree=4", "cluster.rollout_ratio=0.2")
    assert p.trainer_procs == 4


def test_trainers_on_the_gpus_of_generators_start_after_them():
    assert placed(1).starts_after_generators and placed(8, "cluster.colocate=true").starts_after_generators
    assert not placed(8).starts_after_generators and not placed(0).starts_after_generators


def test_degrees_that_do_not_make_the_trainer_processes_are_refused():
    shard, tp = "trainer.parallelism.data_parallel_shard_degree", "trainer.parallelism.tensor_parallel_degree"
    placed(8, "cluster.nodes=4", f"{shard}=4", f"{tp}=4")
    placed(8, "cluster.nodes=4", f"{shard}=8", "trainer.parallelism.data_parallel_replicate_degree=2")
    refused(8, "cluster.nodes=4", f"{shard}=8")
    refused(8, "cluster.nodes=4", f"{tp}=16")
    refused(8, "cluster.nodes=4", "trainer.parallelism.data_parallel_replicate_degree=3")
    refused(8, "cluster.nodes=4", "trainer.parallelism.expert_parallel_degree=3")
    assert "raise trainer.processes_per_node" in (refused(0, f"{tp}=2").hint or "")
    placed(0, f"{tp}=2", "trainer.processes_per_node=2")


def test_ranks_that_share_rows_are_counted_among_the_trainer_processes():
    shard, cp = "trainer.parallelism.data_parallel_shard_degree", "trainer.parallelism.context_parallel_degree"
    placed(8, "cluster.nodes=4", f"{cp}=16")  # over nodes
    placed(8, "cluster.nodes=4", f"{cp}=2", f"{shard}=8")
    placed(8, "cluster.nodes=4", f"{cp}=2", "trainer.parallelism.tensor_parallel_degree=2", f"{shard}=4")
    assert "context 2" in refused(8, "cluster.nodes=4", f"{cp}=2", f"{shard}=16").message
    assert "context 3" in refused(8, "cluster.nodes=4", f"{cp}=3").message
    assert placed(8, f"{cp}=4", "cluster.rollout_ratio=0.2").trainer_procs == 4
    error = refused(8, "cluster.nodes=4", f"{cp}=2", "trainer.parallelism.expert_parallel_degree=2")
    assert "context_parallel_degree=2 does not go with expert_parallel_degree=2" in error.message
    batch = ("rollout.prompts_per_step=1", "rollout.group_size=8")
    refused(8, "cluster.nodes=4", *batch)
    placed(8, "cluster.nodes=4", *batch, f"{cp}=2")


def test_a_batch_smaller_than_the_data_parallel_ranks_is_refused():
    batch = ("rollout.prompts_per_step=1", "rollout.group_size=8")
    refused(8, "cluster.nodes=4", *batch)
    placed(8, "cluster.nodes=4", *batch, "trainer.parallelism.tensor_parallel_degree=2")


def test_sft_trains_on_every_node_and_evaluates_when_the_trainers_have_ended():
    sft = ("recipe=sft", "cluster.nodes=3", "cluster.spare_nodes=1")
    p = placed(8, *sft)
    assert (p.trainer_nodes, p.rollout_nodes, p.spare_nodes, p.replicas) == (range(2), range(2, 2), range(2, 3), 0)
    assert p.trainer_procs == 16
    assert not placed(8, *sft, "evaluation.num_prompts=10", "data.target_field=null").rollout_nodes  # the loss alone
    p = placed(8, *sft, "evaluation.num_prompts=10", "generator.engine.tensor_parallel_size=2")
    assert (p.rollout_nodes, p.replica_gpus, p.generate_after_training) == (range(1, 2), ((0, 1),), True)
    assert p.shared_gpus == () and p.processes_on(1) == 8 and p.nodes == 3
    refused(8, *sft, "cluster.rollout_nodes=1")
    refused(8, *sft, "cluster.trainer_nodes=1")
    refused(8, *sft, "trainer.training.global_batch_size=8")


def test_threads_are_shared_by_the_processes_of_a_node():
    p = placed(8, "cluster.nodes=2")
    assert p.threads_per_process(64, 0) == p.threads_per_process(64, 1) == 8
    p = placed(0)
    assert p.threads_per_process(16, 0) == 8 and p.threads_per_process(16, 0, extra_processes=2) == 4
    assert p.threads_per_process(1, 0) == 1


def test_the_table_of_a_dry_run_names_nodes_and_gpus_by_ranges():
    p = placed(8, "cluster.nodes=64", "cluster.spare_nodes=2", "generator.engine.tensor_parallel_size=4")
    assert p.describe().splitlines() == [
        "64 nodes, 8 GPUs each",
        "  nodes 0-30     trainers    248 processes, 8 a node, GPUs 0-7",
        "  nodes 31-61    generators  62 replicas, 2 a node, GPUs 0-7, 4 GPUs each",
        "  nodes 62-63    spares      replace lost nodes",
    ]
    assert placed(None, "cluster.nodes=64").describe().splitlines() == [
        "64 nodes, GPUs not known yet",
        "  nodes 0-31     trainers",
        "  nodes 32-63    generators",
    ]
    assert "sharing GPU 0 with the trainer" in placed(1).describe()
