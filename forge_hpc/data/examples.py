"""What an example means: where its prompt and its target are, whatever format it was written in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from forge_hpc.config.schema import DataConfig
from forge_hpc.config.sources import find_field
from forge_hpc.data.bad import BadExample

Example = Mapping[str, Any]
Messages = list[dict[str, Any]]
_NO_TOOLS = "a tool is {type: function, function: {name, description, parameters}}; tools_field: null reads none"
_CALLS = "a tool call is {type: function, function: {name, arguments}}, the arguments an object or its JSON text"
_FIELDS = "name the fields with prompt_field and target_field of data, or of the source in data.sources"


def check_example(example: Example | BadExample, data: DataConfig, where: str) -> Example:
    """The example. Raises BadExample unless it holds a prompt and, where ``data`` names its field, a target, and
    tools that are some."""
    if isinstance(example, BadExample):
        raise example
    prompt_of(example, data, where)
    target_of(example, data, where)
    if data.chat_template:
        tools_of(example, data, where)
    return example


def prompt_of(example: Example, data: DataConfig, where: str) -> str | Messages:
    """The prompt: text, or the messages of a chat. Raises BadExample, which ``where`` names."""
    name = data.prompt_field
    value = _field(example, name, where)
    messages = _messages(value, name, where)
    if messages is not None:
        return messages
    if not isinstance(value, str):
        raise BadExample(f"{where}: the field {name!r} is neither a string nor a list of messages", _FIELDS)
    return value


def target_of(example: Example, data: DataConfig, where: str) -> str | Messages:
    """The target as text, or as the messages that answer the prompt; empty where ``data`` names no field for it.

    Numbers are written as Python writes them, days and times as in ISO 8601. Raises BadExample, which ``where`` names.
    """
    name = data.target_field
    if name is None:
        return ""
    value = _field(example, name, where)
    messages = _messages(value, name, where)
    if messages is not None:
        if messages[-1]["role"] != "assistant":
            raise BadExample(f"{where}: the last message in {name!r} is not the assistant's", _FIELDS)
        return messages
    if isinstance(value, date | time):
        return value.isoformat()
    if not isinstance(value, str | int | float | Decimal) or value != value:
        what = f"holds {', '.join(map(str, value))}: name one as {name}.NAME" if isinstance(value, Mapping) else None
        raise BadExample(f"{where}: the field {name!r} {what or 'is no string or number'}", _FIELDS)
    return str(value)


def tools_of(example: Example, data: DataConfig, where: str) -> list[dict[str, Any]]:
    """The tools that an example may call, each as ``{"type": "function", "function": {"name": …, …}}``; none where it
    has no such field. Raises BadExample, which ``where`` names."""
    name = data.tools_field
    try:
        value = None if name is None else find_field(example, name)
        tools = _without_nulls(json.loads(value) if isinstance(value, str) and value.strip() else value or [])
    except KeyError:
        return []
    except ValueError as error:
        raise BadExample(f"{where}: the field {name!r} is no JSON: {error}", _NO_TOOLS) from None
    if not isinstance(tools, list):
        raise BadExample(f"{where}: the field {name!r} is no list of tools", _NO_TOOLS)
    tools = [tool if isinstance(tool, Mapping) and "function" in tool else {"function": tool} for tool in tools]
    named = (isinstance(tool["function"], Mapping) and tool["function"].get("name") for tool in tools)
    if not all(isinstance(name, str) and name for name in named):
        raise BadExample(f"{where}: a tool in {name!r} has no name", _NO_TOOLS)
    return [{"type": "function", **tool} for tool in tools]


def _field(example: Example, name: str, where: str) -> Any:
    try:
        return find_field(example, name)
    except KeyError:
        raise BadExample(f"{where}: no field {name!r} (there is: {_names(example)})", _FIELDS) from None


def _names(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _messages(value: Any, name: str, where: str) -> Messages | None:
    """The messages of a chat, also where a format that has no lists holds them as JSON text; None for anything else.

    A format that has columns writes null for what a message does not have: it is left out.
    """
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = _json_chat(value)
    if not (isinstance(value, list) and value and isinstance(value[0], Mapping)):
        return None
    messages = [_without_nulls(message) for message in value if isinstance(message, Mapping)]
    for message in messages:
        if message.get("tool_calls"):
            message.setdefault("content", "")
            message["tool_calls"] = [_with_arguments(call, name, where) for call in message["tool_calls"]]
    if len(messages) < len(value) or not all(
        isinstance(message.get(key), str) for message in messages for key in ("role", "content")
    ):
        raise BadExample(
            f"{where}: a message in {name!r} is not {{role: text, content: text}}",
            "each message has a role (system, user, assistant) and a content, both text",
        )
    return messages


def _with_arguments(call: Any, name: str, where: str) -> Any:
    """A call whose arguments are an object, as chat templates write them: OpenAI's API has them as JSON text."""
    if not isinstance(call, Mapping):
        raise BadExample(f"{where}: a tool call in {name!r} is no object", _CALLS)
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": _with_arguments(function, name, where)}
    if not isinstance(arguments := call.get("arguments", {}), str):
        return call
    try:
        read = json.loads(arguments)
    except ValueError as error:
        raise BadExample(f"{where}: the arguments of a tool call in {name!r} are no JSON: {error}", _CALLS) from None
    if not isinstance(read, dict):
        raise BadExample(f"{where}: the arguments of a tool call in {name!r} are no object", _CALLS)
    return {**call, "arguments": read}


def _json_chat(text: str) -> Any:
    """The chat that is written there, or None where it is a text like others."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if all(isinstance(item, dict) and {"role", "content"} <= item.keys() for item in value) else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
