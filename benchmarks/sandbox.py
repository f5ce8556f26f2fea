"""What a sandbox costs: programs a second, the time of a start, and of tests within one.

    python benchmarks/sandbox.py [--programs 200] [--parallel 2]

Prints a table in milliseconds of wall and of CPU time, the CPU time being that of all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import time
from collections.abc import Awaitable, Callable

from rows import row

from forge_hpc.config.schema import SandboxConfig
from forge_hpc.sandbox import Case, Sandbox

ADD = "def add(a, b):\n    return a + b\n"
NUM_TESTS = 20


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


async def measure(what: str, times: int, job: Callable[[], Awaitable[object]]) -> None:
    await job()
    start, cpu_before = time.perf_counter(), cpu_s()
    await asyncio.gather(*(job() for _ in range(times)))
    wall, cpu = (time.perf_counter() - start) / times, (cpu_s() - cpu_before) / times
    row(what, 1 / wall, unit="a second", note=f"{1e3 * cpu:.1f} ms of CPU each")
    print(f"{what:<44} {1 / wall:8.1f} a second {1e3 * wall:8.1f} ms {1e3 * cpu:8.1f} ms of CPU")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=None, help="programs at once (the number of cores)")
    args = parser.parse_args()
    one, many = Sandbox(SandboxConfig(parallel=1)), Sandbox(SandboxConfig(parallel=args.parallel))
    print(one.check())
    await measure("a trivial program, one at a time", args.programs // 2, lambda: one.run("pass"))
    await measure("a trivial program, several at once", args.programs, lambda: many.run("pass"))
    cases = [Case(f"{i}", f"{2 * i}") for i in range(NUM_TESTS)]
    doubled = "print(2 * int(input()))"
    await measure(f"a program with {NUM_TESTS} inputs", args.programs // 4, lambda: one.run_tests(doubled, cases))
    tests = [f"assert add({i}, 1) == {i + 1}" for i in range(NUM_TESTS)]
    await measure(f"a program with {NUM_TESTS} assertions apart", args.programs // 4, lambda: one.run_tests(ADD, tests))


if __name__ == "__main__":
    asyncio.run(main())
