"""What a node finds out beside the others: ``python -m forge_hpc.gate.neighbours``, a process of its own for a second.

It times a short matrix product, and adds up a block of numbers with the next node over TCP, as an all-reduce does it:
node 0 ◄─► node 1 ◄─► node 2 ◄─► ... ◄─► node 0. Addresses come through the rendezvous: what a node publishes, another
one reads.

Torch is not imported. The product runs on one core: the best of many counts, so that what else a core does for a moment
is no difference between nodes.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_hpc.cluster.processes import die_with_parent
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.gate.deadlines import EXCHANGE_S

if TYPE_CHECKING:
    import numpy as np

PRODUCT_SIZE = 256
NUM_PRODUCTS = 100
BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 4


def product_s(size: int = PRODUCT_SIZE, times: int = NUM_PRODUCTS) -> float:
    """Seconds of the fastest of ``times`` products of two float32 matrices, on one core."""
    with _one_thread():
        import numpy as np
    matrix = np.full((size, size), 0.5, np.float32)
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        np.matmul(matrix, matrix)
        best = min(best, time.perf_counter() - start)
    return best


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For what numpy's libraries read while they are loaded."""
    name = "OPENBLAS_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class Port:
    """Where the node before this one finds it."""

    def __init__(self, address: str) -> None:
        self._socket = socket.create_server((address, 0))
        self.token = secrets.token_hex(16)
        self.where = {"address": address, "port": self._socket.getsockname()[1], "token": self.token}

    def answer(self, node: int, timeout_s: float) -> None:
        """Let the node before this one add up, when it comes."""
        self._socket.settimeout(timeout_s)
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # it has not come
                return
            with connection, contextlib.suppress(OSError):  # who asks sees it, and says so
                connection.settimeout(EXCHANGE_S)
                if hmac.compare_digest(_receive(connection, len(self.token)), self.token.encode()):
                    _add_up(connection, node)
                    return


def ask(where: dict[str, Any], node: int, timeout_s: float) -> float:
    """Add up with the node at ``where``; bytes a second. Raises OSError."""
    with socket.create_connection((where["address"], where["port"]), timeout=timeout_s) as connection:
        connection.sendall(where["token"].encode())
        return _add_up(connection, node)


def _add_up(connection: socket.socket, node: int) -> float:
    """Both ends send their block, and add the other's to it; the fastest of several, in bytes a second."""
    import numpy as np

    mine = np.full(BLOCK_BYTES // 4, node + 1, np.int32)
    best = float("inf")
    for _ in range(NUM_BLOCKS):
        start = time.perf_counter()
        sender = threading.Thread(target=_send, args=(connection, mine), daemon=True)
        sender.start()
        total = mine + np.frombuffer(_receive(connection, BLOCK_BYTES), np.int32)
        sender.join()
        best = min(best, time.perf_counter() - start)
        if total.min() != total.max():
            raise OSError("the numbers that came are not those that were sent")
    return BLOCK_BYTES / best


def _send(connection: socket.socket, block: np.ndarray[Any, Any]) -> None:
    with contextlib.suppress(OSError):  # the receiving half says so
        connection.sendall(block.tobytes())


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        if not (part := connection.recv(min(num_bytes - len(data), 1 << 18))):
            raise ConnectionError("the connection was closed")
        data += part
    return bytes(data)


def main() -> None:
    """Look, and publish ``port-NODE`` with the product, then ``link-NODE``."""
    parser = argparse.ArgumentParser(description="The node gate's part beside other nodes.")
    parser.add_argument("--rendezvous", type=Path, required=True)
    parser.add_argument("--node", type=int, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--patience", type=float, required=True, help="seconds to wait for nodes that come late")
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--began", type=float, required=True, help="when this process was asked for, unix seconds")
    args = parser.parse_args()
    die_with_parent(args.parent)
    node, rendezvous, port = args.node, Rendezvous(args.rendezvous), Port(args.address)
    seconds = product_s()
    rendezvous.publish(f"port-{node}", port.where | {"product_s": seconds, "took_s": time.time() - args.began})
    answering = threading.Thread(target=port.answer, args=(node, args.patience), daemon=True)
    answering.start()
    [where] = rendezvous.wait([f"port-{(node + 1) % args.num_nodes}"], args.patience)
    try:
        outcome: float | str = ask(where, node, EXCHANGE_S)
    except TimeoutError:  # who has waited for it knows what that means
        return
    except OSError as error:
        outcome = f"{type(error).__name__}: {error}"
    rendezvous.publish(f"link-{node}", {"outcome": outcome})
    answering.join()


if __name__ == "__main__":
    main()
