"""Which replicas are replaced where, for more nodes than can be lost here. test_slurm_spares.py loses a real one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import REWARD, run_local, small_run

from forge_hpc.config import Config, plan
from forge_hpc.controller import generators
from forge_hpc.controller.generators import GeneratorPool, WeightSync
from forge_hpc.controller.kept import KeptMeshes
from forge_hpc.controller.recovery import GivenUp, Recoveries
from forge_hpc.data.builtin import write_tiny_qwen3
from forge_hpc.weights import Offer, Places


class FakeCluster:
    """Nodes on which processes start at once, or not at all."""

    def __init__(self, config: Config) -> None:
        self.placement = plan(config, config.cluster.gpus_per_node or 0)
        self.dead: set[int] = set()
        self.broken_starts = self.num_left = self.num_stopped = 0
        self.leave_s = 0.0
        self.free_bytes = 1000
        self.spawned: list[tuple[int, int]] = []
        self.killed: list[str] = []
        nothing = SimpleNamespace(watch=lambda *args: None, forget=lambda *args: None, ended_nodes=set())
        self.faults: Any = nothing

    def spawn_generator(self, name: str, replica: int, node: int | None = None) -> Any:
        node = self.placement.rollout_nodes[replica // self.placement.replicas_per_node] if node is None else node
        self.spawned.append((replica, node))
        return SimpleNamespace(
            initialized=self.started(node), stop=lambda: self.stopped(node), spawn=lambda *args: FakeActor(self)
        )

    async def started(self, node: int) -> None:
        if node in self.dead:
            raise RuntimeError("unreachable")

    async def stopped(self, node: int) -> None:
        self.num_stopped += 1
        if node in self.dead:
            await asyncio.get_running_loop().create_future()

    def end_at_once(self, name: str) -> None:
        self.killed.append(name)

    async def can_spawn(self, node: int, timeout_s: float) -> bool:
        return node not in self.dead

    def layout(self, role: str) -> str:
        return role


class FakeActor:
    def __init__(self, cluster: FakeCluster) -> None:
        self.start = SimpleNamespace(call_one=self.begin)
        self.leave = SimpleNamespace(call_one=self.end)
        self.renew = SimpleNamespace(call_one=self.begin_again)
        self.cluster = cluster

    async def end(self) -> None:
        await asyncio.sleep(self.cluster.leave_s)
        self.cluster.num_left += 1

    async def begin_again(self, *args: Any) -> str:
        return ""

    async def begin(self, model_dir: Path, kv_cache_bytes: int | None) -> int:
        if self.cluster.broken_starts:
            self.cluster.broken_starts -= 1
            raise ValueError("no free memory")
        return self.cluster.free_bytes if kv_cache_bytes is None else kv_cache_bytes


class Pool:
    """A pool of two rollout nodes with eight replicas each."""

    def __init__(self, spares: int, *, shares: bool = False) -> None:
        self.config = Config()
        self.config.rollout.max_staleness = 1
        self.config.cluster.nodes, self.config.cluster.spare_nodes = 3 + spares, spares
        self.config.cluster.trainer_nodes, self.config.cluster.gpus_per_node = 1, 8
        if shares:  # with the trainers, on every node
            self.config.cluster.nodes, self.config.cluster.trainer_nodes, self.config.cluster.colocate = 2, None, True
        self.cluster, self.lost_nodes = FakeCluster(self.config), list[int]()
        self.recoveries = Recoveries(self.config.cluster.max_restarts)

    async def start(self, kept: KeptMeshes | None = None) -> GeneratorPool:
        on_node_lost = lambda node, reason: self.lost_nodes.append(node)  # noqa: E731
        self.pool = GeneratorPool(self.config, self.cluster, Path(), self.recoveries, on_node_lost, kept)  # type: ignore
        await self.pool.start(Path())
        return self.pool

    async def lose(self, *replicas: int) -> None:
        """Lose replicas, and wait until no replacement is under way."""
        for replica in replicas:
            self.pool.service.lose(replica, "killed")
        await asyncio.wait_for(asyncio.gather(*self.pool._tasks), 60)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generators, "END_S", 0.05)


def test_all_replicas_of_a_lost_node_move_to_one_spare_node() -> None:
    async def scenario() -> None:
        pool = Pool(spares=2)
        service = (await pool.start()).service
        pool.cluster.dead = {1}
        pool.cluster.spawned.clear()
        await pool.lose(*range(8))
        assert sorted(pool.cluster.spawned) == [(replica, 3) for replica in range(8)]
        assert sorted(pool.cluster.killed) == [f"generator{replica}" for replica in range(8)]  # if they only hang
        assert service.serving == list(range(16)) and not pool.lost_nodes
        pool.cluster.dead = {1, 3}  # the spare node is lost as well
        pool.cluster.spawned.clear()
        await pool.lose(*range(8))
        assert sorted(pool.cluster.spawned) == [(replica, 4) for replica in range(8)]
        assert service.serving == list(range(16)) and not pool.lost_nodes

    asyncio.run(scenario())


def test_a_replacement_has_the_kv_cache_of_the_first_engine_whatever_is_free_beside_trainers() -> None:
    async def scenario(pool: Pool) -> set[int | None]:
        await pool.start()
        pool.cluster.free_bytes = 10
        await pool.lose(0, 15)
        await pool.lose(15)
        return {slot.kv_cache_bytes for slot in pool.pool._slots.values()}

    async def with_kept_engines() -> None:
        pool = Pool(spares=0, shares=True)
        kept = KeptMeshes(pool.cluster.faults)
        await (await pool.start(kept)).hand_over(kept)
        pool.cluster.free_bytes = 10
        await pool.start(kept)
        assert pool.cluster.spawned == [(replica, replica // 8) for replica in range(16)]  # and no more
        await pool.lose(3)
        assert pool.pool._slots[3].kv_cache_bytes == 1000

    assert asyncio.run(scenario(Pool(spares=0, shares=True))) == {1000}
    assert asyncio.run(scenario(Pool(spares=1))) == {10, 1000}  # alone on its GPU it measures
    asyncio.run(with_kept_engines())


def test_without_a_spare_node_the_lost_node_is_reported_and_the_others_serve_on() -> None:
    async def scenario() -> None:
        pool = Pool(spares=0)
        service = (await pool.start()).service
        pool.cluster.dead = {2}
        await pool.lose(*range(8, 16))
        assert set(pool.lost_nodes) == {2} and service.serving == list(range(8))
        assert not pool.pool.failed.done()

    asyncio.run(scenario())


def test_an_engine_that_does_not_start_is_tried_again_and_not_for_ever() -> None:
    async def scenario(broken_starts: int) -> GeneratorPool:
        pool = Pool(spares=0)
        await pool.start()
        pool.cluster.broken_starts = broken_starts
        await pool.lose(5)
        return pool.pool

    limit = Config().cluster.max_restarts
    mended, failed = asyncio.run(scenario(limit - 1)), asyncio.run(scenario(limit))
    assert 5 in mended.service.serving and not mended.failed.done()
    assert 5 not in failed.service.serving
    error = failed.failed.result()
    assert isinstance(error, GivenUp) and "no free memory (lost 4 times without a completed step" in str(error)


def test_a_start_outlives_the_attempt_that_began_it_and_one_that_failed_is_begun_anew() -> None:
    async def scenario() -> None:
        pool = Pool(spares=0)
        pool.cluster.broken_starts = 1
        with pytest.raises(ValueError, match="no free memory"):
            await pool.start()
        attempt = asyncio.create_task(pool.pool.start(Path()))
        await asyncio.sleep(0)
        attempt.cancel()
        num_spawned = len(pool.cluster.spawned)
        assert (await pool.pool.start(Path())).serving == list(range(16))
        assert len(pool.cluster.spawned) - num_spawned == 16

    asyncio.run(scenario())


@pytest.mark.parametrize("leave_s", [0.0, 0.3, 60.0])
@pytest.mark.parametrize("waits", [True, False])
def test_retired_generators_end_and_others_start_where_the_run_comes_back(
    leave_s: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generators, "LEAVE_S", 1.0)

    async def scenario() -> None:
        pool = Pool(spares=0)
        service = (await pool.start()).service
        pool.cluster.spawned.clear()
        pool.cluster.leave_s = leave_s
        pool.pool.retire()
        assert not service.serving and not pool.pool.is_serving
        service.lose(3, "ended")  # nobody misses it
        with pytest.raises(RuntimeError, match="nothing can be asked of them after finish"):
            await asyncio.wait_for(service.generate.route(), 10)
        if waits:
            await asyncio.wait_for(pool.pool.close(), 10)
            assert pool.cluster.num_left == (16 if leave_s < 1 else 0)
        assert not pool.cluster.spawned and not pool.pool._tasks
        assert (await asyncio.wait_for(pool.pool.start(Path()), 10)).serving == list(range(16))  # trainers were lost
        assert pool.cluster.num_stopped == len(pool.cluster.spawned) == 16
        await asyncio.sleep(0)
        assert service.serving == list(range(16))  # what ends the old ones leaves these alone
        await pool.lose(3)
        assert len(pool.cluster.spawned) == 17 and service.serving == list(range(16))

    asyncio.run(scenario())


def test_a_replacement_gets_the_weights_and_the_newest_name_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def note(name: str) -> Any:
        async def call_one(*args: Any) -> str:
            told.append((name, args[0] if name == "relabel" else args[1]))
            return "shared memory"

        return SimpleNamespace(call_one=call_one)

    async def scenario(version: int | None, label: int | None) -> list[tuple[str, int]]:
        pool = Pool(spares=0)
        await pool.start()
        nothing: Any = SimpleNamespace(spec=None)
        weights = pool.pool.weights[0] = WeightSync(nothing, nothing, nothing, None)
        weights.version, weights.label = version, label
        weights._offer = Offer(version, Places.of([]), ()) if version is not None else None
        told.clear()
        await pool.lose(5)
        assert 5 in pool.pool.service.serving
        return told.copy()

    told: list[tuple[str, int]] = []
    for name in ("load", "relabel"):
        monkeypatch.setattr(FakeActor, name, note(name), raising=False)
    assert asyncio.run(scenario(2, 2)) == [("load", 2)]
    assert asyncio.run(scenario(2, 4)) == [("load", 2), ("relabel", 4)]  # two steps without a signal
    assert asyncio.run(scenario(None, 3)) == [("relabel", 3)]  # what the run began with
    assert asyncio.run(scenario(None, None)) == []


def test_many_generators_may_die_between_two_steps_but_not_one_again_and_again() -> None:
    async def scenario() -> None:
        pool = Pool(spares=0)
        await pool.start()
        for replica in range(16):
            await pool.lose(replica)
        assert len(pool.pool.service.serving) == 16
        for _ in range(pool.config.cluster.max_restarts):
            await pool.lose(7)
        assert isinstance(pool.pool.failed.result(), GivenUp)

    asyncio.run(scenario())


@pytest.mark.training
def test_a_generator_that_is_given_up_ends_the_run_and_costs_the_trainers_nothing(tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "model", seed=0, head_dim=16)  # which vLLM's attention on the CPU raises for
    model = f"model.path={tmp_path / 'model'}"
    result = run_local(tmp_path / "run", small_run(tmp_path, 2, REWARD, model, "cluster.max_restarts=1"))
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: generator 0, sample(): the generation engine failed: RuntimeError: ")
    assert line.endswith(" (lost 2 times without a completed step in between)")
    [log] = (tmp_path / "run").glob("logs/*/controller.log")
    text = log.read_text()
    assert text.count("recovering (") == 1 and "did not end in good order" not in text
