"""A run on engines that are kept: as ``supervisor.first_node``, but the worker and the controller are there already."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.stacks import StackWriter
from forge_hpc.config import Config, UserError, read_config
from forge_hpc.files import make_private_dir
from forge_hpc.observability.phases import StartPhases
from forge_hpc.run_dir import RunDir
from forge_hpc.run_lock import RunDirLock
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.controller_process import ControllerProcess
from forge_hpc.supervisor.ending import Cause, Ending
from forge_hpc.supervisor.first_node import FirstNode
from forge_hpc.supervisor.gate import Verdict, fitting
from forge_hpc.supervisor.job import OwnJob
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.signals import StopRequest, StopRequests
from forge_hpc.user_files import check_files

DOUBTFUL = frozenset({Cause.CRASH, Cause.NODE_LOST, Cause.GATE, Cause.TAKEN_OVER})
"""After a run that ended so nothing is kept: its processes, or its nodes, may be broken."""


@dataclass
class Engines:
    """What is kept on the first node: the Monarch worker, the controller, and through it all else."""

    node: Node
    rendezvous: Rendezvous
    log_dir: Path
    stacks: StackWriter = field(init=False)
    """Of a run, and of what it leaves."""
    worker: subprocess.Popen[bytes] | None = None
    controller: subprocess.Popen[bytes] | None = None
    start_record: dict[str, Any] = field(default_factory=dict)
    slurm_names: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    """Of the gate, on its nodes."""
    warm_start: RunDir | None = None
    """The newest one that a run has made here."""
    is_doubtful: bool = False

    def __post_init__(self) -> None:
        self.stacks = self.node.stack_writer(self.rendezvous, self.log_dir)

    @property
    def is_alive(self) -> bool:
        """Whether another run can be served."""
        processes = (self.worker, self.controller)
        return not self.is_doubtful and all(process is None or process.poll() is None for process in processes)


class RelayedRequests(StopRequests):
    """What is wanted of the run, by signals that whoever waits for it has sent on, too."""

    def __init__(self, run_dir: RunDir, job: OwnJob, signals: Callable[[], list[int]]) -> None:
        super().__init__(run_dir, job)
        self._relayed = signals

    def next(self) -> StopRequest | None:
        for signum in self._relayed():
            self._on_signal(signum, None)
        return super().next()


class KeptController(ControllerProcess):
    """A controller that serves one run after the other, during one of them."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        node: Node,
        requests: StopRequests,
        lock: RunDirLock,
        rendezvous: Rendezvous,
    ) -> None:
        super().__init__(process, node, requests, lock)
        self._rendezvous = rendezvous

    def is_over(self) -> bool:
        with suppress(OSError):  # at the next look, then
            return self._rendezvous.look("outcome") is not None or super().is_over()
        return super().is_over()


class KeptRun(FirstNode):
    """One run of several on the same engines, which it starts where there are none yet."""

    def __init__(
        self, engines: Engines, node: Node, job: OwnJob, requests: StopRequests, request: Mapping[str, Any]
    ) -> None:
        super().__init__(node, job, requests, summary=True)
        self._engines = engines
        self._request = request

    def rendezvous_key(self, restart: int) -> str | None:
        return f"kept.{restart}.{os.getpid()}"

    def end_processes(self) -> None:
        """They stay."""

    def start(self, config: Config, rendezvous: Rendezvous, tls: Path, log_dir: Path) -> Ending:
        ending: Ending | None = None
        try:
            ending = self._start(config, rendezvous, log_dir)
            return ending
        finally:  # half a start is none
            if self._engines.controller is None or (ending is not None and ending.cause in DOUBTFUL):
                self._engines.is_doubtful = True

    def _start(self, config: Config, rendezvous: Rendezvous, log_dir: Path) -> Ending:
        engines = self._engines
        phases = StartPhases(began=self._request["time"])
        if engines.verdict is None or engines.controller is None:
            ending = self._start_engines(config, phases)
        else:
            ending = fitting(config, self.run_dir, engines.verdict).ending(config.cluster.spare_nodes)
        if ending is not None:
            return ending
        if (ending := self._warm_start(config, phases)) is not None:
            return ending
        assert engines.worker is not None and engines.controller is not None
        self._node.allocation = engines.node.allocation  # without the nodes that are left out
        rendezvous.publish("start", engines.start_record | {"log_dir": str(log_dir)})
        rendezvous.publish("phases", phases.as_record())
        controller = KeptController(engines.controller, self._node, self._requests, self.lock, rendezvous)
        order = {"run_dir": str(self.run_dir), "rendezvous": str(rendezvous.directory), "log_dir": str(log_dir)}
        controller.send("run " + json.dumps(order | {"out": self._request["out"], "err": self._request["err"]}))
        engines.stacks.log_dir = log_dir
        silence_s = deadlines.heartbeat_timeout_s(config)
        request = controller.wait(engines.worker, engines.rendezvous, silence_s, engines.stacks)
        return self._ending_of(config, controller, request, rendezvous, engines.slurm_names)

    def _start_engines(self, config: Config, phases: StartPhases) -> Ending | None:
        """Bring the nodes together and start the controller; how the run has ended where that does not go."""
        engines = self._engines
        node, rendezvous = engines.node, engines.rendezvous
        tls = node.run_dir.tls / rendezvous.directory.name
        started = self._bring_together(node, config, rendezvous, tls, engines.log_dir, phases)
        if isinstance(started, Ending):
            return started
        engines.worker, engines.slurm_names, engines.start_record = started.worker, started.slurm_names, started.start
        engines.verdict = started.verdict
        engines.controller = ControllerProcess.start(
            node, self._requests, self.lock, rendezvous, tls, engines.log_dir, "--keep"
        ).process
        return None

    def _warm_start(self, config: Config, phases: StartPhases) -> Ending | None:
        if config.model.path != "warmstart":
            return None
        own = RunDir(self.run_dir.warmstart)
        if (made := self._engines.warm_start) is not None and made.path != own.path:
            with suppress(OSError, UserError):  # then it is made
                _take_warm_start(made, own)
        ending = super()._warm_start(config, phases)
        if ending is None:
            self._engines.warm_start = own
        return ending


def _take_warm_start(made: RunDir, own: RunDir) -> None:
    """Take a warm start of the same configuration, and of the same files of the user, for one that is still to be made:
    it would become the same."""
    status, before = made.read_status(), own.read_status()
    if status is None or status.state != "completed" or before is not None:
        return
    config = read_config(own.config)
    if config != read_config(made.config) or check_files(config, made, accept=True):
        return
    for path in sorted(made.path.rglob("*")):
        target = own.path / path.relative_to(made.path)
        if path.is_dir():
            make_private_dir(target)
        elif path.name != "status.json" and not target.exists():
            _link_or_copy(path, target)
    _link_or_copy(made.status, own.status)  # last of all: it says that all else is there


def _link_or_copy(path: Path, target: Path) -> None:
    """What a run that is completed has written is replaced as a whole, and never changed."""
    import shutil

    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
