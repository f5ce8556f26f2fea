"""Reward for the right final number, as GSM8K writes it (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_MARK = "####"


def final_number(text: str) -> Decimal | None:
    """The first number after the last ``####``, else the last number of the text, else None.

    Thousands separators and a dollar sign are understood. A hyphen between two words or digits is no sign.
    """
    if _MARK in text:
        match = _NUMBER.search(text.rsplit(_MARK, 1)[1])
        if match:
            return _value(match)
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _value(last)


def _value(match: re.Match[str]) -> Decimal:
    digits = match.group().replace(",", "").replace("$", "")
    glued = match.start() > 0 and match.string[match.start() - 1].isalnum()
    return Decimal(digits.lstrip("+-") if glued else digits)


def gsm8k_reward(prompt: str, response: str, target: str, **fields: Any) -> float:
    """1.0 where the final number of the response equals that of the target, else 0.0.

    Raises ValueError where the target holds no number.
    """
    wanted = final_number(target)
    if wanted is None:
        raise ValueError(f"the target holds no number: {target[:80]!r}")
    return float(final_number(response) == wanted)
