"""Finds the program in a response."""

from __future__ import annotations

import ast
import re
import textwrap
from typing import NamedTuple

from forge_hpc.rewards.answers import split_thinking

_FENCE = re.compile(r"(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<tag>[^`]*)")
_PYTHON = ("python", "python3", "py", "python2")


class _Block(NamedTuple):
    tag: str
    text: str


def find_program(prompt: str, response: str) -> str:
    """The last closed code block after the thinking that can be a Python program, else all that stands there; nothing
    where thinking has no end.

    A block is one by its tag (``python``, ``py``, …), if it is no transcript of ``>>>``; without a tag where nothing
    is tagged as one, or where it parses and calls, defines or imports something: outputs and shell commands do not. The
    indentation of a block, as within a list, is no part of the program.
    """
    said, begins = split_thinking(prompt, response)
    blocks, end = _blocks(said, begins)
    tagged = any(_is_python(block) for block in blocks)
    for block in reversed(blocks):
        if _is_python(block) or (not block.tag and (not tagged or _acts(block.text))):
            return block.text
    return said[:end]


def _is_python(block: _Block) -> bool:
    return block.tag in _PYTHON and not block.text.lstrip().startswith(">>>")


def _acts(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.Call, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    return any(isinstance(node, kinds) for node in ast.walk(tree))


def _blocks(text: str, begins: list[int]) -> tuple[list[_Block], int]:
    """The closed blocks of a text up to where thinking begins outside of them, and where that is."""
    blocks: list[_Block] = []
    opened: re.Match[str] | None = None
    lines: list[str] = []
    position, waiting = 0, list(reversed(begins))
    for line in text.splitlines(keepends=True):
        position += len(line)
        fence = _FENCE.fullmatch(line.rstrip())
        if fence and opened and not fence["tag"] and fence["fence"].startswith(opened["fence"]):
            blocks.append(_Block(_tag(opened), _dedent(lines, opened["indent"])))
            opened = None
        elif fence and (opened is None or (fence["tag"].strip() and fence["fence"] == opened["fence"])):
            opened, lines = fence, []  # also where the block before it was left open
        elif opened:
            lines.append(line.rstrip("\r\n") + "\n")
        while waiting and waiting[-1] < position:
            begin = waiting.pop()
            if opened is None:
                return blocks, begin
    return blocks, len(text)


def _tag(fence: re.Match[str]) -> str:
    words = fence["tag"].strip().strip("{}.").lower().split()
    return words[0].rstrip(",:") if words else ""


def _dedent(lines: list[str], indent: str) -> str:
    """The lines without the indentation of their fence, nor one that all of them share."""
    width = len(indent)
    return textwrap.dedent("".join(line[min(width, len(line) - len(line.lstrip(" \t"))) :] for line in lines))
