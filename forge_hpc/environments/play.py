"""An environment played by hand: ``forge-hpc env``. You are the policy; no model and no run are needed.

A line on the standard input is a response; one of several lines stands between lines of three double quotes. So a file
of responses plays an episode too: ``forge-hpc env environment.name=guessing < responses.txt``.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import PromptStream, evaluation_prompts
from forge_hpc.data.source import load_eval_examples
from forge_hpc.data.tool_calls import HERMES
from forge_hpc.data.types import Prompt
from forge_hpc.environments.base import Opening, Response, Step
from forge_hpc.environments.pool import EnvironmentFailed, EnvironmentPool

_QUOTES = '"""'


def play(config: Config, number: int, held_out: bool) -> int:
    """One episode of the prompt ``number`` of the run's training or held-out prompts. Returns the exit code.

    Raises UserError where there is no such prompt, or the environment cannot be loaded.
    """
    prompt = find_prompt(config, number, held_out)
    config.environment.max_open_episodes = 1  # the second one begins when the first one's session is over
    try:
        return asyncio.run(_play(config, prompt))
    except EnvironmentFailed as error:
        print(f"error: {error}", file=sys.stderr)
        print("hint: in a run this costs the episode, which is counted and left out", file=sys.stderr)
        return 1


def find_prompt(config: Config, number: int, held_out: bool) -> Prompt:
    """The prompt as a run has it, but for its tokens. Raises UserError where the data hold too few."""
    if not held_out:
        return PromptStream(open_sources(config), _NoTokenizer(), config).take(number + 1)[-1]
    examples = load_eval_examples(config.data, config.seed)
    prompts = evaluation_prompts(examples, _NoTokenizer(), config, number + 1)
    if len(prompts) <= number:
        raise UserError(f"there are {len(prompts)} held-out prompts, none with number {number}", "count from 0")
    return prompts[number]


async def _play(config: Config, prompt: Prompt) -> int:
    pool = await EnvironmentPool(config, num_workers=1).start()
    try:
        if pool.is_agent:
            raise UserError(
                f"{config.environment.name} is an agent, which plays by itself",
                "point it at any OpenAI-compatible server: its function takes base_url and api_key",
            )
        async with pool.open() as environment:
            first = await environment.reset(prompt)
        async with pool.open() as environment:
            opening = await environment.reset(prompt)
            _show(f"prompt {prompt.position}, seed {prompt.seed}", _text(opening, prompt))
            if opening != first:
                print(
                    "warning: a second episode of this prompt opens differently, and a run compares them with each "
                    "other: draw what is random from prompt.seed"
                )
            return await _talk(config, environment)
    finally:
        await pool.close()


async def _talk(config: Config, environment: Any) -> int:
    rewards: list[float] = []
    step = Step()
    for turn in range(1, config.environment.max_turns + 1):
        response = _read(f"response {turn}> ")
        if response is None:
            print(f"\nend of the input: {_total(rewards)}, not done")
            return 0
        step = await environment.step(Response(response, tools=HERMES))
        rewards += [] if step.reward is None else [step.reward]
        info = f", info {json.dumps(step.info, ensure_ascii=False)}" if step.info else ""
        _show(f"{step.role}, reward {'none' if step.reward is None else f'{step.reward:g}'}{info}", step.observation)
        if step.done:
            break
    print(f"{'done' if step.done else 'not done, and environment.max_turns reached'}: {_total(rewards)}, {turn} turns")
    return 0


def _read(label: str) -> str | None:
    """The next response; None at the end of the input."""
    if sys.stdin.isatty():
        print(label, end="", flush=True)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio's would wait for the line
    try:
        line = sys.stdin.readline()
        if line.strip() != _QUOTES:
            return line.removesuffix("\n") if line else None
        lines = []
        while (line := sys.stdin.readline()) and line.strip() != _QUOTES:
            lines.append(line)
        return "".join(lines).removesuffix("\n")
    except KeyboardInterrupt:
        return None
    finally:
        signal.signal(signal.SIGINT, handler)


def _text(opening: Opening, prompt: Prompt) -> str:
    if isinstance(opening, dict):
        tools = "".join(f"[tool] {json.dumps(tool['function'], ensure_ascii=False)}\n" for tool in opening["tools"])
        return tools + _text(opening.get("messages"), prompt)
    if opening is None:
        return prompt.question
    return opening if isinstance(opening, str) else "\n".join(f"[{m['role']}] {m['content']}" for m in opening)


def _show(title: str, text: str) -> None:
    print(f"--- {title}\n{text}", flush=True)


def _total(rewards: list[float]) -> str:
    return f"reward {sum(rewards):g}" if rewards else "no reward"


class _NoTokenizer:
    """Stands in where only the text of prompts matters: every prompt fits, chats are their messages' contents."""

    chat_template = "contents"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(message["content"] for message in messages)

    def encode(self, text: str, **_: Any) -> list[int]:
        return []
