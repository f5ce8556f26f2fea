"""Rewards and environments on the other nodes of a run: a process that serves them as a node's Monarch worker does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import PROJECT, wait_for
from sandboxes import needs_bubblewrap

from forge_hpc.cluster.identity import make_job_identity
from forge_hpc.config.schema import Config, EnvironmentConfig, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.environments import EnvironmentFailed, EnvironmentPool
from forge_hpc.rewards import RewardPool
from forge_hpc.rollouts.episodes import Admission
from forge_hpc.rollouts.slots import Slot, Slots
from forge_hpc.wire.tls import Certificates
from forge_hpc.workers import remote
from forge_hpc.workers.channel import frame
from forge_hpc.workers.link import END_TIMEOUT_S
from forge_hpc.workers.remote import Caller, OtherNode

NODE = """
import threading
from forge_hpc.wire.tls import Certificates
from forge_hpc.workers.host import WorkerHost

print(WorkerHost("127.0.0.1", Certificates.from_environment()).port, flush=True)
threading.Event().wait()
"""
USER = """
import asyncio, os, time
from pathlib import Path
from forge_hpc.environments import Step

WHERE, PLACE = os.environ.get("WHERE", "first"), Path(__file__).parent

def note():
    with open(PLACE / "ran", "a") as file:
        file.write(f"{WHERE} {os.getpid()}\\n")

def length(prompt, response, target, **fields):
    note()
    while WHERE != "first" and response.startswith("slow") and not (PLACE / "go").exists():
        time.sleep(0.05)
    time.sleep(0.02)
    return float(len(response))

class Picky:
    per_node = True

    async def check(self):
        if WHERE != "first":
            raise RuntimeError("no sandbox here")

    async def __call__(self, prompt, response, target, **fields):
        note()
        return 1.0

class Talk:
    async def reset(self, prompt):
        return "go"

    async def step(self, response):
        note()
        if WHERE != "first" and response == "long":
            await asyncio.sleep(3600)
        return Step("", reward=1.0, done=True)

    async def close(self):
        pass
"""


class Node:
    """Another node, seen from outside."""

    def __init__(self, certificates: Certificates, **more: str) -> None:
        env = {**os.environ, **certificates.environment(), "PYTHONPATH": str(PROJECT), "WHERE": "other", **more}
        self.process = subprocess.Popen([sys.executable, "-c", NODE], stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None
        self.where = "127.0.0.1", int(self.process.stdout.readline())
        self.place = OtherNode("node 1 (other)", self.where, 4, Caller(certificates))

    def workers(self) -> list[psutil.Process]:
        """The processes that compute; their keepers end with them."""
        found = []
        for keeper in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += keeper.children()
        return found


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("tls")
    make_job_identity(directory, ["127.0.0.1", "localhost"])
    return Certificates(directory / "ca.pem", directory / "cert.pem", directory / "key.pem")


@pytest.fixture
def node(certificates: Certificates, request: pytest.FixtureRequest) -> Iterator[Node]:
    """With other environment variables, where the test's parameter has them."""
    node = Node(certificates, **getattr(request, "param", {}))
    yield node
    below = psutil.Process(node.process.pid).children(recursive=True) if node.process.poll() is None else []
    node.process.kill()
    node.process.wait()
    assert not psutil.wait_procs(below, timeout=60)[1]  # what it had started goes with it


@pytest.fixture
def user(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(USER)
    return tmp_path / "user.py"


def ran(user: Path) -> Counter[str]:
    file = user.parent / "ran"
    return Counter(line.split()[0] for line in file.read_text().splitlines()) if file.exists() else Counter()


async def score(pool: RewardPool, text: str, position: int = 0) -> float:
    completion = Completion(0, text, [3], [-0.1], "stop", (0, 0))
    return (await pool.score(Prompt(position, "go", [1], "", {}), completion))[0]


async def until(condition: Callable[[], Any], what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what, 60)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120):
            await scenario()

    asyncio.run(main())


def config_of(user: Path, name: str, **options: Any) -> Config:
    return Config(reward=[RewardConfig(f"{user}:{name}", **options)])


async def both_compute(pool: RewardPool, user: Path) -> None:
    while not ran(user)["other"]:
        await asyncio.gather(*(score(pool, "text") for _ in range(200)))


