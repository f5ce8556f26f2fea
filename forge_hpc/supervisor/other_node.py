"""The nodes that are not the first: they serve a Monarch worker until the first one says how the start has ended."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from forge_hpc.config import read_config
from forge_hpc.supervisor import deadlines
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.heartbeat import HeartbeatMonitor
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.signals import StopRequests


def serve_node(node: Node, requests: StopRequests) -> int:
    """Serve until the end of the start; the exit code.

    Raises:
        Stopped: somebody at a terminal stops it.
        RendezvousTimeout: the first node does not begin.
    """
    rendezvous, name = node.rendezvous(), f"node {node.allocation.node_id}"
    address = node.introduce(rendezvous)
    config = read_config(node.run_dir.config)
    start = rendezvous.wait_for_any(["start", "outcome"], config.cluster.start_timeout_s, requests.check_interrupt)
    if "code" in start:
        return start["code"]
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
        if outcome is None:
            stacks.look_in_time()
        else:
            return Exit.FAILED if outcome["code"] else Exit.DONE
        if worker.poll() is not None and not reported:
            if worker.returncode == 0:
                return Exit.DONE
            with contextlib.suppress(OSError):  # at the next look, then
                node.report_worker_ended(rendezvous, worker)
                reported = True
        if heartbeat.silent_s() > deadlines.heartbeat_timeout_s(config) + deadlines.OTHERS_S:
            print(f"{name}: the first node fell silent", file=sys.stderr)
            return Exit.FAILED
        time.sleep(deadlines.POLL_S if requests.has_signals else deadlines.LOOK_S)
