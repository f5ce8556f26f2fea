"""The worker processes of rewards and environments: one pool, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import wait_for

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, EnvironmentConfig, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool
from forge_hpc.rewards import RewardPool
from forge_hpc.workers.pool import WorkerPool
from forge_hpc.workers.process import WorkerProcess

PROMPT = Prompt(0, "go", [5, 6], "", {}, "go")

GAME = """
import os, signal, subprocess, time
from pathlib import Path
from forge_hpc.environments import Step

class Game:
    def __init__(self, book):
        self.book = Path(book)

    async def reset(self, prompt):
        server = subprocess.Popen(["sleep", "3600"], start_new_session=True)
        with self.book.open("a") as file:
            print(server.pid, file=file, flush=True)

    async def step(self, response):
        if response == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if response == "hang":
            time.sleep(3600)
        return Step(response, reward=1.0, done=True)

    async def close(self):
        pass
"""


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "game.py").write_text(GAME)
    environment = EnvironmentConfig(name=f"{tmp_path / 'game.py'}:Game", timeout_s=60.0)
    environment.args = {"book": str(tmp_path / "book")}
    return Config(reward=[], environment=environment)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started(tmp_path: Path) -> list[int]:
    book = tmp_path / "book"
    return [int(pid) for pid in book.read_text().split()] if book.exists() else []


async def talk(pool: EnvironmentPool, response: str) -> str:
    try:
        async with pool.open() as environment:
            await environment.reset(PROMPT)
            return (await environment.step(response)).observation
    except EnvironmentFailed as error:
        return f"{error.kind}: {error}"


def test_what_an_environment_started_in_a_session_of_its_own_ends_with_the_pool(config: Config, tmp_path: Path) -> None:
    async def scenario() -> None:
        pool = await EnvironmentPool(config, num_workers=2).start()
        try:
            assert await asyncio.gather(*(talk(pool, "a") for _ in range(4))) == ["a"] * 4
            assert len(started(tmp_path)) == 4 and all(map(is_alive, started(tmp_path)))
        finally:
            await pool.close()

    asyncio.run(scenario())
    assert not any(map(is_alive, started(tmp_path)))


@pytest.mark.parametrize(
    ("response", "failure"),
    [
        ("kill", "died: the environment's process was killed by SIGKILL (out of memory?)"),
        ("hang", "timeout: the environment took longer than 2 s over an episode"),
    ],
)
def test_it_ends_with_the_worker_whose_environment_is_killed_or_hangs(
    config: Config, tmp_path: Path, response: str, failure: str
) -> None:
    config.environment.timeout_s = 2.0 if response == "hang" else 60.0

    async def scenario() -> None:
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            assert await talk(pool, response) == failure
            [server] = started(tmp_path)
            await asyncio.to_thread(wait_for, lambda: not is_alive(server), "the end of what it started", 60)
            assert await talk(pool, "b") == "b"
        finally:
            await pool.close()

    asyncio.run(scenario())


def test_nothing_is_left_of_environments_whose_controller_is_killed(config: Config, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(f"""
import asyncio
from forge_hpc.config.schema import Config, EnvironmentConfig
from forge_hpc.data.types import Prompt
from forge_hpc.environments import EnvironmentPool

async def main():
    environment = EnvironmentConfig(name={config.environment.name!r}, args={config.environment.args!r})
    pool = await EnvironmentPool(Config(reward=[], environment=environment), num_workers=2).start()
    async with pool.open() as one, pool.open() as other:
        await asyncio.gather(one.reset(Prompt(0, "", [], "")), other.reset(Prompt(1, "", [], "")))
        await one.step("hang")

asyncio.run(main())
""")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = psutil.Popen([sys.executable, str(tmp_path / "script.py")], env=env)
    try:
        wait_for(lambda: len(started(tmp_path)) == 2, "the environments", 120)
        below = [child.pid for child in process.children(recursive=True)]
        assert len(below) >= 6  # two keepers, workers and servers
    finally:
        process.kill()
    process.wait(60)
    wait_for(lambda: not any(map(is_alive, [*below, *started(tmp_path)])), "the end of all that it started", 60)


def test_an_answer_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text("""
class Reader:
    def __call__(self, prompt, response, target, **fields):
        return 1.0

    def read_answer(self, prompt, response):
        return response
""")
    text = "x" * 1_000_000

    async def scenario() -> Any:
        async with RewardPool(Config(reward=[RewardConfig(f"{tmp_path / 'reader.py'}:Reader")]), 1) as pool:
            return await pool.judge(PROMPT, Completion(0, text, [3], [-0.1], "stop", (0, 0)), show=True)

    assert asyncio.run(scenario()).read == {"Reader": text}


def test_a_pool_that_was_closed_starts_nothing() -> None:
    async def scenario() -> set[psutil.Process]:
        before = set(psutil.Process().children())  # other tests may have left some of theirs
        pool = WorkerPool("forge_hpc.rewards.worker", "the reward exact", {"name": "exact", "args": {}})
        await pool.close()
        with pytest.raises(UserError, match="a process for the reward exact cannot be started: the run is ending"):
            await pool.start_worker(check=True)
        return set(psutil.Process().children()) - before

    assert asyncio.run(scenario()) == set()


def test_a_start_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "from pathlib import Path\nimport time\nPath(__file__).with_name('up').touch()\ntime.sleep(3600)\n"
    )

    async def scenario(is_up: Callable[[], bool]) -> None:
        before = set(psutil.Process().children(recursive=True))
        load = {"name": f"{tmp_path / 'slow.py'}:f", "args": {}, "memory_gib": None}
        pool = WorkerPool("forge_hpc.rewards.worker", "the reward slow", load)
        starting = asyncio.create_task(pool.start_worker(check=True))
        await asyncio.to_thread(wait_for, is_up, "the worker", 60)
        starting.cancel()
        await asyncio.wait({starting})
        children = psutil.Process().children
        await asyncio.to_thread(wait_for, lambda: set(children(recursive=True)) <= before, "its end", 60)
        await pool.close()

    asyncio.run(scenario((tmp_path / "up").exists))


def test_a_worker_that_is_still_starting_ends_although_it_ignores_signals() -> None:
    """As below a controller, which is deaf to them, and so is what it starts."""

    async def scenario() -> None:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            worker = await WorkerProcess.start("forge_hpc.rewards.worker")
        finally:
            signal.signal(signal.SIGTERM, before)
        worker.kill()
        await asyncio.wait_for(worker.wait(), 60)

    asyncio.run(scenario())
