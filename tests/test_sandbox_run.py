"""Programs that mean well in the sandbox, and tests of programs that do not."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
from typing import Any

import pytest
from hostile_programs import CHEATS
from sandboxes import needs_bubblewrap

from forge_hpc.sandbox import Case, Limits, Report, Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    needs_bubblewrap()
    return Sandbox()


def run_tests(sandbox: Sandbox, code: str, tests: list[Case | str], **options: Any) -> Report:
    return asyncio.run(sandbox.run_tests(code, tests, **options))


def test_a_program_has_its_input_files_output_and_exit_code(sandbox):
    code = """
import sys, data.numbers
print(sum(map(int, sys.stdin)), data.numbers.EXTRA, open("data/text.txt").read(), __name__, __file__)
print("oh", file=sys.stderr)
sys.exit(3)
"""
    files = {"data/numbers.py": "EXTRA = 7", "data/text.txt": "grüße"}
    result = sandbox.run_sync(code, stdin="1\n2\n", files=files)
    assert result.stdout == "3 7 grüße __main__ /tmp/main.py\n"
    assert (result.stderr, result.exit_code, result.killed_by) == ("oh\n", 3, None)


def test_an_error_is_shown_as_python_shows_it(sandbox):
    result = sandbox.run_sync("def f():\n    return 1 / 0\n\nf()\n")
    assert result.stderr.splitlines()[:2] == [
        "Traceback (most recent call last):",
        '  File "/tmp/main.py", line 4, in <module>',
    ]
    assert result.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    broken = sandbox.run_sync("x = (")
    assert broken.stderr.startswith('  File "/tmp/main.py", line 1') and broken.exit_code == 1


def test_ordinary_tools_work(sandbox):
    code = """
import asyncio, collections, concurrent.futures, multiprocessing, re, sqlite3, subprocess, sys, tempfile, threading

def double(x):
    return 2 * x

if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(double, range(3)))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        print(list(pool.map(double, range(3))))
    print(subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout.strip())
    with tempfile.NamedTemporaryFile() as file:
        print(file.write(b"abc"))
    print(sqlite3.connect(":memory:").execute("select 1 + 1").fetchone()[0])
    async def main():
        server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
        await asyncio.open_connection(*server.sockets[0].getsockname())
    asyncio.run(main())
"""
    result = sandbox.run_sync(code)
    assert result.stdout.split("\n") == ["[0, 2, 4]", "[0, 2, 4]", "42", "3", "2", ""], result


def test_a_program_does_the_same_each_time(sandbox):
    code = "print({str(i) for i in range(20)})"
    assert sandbox.run_sync(code).stdout == sandbox.run_sync(code).stdout


def test_memory_shared_by_forked_children_counts_once(sandbox):
    code = """
import os, time
block = os.urandom(60_000_000)
for _ in range(4):
    if os.fork() == 0:
        time.sleep(0.3); os._exit(0)
for _ in range(4): os.wait()
print("done")"""
    assert sandbox.run_sync(code, limits=Limits(memory_mb=128)).stdout == "done\n"


def test_cpu_time_counts_over_all_processes(sandbox):
    code = "import os\nfor _ in range(2): os.fork()\nwhile True: pass"
    result = sandbox.run_sync(code, limits=Limits(wall_s=60, cpu_s=0.6))
    assert result.killed_by == "cpu"
    assert 0.5 < result.cpu_s < 3


def test_what_was_printed_before_a_limit_is_kept(sandbox):
    result = sandbox.run_sync("print('so far', flush=True)\nimport time\ntime.sleep(60)", limits=Limits(wall_s=0.5))
    assert (result.stdout, result.killed_by, result.exit_code) == ("so far\n", "wall", None)


def test_a_large_input_that_nobody_reads_does_no_harm(sandbox):
    assert sandbox.run_sync("print('ok')", stdin="x" * 5_000_000).stdout == "ok\n"
    assert sandbox.run_sync("print(len(input()))", stdin="x" * 5_000_000).stdout == "5000000\n"


def test_files_stay_inside(sandbox):
    for name in ("/etc/passwd", "../x", "a/../../x", ""):
        with pytest.raises(ValueError, match="relative path"):
            sandbox.run_sync("", files={name: "x"})


# --- tests of programs


def test_the_share_of_passed_tests_is_given(sandbox):
    report = run_tests(
        sandbox,
        "n = int(input())\nprint(n * n if n < 5 else n)",
        [Case("2\n", "4\n"), Case("3", "9"), Case("6", "36"), Case("x", "x")],
    )
    assert [verdict.passed for verdict in report.verdicts] == [True, True, False, False]
    assert (report.num_passed, report.share) == (2, 0.5)
    assert report.verdicts[2].reason == "it printed something else"
    assert "ValueError" in report.verdicts[3].reason
    with pytest.raises(ValueError, match="no tests"):
        run_tests(sandbox, "", [])


HONEST = """
from collections import Counter, namedtuple
import math

Point = namedtuple("Point", "x y")

def add(a, b=0): return a + b
def sort_in_place(items): items.sort()
def fill(table, seen): table["k"] = [1]; seen.add(5)
def primes():
    n = 2
    while True:
        if all(n % d for d in range(2, n)): yield n
        n += 1
