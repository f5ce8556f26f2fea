"""Tool calls in what a model wrote, by the format of its family. Which one that is follows from the chat template.

hermes    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>, any number (Qwen2.5, Qwen3, Hermes)
llama3    {"name": "add", "parameters": {"a": 1}} and nothing else (Llama 3.1 and later)
mistral   [TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}], or of its later models [TOOL_CALLS]add[ARGS]{"a": 1}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """One call: the name of a function, and its arguments as JSON text."""

    name: str
    arguments: str


class BadToolCall(ValueError):
    """What looks like a tool call is none: not JSON, or without a name and an object of arguments."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes its calls."""

    name: str
    begin: str
    """A call begins here: what comes before is said to the user. What may be the beginning of it is not streamed."""
    at_start: bool
    """Calls stand at the beginning of a response, or nowhere."""
    read: Callable[[str], tuple[str, list[ToolCall]]]
    """The text without the calls, and the calls. Raises BadToolCall."""


_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def _read_hermes(text: str) -> tuple[str, list[ToolCall]]:
    calls = [_call(_json(body), "arguments") for body in _HERMES.findall(text)]
    return (_HERMES.sub("", text).strip() if calls else text), calls


def _read_llama3(text: str) -> tuple[str, list[ToolCall]]:
    said = text.removeprefix("<|python_tag|>").strip()
    if not said.startswith("{"):
        return text, []
    decoder, calls, place = json.JSONDecoder(), [], 0
    while place < len(said):  # several are set off by semicolons
        try:
            value, place = decoder.raw_decode(said, place)
        except ValueError as error:
            raise BadToolCall(f"not JSON: {error}") from None
        calls.append(_call(value, "parameters"))
        place += len(said[place:]) - len(said[place:].lstrip("; \n"))
    return "", calls


_MISTRAL = "[TOOL_CALLS]"
_NAMED = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?(\{.*\})\s*", re.DOTALL)


def _read_mistral(text: str) -> tuple[str, list[ToolCall]]:
    said, *bodies = text.split(_MISTRAL)
    calls = []
    for body in bodies:
        if named := _NAMED.fullmatch(body):
            calls.append(_call({"name": named[1], "arguments": _json(named[2])}, "arguments"))
            continue
        found = _json(body)
        calls += [_call(call, "arguments") for call in (found if isinstance(found, list) else [found])]
    return (said.strip() if calls else text), calls


HERMES = ToolFormat("hermes", "<tool_call>", False, _read_hermes)
LLAMA3 = ToolFormat("llama3", "{", True, _read_llama3)
MISTRAL = ToolFormat("mistral", _MISTRAL, False, _read_mistral)


def tool_format(chat_template: str | None) -> ToolFormat | None:
    """The format that a chat template tells its model to write; None where it renders no tools that are known here."""
    if not chat_template or "tools" not in chat_template:
        return None
    if "<tool_call>" in chat_template:
        return HERMES
    if _MISTRAL in chat_template:
        return MISTRAL
    return LLAMA3 if '"parameters"' in chat_template and "<|start_header_id|>" in chat_template else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadToolCall(f"not JSON: {error}") from None


def _call(value: Any, key: str) -> ToolCall:
    """Of ``{"name": …, key: {…}}``; what is missing is an empty object."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise BadToolCall("no object with a name")
    arguments = value.get("arguments", {}) if "arguments" in value else value.get(key, {})
    if not isinstance(arguments, dict):
        raise BadToolCall(f"the arguments of {value['name']} are no object")
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
