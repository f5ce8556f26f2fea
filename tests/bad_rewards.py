"""Rewards that do everything that a reward should not. The pool's tests load them in worker processes."""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def misbehave(prompt, response, target, **fields):
    return globals().get(f"do_{response}", lambda fields: float(response))(fields)


def do_raise(fields):
    raise KeyError("nothing there")


def do_nan(fields):
    return float("nan")


def do_none(fields):
    return None


def do_hang(fields):
    time.sleep(3600)


def do_pid(fields):
    return os.getpid()


def do_slow(fields):
    time.sleep(2)
    return 2.0


def do_ignore_sigterm(fields):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(3600)


def do_stop(fields):
    os.kill(os.getpid(), signal.SIGSTOP)


def do_exit(fields):
    os._exit(3)


def do_sys_exit(fields):
    sys.exit(4)


def do_kill(fields):
    os.kill(os.getpid(), signal.SIGKILL)


def do_kill_group(fields):
    os.killpg(0, signal.SIGKILL)


def do_kill_keeper(fields):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)


def do_segfault(fields):
    ctypes.string_at(0)


def do_allocate(fields):
    held = []
    while True:
        held.append(bytearray(2**24))


def do_print(fields):
    print("this must not", end="", flush=True)
    os.write(1, b'{"value": 0.5, "id": 2}\n')
    subprocess.run(["echo", "disturb the answers"], check=True)
    return sys.stdin.read() == ""


def do_write_everywhere(fields):
    for fd in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(fd, b'{"value": 1.0}\n')
    return 1.0


def do_return_twice(fields):
    return 1.0 if os.fork() else 0.0


def leave_a_child(fields):
    """A grandchild in a session of its own that holds every file this process has open."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(fields["pid_file"]).write_text(str(os.getpid()))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(3600)
        os._exit(0)
    os.wait()
    while not Path(fields["pid_file"]).exists() or not Path(fields["pid_file"]).read_text():
        time.sleep(0.01)


def do_child_and_return(fields):
    leave_a_child(fields)
    return 1.0


def do_child_and_exit(fields):
    leave_a_child(fields)
    os._exit(0)


def do_child_and_hang(fields):
    leave_a_child(fields)
    time.sleep(3600)


meeting = asyncio.Barrier(64)


async def meet(prompt, response, target, **fields):
    """Answers when 64 calls run at the same time."""
    await meeting.wait()
    return os.getpid()


async def misbehave_async(prompt, response, target, **fields):
    await asyncio.sleep(0)
    if response == "hang":
        await asyncio.sleep(3600)
    if response == "block":
        time.sleep(3600)
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise KeyError("nothing there")
    if response == "cling":
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)
    if response == "wait":
        await asyncio.sleep(0.2)
    if response == "slow":
        await asyncio.sleep(2)
    return os.getpid()


class Counting:
    """A class; told how many calls came before."""

    def __init__(self, start=0, *, step=1):
        self.value, self.step = start, step

    async def __call__(self, prompt, response, target, **fields):
        self.value += self.step
        return self.value


class Picky:
    timeout_s = 0.5

    def check(self):
        raise RuntimeError("not today")

    def __call__(self, prompt, response, target, **fields):
        return 1.0


def no_fields(prompt, response, target):
    return 1.0


def too_few(prompt, **fields):
    return 1.0
