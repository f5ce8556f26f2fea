"""What hangs on the way to its deadline leaves stacks behind, and what fails by itself leaves none."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import runs
from monarch.actor import Actor, endpoint, this_host
from runs import DEMO, PROJECT, REWARD, run_local, small_run, status
from test_actors import SendingReplica, service_of
from test_ranks import supervised

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.meshes import Cluster, LentHost
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, load_config, plan, save_config
from forge_hpc.config.schema import RewardConfig
from forge_hpc.controller import frozen, generators, lent, serve, session
from forge_hpc.controller.frozen import FrozenProcesses
from forge_hpc.controller.generators import GeneratorPool, NodeLost
from forge_hpc.controller.lent import LentGenerators
from forge_hpc.controller.recovery import Recoveries
from forge_hpc.controller.saving import Saver
from forge_hpc.controller.service import ActorLost, answer, started
from forge_hpc.controller.session import Session
from forge_hpc.environments import EnvironmentPool
from forge_hpc.rewards.workers import RewardWorkers
from forge_hpc.run_dir import RunDir
from forge_hpc.status_writer import StatusWriter
from forge_hpc.workers import pool

HANGS = "import itertools\nsum(itertools.repeat(0))\n"  # in C, without an end
FAILS = "raise SystemExit('no such library')\n"


class Host:
    """This machine, as one of several hosts."""

    def slice(self, hosts: slice) -> Host:
        return self

    def spawn_procs(self, per_host: dict[str, int], name: str, bootstrap_command: Any) -> Any:
        command = bootstrap_command({"hosts": 0, "procs": 0}) if callable(bootstrap_command) else bootstrap_command
        return this_host().spawn_procs(per_host=per_host, name=name, bootstrap_command=command)


class Nodes:
    """This machine as the node of a run, on which processes begin with ``code``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        (folder / "first").mkdir()
        (folder / "first/sitecustomize.py").write_text(code)
        path = [str(folder / "first"), str(PROJECT), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        self.config = load_config(
            DEMO, ["reference.enable=true", "algorithm.kl_coef=0.1", "cluster.frozen_processes=1"]
        )
        self.recoveries, self.folder = Recoveries(0), folder

    def cluster(self) -> Cluster:
        """To be made in the event loop."""
        faults = Faults(Rendezvous(self.folder / "faults"))
        hosts: Any = Host()
        return Cluster(hosts, plan(self.config, 0), 1, [[]], self.folder, faults)

    def pool(self, cluster: Cluster) -> GeneratorPool:
        return GeneratorPool(self.config, cluster, self.folder, self.recoveries, lambda *_: None)


async def start_generators(nodes: Nodes, cluster: Cluster) -> None:
    await nodes.pool(cluster).start(Path())


async def start_frozen(nodes: Nodes, cluster: Cluster) -> None:
    await FrozenProcesses(nodes.config, cluster, nodes.folder, nodes.recoveries, lambda *_: None).start({})


async def start_trainers(nodes: Nodes, cluster: Cluster) -> None:
    lost = asyncio.get_running_loop().create_future()
    attempt: Any = SimpleNamespace(cluster=cluster, lost=lost, _spawned=lambda name, procs: procs)
    await Session._spawn_trainers(attempt, "trainer")


async def start_lent(nodes: Nodes, cluster: Cluster) -> None:
    door = Rendezvous(nodes.folder), "127.0.0.1", nodes.folder, lambda _: None
    lending = LentGenerators(nodes.config, cluster, nodes.pool(cluster), *door)
    hosts: Any = Host()
    node: Any = SimpleNamespace(host=LentHost(hosts, 1, [], [()]), slots={1: 0}, meshes={}, number=4)
    await lending._add(node, 1, lent.SPAWN_S)


Start = Callable[[Nodes, Cluster], Awaitable[None]]
STARTS: list[Start] = [start_generators, start_frozen, start_trainers, start_lent]


def begun_by_monarch() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if "bootstrap_main" in " ".join(p.cmdline())]


def end_begun() -> None:
    for process in begun_by_monarch():
        process.kill()


