"""Worker processes of this node for the controller on another one, in a thread of the node's Monarch worker.

    controller ──TLS stream──► WorkerHost ──pipes──► keeper ──► worker      (one of these for each worker)

A stream begins with a line: the module to run, a tab, and the virtual environment where it is another one. A line
without a module asks whether this node lives. The answer is ``ok`` or why there is no process. From there requests and
answers pass as ``channel`` has them; a request of no length ends the process, as does the end of the stream. After the
last answer comes a line of a zero byte and the exit status.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from concurrent.futures import Future

from forge_hpc.wire.tls import Certificates, prepare
from forge_hpc.workers.link import end_process, join_process, start_process
from forge_hpc.workers.remote import STARTED, STATUS

MODULES = ("forge_hpc.rewards.worker", "forge_hpc.environments.worker")
_HELLO_S = 30.0
_CHUNK_BYTES = 1 << 16
_HEADER = struct.Struct("<Q")


class WorkerHost:
    """Serves from its making to the end of this process: whoever presents a certificate of the job.

    Args:
        address: what to listen on; the port is the kernel's choice.
    """

    def __init__(self, address: str, certificates: Certificates) -> None:
        listening: Future[int] = Future()
        main = _serve(address, certificates, listening)
        threading.Thread(target=asyncio.run, args=(main,), name="worker-host", daemon=True).start()
        self.port = listening.result()


async def _serve(address: str, certificates: Certificates, listening: Future[int]) -> None:
    try:
        server = await asyncio.start_server(_answer, address, 0, ssl=certificates.server(), backlog=256)
    except BaseException as error:
        listening.set_exception(error)
        raise
    listening.set_result(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):  # who asks is gone
        try:
            prepare(writer.get_extra_info("socket"))
            async with asyncio.timeout(_HELLO_S):
                line = (await reader.readline()).decode(errors="surrogateescape")
            module, _, venv = line.removesuffix("\n").partition("\t")
            if module in MODULES:
                await _run(module, venv or None, reader, writer)
            else:
                writer.write(STARTED if not module else f"no worker: {module}\n".encode())
                await writer.drain()
        finally:
            writer.close()


async def _run(module: str, venv: str | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        process = await start_process(module, venv)
    except OSError as error:
        writer.write(f"{error}\n".replace("\0", "").encode())
        return await writer.drain()
    writer.write(STARTED)
    requests = asyncio.create_task(_forward(reader, process))
    ends_line = True
    try:
        assert process.stdout is not None
        while chunk := await process.stdout.read(_CHUNK_BYTES):
            writer.write(chunk)
            ends_line = chunk.endswith(b"\n")
            await writer.drain()
        status = await join_process(process)
        writer.write((b"" if ends_line else b"\n") + STATUS + f"{status}\n".encode())
        await writer.drain()
    finally:
        requests.cancel()
        end_process(process)


async def _forward(reader: asyncio.StreamReader, process: asyncio.subprocess.Process) -> None:
    """Hand requests on, until there are no more.

    A process that hangs reads none of them: that it is to end comes behind what it has not read, so all of that is
    taken, as much as the controller has written.
    """
    assert process.stdin is not None
    try:
        while (length := _HEADER.unpack(header := await reader.readexactly(_HEADER.size))[0]) > 0:
            process.stdin.write(header + await reader.readexactly(length))
    except (OSError, asyncio.IncompleteReadError):
        pass  # the controller is gone
    finally:
        end_process(process)
