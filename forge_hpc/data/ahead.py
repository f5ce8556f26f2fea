"""Documents are made of examples ahead of the steps that train on them, beside the training.

    source ──drawn ahead──► workers: chat template, tokenizer ──► documents, in the order of the source

Which examples come, in which order, and what is saved of it do not depend on that.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from forge_hpc.cluster.processes import die_with_parent, num_cpus
from forge_hpc.cluster.stacks import stand_by
from forge_hpc.data.order import Drawn, Source
from forge_hpc.data.types import Document

logger = logging.getLogger(__name__)
Render = Callable[[Any, str], list[Document]]
"""Documents of an example, which it is told the place of."""
_CORES_A_PROCESS = 8
_MAX_PROCESSES = 16


@dataclass(slots=True)
class Made:
    """What a worker made of an example."""

    documents: list[Document] = field(default_factory=list)
    error: Exception | None = None
    """What the renderer raised."""
    said: list[logging.LogRecord] = field(default_factory=list)


class Workers:
    """Processes that render, one for every 8 cores of this node; a thread where there are fewer, or where the renderers
    cannot be sent to a process.

    Args:
        renderers: of each source; what they hold is copied.
        num_processes: another number of them.
    """

    def __init__(self, renderers: Sequence[Render], num_processes: int | None = None) -> None:
        self._renderers = list(renderers)
        self._said: set[str] = set()
        self._pool: Executor | None = None
        self._make: Callable[[int, Any, str], Made] = _make
        if num_processes is None:
            num_processes = min(_MAX_PROCESSES, num_cpus() // _CORES_A_PROCESS)
        try:
            self._pickled = pickle.dumps(self._renderers)
        except Exception as error:  # a user's renderer may hold anything
            logger.info("documents are made between the steps: their renderers cannot be copied (%s)", error)
            return
        # A module that a run loads from a file is known to this process alone.
        if num_processes and all(type(each).__module__.startswith("forge_hpc.") for each in renderers):
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(num_processes, spawn, _begin, (self._pickled, os.getpid()))
        else:
            self._take_a_thread()

    def _take_a_thread(self) -> None:
        self._make = partial(_made_by, pickle.loads(self._pickled))  # a tokenizer is not for two threads
        self._pool = ThreadPoolExecutor(1, "documents")

    def begin(self, number: int, example: Any, where: str) -> Future[Made] | None:
        """Make the documents of an example of source ``number``; None where nobody does it beside."""
        with contextlib.suppress(BrokenProcessPool):  # which ``finish`` tells
            return self._pool.submit(self._make, number, example, where) if self._pool else None
        return None

    def finish(self, number: int, example: Any, where: str, begun: Future[Made] | None) -> list[Document]:
        """The documents of that example, whoever makes them. Raises what the renderer raises."""
        made = None
        if begun is not None:
            try:
                made = begun.result()
            except BrokenProcessPool as error:
                if isinstance(self._pool, ProcessPoolExecutor):
                    logger.warning("the processes that make documents are gone, and a thread does it: %s", error)
                    self.close()
                    self._take_a_thread()
            except CancelledError:  # by close()
                pass
            except (pickle.PicklingError, TypeError, AttributeError):  # an example that cannot be sent
                pass
        if made is None:
            return self._renderers[number](example, where)
        for record in made.said:
            if record.msg not in self._said:
                self._said.add(record.msg)
                logging.getLogger(record.name).handle(record)
        if made.error is not None:
            raise made.error
        return made.documents

    def close(self) -> None:
        """End them; what is asked for later is made by the caller."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


class AheadSource:
    """A source from which examples are drawn ahead, while what it says of itself is of those that were taken.

    Args:
        begin: begins to make the documents of an example.
    """

    def __init__(self, source: Source, begin: Callable[[Drawn], Future[Made] | None]) -> None:
        self.data = source.data
        self._source = source
        self._begin = begin
        self._drawn: deque[tuple[Drawn, Future[Made] | None, dict[str, Any]]] = deque()
        self._last: tuple[Drawn, Future[Made] | None] | None = None
        self._state: dict[str, Any] | None = None  # after what was taken last, while more is drawn
        self._num_taken = 0  # since it was asked to draw ahead

    def draw_ahead(self, num: int) -> None:
        """Have as many examples under way as were taken since the last time, and ``num`` at least."""
        wanted, self._num_taken = max(num, self._num_taken), 0
        if not self._drawn:
            self._state = self._source.state_dict()
        while len(self._drawn) < wanted:
            drawn = next(self._source)
            self._drawn.append((drawn, self._begin(drawn), self._source.state_dict()))

    def begun(self, drawn: Drawn) -> Future[Made] | None:
        """What is made of the example that was taken last, if it was drawn ahead."""
        return self._last[1] if self._last and self._last[0] is drawn else None

    @property
    def epoch(self) -> int:
        return self._drawn[0][0].epoch if self._drawn else self._source.epoch

    def __next__(self) -> Drawn:
        self._num_taken += 1
        if self._drawn:
            drawn, begun, self._state = self._drawn.popleft()
        else:
            drawn, begun = next(self._source), None
        self._last = drawn, begun
        return drawn

    def again(self) -> Drawn:
        return self._last[0] if self._last else self._source.again()

    def state_dict(self) -> dict[str, Any]:
        return self._state if self._drawn and self._state is not None else self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for _, begun, _ in self._drawn:
            if begun is not None:
                begun.cancel()
        self._drawn.clear()
        self._last, self._state = None, None
        self._source.load_state_dict(state)


# ---- in a process of its own


_renderers: list[Render] = []
_records: list[logging.LogRecord] = []


class _Keep(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), ()
        _records.append(record)


def _begin(pickled: bytes, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    stand_by("documents")
    logging.basicConfig(level=logging.INFO, handlers=[_Keep()], force=True)
    _renderers[:] = pickle.loads(pickled)


def _make(number: int, example: Any, where: str) -> Made:
    made = _made_by(_renderers, number, example, where)
    made.said, _records[:] = list(_records), []
    return made


def _made_by(renderers: Sequence[Render], number: int, example: Any, where: str) -> Made:
    try:
        return Made(renderers[number](example, where))
    except Exception as error:
        return Made(error=error)
