"""Documents are made of examples ahead of the steps that train on them, beside the training.

    source ──drawn ahead──► workers: chat template, tokenizer ──► documents, in the order of the source

Which examples come, in which order, and what is saved of it do not depend on that.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import tempfile
import threading
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from forge_hpc.cluster.processes import num_cpus
from forge_hpc.cluster.stacks import stand_by
from forge_hpc.config.errors import UserError
from forge_hpc.data.order import Drawn, Source
from forge_hpc.data.types import Document

logger = logging.getLogger(__name__)
Render = Callable[[Any, str], list[Document]]
"""Documents of an example, which it is told the place of."""
_CORES_A_PROCESS = 8
_MAX_PROCESSES = 16
_MAX_TOLD = 100


@dataclass(slots=True)
class Made:
    """What a worker made of an example."""

    documents: list[Document] = field(default_factory=list)
    error: Exception | None = None
    """What the renderer raised."""
    said: list[logging.LogRecord] = field(default_factory=list)


class Workers:
    """Processes that render, one for every 8 cores of this node; a thread where there are fewer, where the renderers
    cannot be sent to a process, or where the processes are lost.

    Args:
        renderers: of each source; what they hold is copied.
        num_processes: another number of them, 0 for a thread.
    """

    def __init__(self, renderers: Sequence[Render], num_processes: int | None = None) -> None:
        self._renderers = list(renderers)
        self._told: set[str] = set()
        self._pool: Executor | None = None
        self._render: Callable[[int, Any, str], Made] = _render
        if num_processes is None:
            num_processes = min(_MAX_PROCESSES, num_cpus() // _CORES_A_PROCESS)
        # A module that a run loads from a file is known to this process alone.
        is_known = all(type(each).__module__.startswith("forge_hpc.") for each in renderers)
        self._take(partial(self._take_processes, num_processes) if num_processes and is_known else self._take_a_thread)

    def _take(self, workers: Callable[[], None]) -> None:
        try:
            workers()
        except Exception as error:  # a user's renderer may hold anything
            logger.info("documents are made between the steps: what makes them cannot be copied (%s)", error)

    def _take_processes(self, num: int) -> None:
        # In a file: what does not fit a pipe would have to be read by each of them before the next one can start.
        self._file = tempfile.NamedTemporaryFile(prefix="forge-hpc-renderers-")  # noqa: SIM115
        self._file.write(pickle.dumps(self._renderers))
        self._file.flush()
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num, spawn, _begin, (self._file.name,))

    def _take_a_thread(self) -> None:
        copies = pickle.loads(pickle.dumps(self._renderers))  # a tokenizer is not for two threads
        self._render = partial(_rendered_by, copies)
        self._pool = ThreadPoolExecutor(1, "documents")

    def _replace(self, error: BrokenProcessPool) -> None:
        if isinstance(self._pool, ProcessPoolExecutor):
            logger.warning("the processes that make documents are gone, and a thread does it: %s", error)
            self.close()
            self._take(self._take_a_thread)

    def begin(self, number: int, example: Any, where: str) -> Future[Made] | None:
        """Make the documents of an example of source ``number``; None where nobody does it beside."""
        if isinstance(self._pool, ProcessPoolExecutor):
            try:
                pickled = pickle.dumps(example)
            except Exception as error:  # its fields may be anything
                self._tell(logger, logging.INFO, f"examples that cannot be sent are made between the steps: {error}")
                return None
            try:
                return self._pool.submit(self._render, number, pickled, where)
            except BrokenProcessPool as error:
                self._replace(error)
        return self._pool.submit(self._render, number, example, where) if self._pool else None

    def finish(self, number: int, example: Any, where: str, begun: Future[Made] | None) -> list[Document]:
        """The documents of that example, whoever makes them. Raises what the renderer raises."""
        made = None
        if begun is not None:
            try:
                made = begun.result()  # a renderer that hangs stops the heartbeat, whoever runs it
            except BrokenProcessPool as error:
                self._replace(error)
            except CancelledError:  # by ``close``
                pass
        if made is None:
            return self._renderers[number](example, where)
        for record in made.said:
            self._tell(logging.getLogger(record.name), record.levelno, record.msg)
        if made.error is not None:
            raise made.error
        return made.documents

    def _tell(self, teller: logging.Logger, level: int, message: str) -> None:
        """Once."""
        if message not in self._told and len(self._told) < _MAX_TOLD:
            self._told.add(message)
            teller.log(level, "%s", message)

    def close(self) -> None:
        """End them; what is asked for later is made by the caller."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


