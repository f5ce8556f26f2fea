"""Frozen models in processes of their own: where they stand, and that a run learns as with them beside the policy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from runs import PROJECT, REWARD, left_over, processes, read, run_local, small_run, start_local, status, wait_for
from tiny_models import random_documents

from forge_hpc.cluster.meshes import Cluster
from forge_hpc.config import Config, UserError, load_config, plan, validate
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.split import frozen_apart
from forge_hpc.controller.frozen import FrozenProcesses
from forge_hpc.controller.generators import NodeLost
from forge_hpc.controller.recovery import GivenUp, Recoveries
from forge_hpc.controller.trainers import Trainers

KL = ("reference.enable=true", "algorithm.kl_coef=0.1")


def config(*overrides: str) -> Config:
    return load_config(None, ["model.path=builtin:qwen3-tiny", *KL, *overrides])


# ---- placement


def test_nodes_of_frozen_models_come_between_the_rollout_nodes_and_the_spares() -> None:
    cfg = config("cluster.nodes=8", "cluster.spare_nodes=1", "cluster.frozen_nodes=2", "cluster.trainer_nodes=2")
    validate(cfg)
    placement = plan(cfg, 4)
    nodes = (placement.trainer_nodes, placement.rollout_nodes, placement.frozen_nodes, placement.spare_nodes)
    assert nodes == (range(2), range(2, 5), range(5, 7), range(7, 8))
    assert placement.frozen_gpus == ((0,), (1,), (2,), (3,)) and placement.trainer_procs == 8 and placement.nodes == 8
    assert "  nodes 5-6      frozen      8 processes, 4 a node, GPUs 0-3\n" in placement.describe()
    assert plan(cfg, None).frozen_nodes == range(5, 7)
    assert plan(config("cluster.nodes=3", "cluster.frozen_nodes=1"), 1).shared_gpus == ()


def test_on_one_node_they_take_its_last_gpus() -> None:
    placement = plan(config("cluster.frozen_processes=2"), 8)
    assert (placement.trainer_gpus, placement.frozen_gpus) == (((0,), (1,), (2,)), ((6,), (7,)))
    assert placement.replica_gpus == ((3,), (4,), (5,)) and placement.gpus_per_node == 8
    assert placement.frozen_nodes == range(1) == placement.trainer_nodes
    shared = plan(config("cluster.frozen_processes=1"), 2)
    assert (shared.trainer_gpus, shared.frozen_gpus, shared.shared_gpus) == (((0,),), ((1,),), (0,))


def test_on_the_cpu_they_are_processes_beside_the_others_and_share_its_cores() -> None:
    placement = plan(config("cluster.frozen_processes=2"), 0)
    assert placement.frozen_gpus == ((), ()) and placement.processes_on(0) == 4
    assert placement.threads_per_process(8, 0) == 2
    assert plan(config("cluster.nodes=3", "cluster.frozen_nodes=1"), 0).frozen_gpus == ((),)


def test_without_a_key_they_stand_beside_the_policy() -> None:
    cfg = config()
    assert plan(cfg, 8).frozen_nodes == range(0) and not frozen_apart(cfg, needs_of(cfg))
    apart = config("cluster.frozen_processes=1")
    assert frozen_apart(apart, needs_of(apart)) == {"reference": ModelNeed(trained=False)}


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        (["reference.enable=false", "algorithm.kl_coef=0", "cluster.frozen_processes=1"], 8, "has no frozen model"),
        (["cluster.frozen_nodes=1", "cluster.nodes=2", "trainer.lora.enable=true"], 8, "has no frozen model"),
        (["cluster.frozen_nodes=2", "cluster.nodes=2"], 8, "cluster.frozen_nodes=2 leaves none to work"),
        (["cluster.frozen_processes=1", "cluster.nodes=2"], 8, "without nodes for them, on 2 nodes"),
        (["cluster.frozen_processes=8"], 8, "of the 8 GPUs of the node leave none to train"),
        (["cluster.frozen_nodes=1", "cluster.nodes=3", "cluster.frozen_processes=2"], 8, "has 8 GPUs"),
    ],
)
def test_a_place_that_does_not_add_up_is_refused(overrides: list[str], gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        plan(config(*overrides), gpus)
    assert refused.value.hint


def test_ranks_are_told_how_many_gpus_a_node_has_for_they_see_their_own_alone() -> None:
    cfg = config("cluster.frozen_processes=1")
    nodes: dict[str, Any] = {"hosts": None, "cpus": 1, "gpu_names": [], "log_dir": Path(), "faults": None}
    told = Cluster(placement=plan(cfg, 2), **nodes).told(cfg)
    assert cfg.cluster.gpus_per_node is None and plan(told, told.cluster.gpus_per_node) == plan(cfg, 2)


# ---- the controller's side


class Procs:
    """Processes of one start: they answer, or are lost while they are asked."""

    def __init__(self, cluster: FakeCluster, node_is_gone: bool) -> None:
        self.cluster = cluster
        self.initialized = asyncio.get_running_loop().create_future()
        if node_is_gone:
            self.initialized.set_exception(OSError("no route"))
        else:
            self.initialized.set_result(None)

    def spawn(self, name: str, actor: Any, *args: Any) -> Any:
        async def start(errors: Any, model_dirs: Any, file_store: Path) -> list[Any]:
            self.cluster.stores.append(file_store.name)
            if len(self.cluster.stores) in self.cluster.failing_starts:
                raise ConnectionResetError("by peer")
            return []

        async def logprobs(errors: Any, documents: Any, model: str) -> list[Any]:
            if self.cluster.num_losses:
                self.cluster.num_losses -= 1
                self.cluster.faults.watched[name]("killed")
                await asyncio.get_running_loop().create_future()
            return [(0, [np.full(len(d.token_ids), -1.0, np.float32) for d in documents]), (1, [])]

        async def values(errors: Any, documents: Any, model: str) -> list[Any]:
            raise UserError("a model without a value head has no values")

        endpoints = {"start": start, "logprobs": logprobs, "values": values}
        return SimpleNamespace(**{key: SimpleNamespace(call=call) for key, call in endpoints.items()})

    async def stop(self) -> None: ...


class FakeCluster:
    """Stands for Monarch where it is told to lose processes and nodes."""

    def __init__(self, num_losses: int = 0, node_is_gone: bool = False) -> None:
        self.placement = plan(config("cluster.nodes=3", "cluster.frozen_nodes=1"), 2)
        watched: dict[str, Any] = {}
        self.faults = SimpleNamespace(
            watched=watched, watch=watched.__setitem__, forget=lambda name: None, ended_nodes=set[int]()
        )
        self.num_losses, self.node_is_gone, self.stores = num_losses, node_is_gone, list[str]()
        self.killed: list[str] = []
        self.failing_starts: set[int] = set()

    def told(self, config: Config) -> Config:
        return config

    def spawn_frozen(self, name: str) -> Procs:
        return Procs(self, self.node_is_gone and bool(self.stores))

    def end_at_once(self, name: str) -> None:
        self.killed.append(name)

    async def can_spawn(self, node: int, timeout_s: float) -> bool:
        return not self.node_is_gone


class Mesh:
    """Trainers that keep what they are given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

        async def call(errors: Any, documents: Any, *args: Any) -> list[Any]:
            self.given = documents
            return [(0, {"loss": 0.0})]

        self.train_step = SimpleNamespace(call=call)


