"""Reward for thinking before answering."""

from __future__ import annotations

import re
from typing import Any

from forge_hpc.rewards.answers import after_opened_tag


class ThinkingReward:
    """``full_reward`` for a ``<think>…</think>`` that holds something, ``partial_reward`` for a stray tag, else 0.

    Case and white space within the tags do not matter. Where the prompt ends in ``<think>`` the response begins inside.

    Args:
        partial_reward: for a tag without its counterpart, or a block of nothing but white space.
        full_reward: for a block that is closed and not empty.
        tag: name of the tag.
    """

    def __init__(self, partial_reward: float = 0.2, full_reward: float = 1.0, tag: str = "think") -> None:
        self.partial_reward = partial_reward
        self.full_reward = full_reward
        self.tag = tag
        self._tag = re.compile(rf"<\s*(/?)\s*{re.escape(tag)}\s*>", re.IGNORECASE)

    def __call__(self, prompt: str, response: str, target: str | None = None, **fields: Any) -> float:
        response = after_opened_tag(prompt, response or "", self.tag)
        begin, any_tag = -1, False  # begin: where the open block's text does, -1 outside
        for tag in self._tag.finditer(response):
            any_tag = True
            if not tag[1]:
                begin = tag.end() if begin < 0 else begin
            elif begin >= 0:
                if response[begin : tag.start()].strip():
                    return self.full_reward
                begin = -1
        return self.partial_reward if any_tag else 0.0
