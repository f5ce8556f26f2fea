"""The pool of reward processes: nothing that a reward does stalls it, corrupts it, or is left behind by it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from one_group import make_group
from runs import wait_for

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.config.user_code import load_user_code
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardError, RewardPool
from forge_hpc.rewards.limit import CEILING_S, FACTOR, FLOOR_S, CallLimit
from forge_hpc.rollouts.figures import measure

BAD = Path(__file__).parent / "bad_rewards.py"
FAR = 60.0
"""Seconds: a limit that no test comes near."""


def prompt(position: int = 0, **fields: Any) -> Prompt:
    return Prompt(position, "72+85=", [1, 2], "58", fields)


def completion(text: str) -> Completion:
    return Completion(0, text, [3], [-0.1], "stop", (0, 0))


def run(reward: RewardConfig, scenario: Callable[[RewardPool], Awaitable[Any]], num_workers: int | None = 1) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(FAR), RewardPool(Config(reward=[reward]), num_workers) as pool:
            return await scenario(pool)

    return asyncio.run(main())


def bad(name: str = "misbehave", timeout_s: float | None = FAR, **options: Any) -> RewardConfig:
    return RewardConfig(f"{BAD}:{name}", timeout_s=timeout_s, **options)


async def value(pool: RewardPool, text: str, position: int = 0, **fields: Any) -> float:
    return (await pool.score(prompt(position, **fields), completion(text)))[0]


async def failure(pool: RewardPool, text: str, **fields: Any) -> RewardError:
    with pytest.raises(RewardError) as error:
        await value(pool, text, **fields)
    return error.value


FAILURES = [
    ("raise", "raised", "KeyError: 'nothing there' .*bad_rewards.py:"),
    ("none", "raised", "TypeError"),
    ("nan", "not_finite", "is nan"),
    ("exit", "died", "ended with exit status 3"),
    ("sys_exit", "died", "ended with exit status 4"),
    ("kill", "died", "was killed by SIGKILL .out of memory"),
    ("kill_group", "died", "was killed by SIGKILL"),
    ("kill_keeper", "died", "was killed by SIGKILL"),
    ("segfault", "died", "was killed by SIGSEGV"),
    ("write_everywhere", "died", "wrote into the pool's own pipe"),
]


def test_whatever_a_reward_does_costs_its_episode_alone():
    async def scenario(pool: RewardPool) -> None:
        for text, kind, message in FAILURES:
            error = await failure(pool, text)
            assert error.kind == kind, error
            assert pytest.raises(RewardError, match=message).matches(error), error
            assert await value(pool, "1") == 1.0, text

    run(bad(), scenario)


@pytest.mark.parametrize("text", ["hang", "ignore_sigterm", "stop"])
def test_a_call_that_does_not_end_is_ended(text: str):
    async def scenario(pool: RewardPool) -> None:
        error = await failure(pool, text)
        assert error.kind == "timeout" and "took longer than 0.5 s" in str(error)
        assert await value(pool, "1") == 1.0

    run(bad(timeout_s=0.5), scenario)


def test_a_reward_that_allocates_without_end_meets_its_limit():
    async def scenario(pool: RewardPool) -> None:
        assert (await failure(pool, "allocate")).kind == "memory"
        assert await value(pool, "1") == 1.0

    run(bad(memory_gib=0.5), scenario)


def test_what_a_reward_prints_does_not_disturb_the_answers():
    async def scenario(pool: RewardPool) -> None:
        assert await value(pool, "print") == 1.0
        assert await value(pool, "2") == 2.0

    run(bad(), scenario)


def test_a_child_that_comes_back_from_the_call_answers_nothing():
    async def scenario(pool: RewardPool) -> None:
        for number in range(4):
            assert await value(pool, "return_twice") == 1.0
            assert await value(pool, str(number)) == number

    run(bad(), scenario)


@pytest.mark.parametrize(
    ("text", "kind"), [("child_and_return", None), ("child_and_exit", "died"), ("child_and_hang", "timeout")]
)
def test_children_of_a_reward_do_not_outlive_its_process(tmp_path: Path, text: str, kind: str | None):
    file = tmp_path / "pid"

    def alive() -> bool:
        return psutil.pid_exists(int(file.read_text()))

    async def scenario(pool: RewardPool) -> None:
        if kind is None:
            assert await value(pool, text, pid_file=str(file)) == 1.0
            assert alive()  # it may be of use to the next call
        else:
            assert (await failure(pool, text, pid_file=str(file))).kind == kind
            assert await value(pool, "1") == 1.0
            await asyncio.to_thread(wait_for, lambda: not alive(), "the end of the child", 30)

    run(bad(timeout_s=2), scenario)
    assert not alive()


def test_nothing_is_left_of_a_pool_whose_process_is_killed(tmp_path: Path):
    script = f"""
