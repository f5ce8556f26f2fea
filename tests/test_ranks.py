"""One rank of a mesh fails while the others wait for it: its error is told, and nothing waits until a deadline."""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from failing_actor import LockedError, SpeechlessError, TwoNumbers, Waiting
from monarch.actor import ActorError, this_host
from monarch.config import configured
from runs import DEMO, PROJECT, REWARD, run_local, small_run, status

from forge_hpc.actors.errors import ForeignError, portable
from forge_hpc.cluster import hangs, stacks
from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.hangs import prepare_stacks
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import UserError, load_config
from forge_hpc.controller import ranks as module
from forge_hpc.controller.outcome import outcome_of
from forge_hpc.controller.ranks import Ranks
from forge_hpc.controller.recovery import Leave
from forge_hpc.controller.service import ActorLost, cause_of, is_loss

NEVER_S = 300.0


@contextmanager
def supervised(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """This process is the supervisor, and the controller that asks it for stacks; the file that they go to."""
    monkeypatch.setenv(stacks.FOLDER, str(stacks.folder_in(directory)))
    monkeypatch.setattr(hangs, "_stacks", None)
    rendezvous, over = Rendezvous(directory / "rendezvous"), threading.Event()
    prepare_stacks(rendezvous, directory)
    writer = stacks.StackWriter(rendezvous, 0, directory, directory)

    def look() -> None:
        while not over.wait(0.05):
            writer.look()

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield writer.file
    finally:
        over.set()
        looking.join()


def test_errors_that_another_process_can_make_again_are_sent_as_they_are() -> None:
    full = OSError(errno.ENOSPC, "no space left", "/a/file")
    for error in (ValueError("x"), UserError("what", "what to do"), full, torch.OutOfMemoryError("CUDA out of memory")):
        assert portable(error) is error


def test_all_others_by_their_name_and_text() -> None:
    group = ExceptionGroup("several", [TwoNumbers(1, 2)])
    for error, text in (
        (TwoNumbers(1, 2), "TwoNumbers: 1 and 2"),
        (LockedError("shut"), "LockedError: shut"),
        (SpeechlessError(), "SpeechlessError"),
        (group, "ExceptionGroup: several (1 sub-exception)"),
        (KeyError(Waiting), f"KeyError: {Waiting}"),
        (SystemExit(3), "SystemExit: 3"),
    ):
        sent = portable(error)
        assert type(sent) is ForeignError and str(sent) == text and sent.__cause__ is error
        assert str(pickle.loads(pickle.dumps(sent))) == text


def test_what_the_controller_goes_by_survives_that() -> None:
    class Refused(ConnectionRefusedError):
        pass

    class Full(OSError):
        pass

    class Wrong(UserError):
        pass

    assert type(portable(Refused("by peer"))) is ConnectionError and is_loss(portable(Refused("by peer")))
    full = portable(Full(errno.ENOSPC, "no space left"))
    assert isinstance(full, OSError) and full.errno == errno.ENOSPC and "Full: " in str(full)
    wrong = portable(Wrong("what", "what to do"))
    assert type(wrong) is UserError and (wrong.message, wrong.hint) == ("what", "what to do")


def test_an_error_of_one_rank_is_told_while_others_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = os.pathsep.join(filter(None, [str(PROJECT), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)  # where the actors' processes find their class
    monkeypatch.setattr(module, "OTHERS_S", 1.0)

    async def scenario() -> None:
        faults = Faults(Rendezvous(tmp_path))
        procs = faults.enders.beside("waiting", this_host().spawn_procs(per_host={"procs": 2}, name="waiting"))
        ranks = Ranks(procs.spawn("waiting", Waiting), "they", asyncio.get_running_loop().create_future())

        async def ask(*failing: int, kind: str = "bug") -> list[int]:
            return await asyncio.wait_for(ranks.ask("step", failing, kind, timeout_s=NEVER_S), NEVER_S / 2)

        texts = {
            "bug": "of [01]",
            "user's": "TwoNumbers: 1 and 2",
            "locked": "LockedError: shut",
            "exit": "SystemExit: 3",
        }
        for kind, text in texts.items():
            with pytest.raises(ActorError, match="its cause") as raised:
                await ask(0, 1, kind=kind)
            assert re.fullmatch(text, str(cause_of(raised.value))) and not ranks.is_stuck
            assert await ask() == [0, 1], "nobody waits: they go on"
        with pytest.raises(ActorError, match=r"(?s)step\(\) has failed on rank 1\..*its cause") as raised:
            await ask(1)
        assert str(cause_of(raised.value)) == "of 1" and ranks.is_stuck
        assert "they, step(): rank 1 has failed, and others wait for it: of 1" in caplog.text
        told = f"they, step(): they are asked nothing more; the stacks of all processes: {tmp_path}/stacks-*.log"
        assert told in caplog.text
        text = file.read_text()
        assert text.count("=== ") == 1 and ": they, step(): rank 1 has failed, and others wait for it: of 1\n" in text
        waiting, failed = (text.split(f"--- waiting-{rank}, pid ")[1].split("--- ")[0] for rank in (0, 1))
        assert " in wait_in_a_collective\n" in waiting and " in wait_in_a_collective\n" not in failed
        with pytest.raises(ActorLost, match=r"they, step\(\): rank 1 has failed, and others wait for it: of 1$"):
            await ask()
        faults.forget("waiting")
        faults.enders.end_at_once("waiting")

    with supervised(tmp_path, monkeypatch) as file, configured():
        asyncio.run(scenario())


def test_a_device_that_one_rank_loses_while_others_wait_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OTHERS_S", 0.1)

    async def scenario() -> None:
        def call(errors: Any) -> asyncio.Future[Any]:
            errors.send((3, ActorError(torch.AcceleratorError("CUDA error: an illegal memory access", 700))))
            return asyncio.get_running_loop().create_future()

        def refused(errors: Any) -> Any:
            raise TypeError("too many arguments")

        mesh = SimpleNamespace(step=SimpleNamespace(call=call), other=SimpleNamespace(call=refused))
        ranks = Ranks(mesh, "they", asyncio.get_running_loop().create_future())
        with pytest.raises(TypeError, match="too many"):
            await ranks.ask("other", timeout_s=NEVER_S)
        with pytest.raises(ActorLost, match=r"they, step\(\): rank 3 has failed, .*CUDA error: an illegal memory"):
            await asyncio.wait_for(ranks.ask("step", timeout_s=NEVER_S), NEVER_S / 2)
        ranks = Ranks(mesh, "they", asyncio.get_running_loop().create_future())
        mesh.step.call = lambda errors: (errors.send(Unreadable()), asyncio.get_running_loop().create_future())[1]
        with pytest.raises(LookupError, match="not here"):
            await asyncio.wait_for(ranks.ask("step", timeout_s=NEVER_S), NEVER_S / 2)
        assert ranks.is_stuck
        others = asyncio.all_tasks() - {asyncio.current_task()}
        _, left = await asyncio.wait(others, timeout=NEVER_S) if others else ((), ())
        assert not left

    asyncio.run(scenario())


def fails(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("publish", [fails, lambda *args: time.sleep(5), lambda *args: None])
def test_stacks_that_nobody_can_write_hide_no_error_and_hold_nothing_up_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, publish: Callable[..., None]
) -> None:
    for where, name in ((module, "OTHERS_S"), (stacks, "ANSWER_S"), (stacks, "WRITE_S")):
        monkeypatch.setattr(where, name, 0.1)
    monkeypatch.setattr(hangs, "_stacks", None)
    monkeypatch.setattr(Rendezvous, "publish", publish)
    prepare_stacks(Rendezvous(tmp_path), tmp_path)

    async def scenario() -> None:
        def call(errors: Any) -> asyncio.Future[Any]:
            errors.send((1, ActorError(ValueError("a bug"))))
            return asyncio.get_running_loop().create_future()

        ranks = Ranks(SimpleNamespace(step=SimpleNamespace(call=call)), "they", asyncio.Future())
        with pytest.raises(ActorError) as raised:
            await asyncio.wait_for(ranks.ask("step", timeout_s=NEVER_S), 3)
        assert str(cause_of(raised.value)) == "a bug" and ranks.is_stuck

    asyncio.run(scenario())
    assert "they are asked nothing more\n" in caplog.text


class Unreadable:
    """Cannot be made again by whoever gets it."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not here")


LOSS = """import torch
import torch.distributed as dist
from forge_hpc.losses import LossOutput


class Unlucky(Exception):
    def __init__(self, rank, row):
        super().__init__(f"row {row} of rank {rank}")


def loss(logprobs, advantages, mask, *, normalizer, **fields):
    if dist.get_rank() == 1:
        raise Unlucky(1, 7)
    return LossOutput(-torch.where(mask, logprobs * advantages, 0).sum() / normalizer, {})
"""


@pytest.mark.training
def test_a_loss_that_fails_on_one_rank_of_two_ends_the_run_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "loss.py").write_text(LOSS)
    given = (f"algorithm.loss={tmp_path}/loss.py:loss", "trainer.processes_per_node=2", "evaluation.num_prompts=0")
    result = run_local(tmp_path / "run", small_run(tmp_path, 8, REWARD, *given))
    assert result.returncode == 1
    assert status(tmp_path / "run")["message"] == "Unlucky: row 7 of rank 1"
    assert "Unlucky: row 7 of rank 1" in result.stderr
    [log] = (tmp_path / "run").glob("logs/*/controller.log")
    why = "the trainers, train_step(): rank 1 has failed, and others wait for it: Unlucky: row 7"
    assert why in log.read_text() and f"the stacks of all processes: {log.parent}/stacks-*.log" in log.read_text()
    text = (log.parent / "stacks-0.log").read_text()
    waiting, failed = (text.split(f"--- trainer-{rank}, pid ")[1].split("--- ")[0] for rank in (0, 1))
    assert why in text and " in train_step\n" in waiting and " in train_step\n" not in failed
    assert all(f"--- {role}, pid " in text for role in ("controller", "generator-0", "worker-0"))
    assert f'File "{tmp_path}/loss.py", line 13, in loss' in log.read_text(), "where it happened"


def test_a_gpu_that_is_full_is_told_with_what_takes_less() -> None:
    async def step() -> bool:
        raise ActorError(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))

    outcome = asyncio.run(outcome_of(step(), Leave()))
    assert outcome["message"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert "trainer.training.local_batch_size=1" in outcome["hint"] and not outcome["is_loss"]
    load_config(DEMO, ["trainer.training.local_batch_size=1", "trainer.activation_checkpoint.mode=full"])
