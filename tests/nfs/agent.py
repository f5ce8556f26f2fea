"""On a test machine: runs one shell command a connection (port 2222), streams its output, and ends with its code.

A connection brings a line with two lengths, the command, and what the command finds on its standard input.
"""

import contextlib
import socket
import subprocess
import threading


def serve(connection: socket.socket) -> None:
    file = connection.makefile("rb")
    length, data_length = map(int, file.readline().split())
    command, data = file.read(length).decode(), file.read(data_length)
    process = subprocess.Popen(
        ["bash", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.write(data)
        process.stdin.close()
    with contextlib.suppress(OSError):
        while data := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            connection.sendall(data)
        connection.sendall(b"\0%d\n" % process.wait())
    connection.close()


listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("0.0.0.0", 2222))
listener.listen(64)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