import asyncio
from forge_hpc.config.schema import Config, RewardConfig
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards import RewardPool

async def main():
    async with RewardPool(Config(reward=[RewardConfig({f"{BAD}:misbehave"!r})]), 1) as pool:
        fields = {{"pid_file": {str(tmp_path / "pid")!r}}}
        await pool.score(Prompt(0, "", [], "", fields), Completion(0, "child_and_return", [3], [0], "stop", (0, 0)))
        await pool.score(Prompt(0, "", [], "", fields), Completion(0, "hang", [3], [0], "stop", (0, 0)))

asyncio.run(main())
"""
    (tmp_path / "script.py").write_text(script)
    process = start(tmp_path / "script.py")
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the child", 60)
        below = process.children(recursive=True)
        child = psutil.Process(int((tmp_path / "pid").read_text()))
        assert len(below) >= 2  # the keeper and the worker
    finally:
        process.kill()
    process.wait(30)
    wait_for(lambda: not any(map(is_alive, [*below, child])), "the end of all that it started", 30)


def test_hanging_calls_hold_up_neither_other_workers_nor_other_rewards():
    """Events, no clock: all others are done while three of four workers still hang."""

    async def main() -> None:
        config = Config(reward=[bad(), RewardConfig("exact")])
        async with asyncio.timeout(FAR), RewardPool(config, num_workers=4) as pool:
            hanging = [asyncio.create_task(value(pool, "hang")) for _ in range(3)]
            values = await asyncio.gather(*(value(pool, "58") for _ in range(200)))
            assert values == [59.0] * 200
            assert not any(task.done() for task in hanging)
            for task in hanging:
                task.cancel()
            await asyncio.gather(*hanging, return_exceptions=True)

    asyncio.run(main())


def test_where_all_workers_hang_the_others_wait_for_the_limit_and_no_longer():
    async def scenario(pool: RewardPool) -> None:
        texts = ["hang"] * 4 + ["1"] * 8
        results = await asyncio.gather(*(value(pool, text) for text in texts), return_exceptions=True)
        assert [isinstance(r, RewardError) and r.kind for r in results[:4]] == ["timeout"] * 4
        assert results[4:] == [1.0] * 8

    run(bad(timeout_s=0.5), scenario, num_workers=2)


def test_the_limit_of_a_call_is_learned_from_those_that_gave_a_value():
    limit = CallLimit()
    for is_first in [True] * 2 + [False] * 13:
        limit.learn(0.001, is_first)
        assert limit.seconds(False) == limit.seconds(True) == CEILING_S
    limit.learn(0.3, is_first=True)
    assert limit.seconds(False) == limit.seconds(True) == 0.3 * FACTOR
    for _ in range(3):
        limit.learn(0.001, is_first=False)
    assert (limit.seconds(False), limit.seconds(True)) == (FLOOR_S, 0.3 * FACTOR)
    assert limit.describe(FLOOR_S) == "1 s, a limit learned from its other calls (timeout_s sets one)"
    limit.learn(7, is_first=False)
    assert limit.seconds(False) == limit.seconds(True) == CEILING_S
    assert limit.describe(CEILING_S) == "10 s, the default (timeout_s sets one)"
    for _ in range(1000):  # one that was slow is forgotten after so many
        limit.learn(0.001, is_first=False)
    assert (limit.seconds(False), limit.seconds(True)) == (FLOOR_S, 0.3 * FACTOR)
    eager = CallLimit()  # all that is known comes from first calls, until one of the others turns out to be slow
    for _ in range(20):
        eager.learn(0.001, is_first=True)
    assert eager.seconds(False) == FLOOR_S
    eager.learn(3, is_first=False)
    assert eager.seconds(False) == eager.seconds(True) == CEILING_S
    many = CallLimit(concurrency=64)
    for _ in range(20):
        many.learn(0.1, is_first=False)
    assert many.seconds(False) == pytest.approx(6.4)
    fixed = CallLimit(30.0)
    for _ in range(20):
        fixed.learn(0.001, is_first=False)
    assert fixed.seconds(False) == fixed.seconds(True) == 30.0 and fixed.describe(30.0) == "30 s"


@pytest.mark.parametrize(("name", "num_workers"), [("misbehave", 2), ("misbehave_async", 1)])
def test_a_hanging_call_of_a_quick_reward_is_given_up_long_before_the_ceiling(name: str, num_workers: int):
    """By the limit that its error names. Of several at most one is watched, beside the other workers."""

    async def scenario(pool: RewardPool) -> None:
        workers: set[float] = set()
        while len(workers) < num_workers:  # the second one takes calls when it is up
            workers.add(await value(pool, "pid"))
        await asyncio.gather(*(value(pool, "1") for _ in range(40)))
        num_processes = len(psutil.Process().children(recursive=True))
        results = await asyncio.gather(*(value(pool, text) for text in ["hang"] * 4), return_exceptions=True)
        for error in results:
            assert isinstance(error, RewardError) and error.kind == "timeout", error
            given = re.search(r"longer than (\S+) s, a limit learned", str(error))
            assert given and FLOOR_S <= float(given[1]) < CEILING_S, error
        await asyncio.gather(*(value(pool, "1") for _ in range(8)))
        most = num_processes + 2  # a keeper and its worker
        children = psutil.Process().children
        await asyncio.to_thread(wait_for, lambda: len(children(recursive=True)) <= most, "the end of the others", 60)

    run(bad(name, timeout_s=None), scenario, num_workers)


@pytest.mark.parametrize("name", ["misbehave", "misbehave_async"])
def test_a_reward_that_becomes_slow_gets_the_time_it_needs(caplog: pytest.LogCaptureFixture, name: str):
    async def scenario(pool: RewardPool) -> None:
        for _ in range(20):
            await value(pool, "1")
        assert (await failure(pool, "slow")).kind == "timeout"
        told = "that was given up took 2"
        await asyncio.to_thread(wait_for, lambda: told in caplog.text, "the end of the call that was given up", 30)
        assert await value(pool, "slow") > 0

    run(bad(name, timeout_s=None), scenario)


def test_the_calls_of_an_async_reward_run_at_the_same_time():
    async def scenario(pool: RewardPool) -> list[float]:
        return await asyncio.gather(*(value(pool, "") for _ in range(64)))

    assert len(set(run(bad("meet"), scenario, num_workers=None))) == 1  # in one process


def test_an_async_call_that_hangs_or_raises_harms_none_of_its_neighbours():
    async def scenario(pool: RewardPool) -> None:
        texts = ["hang", "wait", "raise"] * 5
        results = await asyncio.gather(*(value(pool, text) for text in texts), return_exceptions=True)
        kinds = [r.kind if isinstance(r, RewardError) else None for r in results]
        assert kinds == ["timeout", None, "raised"] * 5
        assert {r for r in results if isinstance(r, float)} == {await value(pool, "")}  # its process lived on

    run(bad("misbehave_async", timeout_s=1), scenario)


@pytest.mark.parametrize(("text", "kind"), [("exit", "died"), ("block", "timeout"), ("cling", "timeout")])
def test_an_async_call_that_takes_its_process_down_is_found_out(text: str, kind: str):
    async def scenario(pool: RewardPool) -> None:
        texts = ["wait"] * 6 + [text] + ["wait"] * 6
        results = await asyncio.gather(*(value(pool, text) for text in texts), return_exceptions=True)
        assert isinstance(guilty := results.pop(6), RewardError) and guilty.kind == kind
        assert all(isinstance(result, float) for result in results)
        assert await value(pool, "") > 0

    run(bad("misbehave_async", timeout_s=1), scenario)


def test_a_class_is_made_once_with_its_arguments():
    async def scenario(pool: RewardPool) -> list[float]:
        return [await value(pool, "") for _ in range(3)]

    assert run(bad("Counting", args={"start": 10, "step": 2}), scenario) == [12, 14, 16]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{BAD}:Picky", "RuntimeError: not today"),
        (f"{BAD}:no_fields", "does not take \\*\\*fields"),
        (f"{BAD}:too_few", "too few arguments"),
        (f"{BAD}:nothing", "no function or class 'nothing'"),
        ("nowhere.py:f", "no such reward file"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("forge_hpc.rewards.exact:nothing", "no function or class 'nothing'"),
        ("broken:f", "SyntaxError"),
        ("needs:f", "nothing_of_that_name"),
        ("dies:f", "ended with exit status 3"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_told_at_the_start(tmp_path: Path, monkeypatch, name: str, message: str):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.chdir(tmp_path)

    async def scenario(pool: RewardPool) -> None:
        raise AssertionError("it started")

    with pytest.raises(UserError, match=message):
        run(RewardConfig(name), scenario)


def test_a_file_may_import_its_neighbours_which_hide_nothing_that_is_installed(tmp_path: Path):
    (tmp_path / "neighbour_of_mine.py").write_text("import json, yaml\nVALUE = len(json.dumps(yaml.safe_load('[1]')))")
    for name in ("json", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('taken for the real one')")
    code = "import neighbour_of_mine as n\ndef f(prompt, response, target, **fields): return n.VALUE"
    (tmp_path / "mine.py").write_text(code)
    assert run(RewardConfig(f"{tmp_path / 'mine.py'}:f"), lambda pool: value(pool, "")) == 3.0
    before = sys.path.copy()
    try:
        for kind in ("recipe", "loss", "environment"):
            assert load_user_code(f"{tmp_path / 'mine.py'}:f", kind)("", "", "") == 3
        assert sys.path == [*before, str(tmp_path)]
    finally:
        sys.path[:] = before


def test_wrong_arguments_of_a_reward_are_told_at_the_start():
    for reward in (bad("Counting", args={"strat": 1}), RewardConfig("repetition", args={"ngram_size": 0})):
        with pytest.raises(UserError, match="cannot be loaded: "):
            asyncio.run(RewardPool(Config(reward=[reward])).start())


def test_a_reward_that_cannot_be_loaded_again_fails_its_calls(tmp_path: Path):
    file = tmp_path / "fickle.py"
    file.write_text("import os\ndef f(prompt, response, target, **fields):\n    os._exit(3)\n")

    async def scenario(pool: RewardPool) -> float:
        file.write_text("import nothing_of_that_name\n")
        assert (await failure(pool, "")).kind == "died"
        for _ in range(2):
            error = await failure(pool, "")
            assert error.kind == "load" and "nothing_of_that_name" in str(error)
        file.write_text("def f(prompt, response, target, **fields):\n    return 1.0\n")
        for _ in range(3):  # each call that meets a failed start begins another one
            with contextlib.suppress(RewardError):
                return await value(pool, "")
        raise AssertionError("it never came back")

    assert run(RewardConfig(f"{file}:f"), scenario) == 1.0


def test_a_reward_that_never_works_ends_the_run_with_its_cause():
    async def scenario(pool: RewardPool) -> None:
        for number in range(100):
            with pytest.raises(RewardError):
                await value(pool, "raise", position=number // 8)

    with pytest.raises(RuntimeError, match=r"failed 32 times and never worked: .*KeyError: 'nothing there'"):
        run(bad(), scenario)


def test_a_prompt_that_no_reward_can_be_computed_for_ends_nothing():
    async def scenario(pool: RewardPool) -> None:
        for _ in range(40):
            await failure(pool, "raise")
        assert await value(pool, "1") == 1.0

    run(bad(), scenario)


def test_failures_of_a_step_are_counted_by_kind_and_the_first_of_each_is_logged(caplog: pytest.LogCaptureFixture):
    config = Config(reward=[bad(timeout_s=1)])

    async def main() -> dict[str, float]:
        async with RewardPool(config, num_workers=2) as pool:
            texts = ["1", "raise", "raise", "nan", "2", "hang", "exit"]
            group = await make_group(prompt(), [completion(text) for text in texts], pool, config)
            empty = await make_group(prompt(1), [Completion(0, "", [], [], "stop", (0, 0))], pool, config)
            assert [episode.reward for episode in group.episodes] == [1.0, 2.0]
            return measure([group, empty], step=1)

    with caplog.at_level(logging.WARNING, "forge_hpc.rewards"):
        figures = asyncio.run(main())
    failed = {key.partition("failed_")[2]: v for key, v in figures.items() if key.startswith("rewards/failed_")}
    counts = {
        "raised": 2,
        "not_finite": 1,
        "timeout": 1,
        "died": 1,
        "memory": 0,
        "load": 0,
        "empty": 1,
        "environment": 0,
        "logprobs": 0,
    }
    assert failed == counts
    assert figures["episodes/failed"] == 6
    assert sum("KeyError" in message for message in caplog.messages) == 1


def test_a_step_in_which_every_reward_failed_names_the_cause():
    config = Config(reward=[bad()])

    async def main() -> None:
        async with RewardPool(config, num_workers=1) as pool:
            measure([await make_group(prompt(), [completion("raise")] * 2, pool, config)], step=1)

    with pytest.raises(RuntimeError, match=r"all completions of step 1 failed, .*KeyError: 'nothing there'"):
        asyncio.run(main())


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def start(script: Path) -> psutil.Popen:
    return psutil.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
