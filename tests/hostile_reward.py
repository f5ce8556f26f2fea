"""A reward that runs a hostile program beside what it measures, for one completion of 16; its neighbour has them."""

import zlib
from pathlib import Path

from hostile_programs import PRELUDE, PROGRAMS

from forge_hpc.sandbox import Limits, Sandbox

LIMITS = Limits(wall_s=1, cpu_s=1, memory_mb=128, processes=16, output_kb=16, disk_mb=8)
SETTING = PRELUDE + (
    f"HOME, CANARY, ADDRESS, PORT = {str(Path(__file__).parent)!r}, 'FORGE_HPC_CANARY', '127.0.0.1', 22\n"
    "UNIX, ABSTRACT = '/run/dbus/system_bus_socket', '\\0forge-hpc'\n"
)
SHARE = 16


class Hostile:
    """The response's length. Writes a line about each program into `book`. Raises RuntimeError where one got out."""

    timeout_s = 120.0

    def __init__(self, book: str) -> None:
        self.book, self.sandbox = Path(book), Sandbox()

    async def __call__(self, prompt, response, target, **fields):
        number = zlib.crc32(f"{prompt}|{response}".encode())
        if number % SHARE == 0:
            program = PROGRAMS[number // SHARE % len(PROGRAMS)]
            result = await self.sandbox.run(SETTING + program.code, limits=LIMITS)
            with self.book.open("a") as file:
                print(program.name, result.killed_by or f"exit {result.exit_code}", file=file)
            if "ESCAPED" in result.stdout + result.stderr:
                raise RuntimeError(f"{program.name} got out: {result}")
        return len(response) / 6
