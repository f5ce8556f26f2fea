"""Environments of the ``verifiers`` package (0.4) as agents, unchanged: its harness asks the run's endpoint.

    environment:
      name: forge_hpc.environments.verifiers:episode
      venv: harness # where verifiers is installed
      args: {taskset: {id: my-taskset}, agent: {...}} # verifiers' own [env] block

Their tasks are the run's prompts: ``python -m forge_hpc.environments.verifiers my-taskset > tasks.jsonl`` writes them.
All that an episode starts (the server that stands between harness and endpoint, tool servers) ends with it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from forge_hpc.config.errors import UserError, print_error

_LOCK = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


async def episode(base_url: str, api_key: str, example: Mapping[str, Any], **env: Any) -> dict[str, Any]:
    """One episode of the task in ``example``; the reward is that of its one trace that trains.

    Args:
        env: verifiers' ``[env]`` block: ``taskset``, ``agent`` and whatever its class of environments has.
    """
    playing = asyncio.run_coroutine_threadsafe(_play(base_url, api_key, example, env), _shared_loop())
    return await asyncio.wrap_future(playing)


def check(**env: Any) -> None:
    """Raise UserError where verifiers cannot make the environment."""
    with _importing("name the virtual environment that has it: environment.venv"):
        from verifiers.v1.utils.loaders import load_environment, resolve_env_config
    try:
        load_environment(resolve_env_config(dict(env)))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"verifiers: {error}", "environment.args is verifiers' [env] block") from None


episode.check = check  # type: ignore[attr-defined]


async def _play(base_url: str, api_key: str, example: Mapping[str, Any], env: Mapping[str, Any]) -> dict[str, Any]:
    from verifiers.v1 import EvalClientConfig, ModelContext
    from verifiers.v1.utils.loaders import load_environment, resolve_env_config

    environment = load_environment(resolve_env_config(dict(env)))
    kind = type(environment.taskset).task_type()
    data = kind.data_type().model_validate_json(example["task"])
    task = kind(data, environment.config.taskset.task)
    # A client's own key would have to stand in the process's environment, which all episodes share.
    address = address_of_episode(base_url, api_key)
    context = ModelContext(model="policy", client=EvalClientConfig(base_url=address, api_key_var="NO_KEY"))
    async with environment.serving():  # anew for each: it keeps a client for every address that it has seen
        [slot] = environment.slots(task)
        played = await environment.run_slot(slot, context)
    if not played.ok:
        errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
        raise RuntimeError("; ".join(f"{error.type}: {error.message}" for error in errors) or "the episode is not ok")
    trained = [trace for trace in played.traces if trace.agent.trainable]
    if len(trained) != 1:
        raise ValueError(f"{len(trained)} traces of the episode are to train: it has no one reward")
    [trace] = trained
    rewards = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
    return {"reward": trace.reward, "info": {"rewards": rewards, "metrics": dict(trace.metrics)}}


def address_of_episode(base_url: str, api_key: str) -> str:
    """The endpoint's address with an episode's key in it."""
    return f"{base_url.removesuffix('/v1')}/episode/{api_key}/v1"  # a host may be called v100-3


def _shared_loop() -> asyncio.AbstractEventLoop:
    """One for all episodes of a process, on a thread of its own: locks of verifiers' classes belong to a loop."""
    global _loop
    with _LOCK:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, daemon=True).start()
        return _loop


@contextlib.contextmanager
def _importing(hint: str) -> Iterator[None]:
    """Around an import of verifiers. Raises UserError where there is none."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"verifiers 0.4 cannot be imported: {error}", hint) from None


def _tasks(taskset: str, first: int) -> Any:
    """The tasks of a taskset, by its id or its block, from the first one wanted. Raises UserError."""
    with _importing("call the Python of the virtual environment that has it"):
        from verifiers.v1.utils.loaders import load_taskset, taskset_config_type
    try:
        block = json.loads(taskset) if taskset.startswith("{") else {"id": taskset}
        return load_taskset(taskset_config_type(block["id"]).model_validate(block)).skip(first)
    except KeyError as error:
        raise UserError(f"the taskset has no {error}", 'its block is as {"id": "my-taskset"}') from None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"verifiers: {error}", "give the id of an installed taskset, or its block as JSON") from None


def main() -> int:
    """Write the tasks of a taskset as prompts, one JSON object a line."""
    parser = argparse.ArgumentParser(prog="python -m forge_hpc.environments.verifiers", description=main.__doc__)
    parser.add_argument("taskset", help='its id, or its block as JSON: \'{"id": "my-taskset", "difficulty": 2}\'')
    parser.add_argument("--first", type=int, default=0, help="the first one to write (0)")
    parser.add_argument("--num", type=int, help="how many; all, where the taskset ends")
    args = parser.parse_args()
    try:
        tasks = _tasks(args.taskset, args.first)
    except UserError as error:
        return print_error(error)
    if args.num is None and not tasks.bounded:
        parser.error("the taskset has no end: say how many with --num")
    for task in tasks if args.num is None else tasks.take(args.num):
        print(json.dumps({"question": task.data.prompt_text, "task": task.data.model_dump_json(exclude_none=True)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
