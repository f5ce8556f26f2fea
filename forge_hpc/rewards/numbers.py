r"""Numbers as people, JSON and LaTeX write them: ``1,234``, ``1\,234``, ``5e-05``, ``6.02 \times 10^{23}``, ``½``.

Values are exact (``Fraction``). A comma or a space stands in a number only before groups of three digits. Every
function is linear in the text's length.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 1000
"""What has more is no answer, and slow to read."""

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3}){1,30}(?!,?\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
_SPACED = r"(?:\d{1,3}(?:,\d{3}){1,30}(?:\.\d*)?|\d{1,3}(?: \d{3}){1,30}(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = (
    r"(?:[eE][-+]?\d{1,4}(?!\d|\.\d)|\s?(?:\\times|\\cdot|\*)\s?10\s?(?:\^|\*\*)\s?(?:[-+]?\d{1,4}|\{[-+]?\d{1,4}\}))"
)
_TEN = r"10(?:\^|\*\*)(?:[-+]?\d{1,4}|\{[-+]?\d{1,4}\})"
_CURRENCY = r"(?:\\?\$|[€£¥₹])?"

_WHOLE = re.compile(
    rf"(?P<sign>[-+]?)\s?{_CURRENCY}\s?(?P<inner>[-+]?)(?:"
    rf"(?P<ten>{_TEN})|(?P<whole>\d+)\s(?P<part>\d+)\s?/\s?(?P<of>\d+)|(?P<over>{_SPACED})\s?/\s?(?P<under>{_SPACED})"
    rf"|(?P<lead>\d*\.\d*)(?:\\overline\{{(?P<bar>\d+)\}}|\((?P<round>\d+)\))|(?P<plain>{_SPACED})(?P<power>{_POWER})?)"
)
_IN_TEXT = re.compile(
    rf"(?P<sign>[-+]\s?)?{_CURRENCY}(?<![\w.])(?:(?P<ten>{_TEN})|(?P<whole>\d+)\s(?P<part>\d+)/(?P<of>\d+)(?![\d/])"
    rf"|(?<!/)(?P<over>{_UNSIGNED})/(?P<under>\d+)(?![\d/.])|(?P<plain>{_UNSIGNED})(?P<power>{_POWER})?)"
)
_FRACTION = re.compile(r"(?:(\d)\s?)?\\[dtc]?frac\s?(?:\{\s?([-+]?[\d.,]+)\s?\}|(\d))\s?(?:\{\s?([\d.,]+)\s?\}|(\d))")
_GROUPS = re.compile(r"(?<=\d)(?:\\[,;:! ]|~|\{,\}|,\\!)(?=\d{3}(?!\d))")
_AS_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|\\quad|~|[\u2000-\u200a\u202f\u00a0]")
_SIGNS = str.maketrans({"\u2212": "-", "\u2012": "-", "\u2013": "-", "\uff0d": "-", "\u00d7": "*", "\u22c5": "*"})
_VULGAR = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}


class Number(NamedTuple):
    """A number in a text."""

    value: Fraction
    is_exact: bool
    """An integer or a fraction, no decimal."""
    text: str
    """How it is written in the tidy text."""
    end: int
    """Where it ends there."""


def tidy(text: str) -> str:
    """The text with one way to write signs, spaces and separators of thousands."""
    return _AS_SPACE.sub(" ", _GROUPS.sub(",", text.translate(_SIGNS).replace(r"\!", "")))


def with_plain_fractions(text: str) -> str:
    r"""A tidy text with ``1/2`` for ``\frac{1}{2}`` and ``1 1/2`` for ``1\frac12``: for numbers, as it turns
    ``\frac{1}{2}x`` into what may be 1/(2x)."""
    for sign, fraction in _VULGAR.items():
        if sign in text:
            text = re.sub(rf"(\d?)\s?{sign}", rf"\1 {fraction}", text)
    return _FRACTION.sub(_write_fraction, text)


def _write_fraction(match: re.Match[str]) -> str:
    whole, over, under = match[1], match[2] or match[3], match[4] or match[5]
    if whole and over[0] in "+-":
        return match.group()
    return f"{whole} {over}/{under}" if whole else f"{over}/{under}"


def plain_number(text: str) -> Number | None:
    """The number that is all of the text, apart from a sign of a currency and a full stop, else None."""
    if len(text) > 2 * MAX_DIGITS:
        return None
    text = with_plain_fractions(tidy(text)).strip()
    text = text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
    match = _WHOLE.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    return _number(match, negative="-" in match["sign"] + match["inner"])


def leading_number(text: str) -> tuple[Number, str] | None:
    """The number that a tidy text with plain fractions begins with, and what follows it; None where there is none."""
    match = _WHOLE.match(text)
    if match is None or (match["sign"] and match["inner"]):
        return None
    number = _number(match, negative="-" in match["sign"] + match["inner"])
    return None if number is None else (number, text[match.end() :])


def numbers(text: str) -> list[Number]:
    """All numbers of the text. A hyphen after a word, a digit or a bracket is no sign; digits in a word are none."""
    text = with_plain_fractions(tidy(text))
    return [number for match in _IN_TEXT.finditer(text) if (number := _found(match))]


def first_number(text: str) -> Number | None:
    """The first of ``numbers``."""
    return next(filter(None, map(_found, _IN_TEXT.finditer(tidy(text)))), None)


def last_number(text: str) -> Number | None:
    """The last of ``numbers``."""
    return last_in(with_plain_fractions(tidy(text)))


def last_in(text: str) -> Number | None:
    """The last number of a tidy text, without the fractions of LaTeX."""
    return next(filter(None, map(_found, reversed(list(_IN_TEXT.finditer(text))))), None)


def _found(match: re.Match[str]) -> Number | None:
    sign = match["sign"] or ""
    before = match.string[max(0, match.start() - 8) : match.start()]
    if sign.endswith(" "):
        before = before.rstrip()
    glued = before[-1:].isalnum() or before[-1:] in tuple(")]}%-+")
    return _number(match, negative=sign[:1] == "-" and not glued)


def same_number(wanted: Number, given: Number, tolerance: Fraction) -> bool:
    """Whether the two are the same: exactly where both are exact and one is no integer, else within ``tolerance`` times
    the wanted one's size, or ``tolerance`` where that is above 1. So 9e-7 is not 3e-7, and 12345678 not 12345679."""
    if wanted.value == given.value:
        return True
    if wanted.is_exact and given.is_exact and not wanted.value.denominator == given.value.denominator == 1:
        return False
    return abs(wanted.value - given.value) <= tolerance * min(Fraction(1), abs(wanted.value))


