"""Reward for a response in the form that was asked for."""

from __future__ import annotations

import re
from typing import Any

from forge_hpc.rewards.answers import after_opened_tag

_TAG = re.compile(r"</?(?:think|answer)>")
_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


class FormatReward:
    """1.0 where the whole response has the form, apart from white space around it, else 0.0.

    The form is ``<think>…</think><answer>…</answer>``: each tag once, neither block empty, nothing but white space
    around them (the format reward of DeepSeek-R1, https://arxiv.org/abs/2501.12948). Where the prompt ends in
    ``<think>`` the response begins inside.

    Args:
        pattern: a regular expression for the whole response instead; ``.`` matches line breaks too.
    Raises ValueError for a pattern that is none.
    """

    def __init__(self, pattern: str | None = None) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        if self._pattern is not None:
            return float(self._pattern.fullmatch(response.strip()) is not None)
        return float(_thinks_then_answers(after_opened_tag(prompt, response, "think")))


def _thinks_then_answers(text: str) -> bool:
    tags = list(_TAG.finditer(text))
    if [tag.group() for tag in tags] != _ORDER:
        return False
    ends = [0] + [tag.end() for tag in tags]
    starts = [tag.start() for tag in tags] + [len(text)]
    before, thought, between, answer, after = (bool(text[a:b].strip()) for a, b in zip(ends, starts, strict=True))
    return thought and answer and not (before or between or after)
