"""What the controller takes for a lost process: by the real classes of Monarch, torch and the engine, and by nothing
else. A class that is renamed there would end runs that could have been mended."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import monarch.actor
import pytest
from failing_actor import Failing
from monarch.actor import ActorError, this_host
from monarch.config import configured
from runs import PROJECT

from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.rendezvous import Rendezvous
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


@pytest.mark.parametrize("killed", [0, 2])  # the first rank of each host: what is told to a whole mesh goes through it
def test_ranks_that_wait_for_a_dead_one_are_ended_at_once_on_all_hosts(killed: int) -> None:
    path = os.pathsep.join(filter(None, [str(PROJECT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path, "HYPERACTOR_MESH_SUPERVISION_POLL_FREQUENCY": "1s"}
    command = [sys.executable, str(Path(__file__).with_name("lost_ranks.py")), str(killed)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < 5, "in good order it takes Monarch ten seconds and more"
    assert found["alive"] == [] and found["unexpected"] is None, "nobody asks how the enders are"


def test_of_a_group_of_errors_the_first_one_tells() -> None:
    group = BaseExceptionGroup("several", [ActorLost("trainers: gone"), ValueError("its echo")])
    assert is_loss(group) and reason_of(group) == "trainers: gone"
    assert not is_loss(BaseExceptionGroup("several", [ValueError("a bug")]))


def test_an_error_of_the_same_name_from_elsewhere_is_no_loss() -> None:
    class GenerationError(RuntimeError):
        pass

    assert not is_loss(GenerationError("a user's own"))
