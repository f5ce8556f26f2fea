"""The nodes that are not the first: they serve a Monarch worker until the first one says how the start has ended."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout
from forge_hpc.config import Config, read_config
from forge_hpc.gate.complaints import complain
from forge_hpc.hub.offline import offline_environ
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.signals import StopRequests


def serve_node(node: Node, requests: StopRequests) -> int:
    """Serve until the end of the start; the exit code. A node that is left out waits for the end, too: Slurm takes one
    that leaves early for a failure, or for the end.

    Raises:
        Stopped: somebody at a terminal stops it.
        RendezvousTimeout: the first node does not begin.
    """
    name = f"node {node.allocation.node_id}"
    config = read_config(node.run_dir.config)
    node.hub_environ = offline_environ(config, node.run_dir.path)
    rendezvous, address = _introduce(node, config, requests)
    start = rendezvous.wait_for_any(["start", "outcome"], config.cluster.start_timeout_s, requests.check_interrupt)
    if "code" in start:
        return start["code"]
    worker = stacks = None
    if address is not None and node.join(start["members"]):
        worker = node.start_worker(rendezvous, address, Path(start["tls"]), Path(start["log_dir"]))
        stacks = node.stack_writer(rendezvous, Path(start["log_dir"]))
    heartbeat, reported = HeartbeatMonitor(node.run_dir), False
    while True:
        requests.check_interrupt()
        outcome = None
        try:
            outcome = rendezvous.look("outcome")
        except FileNotFoundError:  # a newer start has begun, and removed what ours left
            print(f"{name}: this start is over", file=sys.stderr)
            return Exit.FAILED
        except OSError:  # a pause of the file server: it counts as silence
            pass
        if outcome is not None:
            return Exit.FAILED if outcome["code"] else Exit.DONE
        if stacks is not None:
            stacks.look_in_time()
        if worker is not None and worker.poll() is not None and not reported:
            if worker.returncode == 0:
                return Exit.DONE
            with contextlib.suppress(OSError):  # at the next look, then
                node.report_worker_ended(rendezvous, worker)
                reported = True
        if heartbeat.silent_s() > deadlines.heartbeat_timeout_s(config) + deadlines.OTHERS_S:
            print(f"{name}: the first node fell silent", file=sys.stderr)
            return Exit.FAILED
        time.sleep(deadlines.POLL_S if requests.has_signals else deadlines.LOOK_S)


def _introduce(node: Node, config: Config, requests: StopRequests) -> tuple[Rendezvous, str | None]:
    """The start's rendezvous, and this node's address. Where nothing can be written there, the first node is told so
    in another way, and there is no address.

    Raises:
        RendezvousTimeout: there is no rendezvous, and the first node makes none.
    """
    until = time.monotonic() + config.cluster.start_timeout_s
    try:
        rendezvous = node.rendezvous()
        return rendezvous, node.introduce(rendezvous, config)
    except OSError as error:
        problem = f"it cannot write to the run directory {node.run_dir}: {error.strerror or error}"
        print(f"node {node.allocation.node_id}: {problem}", file=sys.stderr, flush=True)
    while True:
        with contextlib.suppress(OSError):  # the first node has not made it yet, or it is not seen here yet
            rendezvous = node.rendezvous()
            gate = rendezvous.wait_for_any(["gate"], until - time.monotonic(), requests.check_interrupt)
            who = {"node": node.allocation.node_id, "slurm_name": node.slurm_name, "problem": problem}
            complain(gate["desk"], who)
            return rendezvous, None
        requests.check_interrupt()
        if time.monotonic() > until:
            raise RendezvousTimeout(f"there is no rendezvous in {node.run_dir}, and none can be made")
        time.sleep(deadlines.POLL_S)