def frozen_of(cluster: FakeCluster, on_node_lost: Any = lambda node, reason: None) -> FrozenProcesses:
    cfg = config("cluster.nodes=3", "cluster.frozen_nodes=1")
    return FrozenProcesses(cfg, cluster, Path("logs"), Recoveries(2), on_node_lost)  # type: ignore[arg-type]


def test_a_reference_that_stands_apart_is_asked_before_the_policy_is_trained() -> None:
    async def scenario() -> None:
        frozen = frozen_of(FakeCluster())
        await frozen.start({})
        mesh = Mesh()
        trainers = Trainers(mesh, 10, asyncio.get_running_loop().create_future(), frozen=frozen)
        documents = random_documents(3)
        asked = await trainers.with_reference(documents)
        assert all((document.ref_logprobs == -1).all() for document in asked)
        assert not any((document.ref_logprobs == -1).all() for document in documents)  # the recipe's own stay
        assert await trainers.train_step(asked) == {"loss": 0.0}
        assert mesh.given is asked
        with pytest.raises(UserError, match="no values"):
            await trainers.values(documents, model="reference")

    asyncio.run(scenario())


def test_lost_processes_are_started_again_and_asked_again_until_that_has_gone_on_for_too_long() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(num_losses=2)
        frozen = frozen_of(cluster)
        await frozen.start({})
        answers = await frozen.logprobs(random_documents(3), "reference")
        assert len(answers) == 3 and (answers[0] == -1).all()
        assert cluster.stores == ["process-group-frozen", "process-group-frozenr1", "process-group-frozenr2"]
        assert cluster.killed == ["frozen", "frozenr1"], "ranks that wait for a dead one end no sooner by themselves"
        cluster.num_losses = 1
        with pytest.raises(GivenUp, match=r"frozen models: killed \(lost 3 times without a completed step"):
            await frozen.logprobs(random_documents(3), "reference")

    asyncio.run(scenario())