def outcome_of(start: Start, nodes: Nodes) -> Exception:
    async def scenario() -> Exception:
        try:
            with pytest.raises((NodeLost, ActorLost, ValueError)) as raised:
                await start(nodes, nodes.cluster())
        finally:
            end_begun()
        return raised.value

    return asyncio.run(scenario())


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_do_not_start_leave_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start
) -> None:
    for module in (generators, frozen, session, lent):
        monkeypatch.setattr(module, "SPAWN_S", 3.0)
    with supervised(tmp_path, monkeypatch) as file:
        error = outcome_of(start, Nodes(tmp_path, monkeypatch, HANGS))
    assert f"did not answer within 3 s; the stacks of all processes: {tmp_path}/stacks-*.log" in str(error)
    text = file.read_text()
    assert text.count("=== ") == 1 and "start of its processes did not answer within 3 s\n" in text
    assert "monarch._src.actor.bootstrap_main" in text


@pytest.mark.training
def test_a_run_whose_processes_do_not_start_shows_them_before_they_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "first").mkdir()
    hangs = "import sys, time\nif any('bootstrap_main' in word for word in sys.orig_argv):\n    time.sleep(600)\n"
    (tmp_path / "first/sitecustomize.py").write_text(hangs)
    monkeypatch.setattr(runs, "PROJECT", os.pathsep.join([str(tmp_path / "first"), str(PROJECT)]))
    run_dir = tmp_path / "run"
    result = run_local(run_dir, small_run(tmp_path, 2, REWARD, "cluster.max_restarts=0"))
    assert result.returncode == 1
    [file] = run_dir.glob("logs/*/stacks-0.log")
    told = f"did not answer within {generators.SPAWN_S:.0f} s; the stacks of all processes: {file.parent}/stacks-*.log"
    assert told in status(run_dir)["message"] and told in result.stderr
    assert file.read_text().count("monarch._src.actor.bootstrap_main") == 2  # a trainer, and a generator


@pytest.mark.parametrize("start", STARTS)
def test_processes_that_fail_to_start_leave_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Start) -> None:
    for module in (generators, frozen, session, lent):
        monkeypatch.setattr(module, "SPAWN_S", 60.0)
    with supervised(tmp_path, monkeypatch) as file:
        error = outcome_of(start, Nodes(tmp_path, monkeypatch, FAILS))
    assert "stacks" not in str(error) and not file.exists()


async def load_reward(module: str) -> None:
    rewards = RewardWorkers(RewardConfig(module))
    try:
        await rewards.start()
    finally:
        await rewards.close()


async def load_environment(module: str) -> None:
    config = Config()
    config.environment.name = module
    await EnvironmentPool(config, num_workers=2).start()


LOADS = {"reward": load_reward, "environment": load_environment}


@pytest.mark.parametrize("what", LOADS)
def test_a_users_module_that_hangs_when_it_is_loaded_leaves_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    (tmp_path / "mine.py").write_text(f"def forever():\n    {HANGS.replace(chr(10), '; ')}pass\nforever()\n")
    monkeypatch.setattr(pool, "_START_TIMEOUT_S", 8.0)
    with supervised(tmp_path, monkeypatch) as file, pytest.raises(UserError) as raised:
        asyncio.run(LOADS[what](f"{tmp_path}/mine.py:mine"))
    told = f"cannot be loaded: that took longer than 8 s; the stacks of all processes: {tmp_path}/stacks-*.log"
    assert told in raised.value.message
    shown = [part for part in file.read_text().split("--- ") if part.startswith(f"{what}, pid ")]
    assert shown and all(" in forever\n" in part for part in shown)
    assert not [p for p in psutil.Process().children(recursive=True) if f"forge_hpc.{what}s" in " ".join(p.cmdline())]


@pytest.mark.parametrize("what", LOADS)
def test_a_users_module_that_raises_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "mine.py").write_text("1 / 0\n")
    with supervised(tmp_path, monkeypatch) as file, pytest.raises(UserError, match="division by zero"):
        asyncio.run(LOADS[what](f"{tmp_path}/mine.py:mine"))
    assert not file.exists()


RECIPE = "from forge_hpc.recipes.sft import SFT\n\n\ndef forever():\n    {hangs}\n\n\nforever()\n"


