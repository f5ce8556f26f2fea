"""What the controller takes for a lost process: by the real classes of Monarch, torch and the engine, and by nothing
else. A class that is renamed there would end runs that could have been mended."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import time
from pathlib import Path
from typing import Any, cast

import monarch.actor
import psutil
import pytest
from failing_actor import Failing
from monarch.actor import ActorError, this_host
from monarch.config import configured
from runs import PROJECT

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.meshes import Cluster
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import load_config, plan
from forge_hpc.controller import service
from forge_hpc.controller.service import ActorLost, answer, cause_of, is_loss, reason_of


def test_the_names_by_which_losses_are_told_are_those_of_classes_that_exist() -> None:
    for name in service._LOSSES:
        module, _, kind = name.rpartition(".")
        found = getattr(importlib.import_module(module), kind)
        assert issubclass(found, Exception) and f"{found.__module__}.{found.__qualname__}" == name


def test_what_a_real_actor_fails_with_is_a_loss_where_a_process_a_device_or_a_network_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # where the actor's process finds its class
    monkeypatch.setenv("HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY", "1s")
    losses = ("device", "network", "collective", "engine", "deadline", "connection", "dies")

    async def scenario() -> None:
        faults = Faults(Rendezvous(tmp_path))
        procs = this_host().spawn_procs(per_host={"procs": 1}, name="failing")
        actor: Any = procs.spawn("failing", Failing)
        nothing: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        for how in ("bug", "bug in torch"):
            with pytest.raises(ActorError) as raised:
                await answer(actor.fail.call_one(how), nothing, 60, "it")
            assert type(cause_of(raised.value)).__name__ in ("ValueError", "OutOfMemoryError")
            assert not is_loss(raised.value), how
        for how in losses:
            with pytest.raises(ActorLost, match="it: ") as lost:
                await answer(actor.fail.call_one(how), nothing, 60, "it")
            assert lost.value.__cause__ is not None and is_loss(lost.value.__cause__), how
        with pytest.raises(ActorLost):  # what is asked of a dead process
            await answer(actor.fail.call_one("bug"), nothing, 60, "it")
        assert (await asyncio.wait_for(faults.unexpected, 60)).startswith("failing failed: ")

    with configured():  # Monarch waits for silent processes as before, once this is over
        asyncio.run(scenario())
    # Of the dead process more is reported at any time, after the end, too; what the hook raises Monarch makes an end of
    # this process of. That of `Faults` stays, as it does in a controller.
    monarch.actor.unhandled_fault_hook(cast("Any", None))


def test_ranks_that_wait_for_a_dead_one_are_ended_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY", "1s")
    config = load_config(PROJECT / "configs/grpo/demo.yaml", ["trainer.processes_per_node=3"])

    async def scenario() -> float:
        faults = Faults(Rendezvous(tmp_path))
        cluster = Cluster(this_host().flatten("hosts"), plan(config, 0), 2, [[]], tmp_path, faults)
        procs = cluster.spawn_trainers("trainer")
        ranks: Any = procs.spawn("trainer", Failing)
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        faults.watch("trainer", lambda reason: lost.done() or lost.set_result(reason))
        pids = [pid for _, pid in await ranks.pid.call()]
        waiting = asyncio.ensure_future(answer(ranks.wait_for_others.call(), lost, 600, "it"))
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(ActorLost):
            await waiting
        faults.forget("trainer")
        cluster.end_at_once("trainer")
        start = time.monotonic()
        await asyncio.wait_for(procs.stop(), 60)
        seconds = time.monotonic() - start
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not faults.unexpected.done(), "nobody asks how the enders are"
        return seconds

    with configured():
        assert asyncio.run(scenario()) < 5, "in good order it takes Monarch ten seconds and more"


def test_of_a_group_of_errors_the_first_one_tells() -> None:
    group = BaseExceptionGroup("several", [ActorLost("trainers: gone"), ValueError("its echo")])
    assert is_loss(group) and reason_of(group) == "trainers: gone"
    assert not is_loss(BaseExceptionGroup("several", [ValueError("a bug")]))


def test_an_error_of_the_same_name_from_elsewhere_is_no_loss() -> None:
    class GenerationError(RuntimeError):
        pass

    assert not is_loss(GenerationError("a user's own"))
