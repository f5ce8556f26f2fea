r"""Finds the answer in a response: what is said after the thinking, and in it the last mark, else the last expression.

Marks are ``<answer>…</answer>``, ``\boxed{…}``, a line's ``####`` where an answer follows it, a line that begins with
``Answer:``, and ``"answer": …`` in JSON. Of several marks the last one counts. Every function is linear in the text's
length.
"""

from __future__ import annotations

import json
import re

from forge_hpc.rewards.numbers import last_in, tidy

_THINKING = re.compile(r"<(/?)\s{0,2}(?:think|thinking|reasoning)\s{0,2}>|\[(/?)THINK\]", re.IGNORECASE)
_OPENED = re.compile(r"(?:<(?:think|thinking|reasoning)>|\[THINK\])\s*\Z", re.IGNORECASE)
_MAX_OPENED = 200
"""What a template may write after the tag that it opens: white space."""


def after_opened_tag(prompt: str, response: str, tag: str) -> str:
    """The response, with ``<tag>`` before it where the prompt ends in one: some chat templates open it themselves."""
    return f"<{tag}>{response}" if prompt.rstrip().endswith(f"<{tag}>") else response


def after_thinking(prompt: str, response: str) -> str:
    """What stands after the last end of thinking, up to where thinking begins again; nothing where the thinking, begun
    by the response or by the end of the prompt, has no end."""
    said, begins = split_thinking(prompt, response)
    return said[: begins[0]] if begins else said


def split_thinking(prompt: str, response: str) -> tuple[str, list[int]]:
    """What stands after the last end of thinking, and where in it thinking begins again."""
    tags = list(_THINKING.finditer(response))
    ends = [tag.end() for tag in tags if "/" in tag.group()]
    if not ends and _OPENED.search(prompt[-_MAX_OPENED:]):
        return "", []
    said = ends[-1] if ends else 0
    return response[said:], [tag.start() - said for tag in tags if tag.start() >= said]


# ---- marks

