r"""Whether two answers are the same, by their form: letters of choices, numbers with units, lists, equations, words.

What is left is an expression, which the caller compares as mathematics. The forms come first because a reader of LaTeX
has no notion of them: it takes ``1,2`` for a set and ``(1,2)`` for an interval, ``5 m`` and ``5 cm`` for 5, and
``east`` and ``seat`` for the same product of letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction

from forge_hpc.rewards.numbers import plain_number, tidy
from forge_hpc.rewards.quantities import quantity, same_quantity, without_unit

Compare = Callable[[str, str], bool]
"""Whether two expressions are equal as mathematics, the wanted one first."""

_MAX_LIST, _MAX_DEPTH = 64, 4

_WRAPPED = re.compile(
    r"(?:\$\$?(?P<dollar>[^$]+)\$\$?|\\\((?P<round>.+)\\\)|\\\[(?P<square>.+)\\\]|\*\*(?P<bold>[^*]+)\*\*|`(?P<code>[^`]+)`"
    r"|\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|displaystyle)\s?\{(?P<text>[^{}]*)\}|\{(?P<brace>[^{},]*)\}"
    r"|\"(?P<quote>[^\"]*)\")",
    re.DOTALL,
)
_LOOKS = re.compile(r"\\(?:approx|left|right|displaystyle|bigl?|bigr?|limits)(?![A-Za-z])")
_CHOICE = re.compile(r"\(?(?P<letter>[A-J])(?:\)|(?=[.:]\s*\S|\.?\s*\Z))(?P<rest>.*)", re.DOTALL)
_OPTION = re.compile(r"(?:option|choice|answer)\s+(?=\(?[A-Ja-j]\b)", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s?\{([^{}]*)\}")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([^()=]{0,20}\))?|\|?[A-Z]{2,3}\|?|\\(?:text|mathrm)\{[^{}]*\}"
    r"|\d{0,3}[a-w](?:\s?[+-]\s?\d{0,3}[a-w]){1,6})\s?\Z"
)
_EQUALS = re.compile(r"(?<![<>!:\\=])=(?!=)|\\in(?![a-z])")
_AND = re.compile(r"\s*(?:,|;)?\s*(?:\\(?:text|mathrm|quad)\s?\{\s?)?(?<![A-Za-z])(?:and|or)(?![A-Za-z])\s?\}?\s*")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'\u2019 .-]*")
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s?:\s?\d+(?:\.\d+)?)+")
_BASE = re.compile(r"(?P<digits>[0-9A-F]+)_\{?(?P<base>\d{1,2})\}?")


def clean(text: str) -> str:
    """An answer without what is put around it: dollars, bold, ``\\text{}``, a full stop."""
    text = _LOOKS.sub("", tidy(text)).strip()
    for _ in range(_MAX_DEPTH):
        bare = text[:-1].rstrip() if text[-1:] in (".", ",", ";") and text[-2:-1] != "." else text
        match = _WRAPPED.fullmatch(bare)
        inner = next((group for group in match.groups() if group is not None), "") if match else bare
        if inner.strip() == text:
            break
        text = inner.strip()
    return text


def same_answer(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int = 0) -> bool:
    """Whether ``given`` answers ``wanted``."""
    wanted, given = clean(wanted), clean(given)
    if not wanted or not given or depth > _MAX_DEPTH:
        return False
    if wanted == given:
        return True
    if letter := choice(wanted):
        return letter == choice(given, any_case=True)
    for same in (_same_numbers, _same_lists, _same_equations, _same_ratios, _same_bases, _same_words):
        verdict = same(wanted, given, tolerance, compare, depth)
        if verdict is not None:
            return verdict
    a, b = without_unit(wanted), without_unit(given)
    if a is None and b is None:
        return compare(wanted, given)
    if a is not None and b is not None and not a[1].fits(b[1]):
        return False
    return same_answer(a[0] if a else wanted, b[0] if b else given, tolerance, compare, depth + 1)


def choice(text: str, any_case: bool = False) -> str | None:
    """The letter of a choice: ``B``, ``(B)``, ``B.``, ``(B) 12``, ``\\text{B}``, ``Option B``; None for all else."""
    text = clean(_OPTION.sub("", clean(_TEXT.sub(r"\1", text))))
    if any_case and re.fullmatch(r"\(?[a-j]\)?\.?", text):
        return text.strip("().").upper()
    match = _CHOICE.fullmatch(text)
    if match is None or re.match(r"\s*(?:or|and|,|\\cup|\\cap|[-+*/^=<>])", match["rest"]):
        return None
    return match["letter"]


def _same_numbers(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    a, b = quantity(wanted), quantity(given)
    if a is None or b is None:
        return None
    if is_list(wanted) and "," in given and not a.unit.name:  # 100,200 after 100, 200
        return None
    return same_quantity(a, b, tolerance)


# ---- lists

_OPEN, _CLOSE = {"(": ")", "[": "]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle"}, (")", "]", r"\}", "}", r"\rangle")
_BRACKET = re.compile(r"\\[{}]|\\[lr]angle(?![a-z])|\\begin\{[a-z]*matrix\}|\\end\{[a-z]*matrix\}|[()\[\]{},;]")


def parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets of a list, "" where it has none, and its items; None for what is no list. A set, a tuple and an
    interval have brackets; solutions that follow one another have none."""
    kind, body = _unwrap(text)
    items = _split(body)
    if items is None or len(items) > _MAX_LIST or (len(items) == 1 and kind != r"\{"):
        return None
    return kind, items