def test_both_nodes_compute_and_a_lost_one_takes_nothing_with_it(node: Node, user: Path) -> None:
    async def scenario() -> None:
        config = config_of(user, "length", timeout_s=60.0)
        async with RewardPool(config, others=[node.place]) as pool:
            await both_compute(pool, user)
            before = ran(user)["other"]
            texts = [f"slow{'x' * (number % 7)}" for number in range(60)]
            scoring = [asyncio.create_task(score(pool, text, number)) for number, text in enumerate(texts)]
            await until(lambda: ran(user)["other"] > before, "calls on the other node")
            node.process.kill()
            assert await asyncio.gather(*scoring) == [float(len(text)) for text in texts]
            assert node.place.is_lost

    run(scenario)


def test_a_call_whose_process_is_killed_on_one_of_several_nodes_is_made_again(node: Node, user: Path) -> None:
    async def scenario() -> None:
        async with RewardPool(config_of(user, "length", timeout_s=60.0), others=[node.place]) as pool:
            await both_compute(pool, user)
            before = ran(user)["other"]
            scoring = [asyncio.create_task(score(pool, "slow")) for _ in range(10)]
            await until(lambda: ran(user)["other"] > before, "calls on the other node")
            loaded = {int(line.split()[1]) for line in (user.parent / "ran").read_text().splitlines()}
            killed = [worker for worker in node.workers() if worker.pid in loaded]  # not one that begins
            for worker in killed:
                worker.kill()
            assert killed and not psutil.wait_procs(killed, timeout=60)[1]
            (user.parent / "go").touch()
            assert await asyncio.gather(*scoring) == [4.0] * 10
            await until(lambda: len(node.workers()) == 4, "as many processes as before")
            assert not node.place.is_lost

    run(scenario)


def test_a_node_that_cannot_compute_a_reward_is_named_and_left_out(node: Node, user: Path) -> None:
    warned: list[str] = []

    async def scenario() -> None:
        async with RewardPool(config_of(user, "Picky", workers=2), others=[node.place], warn=warned.append) as pool:
            await until(lambda: warned, "the warning")
            assert await asyncio.gather(*(score(pool, "text") for _ in range(20))) == [1.0] * 20

    run(scenario)
    [text] = warned
    assert text.startswith("node 1 (other) computes no ") and "no sandbox here" in text
    assert ran(user).keys() == {"first"}


@pytest.mark.parametrize("node", [{"PATH": "/nowhere"}], indirect=True)
def test_a_node_without_a_sandbox_is_named_and_runs_no_programs(node: Node) -> None:
    needs_bubblewrap()
    warned: list[str] = []
    program = Completion(0, "```python\nprint(6 * 7)\n```", [3], [-0.1], "stop", (0, 0))
    prompt = Prompt(0, "go", [1], "", {"tests": [{"input": "", "output": "42"}]})

    async def scenario() -> None:
        config = Config(reward=[RewardConfig("code", workers=2)])
        async with RewardPool(config, others=[node.place], warn=warned.append) as pool:
            await until(lambda: warned, "the warning")
            assert (await pool.score(prompt, program))[0] == 1.0

    run(scenario)
    [text] = warned
    assert text.startswith("node 1 (other) computes no code, the other nodes do: ") and "sandbox" in text


def test_a_node_that_falls_silent_is_asked_before_a_call_is_blamed(
    node: Node, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 1.0)

    async def scenario() -> None:
        async with RewardPool(config_of(user, "length", timeout_s=3.0), others=[node.place]) as pool:
            await both_compute(pool, user)
            for process in [psutil.Process(node.process.pid), *node.workers()]:
                process.suspend()  # as when a node hangs: its connections stay
            assert await asyncio.gather(*(score(pool, "text") for _ in range(40))) == [4.0] * 40
            assert node.place.is_lost

    run(scenario)
    node.process.send_signal(signal.SIGCONT)


def test_one_that_hangs_ends_however_much_it_has_not_read(node: Node) -> None:
    async def scenario() -> None:
        link = await node.place.open("forge_hpc.environments.worker")
        await until(node.workers, "the worker")
        [worker] = node.workers()
        worker.suspend()  # as where C code keeps the interpreter to itself
        for _ in range(64):
            link.write(frame({"do": "load", "name": "x" * (1 << 15)}))
        start = time.monotonic()
        link.kill()
        assert await link.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - start < END_TIMEOUT_S
        assert not worker.is_running() and not node.place.is_lost

    run(scenario)


