"""Finds the answer in a text: tags, the mark of GSM8K, numbers. Every function is linear in the text's length."""

from __future__ import annotations

import re
from decimal import Decimal

_MARK = "####"
_NUMBER = re.compile(r"[-+]?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_PLAIN = re.compile(r"\s*([-+]?)\s*\$?\s*([-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)\s*\.?\s*")


def after_opened_tag(prompt: str, response: str, tag: str) -> str:
    """The response, with ``<tag>`` before it where the prompt ends in one: some chat templates open it themselves."""
    return f"<{tag}>{response}" if prompt.rstrip().endswith(f"<{tag}>") else response


def marked_answer(text: str) -> str | None:
    """What stands in the last ``<answer>…</answer>``, else in the line after the last ``####``, else None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    if start >= 0:
        return text[start + len("<answer>") : end].strip()
    if _MARK in text:
        line, *_ = text.rsplit(_MARK, 1)[1].strip().split("\n", 1)
        return line.strip()
    return None


def plain_number(text: str) -> Decimal | None:
    """The number that is all of the text, apart from ``$``, thousands separators and a full stop, else None."""
    match = _PLAIN.fullmatch(text)
    if match is None or (match[1] and match[2][0] in "+-"):
        return None
    return Decimal(match[1] + match[2].replace(",", ""))


def numbers(text: str) -> list[Decimal]:
    """All numbers of the text. A hyphen between two words or digits is no sign."""
    return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> Decimal:
    digits = match.group().replace(",", "").replace("$", "")
    glued = match.start() > 0 and match.string[match.start() - 1].isalnum()
    return Decimal(digits.lstrip("+-") if glued else digits)