def is_list(text: str) -> bool:
    """Whether ``parts`` finds any."""
    return parts(text) is not None


def _unwrap(text: str) -> tuple[str, str]:
    """The pair of brackets around all of a text, and what is in it."""
    depth, first = 0, ""
    for match in _BRACKET.finditer(text):
        bracket = match.group()
        if bracket in (",", ";"):
            continue
        if bracket in _OPEN or bracket.startswith(r"\begin"):
            if match.start() == 0:
                first = bracket
            depth += 1
        else:
            depth -= 1
            if depth == 0 and match.end() < len(text):
                return "", text
    if not first or first.startswith(r"\begin") or depth:
        return "", text
    last = next((close for close in (r"\rangle", r"\}", ")", "]", "}") if text.endswith(close)), "")
    opening = r"\{" if first == "{" else first
    closing = r"\}" if last == "}" else last
    kind = opening if _OPEN.get(opening) == closing else opening + closing
    return ("(" if kind == r"\langle" else kind), text[len(first) : len(text) - len(last)].strip()


def _split(text: str) -> list[str] | None:
    """The items of a list: at commas and semicolons outside of brackets, "and" and "or". None where one is empty."""
    text = _AND.sub(" , ", text)
    depth, begin, items = 0, 0, []
    for match in _BRACKET.finditer(text):
        bracket = match.group()
        if bracket in (",", ";"):
            if depth == 0:
                items.append(text[begin : match.start()])
                begin = match.end()
        else:
            depth += 1 if bracket in _OPEN or bracket.startswith(r"\begin") else -1
    items = [item.strip() for item in [*items, text[begin:]]]
    return items if all(items) else None