def point(): return Point(1, 2)
def counts(text): return Counter(text)
def fail(): raise KeyError("no")
def halves(n): return n / 2
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert add(1, 2) == 3 and add(1, b=2) == 3 and add('a', 'b') == 'ab'",
        "assert add([1], [(2, None)]) == [1, (2, None)] and add({1: 2}.keys() == {1}) == True",
        "assert add(2**200, 1) == 2**200 + 1 and add(1j, 1) == 1 + 1j and add(b'a', b'b') == b'ab'",
        "assert math.isclose(halves(1), 0.5) and add(float('inf')) == float('inf')",
        "x = [3, 1, 2]; sort_in_place(x); assert x == [1, 2, 3]",
        "t, s = {}, set(); fill(t, s); assert t == {'k': [1]} and s == {5}",
        "from itertools import islice\nassert list(islice(primes(), 5)) == [2, 3, 5, 7, 11]",
        "g = primes(); assert next(g) == 2 and next(g) == 3",
        "assert point() == (1, 2) and counts('aab') == {'a': 2, 'b': 1}",
        "try:\n    fail()\nexcept KeyError:\n    pass\nelse:\n    assert False",
        "s = Stack(); s.push(1).push(2); assert s.pop() == 2 and len(s) == 1 and s.items == [1]",
        "s = Stack(); t = s; assert s == t and s != [1] and s != None and Stack().push(1).pop() == 1",
        "def check(candidate):\n    for i in range(3):\n        assert candidate(i, i) == 2 * i\ncheck(add)",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 1), 2)\n"
        "unittest.main()",
    ],
)
def test_an_honest_program_passes(sandbox, test):
    report = run_tests(sandbox, HONEST, [test])
    assert report.verdicts[0].passed, report


def test_objects_of_the_program_judge_nothing(sandbox):
    code = "class P:\n    def __eq__(self, other): return True\n    def isdigit(self): return True\nitems = [P()]"
    tests = ["assert P() == P()", "assert P().isdigit()", "assert P() in items", "assert 1 in P"]
    reasons = [verdict.reason for verdict in run_tests(sandbox, code, tests).verdicts]
    assert all(reason.startswith("NotPlainError: ") for reason in reasons), reasons


def test_a_failure_says_why_and_where(sandbox):
    tests = [
        "assert add(1, 1) == 2\nassert add(1, 2) == 4, 'wrong sum'",
        "assert missing(1) == 2",
        "assert add(",
        "fail()",
        "assert add(1, 1) == 2",
        "import unittest\nclass T(unittest.TestCase):\n    def test(self):\n        self.assertEqual(add(1, 1), 3)\n"
        "unittest.main()",
    ]
    reasons = [verdict.reason for verdict in run_tests(sandbox, HONEST, tests).verdicts]
    assert reasons[0] == "AssertionError: wrong sum (line 2 of the test)"
    assert reasons[1].startswith("NameError")
    assert reasons[2].startswith("SyntaxError")
    assert reasons[3].startswith("KeyError")
    assert reasons[4] == ""
    assert reasons[5].startswith("SystemExit")


def test_a_test_that_hangs_fails_alone(sandbox):
    code = "def f(n):\n    while n == 1: pass\n    return n"
    report = run_tests(sandbox, code, [f"assert f({n}) == {n}" for n in range(4)], test_s=0.5)
    assert [verdict.passed for verdict in report.verdicts] == [True, False, True, True]
    assert report.verdicts[1].reason == "it passed its limit: wall"


def test_what_there_was_no_time_for_has_failed(sandbox):
    limits = Limits(wall_s=1)
    report = run_tests(sandbox, "import time\ntime.sleep(60)", [Case("", ""), Case("", "")], limits=limits)
    assert [verdict.passed for verdict in report.verdicts] == [False, False]
    assert report.wall_s < 2.5


UNPASSABLE = [
    "assert f(2, 3) == 2417",
    "assert not f(2) != 2417",
    "assert isinstance(f(1), int) and abs(f(1) - 2417) < 1",
    "assert math.isclose(f(4), 2417)",
    "import math\nassert math.isclose(f([1]), 2417)",
    "assert sorted([f(1), 1]) == [1, 2417]",
    "assert 2417 in [f(1)] and f(1) in (2417, 2418)",
    "expected = [2417]\nassert [f(expected)] == [2417] and expected",
    "assert 2417 in f(1)",
    "assert f('A').islower() and f('b').isupper()",
    "assert f(1) == f(2) and f(1) != f(1)",
    "assert [f('A')] == [f('a')] and f('A') is not None and {f(1), f(2)} <= f(3)",
    "assert f([1]).issubset({2417}) and f('a').startswith('2417')",
    "assert np.allclose(f(1), [2417])",
]


@pytest.mark.parametrize("cheat", CHEATS, ids=str)
def test_a_pass_cannot_be_faked(sandbox, cheat):
    limits = Limits(wall_s=4, cpu_s=4, memory_mb=256)
    report = run_tests(sandbox, CHEATS[cheat], UNPASSABLE, limits=limits)
    assert report.num_passed == 0, report
    assert len(report.verdicts) == len(UNPASSABLE) and all(verdict.reason for verdict in report.verdicts)


@pytest.mark.parametrize(
    "cheat",
    [
        "import os\nfor fd in range(50):\n    try: print(os.read(fd, 10**6))\n    except OSError: pass",
        "import os\nfor folder, _, names in os.walk('/tmp'): print([open(f'{folder}/{n}').read() for n in names])",
        "import gc\nprint(gc.get_objects())",
        "import os\nos._exit(0)",
        "class Out:\n    def write(self, s): return True\nimport sys\nsys.stdout = Out()\nprint('x')",
    ],
)
def test_a_program_cannot_find_what_it_is_to_print(sandbox, cheat):
    number = secrets.randbelow(10**9)
    report = run_tests(sandbox, cheat, [Case("", str(number)), Case("", str(number))], limits=Limits(wall_s=5))
    assert report.num_passed == 0


def test_the_room_imports_nothing_heavy():
    code = "import sys, forge_hpc.sandbox; assert not {'torch', 'monarch', 'vllm'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