_ANSWER = re.compile(r"<answer>|</answer>", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s?\{|\\[\\{}]|[{}]|\\boxed\s?(\d+)")
_HASHES = re.compile(r"(?<!#)####(?!#)")
_LABEL = re.compile(r"^\W{0,8}(?:the\s)?(?:final\s|correct\s)?answer(?:\sis)?[*_ ]{0,4}[:=][*_ ]{0,4}", re.I | re.M)
_JSON = re.compile(r"[{,]\s{0,20}\"(?:final_?)?answer\"\s?:\s?", re.IGNORECASE)
_JOINED = re.compile(r"[\s$,;.]{0,9}(?:\\(?:text|quad)\{?)?\s?(?:and|or)?\s?\}?[\s$]{0,9}(?:[a-zA-Z]\s?=\s?)?")
_IS = re.compile(r"(?:the\s)?(?:final\s)?answer(?:\sis\b:?|:)\s?", re.IGNORECASE)
_HEADING = re.compile(r"\d{1,2}[.):]\s+\S*[A-Za-z]|(?:step|part|case)\b", re.IGNORECASE)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MAX_WORDS = 3
"""More words after ``####`` are a heading."""

Mark = tuple[int, str]
"""Where it ends, and what it marks."""


def marked_answer(text: str) -> str | None:
    """What the last mark of the text holds, "" where that is open or empty; None where there is no mark."""
    marks = [mark for find in (_tagged, _boxed, _after_hashes, _labelled, _in_json) if (mark := find(text))]
    if not marks:
        return None
    _, answer = max(marks, key=lambda mark: mark[0])
    inner = marked_answer(answer) if len(answer) < len(text) else None
    return answer.strip() if inner is None else inner


def _tagged(text: str) -> Mark | None:
    begin, found = -1, None
    for tag in _ANSWER.finditer(text):
        if tag.group()[1] != "/":
            begin = tag.end()
        elif begin >= 0:
            found, begin = (tag.end(), text[begin : tag.start()]), -1
    return found


def _boxed(text: str) -> Mark | None:
    r"""The last box, or those that commas, "and" or "or" join to it as a list: ``\boxed{1} or \boxed{2}``. Of a box
    that is never closed: nothing."""
    boxes: list[tuple[int, int, int]] = []  # begin of the command, begin and end of the content
    opened: list[tuple[int, int]] = []  # of braces that are open: begin of the box's command or -1, begin of content
    for brace in _BRACES.finditer(text):
        kind = brace.group()
        if brace[1]:
            boxes.append((brace.start(), brace.start(1), brace.end()))
        elif kind[-1] == "{" and kind != r"\{":
            opened.append((brace.start() if len(kind) > 1 else -1, brace.end()))
        elif kind == "}" and opened:
            begin, content = opened.pop()
            if begin >= 0:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()  # it lies in this one
                boxes.append((begin, content, brace.start()))
    last_open = max((begin for begin, _ in opened), default=-1)
    if last_open >= 0 and (not boxes or boxes[-1][0] < last_open):
        return len(text), ""
    if not boxes:
        return None
    joined = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if len(joined) == 20 or not (match := _JOINED.fullmatch(text, box[2] + 1, joined[0][0])) or not match.group():
            break
        if not re.search(r"[,;]|and|or", match.group()):
            break
        joined.insert(0, box)
    return boxes[-1][2] + 1, ", ".join(text[begin:end] for _, begin, end in joined)


def _after_hashes(text: str) -> Mark | None:
    marks = list(_HASHES.finditer(text))
    if not marks:
        return None
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    for mark, end in zip(reversed(marks), reversed(ends), strict=True):
        line, below = _line(text, mark.end(), end)
        answer = _IS.sub("", line)
        if answer and _is_answer(answer, is_last=not below):
            return mark.end() + len(line), answer
    return None


def _labelled(text: str) -> Mark | None:
    labels = list(_LABEL.finditer(text))
    if not labels:
        return None
    line, _ = _line(text, labels[-1].end(), len(text))
    return (labels[-1].end() + len(line), _clause(line) or "") if line else None


def _in_json(text: str) -> Mark | None:
    keys = list(_JSON.finditer(text))
    if not keys:
        return None
    try:
        value, end = json.JSONDecoder(parse_float=str, parse_int=str).raw_decode(text, keys[-1].end())
    except (ValueError, RecursionError):
        return len(text), ""
    if value is None or isinstance(value, dict):
        return end, ""
    return end, json_text(value)


def json_text(value: object) -> str:
    """A value of JSON as the text of an answer: what a string says, ``True``, ``[1, 2]``."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(json_text, value))}]"
    return str(value)


def _line(text: str, begin: int, end: int) -> tuple[str, bool]:
    """The first line after ``begin`` that holds something, and whether anything stands below it."""
    rest = text[begin:end].strip()
    line, _, below = rest.partition("\n")
    return line.strip().strip("*").strip(), bool(below.strip()) or end < len(text)


def _is_answer(line: str, *, is_last: bool) -> bool:
    """Whether a line after ``####`` is an answer and no heading: it begins as a number or formula, or it is a few
    words with nothing below them."""
    if _HEADING.match(line):
        return False
    words = len(_WORD.findall(line[:400]))
    if not words or not line[0].isalpha():
        return words < 2 * _MAX_WORDS
    return is_last and words <= _MAX_WORDS and not line.endswith(":")


# ---- an answer without a mark

_SAID = re.compile(
    r"\b(?:answer|option|choice)\b[^.\n:=]{0,60}?(?:\b(?:is|are|be|to)\b|[:=])[\s:*_]{0,8}"
    r"(?:(?:therefore|thus|simply|just|exactly|approximately|about|option|choice|equal\sto)\s){0,3}",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"\$\$([^$]{1,2000})\$\$|(?<![\\\d])\$(?!\s)([^$\n]{1,500})(?<![\s\\])\$(?!\d)"
    r"|\\\(((?:[^\\]|\\(?![()\[\]]))+)\\\)|\\\[((?:[^\\]|\\(?![()\[\]]))+)\\\]"
    r"|(-?\d{0,9}\\[dtc]?frac\{[^{}\n]{1,100}\}\{[^{}\n]{1,100}\})"
)
_SENTENCE = re.compile(r"\.(?=\s|\Z)|[;\n]|\s(?:because|since|which|so|as|where|I hope)\s|\.?\*\*")
_VERDICT = re.compile(r"(?:yes|no|true|false)\b(?=[\s,.:!])(?!\D*\d)", re.IGNORECASE)
_LETTER = re.compile(r"\(?[A-J](?:[).:]|\Z)")


def final_answer(text: str) -> str | None:
    """The answer of a text: what its last mark holds, else what it says "the answer is", else a lone expression or a
    word, else the last formula or number. None where nothing of that is there, or the last mark is empty or open."""
    marked = marked_answer(text)
    if marked is not None:
        return marked or None
    said = list(_SAID.finditer(text))
    if said and (clause := _clause(text[said[-1].end() :])):
        return clause
    text = tidy(text).strip().lstrip("#").lstrip()
    if verdict := _VERDICT.match(text):
        return verdict.group()
    if "\n" not in text and len(text) <= 200 and (_LETTER.match(text) or _is_lone(text)):
        return text
    formulas = [(match.end(), _inside(match)) for match in _FORMULA.finditer(text)]
    number = last_in(text)
    ends = [*formulas[-1:], *([(number.end, number.text)] if number else [])]
    return max(ends)[1] if ends else None


def _is_lone(text: str) -> bool:
    """Whether a line is one expression, or words without a number."""
    words = _WORD.search(re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{[^{}]*\}", "", text))
    return bool(text) and (words is None or (not re.search(r"[\d$\\]", text) and len(text) <= 60))


def _clause(text: str) -> str | None:
    """What is said to be the answer at the beginning of a text: a formula, or the words up to the end of the sentence,
    or the last number in them."""
    text = text.lstrip()[:1000]
    parts = []
    position = 0
    while (match := _FORMULA.match(text, position)) and len(parts) < 20:
        parts.append(_inside(match))
        joint = re.compile(r"\s?(?:,|and|or|, and)\s").match(text, match.end())
        position = joint.end() if joint else len(text)
    if parts:
        return ", ".join(parts)
    sentence = _SENTENCE.split(text, maxsplit=1)[0].strip(" *_`\"'.,:")
    if not sentence or _LETTER.match(sentence) or not re.search(r"\d", sentence) or _leads(sentence):
        return sentence or None
    formulas = [_inside(match) for match in _FORMULA.finditer(sentence)]
    number = last_in(sentence)
    return formulas[-1] if formulas else number.text if number else sentence


def _leads(sentence: str) -> bool:
    """Whether a sentence with a number begins with it, or with a bracket or a name for it."""
    return bool(re.match(r"[-+\u2212(\[{$€£¥₹\\\d.]|[A-Za-z]\w{0,3}\s?[=<>]", sentence))


def _inside(match: re.Match[str]) -> str:
    return next(filter(None, match.groups()), "").strip()
