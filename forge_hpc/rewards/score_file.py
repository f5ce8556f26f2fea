"""``forge-hpc reward``: scores a JSONL of prompts, responses and targets without a run."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.fields import target_text
from forge_hpc.data.types import Completion, Prompt
from forge_hpc.rewards.errors import RewardError
from forge_hpc.rewards.pool import RewardPool

_RESPONSES = ("response", "completion")
_MAX_CHARS = 60
_AT_ONCE = 64


def score_files(files: Sequence[Path], config: Config, as_json: bool = False) -> int:
    """Score each line of `files` by the rewards of `config` and print what each reward read, its value and the target;
    at the end the means. Returns 1 where a reward failed for a line.

    A line has a ``response`` (or ``completion``, as in rollouts.jsonl), and the fields that the configuration names for
    prompt and target (or ``prompt`` and ``target``); all others reach the rewards.

    Raises:
        UserError: a file or a line cannot be read, or a reward cannot be loaded.
    """
    rows = [row for file in files for row in _read(file, config)]
    if not rows:
        raise UserError(f"there is no line in {', '.join(map(str, files))}", "write one JSON object a line")
    logger = logging.getLogger("forge_hpc.rewards.pool")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each failure has a line of its own here
    try:
        return asyncio.run(_score(rows, config, as_json))
    finally:
        logger.setLevel(level)


_Row = tuple[str, Prompt, Completion]


async def _score(rows: Sequence[_Row], config: Config, as_json: bool) -> int:
    sums: dict[str, list[float]] = {}
    num_failed = 0
    gate = asyncio.Semaphore(_AT_ONCE)
    async with RewardPool(config, with_model=True) as pool:

        async def judge(prompt: Prompt, completion: Completion) -> Any:
            async with gate:
                return await pool.judge(prompt, completion, show=True)

        tasks = [asyncio.create_task(judge(prompt, completion)) for _, prompt, completion in rows]
        try:
            for (place, prompt, _), task in zip(rows, tasks, strict=True):
                record: dict[str, Any] = {"line": place, "target": prompt.target}
                try:
                    judgement = await task
                except RewardError as error:
                    num_failed += 1
                    record["error"] = str(error)
                else:
                    record |= {"reward": judgement.total, "rewards": judgement.terms, "read": judgement.read}
                    for name, value in {"reward": judgement.total, **judgement.terms}.items():
                        sums.setdefault(name, []).append(value)
                print(json.dumps(record, ensure_ascii=False) if as_json else _describe(record), flush=True)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    if not as_json:
        means = "  ".join(f"{name} {sum(values) / len(values):.4g}" for name, values in sums.items())
        print(f"mean of {len(rows) - num_failed}, {num_failed} failed: {means}".rstrip(": "))
    return 1 if num_failed else 0


def _describe(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{record['line']}  failed: {record['error']}"
    terms = "  ".join(
        f"{name} {value:.4g}"
        + (f" read {_short(record['read'][name])}" if record["read"].get(name) is not None else "")
        for name, value in record["rewards"].items()
    )
    return f"{record['line']}  {record['reward']:.4g}  {terms}  target {_short(record['target'])}"


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= _MAX_CHARS else text[: _MAX_CHARS - 1] + "…", ensure_ascii=False)


def _read(file: Path, config: Config) -> Iterator[_Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}", "name a JSONL file, such as RUN_DIR/rollouts.jsonl") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(f"{file.name}:{number}", line, config)


def _row(place: str, line: str, config: Config) -> _Row:
    try:
        row = json.loads(line, parse_float=str)  # 5e-05 stays as it is written
    except ValueError as error:
        raise UserError(f"{place} is no JSON: {error}", "write one JSON object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place} is no JSON object", 'write {"prompt": …, "response": …, "target": …}')
    response = next((row.pop(name) for name in _RESPONSES if name in row), None)
    if not isinstance(response, str):
        raise UserError(f"{place} has no response", f"it is a text in the field {' or '.join(_RESPONSES)}")
    prompt, target = _take(row, config.data.prompt_field, "prompt"), _take(row, config.data.target_field, "target")
    fields = {name: value for name, value in row.items() if name not in ("num_tokens", "finish_reason")}
    num_tokens = row.get("num_tokens", len(response.split()))
    completion = Completion(0, response, [0] * int(num_tokens), [], str(row.get("finish_reason", "stop")), (0, 0))
    return place, Prompt(0, prompt, [], target, fields), completion


def _take(row: dict[str, Any], *names: str | None) -> str:
    """The text of the first of the fields that is there."""
    for name in names:
        if name in row:
            return target_text(row.pop(name))
    return ""
