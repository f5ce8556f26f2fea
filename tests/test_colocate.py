"""Trainers and generators on the same GPUs, in turns or at once: placement, memory, whose turn it is, who starts first.
Whole runs: test_survival."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_generator_pool import FakeActor, FakeCluster
from test_split import placed, refused

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.changes import safe_changes
from forge_hpc.config.lending import takes_lent
from forge_hpc.config.recipes import needs_of
from forge_hpc.controller.generators import GeneratorPool, WeightSync
from forge_hpc.controller.recovery import Leave, Recoveries
from forge_hpc.controller.service import ActorLost, Service
from forge_hpc.controller.session import Session
from forge_hpc.controller.turns import Turns
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.generation.options import cache_arguments, engine_arguments
from forge_hpc.generation.sleep import SleepingEngine
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.microbatch import plan_shared, trainer_share
from forge_hpc.training.build import Shape
from forge_hpc.training.models import Models
from forge_hpc.weights import Offer, Places, VersionNotFoundError

GIB = 2**30
COLOCATE = "cluster.colocate=true"


# ---- placement


@pytest.mark.parametrize(
    ("nodes", "gpus", "tensor_parallel", "ranks", "replicas"),
    [(1, 1, 1, 1, 1), (1, 2, 1, 2, 2), (1, 8, 4, 8, 2), (4, 8, 2, 32, 16)],
)
def test_every_gpu_has_a_trainer_and_a_generator(
    nodes: int, gpus: int, tensor_parallel: int, ranks: int, replicas: int
) -> None:
    sizes = (f"cluster.nodes={nodes}", f"generator.engine.tensor_parallel_size={tensor_parallel}")
    placement = placed(gpus, COLOCATE, *sizes)
    everything = tuple(range(gpus))
    assert placement.trainer_nodes == placement.rollout_nodes == range(nodes) and placement.nodes == nodes
    assert (placement.trainer_procs, placement.replicas) == (ranks, replicas)
    assert tuple(gpu for process in placement.trainer_gpus for gpu in process) == everything
    assert tuple(gpu for replica in placement.replica_gpus for gpu in replica) == everything
    assert placement.shared_gpus == everything


def test_on_the_cpu_both_stand_on_every_node_with_the_threads_that_they_have_side_by_side() -> None:
    sizes = ("cluster.nodes=2", "trainer.processes_per_node=2", "generator.replicas=4")
    placement = placed(0, COLOCATE, *sizes)
    assert (placement.trainer_procs, placement.replicas, placement.shared_gpus) == (4, 4, ())
    assert placement.processes_on(0) == placement.processes_on(1) == 4  # the last bit follows from the threads


def test_the_table_of_a_dry_run_says_who_takes_turns() -> None:
    assert placed(2, COLOCATE).describe().splitlines() == [
        "1 node, 2 GPUs each",
        "  node 0         trainers    2 processes, GPUs 0-1",
        "  node 0         generators  2 replicas, GPUs 0-1, in turns with the trainers",
    ]
    assert "in turns" in placed(None, COLOCATE, "cluster.nodes=3").describe()


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["recipe=sft"], "recipe=sft does not have both at the same time"),
        (["recipe=eval"], "recipe=eval does not have both at the same time"),
        (["cluster.nodes=4", "cluster.trainer_nodes=2"], "on every node, and cluster.trainer_nodes is 2"),
        (["cluster.nodes=4", "cluster.rollout_nodes=1"], "on every node, and cluster.rollout_nodes is 1"),
        (["cluster.nodes=4", "cluster.spare_nodes=1"], "cluster.spare_nodes=1 replace nodes that only generate"),
        (["generator.engine.tensor_parallel_size=3"], "tensor_parallel_size=3 does not divide the 8 GPUs"),
        (["trainer.processes_per_node=4"], "trainer.processes_per_node=4, a trainer node has 8 GPUs"),
        (["generator.replicas=4"], "need 4 GPUs, 1 rollout node have 8"),
    ],
)
def test_what_does_not_go_with_turns_is_refused_in_a_line(others: list[str], message: str) -> None:
    assert message in refused(8, COLOCATE, *others).message


def test_weights_by_nccl_between_hosts_whose_gpus_do_both_are_refused() -> None:
    nccl = [COLOCATE, "model.path=builtin:qwen3-tiny", "generator.weight_transport=nccl"]
    validate(load_config(None, nccl), check_paths=False)
    with pytest.raises(UserError, match="one of those is on its own GPU, where NCCL takes no two"):
        validate(load_config(None, [*nccl, "cluster.nodes=2"]), check_paths=False)
    a_copy_a_node = "trainer.parallelism.data_parallel_replicate_degree=2"  # the first one's GPUs read it by CUDA IPC
    validate(load_config(None, [*nccl, "cluster.nodes=2", "cluster.gpus_per_node=8", a_copy_a_node]), check_paths=False)


@pytest.mark.parametrize("others", [["rollout.max_staleness=1"], ["generator.engine.sleep_level=0"]])
def test_where_both_compute_at_once_or_no_engine_may_sleep_they_share_every_gpu(others: list[str]) -> None:
    placement = placed(2, COLOCATE, *others)
    assert (placement.trainer_procs, placement.replicas, placement.shared_gpus) == (2, 2, (0, 1))
    assert not placement.takes_turns and placement.starts_after_generators
    assert takes_lent(load_config(None, [COLOCATE, "rollout.max_staleness=1"]))
    assert placement.describe().splitlines()[-1].endswith("GPUs 0-1, sharing GPUs 0-1 with the trainers")
    assert placed(1, COLOCATE, *others).describe().splitlines()[-1].endswith("sharing GPU 0 with the trainer")
    config = load_config(None, ["model.path=builtin:qwen3-tiny", COLOCATE, *others])
    assert engine_arguments("m", config, "cuda")["enable_sleep_mode"] is False
    config.generator.engine.extra["enable_sleep_mode"] = False
    validate(config, check_paths=False)


def test_on_the_cpu_they_stand_as_without_it_in_an_asynchronous_run() -> None:
    ahead = "rollout.max_staleness=1"
    assert placed(0, COLOCATE, ahead) == placed(0, ahead)


def test_an_engine_that_may_not_sleep_is_refused() -> None:
    config = load_config(None, ["model.path=builtin:qwen3-tiny", COLOCATE])
    validate(config, check_paths=False)
    assert engine_arguments("m", config, "cuda")["enable_sleep_mode"] is True
    config.generator.engine.extra["enable_sleep_mode"] = False
    with pytest.raises(UserError, match="enable_sleep_mode=false forbids it"):
        validate(config, check_paths=False)


def test_a_run_may_be_resumed_with_turns_or_without_and_says_so() -> None:
    apart, in_turns = load_config(None, []), load_config(None, [COLOCATE, "generator.engine.sleep_level=1"])
    for old, new in ((apart, in_turns), (in_turns, apart)):
        lines = safe_changes(old, new, 0, "refused", "hint")
        assert any(
            line.startswith("cluster.colocate: ") and line.endswith("(may change the last bit)") for line in lines
        )


# ---- memory


def test_what_both_take_of_a_gpu_is_said_and_what_is_too_much_refused_with_the_share_that_fits() -> None:
    said = plan_shared(80 * GIB, 0.8, 10 * GIB, in_turns=True)
    assert "of 80.0 GiB of a GPU the generator takes 64.0" in said and "the trainer keeps 10.0" in said
    with pytest.raises(UserError, match=r"takes 68\.0 .*=0\.85.* keeps 10\.0 .*: 1\.0 GiB too much") as caught:
        plan_shared(80 * GIB, 0.85, 10 * GIB, in_turns=True)
    assert caught.value.hint.startswith("set generator.engine.gpu_memory_utilization to 0.83 or less")
    assert plan_shared(80 * GIB, 0.83, 10 * GIB, in_turns=True)
    with pytest.raises(UserError) as caught:
        plan_shared(80 * GIB, 0.85, 90 * GIB, in_turns=True)
    assert caught.value.hint.startswith("take more GPUs")


def test_of_a_gpu_that_both_use_at_once_the_rest_is_for_activations() -> None:
    said = plan_shared(80 * GIB, 0.5, 10 * GIB, in_turns=False)
    assert said.startswith("shared: ") and said.endswith("the rest, 27.0, for activations")
    assert 80 * trainer_share(80 * GIB, 0.5) == pytest.approx(38.5)  # what is no activation too
    with pytest.raises(UserError, match=r"a trainer and a generator on one GPU: .*: 6\.0 GiB too much") as caught:
        plan_shared(80 * GIB, 0.85, 15 * GIB, in_turns=False)
    assert caught.value.hint.startswith("set generator.engine.gpu_memory_utilization to less than 0.77")


def test_of_a_small_gpu_that_both_use_at_once_only_what_they_surely_take_is_refused() -> None:
    said = plan_shared(16 * GIB, 0.85, GIB // 10, in_turns=False)
    assert "0.7 GiB too much" in said and "may run out of memory" in said
    assert 16 * trainer_share(16 * GIB, 0.85) == pytest.approx(1.2)  # half of what is left
    for total, share, kept in ((16, 0.85, 1.25), (80, 0.85, 11.0), (141, 0.85, 20.0)):  # the limit is below that
        with pytest.raises(UserError, match="GiB too much"):
            plan_shared(total * GIB, share, int(kept * GIB), in_turns=False)


@pytest.mark.usefixtures("process_group")
def test_a_trainer_keeps_to_its_part_of_a_gpu_and_a_process_that_was_kept_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parts = write_tiny_qwen3(tmp_path / "model", seed=0), []
    kinds = (["rollout.max_staleness=1"], [], ["cluster.colocate=false", "rollout.max_staleness=1"])
    given = [[f"model.path={model}", "cluster.gpus_per_node=2", COLOCATE, *others] for others in kinds]
    configs = [load_config(None, each) for each in given]
    shapes = [Shape.of(config) for config in configs]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: parts.append(part))
    said = [
        shape.share_gpu({name: (model, need) for name, need in needs_of(config).models.items()})
        for shape, config in zip(shapes, configs, strict=True)
    ]
    assert [line.split(":")[0] for line in said] == ["shared", "in turns", ""]
    assert parts == [pytest.approx(1 - 0.85 - 1.5 / 100), 1.0, 1.0]


def test_an_engine_in_the_place_of_another_asks_for_its_kv_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM wants the share that it is given free of all others' contexts, too."""
    properties = SimpleNamespace(total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert cache_arguments(None, "cuda") == {}
    assert cache_arguments(20 * GIB, "cpu") == {"kv_cache_memory_bytes": 20 * GIB}
    assert cache_arguments(20 * GIB, "cuda") == {"kv_cache_memory_bytes": 20 * GIB, "gpu_memory_utilization": 0.25}


@pytest.mark.usefixtures("process_group")
def test_models_are_built_once_their_process_keeps_to_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_qwen3(tmp_path / "model", seed=0)
    config = load_config(None, [f"model.path={model}", "cluster.gpus_per_node=2", COLOCATE, "rollout.max_staleness=1"])

    def limit(part: float, device: torch.device) -> None:
        raise RuntimeError(f"{part:.3f} of {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # on one that is not there nothing can be built
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * GIB, 100 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    with pytest.raises(RuntimeError, match=r"0\.135 of cuda"):
        Models(config, needs_of(config).models, {"policy": model})


@pytest.mark.parametrize(
    ("overrides", "order"),
    [
        ([COLOCATE, "rollout.max_staleness=1"], ["generators", "trainers"]),
        ([COLOCATE], ["generators", "trainers"]),
        (["rollout.max_staleness=1"], ["trainers"]),  # nobody waits for the generators
    ],
)
def test_on_gpus_in_common_vllm_plans_before_the_trainers_start(
    tmp_path: Path, overrides: list[str], order: list[str]
) -> None:
    config, placement = load_config(None, overrides), placed(2, *overrides)
    run_dir, began = RunDir(tmp_path / "run").create(), list[str]()

    async def start(who: str) -> Any:
        began.append(who)
        return [(0, "")]

    async def nothing(*args: Any) -> dict[str, Path]:
        return {}

    async def scenario() -> None:
        pool: Any = SimpleNamespace(turns=None, is_serving=False, start=lambda model_dir: start("generators"))
        mesh = SimpleNamespace(start=SimpleNamespace(call=lambda *args: start("trainers")))
        cluster: Any = SimpleNamespace(placement=placement, told=lambda config: config, layout=lambda role: None)
        session = Session(config, run_dir, tmp_path, cluster, pool, Recoveries(0), Leave())
        session.model_dir, session.tokenizer = tmp_path, SimpleNamespace(get_vocab=dict)
        procs = SimpleNamespace(initialized=nothing(), spawn=lambda *args: mesh)
        cluster.spawn_trainers, cluster.faults = lambda name: procs, SimpleNamespace(watch=lambda *args: None)
        await asyncio.wait_for(session._start_trainers(), 60)

    asyncio.run(scenario())
    assert began == order


class FakeVLLM:
    """vLLM's engine on a GPU of 100 GiB, of which others take some."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.sizes = {"weights": 10.0, "kv_cache": 70.0}
        self.others = 0.0
        self.calls: list[Any] = []

    def sleep(self, level: int) -> None:
        self.calls.append(level)
        self.asleep = set(self.sizes)

    def wake_up(self, tags: list[str]) -> bool:
        assert set(tags) <= self.asleep
        self.calls.append(*tags)
        self.asleep -= set(tags)
        return not self.asleep

    def collective_rpc(self, function: Any) -> list[int]:
        held = sum(size for tag, size in self.sizes.items() if tag not in self.asleep)
        return [int((100 - held - self.others) * GIB)]


def test_weights_have_memory_before_they_are_loaded_and_the_kv_cache_after() -> None:
    vllm = FakeVLLM()
    engine = SleepingEngine(vllm, 2, "cuda")
    assert engine.sleep().endswith("80.0 GiB given up") and engine.sleep() == "asleep already"
    with pytest.raises(ValueError, match="load"):
        engine.wake()
    engine.make_room_for_weights()
    engine.make_room_for_weights()
    engine.has_weights = True
    assert engine.wake().endswith("70.0 GiB taken") and engine.wake() == "awake already"
    assert vllm.calls == [2, "weights", "kv_cache"] and not engine.is_asleep


def test_an_engine_that_has_woken_in_part_sleeps_and_wakes_again() -> None:
    vllm = FakeVLLM()
    engine = SleepingEngine(vllm, 2, "cuda")
    engine.sleep()
    engine.make_room_for_weights()
    engine.has_weights = True
    engine.sleep()
    assert not engine.has_weights and vllm.asleep == {"weights", "kv_cache"}
    engine.make_room_for_weights()
    engine.has_weights = True
    engine.wake()
    assert not vllm.asleep


def test_weights_that_are_kept_in_host_memory_need_not_be_loaded() -> None:
    vllm = FakeVLLM()
    engine = SleepingEngine(vllm, 1, "cuda")
    engine.sleep()
    engine.wake()
    assert vllm.calls == [1, "weights", "kv_cache"]


def test_trainers_that_leave_too_little_memory_are_said_before_vllm_asks_for_it() -> None:
    vllm = FakeVLLM()
    engine = SleepingEngine(vllm, 1, "cuda")
    engine.sleep()
    vllm.others = 25
    with pytest.raises(UserError, match=r"given up 70\.0 GiB .* left it 65\.0"):
        engine.wake()
    assert engine.is_asleep
    vllm.others = 15
    engine.wake()


# ---- whose turn it is


class Sides:
    """Turns whose changes are noted, and take until they are let through."""

    def __init__(self) -> None:
        self.turns, self.events = Turns(), list[str]()
        self.gate = asyncio.Event()
        self.gate.set()
        self.turns.sleep, self.turns.wake = self.change("sleep"), self.change("wake")

    def change(self, name: str) -> Callable[[], Awaitable[None]]:
        async def change() -> None:
            self.events.append(name)
            await self.gate.wait()

        return change

    def compute(self, side: str, name: str, end: asyncio.Event) -> asyncio.Task[None]:
        async def computing() -> None:
            async with self.turns.generating() if side == "generators" else self.turns.training():
                self.events.append(name)
                await end.wait()
                self.events.append(f"{name} ends")

        return asyncio.create_task(computing())


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_who_comes_waits_for_the_other_side_and_not_for_its_own() -> None:
    async def scenario() -> None:
        sides, end_a, end_b = Sides(), asyncio.Event(), asyncio.Event()
        tasks = [sides.compute("generators", "a", end_a)]
        await settle()
        tasks.append(sides.compute("trainers", "t", end_b))
        await settle()
        tasks.append(sides.compute("generators", "b", end_b))  # what a waits for, say
        await settle()
        assert sides.events == ["a", "b"]
        end_a.set()
        await settle()
        assert sides.events == ["a", "b", "a ends"]
        end_b.set()
        await asyncio.gather(*tasks)
        assert sides.events == ["a", "b", "a ends", "b ends", "sleep", "t", "t ends"]
        async with sides.turns.training():
            pass
        async with sides.turns.generating():
            pass
        assert sides.events[-1] == "wake" and sides.events.count("sleep") == 1
        assert all(value >= 0 for value in sides.turns.metrics().values())

    asyncio.run(scenario())


def test_all_who_come_wait_for_one_change() -> None:
    async def scenario() -> None:
        sides, end = Sides(), asyncio.Event()
        sides.gate.clear()
        tasks = [sides.compute("trainers", name, end) for name in "ab"]
        await settle()
        assert sides.events == ["sleep"]
        sides.gate.set()
        await settle()
        assert sides.events == ["sleep", "a", "b"]
        end.set()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_change_that_was_cancelled_or_failed_is_made_again_by_who_comes_next() -> None:
    async def scenario() -> None:
        sides, end = Sides(), asyncio.Event()
        end.set()
        sides.gate.clear()
        first = sides.compute("trainers", "first", end)
        await settle()
        second = sides.compute("trainers", "second", end)
        await settle()
        first.cancel()
        sides.gate.set()
        await second
        assert sides.events == ["sleep", "sleep", "second", "second ends"]

        async def fail() -> None:
            raise ActorLost("the trainers")

        wake, sides.turns.wake = sides.turns.wake, fail
        with pytest.raises(ActorLost):
            await sides.compute("generators", "third", end)
        sides.turns.wake = wake
        await sides.compute("trainers", "fourth", end)  # some generators may be awake
        await sides.compute("generators", "fifth", end)
        assert sides.events[4:] == ["sleep", "fourth", "fourth ends", "wake", "fifth", "fifth ends"]

    asyncio.run(scenario())


def test_a_call_that_waits_for_a_replacement_lets_it_start_although_trainers_wait() -> None:
    async def scenario() -> None:
        sides, lost = Sides(), list[int]()
        service = Service("generator", 1, 60, lambda index, reason: lost.append(index))
        service.turn = sides.turns.generating

        def actor(answer: Callable[[], Awaitable[str]]) -> Any:
            return SimpleNamespace(generate=SimpleNamespace(call_one=answer))

        async def die() -> str:
            raise ActorLost("killed")

        async def answer() -> str:
            return "done"

        await service.admit(0, actor(die))
        call = asyncio.create_task(service.generate.route())
        await settle()
        trainers = sides.compute("trainers", "t", asyncio.Event())
        await settle()
        assert lost == [0] and not sides.events
        async with asyncio.timeout(60), sides.turns.generating():  # as the pool starts another
            await service.admit(0, actor(answer))
        assert await call == "done"
        await settle()
        assert sides.events == ["sleep", "t"]
        trainers.cancel()

    asyncio.run(scenario())


# ---- generators, trainers and weights


class SleepyActor(FakeActor):
    """A generator whose calls are noted."""

    def __init__(self, cluster: Any) -> None:
        super().__init__(cluster)
        self.log: list[Any] = []
        for name in ("sleep", "wake", "load"):
            setattr(self, name, SimpleNamespace(call_one=self.note(name)))

    def note(self, name: str) -> Callable[..., Awaitable[str]]:
        async def call(*args: Any) -> str:
            self.log.append((name, args[1]) if name == "load" else name)
            return name

        return call


class SleepyCluster(FakeCluster):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.actors: list[SleepyActor] = []

    def spawn_generator(self, name: str, replica: int, node: int | None = None) -> Any:
        procs = super().spawn_generator(name, replica, node)
        self.actors.append(SleepyActor(self))
        procs.spawn = lambda *args, actor=self.actors[-1]: actor
        return procs


class FakeTrainers:
    timeout_s = 60.0

    def __init__(self) -> None:
        self.log: list[str] = []

    async def publish(self, store: Any, version: int, in_use: Any, **options: Any) -> Offer:
        self.log.append(f"publish {version}")
        return Offer(version, Places.of([]), ())

    async def release(self) -> str:
        self.log.append("release")
        return ""


async def in_turns(gpus: int = 2) -> tuple[GeneratorPool, SleepyCluster, FakeTrainers, WeightSync]:
    config = Config()
    config.cluster.colocate, config.cluster.gpus_per_node = True, gpus
    cluster, trainers = SleepyCluster(config), FakeTrainers()
    pool = GeneratorPool(config, cluster, Path(), Recoveries(3), lambda node, reason: None)  # type: ignore[arg-type]
    await pool.start(Path())
    assert pool.turns is not None
    store: Any = SimpleNamespace(spec=None)
    weights = WeightSync(trainers, store, pool.service, None, turns=pool.turns)  # type: ignore[arg-type]
    pool.weights[0], pool.turns.wake = weights, weights.wake
    return pool, cluster, trainers, weights


async def publish(weights: WeightSync, version: int) -> None:
    await weights.publish(version)
    await weights.delivered()


def test_each_step_wakes_the_generators_once_with_its_weights_also_where_they_have_not_changed() -> None:
    async def scenario() -> None:
        pool, cluster, trainers, weights = await in_turns()
        for version in (0, 1, 2):
            async with pool.turns.training():  # type: ignore[union-attr]
                trainers.log.append("train")
            await publish(weights, version)
        log = [call for version in (0, 1, 2) for call in ("sleep", ("load", version), "wake")]
        assert [actor.log for actor in cluster.actors] == [log] * 2
        assert trainers.log == [line for v in (0, 1, 2) for line in ("train", f"publish {v}", "release")]
        assert weights.version == weights.label == 2

    asyncio.run(scenario())


def test_a_generator_that_is_lost_asleep_starts_in_the_generators_turn_and_takes_the_newest_weights() -> None:
    async def scenario() -> None:
        pool, cluster, _, weights = await in_turns()
        assert pool.turns is not None
        async with pool.turns.training():
            pass
        await publish(weights, 0)
        async with pool.turns.training():
            pool.service.lose(1, "killed")
            await settle()
            assert len(cluster.actors) == 2 and pool.service.serving == [0]
        await asyncio.wait_for(asyncio.gather(*pool._tasks), 60)
        assert pool.service.serving == [0, 1]
        assert cluster.actors[0].log[-2:] == [("load", 0), "wake"]  # the others wake with it
        assert cluster.actors[2].log == [("load", 0)]  # it has not slept
        await publish(weights, 1)
        assert cluster.actors[2].log[1:] == ["sleep", ("load", 1), "wake"]

    asyncio.run(scenario())


def test_a_generator_that_starts_when_the_trainers_are_gone_sleeps_until_the_next_bring_weights() -> None:
    async def scenario() -> None:
        pool, cluster, trainers, weights = await in_turns()
        assert pool.turns is not None
        await publish(weights, 0)
        weights.cancel()
        weights._offer = None  # it went with the trainers

        pool.service.lose(1, "killed")
        await asyncio.wait_for(asyncio.gather(*pool._tasks), 60)
        assert cluster.actors[2].log == ["sleep"] and pool.service.serving == [0, 1]
        store: Any = SimpleNamespace(spec=None)
        again = WeightSync(trainers, store, pool.service, None, turns=pool.turns)  # type: ignore[arg-type]
        pool.weights[0], pool.turns.wake = again, again.wake
        async with pool.turns.training():  # the next trainers start
            pass
        await publish(again, 0)
        assert all(actor.log[-3:] == ["sleep", ("load", 0), "wake"] for actor in (cluster.actors[0], cluster.actors[2]))

    asyncio.run(scenario())


def test_generators_that_wake_while_a_version_is_replaced_get_the_next() -> None:
    async def scenario() -> None:
        pool, cluster, _, weights = await in_turns()
        assert pool.turns is not None
        await publish(weights, 0)
        async with pool.turns.training():
            pass
        weights._offer = None
        with pytest.raises(VersionNotFoundError):
            await weights.give(pool.service.load.fanout)
        async with pool.turns.generating():
            pass
        assert cluster.actors[0].log[-1] == "sleep"
        await publish(weights, 1)
        assert cluster.actors[0].log[-2:] == [("load", 1), "wake"]

    asyncio.run(scenario())