def as_tolerance(tolerance: float) -> Fraction:
    """A tolerance of the configuration, as the decimal that was written there. Raises ValueError below 0 or NaN."""
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance={tolerance} must be 0 or more")
    return Fraction(str(tolerance))


def _number(match: re.Match[str], *, negative: bool) -> Number | None:
    if match.end() - match.start() > MAX_DIGITS:
        return None
    groups = match.groupdict()
    try:
        value, is_exact = _value(groups)
    except ZeroDivisionError:
        return None
    text = ("-" if negative else "") + match.group().lstrip("+- ")
    return Number(-value if negative else value, is_exact, text, match.end())


def _value(part: dict[str, str | None]) -> tuple[Fraction, bool]:
    if ten := part["ten"]:
        return Fraction(10) ** int(ten[2:].lstrip("^* ").strip("{}")), True
    if part["whole"]:
        return int(part["whole"]) + Fraction(int(part["part"] or 0), int(part["of"] or 0)), True
    if part["over"]:
        over, under = _decimal(part["over"]), _decimal(part["under"] or "")
        return over / under, "." not in part["over"] + (part["under"] or "")
    repeating = part.get("bar") or part.get("round")
    if repeating:
        lead = part["lead"] or ""
        places = len(lead.partition(".")[2])
        start = Fraction(lead) if lead != "." else Fraction(0)
        return start + Fraction(int(repeating), (10 ** len(repeating) - 1) * 10**places), True
    value = _decimal(part["plain"] or "")
    power = part["power"]
    if not power:
        return value, "." not in (part["plain"] or "")
    exponent = int(re.split(r"[eE]|\^|\*\*", power)[-1].strip(" {}"))
    return value * Fraction(10) ** exponent, False


def _decimal(digits: str) -> Fraction:
    return Fraction(Decimal(digits.replace(",", "").replace(" ", "").rstrip(".")))