def test_who_may_open_no_more_files_loses_no_node(node: Node) -> None:
    async def scenario() -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            assert await node.place.answers()
            with pytest.raises(OSError, match="Too many open files"):
                await node.place.open("forge_hpc.rewards.worker")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert not node.place.is_lost
        link = await node.place.open("forge_hpc.rewards.worker")
        link.kill()
        await link.wait()

    run(scenario)


def test_a_controller_that_is_held_up_blames_no_node(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_S", 4.0)

    async def scenario() -> None:
        asking = asyncio.create_task(node.place.answers())
        await asyncio.sleep(0.001)
        time.sleep(5.0)
        assert await asking

    run(scenario)


def test_as_many_workers_as_were_asked_for_are_spread_over_the_nodes(node: Node, user: Path) -> None:
    async def scenario() -> None:
        async with RewardPool(config_of(user, "length", workers=3), others=[node.place]) as pool:
            await both_compute(pool, user)
            await asyncio.gather(*(score(pool, "text") for _ in range(60)))
        pids = {tuple(line.split()) for line in (user.parent / "ran").read_text().splitlines()}
        assert Counter(where for where, _ in pids) == {"first": 2, "other": 1}
        assert not node.workers()

    run(scenario)


def test_an_episode_whose_node_is_lost_is_played_again_elsewhere(node: Node, user: Path) -> None:
    config = Config(reward=[], environment=EnvironmentConfig(name=f"{user}:Talk", timeout_s=60.0))

    async def scenario() -> None:
        pool = await EnvironmentPool(config, num_workers=1, others=[node.place]).start()
        admission, slots = Admission(config, pool), Slots(lambda: None)

        async def play(away_from: Any) -> Any:
            async with pool.open(away_from) as environment:
                await environment.reset(Prompt(0, "", [], ""))
                return await environment.step("long")

        try:
            await until(lambda: pool.is_on_several_nodes, "environments on the other node")
            prompt = Prompt(0, "", [], "")
            playing = [asyncio.create_task(admission.admit(prompt, Slot(slots), play)) for _ in range(4)]
            await until(lambda: ran(user)["other"] == 2, "two episodes there")
            node.process.kill()
            played = await asyncio.gather(*playing)
            assert not [error for error in played if isinstance(error, EnvironmentFailed)]
            assert [step.reward for step in played] == [1.0] * 4
            assert not pool.is_on_several_nodes
        finally:
            await pool.close()

    run(scenario)


def test_who_has_no_certificate_of_the_job_starts_nothing(node: Node, user: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "tls"
    make_job_identity(foreign, ["127.0.0.1", "localhost"])
    stranger = Certificates(foreign / "ca.pem", foreign / "cert.pem", foreign / "key.pem")

    async def scenario() -> None:
        with pytest.raises(OSError, match="does not answer"):
            await OtherNode("node 1", node.where, 1, Caller(stranger)).open("forge_hpc.rewards.worker")
        with pytest.raises(OSError, match="no worker: os"):
            await node.place.open("os")
        assert await node.place.answers()

    run(scenario)
    assert not node.workers()


def test_an_episode_whose_process_died_begins_again_on_another_node(node: Node, user: Path) -> None:
    config = Config(reward=[], environment=EnvironmentConfig(name=f"{user}:Talk", timeout_s=60.0))

    async def scenario() -> None:
        pool = await EnvironmentPool(config, num_workers=1, others=[node.place]).start()
        admission, slots, prompt = Admission(config, pool), Slots(lambda: None), Prompt(0, "", [], "")
        places: list[Any] = []

        async def play(away_from: Any) -> Any:
            async with pool.open(away_from) as environment:
                places.append(environment._host.place)
                await environment.reset(prompt)
                return await environment.step("long")

        try:
            await until(lambda: pool.is_on_several_nodes, "environments on the other node")
            async with (
                pool.open(),
                pool.open(),
                pool.open(),
            ):  # two on this node, so that an episode begins on the other
                playing = asyncio.create_task(admission.admit(prompt, Slot(slots), play))
                await until(lambda: ran(user)["other"] == 1, "an episode there")
                node.workers()[0].kill()
                assert (await playing).reward == 1.0
            assert places[0] is node.place and places[1] is not node.place, "its node may be going down"
        finally:
            await pool.close()

    run(scenario)
