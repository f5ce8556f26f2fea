"""Documents that are made ahead of their steps: the same ones, in the same order, and the same states to go on from."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig, SourceConfig
from forge_hpc.data.ahead import Workers
from forge_hpc.data.bad import BadExample
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.order import Drawn
from forge_hpc.data.pairs import PairRenderer
from forge_hpc.data.prompts import DocumentStream
from forge_hpc.data.render import DocumentRenderer
from forge_hpc.data.types import Document

TOKENIZER = char_tokenizer()
WAIT_S = 120.0


def mixture(tmp_path: Path, *, streaming: bool) -> Config:
    """Two sources; of one some examples are bad and some too long for a row."""
    for name, count in (("a", 30), ("b", 50)):
        lines = [{"question": "x" * (1 + i % 9), "answer": f"{name}{i}"} for i in range(count)]
        if name == "b":
            for i in range(0, count, 7):
                lines[i]["answer"] = ""
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [
        SourceConfig(path=str(tmp_path / f"{name}.jsonl"), weight=weight) for name, weight in (("a", 3), ("b", 1))
    ]
    cfg = Config(data=DataConfig(chat_template=False, sources=sources, streaming=streaming, shuffle_buffer=8))
    cfg.trainer.training.seq_len = 12
    return cfg


def stream(cfg: Config, *, ahead: bool, num_processes: int = 0) -> DocumentStream:
    return DocumentStream(open_sources(cfg), TOKENIZER, cfg, ahead=ahead, num_processes=num_processes)


def counted(ahead: DocumentStream) -> list[str]:
    """Where examples stand of which the documents are not made beside, from now on."""
    places: list[str] = []
    workers = ahead._workers
    assert workers is not None

    def render(number: int, example: Any, where: str) -> list[Document]:
        places.append(where)
        return ahead._renderers[number](example, where)

    workers._renderers = [partial(render, number) for number in range(len(ahead._renderers))]
    return places


def said(documents: list[Document]) -> list[tuple[list[int], list[bool]]]:
    return [(document.token_ids.tolist(), document.loss_mask.tolist()) for document in documents]


@pytest.mark.parametrize("num_processes", [0, 2], ids=["a thread", "two processes"])
@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_the_same_documents_and_states_as_without(tmp_path: Path, streaming: bool, num_processes: int) -> None:
    cfg = mixture(tmp_path, streaming=streaming)
    plain, ahead = stream(cfg, ahead=False), stream(cfg, ahead=True, num_processes=num_processes)
    ahead.make_ahead(5)
    states, alone = [], counted(ahead)
    for count in (5, 1, 17, 40, 40, 3):  # epochs end in between
        assert said(ahead.take(count)) == said(plain.take(count))
        assert ahead.state_dict() == plain.state_dict()
        assert [source.epoch for source in ahead._mixture.sources] == [each.epoch for each in plain._mixture.sources]
        assert ahead.metrics() == plain.metrics()
        states.append(json.loads(json.dumps(ahead.state_dict())))
    assert plain.metrics()["examples/bad"] > 0 and plain.metrics()["examples/too_long"] > 0
    alone.clear()
    assert said(ahead.take(3)) == said(plain.take(3)) and said(ahead.take(3)) == said(plain.take(3))
    assert len(alone) <= 2  # beyond what was taken the time before, where more was left out
    ahead.load_state_dict(states[-1]), plain.load_state_dict(states[-1])
    expected = said(plain.take(20))
    assert said(ahead.load_state_dict(states[-1]).take(20)) == expected  # what was drawn ahead is forgotten
    again = stream(cfg, ahead=True, num_processes=num_processes).load_state_dict(states[-1])
    assert said(again.take(20)) == expected
    assert said([next(again) for _ in range(9)]) == said(plain.take(9))
    for each in (ahead, again):
        each.close()


def children() -> set[psutil.Process]:
    return {each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())}


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[tuple[DocumentStream, DocumentStream, set[psutil.Process]]]:
    """A stream, the same whose documents two processes make, and these."""
    before = children()  # of an earlier test
    cfg = mixture(tmp_path, streaming=False)
    plain, ahead = stream(cfg, ahead=False), stream(cfg, ahead=True, num_processes=2)
    assert said(ahead.take(10)) == said(plain.take(10))
    own = children() - before
    assert len(own) == 2
    yield plain, ahead, own
    ahead.close()
    _, alive = psutil.wait_procs(own, WAIT_S)
    assert not alive


@pytest.mark.parametrize("idle", [False, True], ids=["at work", "idle"])
def test_lost_processes_cost_nothing_but_time(
    processes: tuple[DocumentStream, DocumentStream, set[psutil.Process]], idle: bool, caplog: pytest.LogCaptureFixture
) -> None:
    plain, ahead, own = processes
    if idle:
        for source in ahead._ahead:
            for each in source._ahead:
                assert each.begun is not None
                each.begun.result(WAIT_S)
    for process in own:
        process.kill()
    psutil.wait_procs(own, WAIT_S)
    for _ in range(3):
        assert said(ahead.take(10)) == said(plain.take(10))
    told = [record.message for record in caplog.records if "processes that make documents are gone" in record.message]
    assert len(told) == 1
    assert isinstance(ahead._workers, Workers) and isinstance(ahead._workers._pool, ThreadPoolExecutor)
    alone = counted(ahead)
    assert said(ahead.take(10)) == said(plain.take(10))
    assert len(alone) < 5


def test_a_closed_stream_goes_on_by_itself(
    processes: tuple[DocumentStream, DocumentStream, set[psutil.Process]],
) -> None:
    plain, ahead, _ = processes
    ahead.close()
    assert said(ahead.take(30)) == said(plain.take(30))


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content if loop.last or m.role == 'user' else m.content[:1] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def chat(*contents: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"messages": messages, **fields}


@pytest.mark.parametrize("num_processes", [0, 1], ids=["a thread", "a process"])
def test_errors_and_what_is_said_of_examples_come_as_without(
    num_processes: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data = DataConfig(prompt_field="messages", target_field=None, tools_field="tools")
    workers = Workers([DocumentRenderer(tokenizer, data)], num_processes)
    split = chat("1", "22", "3", "44")
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    examples = [split, split, chat("1"), chat("1", "2", tools=[tool])]
    begun = [(each, workers.begin(0, each, "data, example 3")) for each in examples]
    assert all(future is not None for _, future in begun)

    def finished(number: int) -> list[Document]:
        example, future = begun[number]
        return workers.finish(0, example, "data, example 3", future)

    for number in (0, 1):
        assert [tokenizer.decode(each.token_ids) for each in finished(number)] == [
            "u:1<eos>a:22<eos>",
            "u:1<eos>a:2<eos>u:3<eos>a:44<eos>",
        ]
    with pytest.raises(BadExample, match=r"^data, example 3: no turn of the assistant") as bad:
        finished(2)
    assert bad.value.hint == "leave the example out"
    with pytest.raises(UserError, match=r"^data, example 3: the example has tools"):
        finished(3)
    workers.close()
    assert len([record for record in caplog.records if "renders earlier turns otherwise" in record.message]) == 1


def test_pairs_and_chats_of_several_documents(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}=", "chosen": "1", "rejected": "2"}) + "\n" for i in range(7))
    )
    cfg = Config(data=DataConfig(path=str(tmp_path / "pairs.jsonl"), chat_template=False))

    def pairs(**options: Any) -> DocumentStream:
        renderer = partial(PairRenderer, rejected="rejected")
        found = replace(cfg.data, target_field="chosen")
        return DocumentStream(open_sources(replace(cfg, data=found)), TOKENIZER, replace(cfg, data=found), renderer,
                              **options)  # fmt: skip

    plain, ahead = pairs(), pairs(ahead=True, num_processes=0)
    for count in (2, 3, 4, 1, 20):  # also half a pair
        ours, theirs = ahead.take(count), plain.take(count)
        assert said(ours) == said(theirs)
        assert [document.group for document in ours] == [document.group for document in theirs]
        assert ahead.state_dict() == plain.state_dict()
        again = pairs(ahead=True, num_processes=0).load_state_dict(json.loads(json.dumps(ahead.state_dict())))
        later = pairs().load_state_dict(plain.state_dict())
        assert said(again.take(9)) == said(later.take(9))
        again.close()
    held = [len(source._ahead) for source in ahead._ahead]
    assert held == [10]  # a pair is two documents
    ahead.close()


class Breaking:
    """A source of which the fourth example cannot be read."""

    def __init__(self) -> None:
        self.data = DataConfig(path="breaking", chat_template=False)
        self.epoch = 0
        self.num = 0

    def __next__(self) -> Drawn:
        if self.num == 3:
            raise OSError("the file is gone")
        self.num += 1
        return Drawn({"question": "1", "answer": str(self.num)}, self.num, 0)

    def again(self) -> Drawn:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"num": self.num}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num = state["num"]


def test_what_cannot_be_read_fails_the_step_that_needs_it() -> None:
    cfg = Config(data=DataConfig(chat_template=False))
    ahead = DocumentStream([(Breaking(), 1.0)], TOKENIZER, cfg, ahead=True, num_processes=0)
    first = ahead.take(2)
    assert [TOKENIZER.decode(document.token_ids) for document in first] == ["11<eos>", "12<eos>"]
    assert ahead.state_dict()["mixture"]["sources"] == [{"num": 2}]
    assert TOKENIZER.decode(next(ahead).token_ids) == "13<eos>"
    with pytest.raises(OSError, match=r"^the file is gone$"):
        next(ahead)
    ahead.close()


def test_renderers_that_cannot_be_copied_and_examples_that_cannot_be_sent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    workers = Workers([lambda example, where: []], 2)
    assert workers.begin(0, {}, "") is None and workers.finish(0, {}, "", None) == []
    assert any("made between the steps" in record.message for record in caplog.records)
    workers = Workers([DocumentRenderer(TOKENIZER, DataConfig(chat_template=False))], 1)
    example = {"question": "1", "answer": "2", "another": lambda: None}
    assert workers.begin(0, example, "") is None and workers.begin(0, example, "") is None
    assert sum("cannot be sent" in record.message for record in caplog.records) == 1
    (document,) = workers.finish(0, example, "", None)
    assert TOKENIZER.decode(document.token_ids) == "12<eos>"
    begun = workers.begin(0, {"question": "1", "answer": Unreadable()}, "data, example 3")
    with pytest.raises(RuntimeError, match=r"^data, example 3: ValueError: cannot be read here"):
        workers.finish(0, example, "data, example 3", begun)
    (document,) = workers.finish(0, {}, "", workers.begin(0, {"question": "1", "answer": "2"}, ""))
    assert isinstance(workers._pool, ProcessPoolExecutor)  # it is there still
    workers.close()


class Unreadable:
    """Can be sent, and not be received."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, (os.getpid(),)


def _refuse(pid: int) -> None:
    if os.getpid() != pid:
        raise ValueError("cannot be read here")


ORPHAN = """
import os, sys, time
from forge_hpc.data.ahead import Workers
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.render import DocumentRenderer
from forge_hpc.config.schema import DataConfig

if __name__ == "__main__":
    workers = Workers([DocumentRenderer(char_tokenizer(), DataConfig(chat_template=False))], 1)
    workers.begin(0, {"question": "1", "answer": "2"}, "").result()
    import psutil
    print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(600)
"""


def test_processes_end_with_a_killed_controller(tmp_path: Path) -> None:
    script = tmp_path / "controller.py"
    script.write_text(ORPHAN)
    environ = {**os.environ, "TMPDIR": str(tmp_path)}  # which its supervisor would remove
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environ) as controller:
        assert controller.stdout is not None
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        os.kill(controller.pid, signal.SIGKILL)
    assert pids
    end = time.monotonic() + WAIT_S
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)