def test_an_export_of_the_best_checkpoint_that_hangs_leaves_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(RECIPE.format(hangs=HANGS.replace("\n", "; ")))
    config, run_dir = Config(recipe=f"{tmp_path}/mine.py:SFT"), RunDir(tmp_path / "run").create()
    config.trainer.timeout_s = 8.0
    save_config(config, run_dir.config)
    saver = Saver(config, run_dir, Recoveries(0), StatusWriter(run_dir), list, print, print)
    with supervised(tmp_path, monkeypatch) as file, pytest.raises(ActorLost) as raised:
        asyncio.run(saver.export_best())
    late = "the model of the best checkpoint was not exported within trainer.timeout_s"
    assert str(raised.value) == f"{late}; the stacks of all processes: {tmp_path}/stacks-*.log"
    [shown] = [part for part in file.read_text().split("--- ") if part.startswith("export, pid ")]
    assert " in forever\n" in shown


class Tired(Actor):
    @endpoint
    def rest(self) -> None:
        sum(itertools.repeat(0))


def test_a_run_that_hands_nothing_over_leaves_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = [str(PROJECT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setattr(serve, "HAND_OVER_S", 5.0)

    async def scenario(hangs: bool) -> None:
        faults = Faults(Rendezvous(tmp_path / "faults"))
        procs = faults.enders.beside("tired", this_host().spawn_procs(per_host={"procs": 1}, name="tired"))
        await procs.initialized
        faults.watch("tired", lambda _: None)
        actor = procs.spawn("tired", Tired)

        async def hand_over(kept: Any) -> None:
            if not hangs:
                raise RuntimeError("nothing to hand over")
            await actor.rest.call_one()

        crew: Any = SimpleNamespace(hand_over=hand_over)
        try:
            await serve._hand_over(crew, None)  # type: ignore[arg-type]
        finally:
            end_begun()

    with supervised(tmp_path, monkeypatch) as file:
        with pytest.raises(RuntimeError, match="nothing to hand over"):
            asyncio.run(scenario(hangs=False))
        assert not file.exists()
        with pytest.raises(TimeoutError, match="not given up what is not kept within 5 s; the stacks of all processes"):
            asyncio.run(scenario(hangs=True))
    assert "have not given up" in file.read_text() and "bootstrap_main" in file.read_text()


def test_a_stream_whose_results_do_not_come_leaves_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        replica = SendingReplica()
        service, _ = await service_of([replica])
        service.timeout_s = 0.05
        replica.tell((0, "zero"), 2)
        with pytest.raises(ActorLost, match="1 results are missing; the stacks of all processes: "):
            [pair async for pair in service.generate.stream()]

    with supervised(tmp_path, monkeypatch) as file:
        asyncio.run(asyncio.wait_for(scenario(), 60))
    assert "generator, generate(): 1 results are missing\n" in file.read_text()


SLOW = """import sys, time
from monarch.actor import Actor, endpoint


def forever():
    time.sleep(600)


if any("bootstrap_main" in word for word in sys.orig_argv):
    forever()


class Slow(Actor):
    @endpoint
    def start(self) -> None: ...
"""


def test_a_process_that_hangs_in_the_imports_of_its_actor_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_actor.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    path = [str(tmp_path), str(PROJECT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    slow_actor = importlib.import_module("slow_actor")

    async def scenario() -> None:
        faults = Faults(Rendezvous(tmp_path / "faults"))
        procs = faults.enders.beside("slow", this_host().spawn_procs(per_host={"procs": 1}, name="slow"))
        lost = asyncio.get_running_loop().create_future()
        await started(procs, 60, "slow")
        call = procs.spawn("slow", slow_actor.Slow).start.call_one()
        try:
            with pytest.raises(ActorLost, match="the stacks of all processes"):
                await answer(call, lost, 6, "slow, start()")
        finally:
            end_begun()

    with supervised(tmp_path, monkeypatch) as file:
        asyncio.run(scenario())
    [shown] = [part for part in file.read_text().split("--- ") if part.startswith("slow, pid ")]
    assert " in forever\n" in shown