@dataclass(slots=True)
class _Ahead:
    """An example that was drawn ahead."""

    drawn: Drawn
    begun: Future[Made] | None
    epoch: int
    """What the source said before."""
    state: dict[str, Any]
    """What it said afterwards."""


class AheadSource:
    """A source from which examples are drawn ahead, while what it says of itself is of those that were taken.

    Args:
        begin: begins to make the documents of an example.
    """

    def __init__(self, source: Source, begin: Callable[[Drawn], Future[Made] | None]) -> None:
        self.data = source.data
        self._source = source
        self._begin = begin
        self._ahead: deque[_Ahead] = deque()
        self._error: Exception | None = None  # in the place of the example after those
        self._last: tuple[Drawn, Future[Made] | None] | None = None
        self._state: dict[str, Any] = {}  # after what was taken last, while more is drawn
        self._num_taken = 0  # since it was asked to draw ahead

    @property
    def is_ahead(self) -> bool:
        """Whether examples are drawn that were not taken, or could not be."""
        return bool(self._ahead) or self._error is not None

    def draw_ahead(self, num: int) -> None:
        """Have as many examples under way as were taken since the last time, or else ``num``."""
        wanted, self._num_taken = self._num_taken or num, 0
        if not self.is_ahead:
            self._state = self._source.state_dict()
        while len(self._ahead) < wanted and self._error is None:
            epoch = self._source.epoch
            try:
                drawn = next(self._source)
            except Exception as error:  # of what nobody may need
                self._error = error
            else:
                self._ahead.append(_Ahead(drawn, self._begin(drawn), epoch, self._source.state_dict()))

    def begun(self, drawn: Drawn) -> Future[Made] | None:
        """What is made of the example that was taken last, if it was drawn ahead."""
        return self._last[1] if self._last and self._last[0] is drawn else None

    @property
    def epoch(self) -> int:
        return self._ahead[0].epoch if self._ahead else self._source.epoch

    def __next__(self) -> Drawn:
        self._num_taken += 1
        if self._ahead:
            first = self._ahead.popleft()
            self._last, self._state = (first.drawn, first.begun), first.state
        elif self._error is not None:
            error, self._error = self._error, None
            raise error
        else:
            self._last = next(self._source), None
        return self._last[0]

    def again(self) -> Drawn:
        return self._last[0] if self._last else self._source.again()

    def state_dict(self) -> dict[str, Any]:
        return self._state if self.is_ahead else self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for each in self._ahead:
            if each.begun is not None:
                each.begun.cancel()
        self._ahead.clear()
        self._error, self._last = None, None
        self._source.load_state_dict(state)


# ---- in a process of its own


_renderers: list[Render] = []
_records: list[logging.LogRecord] = []


class _Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), ()
        _records.append(record)


def _begin(file: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stand_by("documents")
    logging.basicConfig(level=logging.INFO, handlers=[_Keep()], force=True)
    _renderers[:] = pickle.loads(Path(file).read_bytes())


def _end_with_parent() -> None:
    # The kernel's way (``die_with_parent``) goes by the thread that started this process, which may be any.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _render(number: int, pickled: bytes, where: str) -> Made:
    try:
        made = _rendered_by(_renderers, number, pickle.loads(pickled), where)
        if made.error is not None and not isinstance(made.error, UserError):
            made.error.add_note("".join(traceback.format_exception(made.error)))
        pickle.loads(pickle.dumps(made.error))
    except Exception as error:  # of what cannot be sent back: its words
        made = Made(error=RuntimeError(f"{where}: {type(error).__name__}: {error}"))
    made.said, _records[:] = list(_records), []
    return made


def _rendered_by(renderers: Sequence[Render], number: int, example: Any, where: str) -> Made:
    try:
        return Made(renderers[number](example, where))
    except Exception as error:
        return Made(error=error)
