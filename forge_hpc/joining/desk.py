"""The first node's part: it looks at nodes that other jobs lend, and signs certificates for those that fit."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forge_hpc.cluster.identity import Authority
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError
from forge_hpc.config.lending import lent_replicas
from forge_hpc.files import in_thread
from forge_hpc.gate.verdict import own_problems
from forge_hpc.joining import door
from forge_hpc.joining.door import Answer, Ask, Door, Lent
from forge_hpc.sizing.host import Sizes, plan_lent, room_of

WITHIN_S = 8.0
"""A file system that hangs holds the supervisor up for so long."""


class Desk:
    """Lets lent nodes in, one look after the other.

    Args:
        report: of the first node (``gate.own.look_at_node``), to which lent ones are compared.
        num_nodes: of the run itself: lent ones are numbered from there.
        size_of: the size of a model by its path, None being the policy's.
    """

    def __init__(
        self,
        config: Config,
        rendezvous: Rendezvous,
        authority: Authority,
        report: Mapping[str, Any],
        num_nodes: int,
        log_dir: Path,
        size_of: Sizes = lambda path: None,
    ) -> None:
        self._config = config
        self._rendezvous = rendezvous
        self._authority = authority
        self._report = report
        self._next = num_nodes
        self._size_of = size_of
        gpus = config.cluster.gpus_per_node
        self._gpus = int(report.get("gpus", 0)) if gpus is None else gpus
        environment = dict(report.get("environment", {}))
        rendezvous.publish(door.DOOR, Door(str(log_dir), self._gpus, environment).as_record())

    def look_in_time(self) -> None:
        """Answer whoever has asked since the last look."""
        with contextlib.suppress(OSError):  # of the file system: at the next look, then
            in_thread(self.look, within_s=WITHIN_S)

    def look(self) -> None:
        """The same. Raises OSError."""
        for name in self._rendezvous.names("ask-"):
            if (record := self._rendezvous.look(name)) is None:
                continue
            answer = self._answer(record)
            # first it is known to the controller: a node that is let in is never without an owner
            if not answer.refused:
                ask = Ask.of(record)
                self._rendezvous.publish(door.lent_name(answer.node), Lent(ask.job_id, ask.slurm_name).as_record())
            self._rendezvous.publish(door.answer_name(name.removeprefix("ask-")), answer.as_record())
            self._rendezvous.withdraw(name)

    def _answer(self, record: Any) -> Answer:
        try:
            ask = Ask.of(record)
            if problems := own_problems({0: self._report, 1: ask.report}, whole_nodes=False)[1]:
                return self._refusal(ask, "; ".join(problems))
            self._check_memory(ask, lent_replicas(self._config, self._gpus, ask.gpus))
            cert = self._authority.certify(ask.request.encode(), ask.names)
        except UserError as error:
            return self._refusal(ask, error.message)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # another version's record
            return Answer(refused=f"the run does not understand what the node asks: {type(error).__name__}: {error}")
        node, self._next = self._next, self._next + 1
        print(f"job {ask.job_id} lends {ask.slurm_name}: node {node} from now on", file=sys.stderr, flush=True)
        return Answer("", node, self._authority.ca.decode(), cert.decode())

    def _check_memory(self, ask: Ask, replicas: Sequence[Sequence[int]]) -> None:
        """Raises UserError where the node's own memory is too small for such generators."""
        limit = ask.report.get("memory_limit")
        host = plan_lent(self._config, len(replicas), on_gpus=bool(replicas[0]), size_of=self._size_of)
        if host is not None and limit is not None and (error := host.refusal(0, room_of(**limit), "it")):
            raise UserError(f"{error.message}; {error.hint}")

    def _refusal(self, ask: Ask, why: str) -> Answer:
        print(f"{ask.slurm_name}, which job {ask.job_id} lends, is not taken: {why}", file=sys.stderr, flush=True)
        return Answer(refused=why)