def _same_lists(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    a, b = parts(wanted), parts(given)
    if a is None and b is None:
        return None
    if a is None or b is None:
        kind, items = a or b or ("", [])
        if kind == r"\{" and len(items) == 1:  # {5} is the set of solutions 5
            one = items[0]
            return same_answer(one if a else wanted, one if b else given, tolerance, compare, depth + 1)
        return None
    return _same_items(*a, *b, lambda x, y: same_answer(x, y, tolerance, compare, depth + 1))


def _same_items(kind: str, wanted: Sequence[str], given_kind: str, given: Sequence[str], same: Compare) -> bool:
    """Sets have any order and no repeats, bare lists any order, all else keeps its order. A list without brackets may
    stand for one of any kind."""
    if kind and given_kind and kind != given_kind and not (len(wanted) > 2 and {kind, given_kind} == {"(", "["}):
        return False
    if r"\{" in (kind, given_kind):
        return all(any(same(x, y) for y in given) for x in wanted) and all(
            any(same(x, y) for x in wanted) for y in given
        )
    if len(wanted) != len(given):
        return False
    if kind or given_kind or _has_names(wanted) != _has_names(given):
        return all(map(same, wanted, given))
    rest = list(given)
    for x in wanted:
        found = next((i for i, y in enumerate(rest) if same(x, y)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _has_names(items: Sequence[str]) -> bool:
    """Whether the items have names of their own: x = 1, y = 2 has an order where the names are left out."""
    return len({sides[0] for item in items if (sides := _sides(item))}) > 1


# ---- equations, ratios, bases, words


def _sides(text: str) -> tuple[str, str] | None:
    """The first and the last side of an equation or a chain of them."""
    sides = _EQUALS.split(text)
    return (sides[0].strip(), sides[-1].strip()) if len(sides) > 1 and sides[0].strip() and sides[-1].strip() else None


def _same_equations(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    r"""``x = 5`` is 5, and ``3 + 4 = 7`` is 7; ``x^2 + y^2 = 1`` is not 1."""
    a, b = _sides(wanted), _sides(given)
    if a is None and b is None:
        return None
    if a and b:
        if _NAME.match(a[0]) and re.sub(r"\s", "", a[0]) == re.sub(r"\s", "", b[0]):
            return same_answer(a[1], b[1], tolerance, compare, depth + 1)
        return compare(wanted, given)
    name, value = a or b or ("", "")
    if not _NAME.match(name) and not same_answer(value, name, tolerance, compare, depth + 1):
        return compare(wanted, given) if a and re.search(r"[<>]|\\[lg]", given) else False
    return same_answer(value if a else wanted, value if b else given, tolerance, compare, depth + 1)


def _same_ratios(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    """``3:4`` is ``6:8`` and ``3/4``; ``12:00`` is no other time of the day."""
    if not _RATIO.match(wanted) and not _RATIO.match(given):
        return None
    a, b = (_RATIO.match(text) for text in (wanted, given))
    if a and b:
        rests = [re.sub(r"[\s.]", "", text[m.end() :]).lower() for text, m in ((wanted, a), (given, b))]
        if rests[0] != rests[1] and all(rests):
            return False
        x, y = ([Fraction(part) for part in m.group().replace(" ", "").split(":")] for m in (a, b))
        is_time = any(re.fullmatch(r"\d{1,2}:\d\d(?::\d\d)?", m.group()) for m in (a, b))
        if is_time or len(x) != len(y) or not y[0]:
            return x == y
        return [y[0] * v for v in x] == [x[0] * v for v in y]
    ratio, other = (a, given) if a else (b, wanted)
    assert ratio is not None
    sides = ratio.group().replace(" ", "").split(":")
    number = plain_number(other)
    if number is None or len(sides) != 2 or not Fraction(sides[1]):
        return False
    return Fraction(sides[0]) / Fraction(sides[1]) == number.value


def _same_bases(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    """``1011_2``: its base may be left out, and is no other one."""
    a, b = _BASE.fullmatch(wanted), _BASE.fullmatch(given)
    if a is None and b is None:
        return None
    bases = {m["base"] for m in (a, b) if m}
    digits = {m["digits"] if m else text.replace(",", "") for m, text in ((a, wanted), (b, given))}
    return len(bases) == 1 and len(digits) == 1


def _same_words(wanted: str, given: str, tolerance: Fraction, compare: Compare, depth: int) -> bool | None:
    """Words are text, whatever letters they are made of."""
    a, b = (_TEXT.sub(r"\1", text) for text in (wanted, given))
    words = [bool(_WORDS.fullmatch(text) and re.search(r"[A-Za-z]{4}", text)) for text in (a, b)]
    if not any(words) and not (_TEXT.fullmatch(wanted) or _TEXT.fullmatch(given)):
        return True if a.lower() == b.lower() and _WORDS.fullmatch(a) and len(a) > 1 else None
    folded = [re.sub(r"[\s.]+", " ", re.sub(r"^(?:the|a|an)\s", "", text.strip().lower())).strip() for text in (a, b)]
    if folded[0] == folded[1]:
        return True
    return False if all(words) else None