def test_what_is_left_of_a_start_that_fails_on_one_rank_is_ended_before_the_next() -> None:
    async def scenario() -> None:
        cluster = FakeCluster(num_losses=1)
        cluster.failing_starts = {2}
        frozen = frozen_of(cluster)
        await frozen.start({})
        assert len(await frozen.logprobs(random_documents(3), "reference")) == 3
        assert cluster.stores == ["process-group-frozen", "process-group-frozenr1", "process-group-frozenr2"]
        assert cluster.killed == ["frozen", "frozenr1"]

    asyncio.run(scenario())


def test_a_node_that_starts_them_no_more_is_told_and_ends_the_call() -> None:
    async def scenario() -> None:
        lost: list[int] = []
        frozen = frozen_of(FakeCluster(1, node_is_gone=True), lambda node, reason: lost.append(node))
        await frozen.start({})
        with pytest.raises(NodeLost, match="node 2 is lost: no route"):
            await frozen.logprobs(random_documents(3), "reference")
        assert lost == [2]

    asyncio.run(scenario())


# ---- whole runs


def distillation(directory: Path, *overrides: str) -> tuple[Path, list[str]]:
    """Its demo and what makes that short, with a teacher of random weights, larger than the student."""
    given = ["evaluation.num_prompts=0", "rollout.prompts_per_step=8"]
    return PROJECT / "configs/distillation/demo.yaml", small_run(directory, 6, REWARD, *given, *overrides)


@pytest.mark.timeout(900)
def test_a_teacher_with_processes_of_its_own_that_die_teaches_as_one_beside_the_policy(tmp_path: Path) -> None:
    figures = []
    for name, overrides in (("beside", []), ("apart", ["cluster.frozen_processes=1"])):
        (tmp_path / name).mkdir()
        page, options = distillation(tmp_path / name, *overrides)
        run_dir = tmp_path / name / "run"
        if not overrides:
            result = run_local(run_dir, options, config=page)
            assert result.returncode == 0, result.stderr
        else:
            run = start_local(run_dir, options, page)
            try:
                wait_for(lambda place=run_dir, run=run: read(place) or run.poll() is not None, "a step")
                [teacher] = processes(run_dir, "frozen-0.log")
                teacher.kill()
                _, err = run.communicate(timeout=400)
            finally:
                run.kill()
            assert run.returncode == 0, err
            assert not left_over(run_dir)
        assert status(run_dir)["state"] == "completed"
        figures.append(read(run_dir))
    beside, apart = figures
    for key in ("step", "loss", "grad_norm", "teacher/reverse_kl", "reward/mean", "tokens/generated"):
        assert [record[key] for record in apart] == [record[key] for record in beside], key
    assert (beside[-1]["recoveries/frozen"], apart[-1]["recoveries/frozen"]) == (0, 1)
    assert apart[-1]["recoveries/trainers"] == 0
