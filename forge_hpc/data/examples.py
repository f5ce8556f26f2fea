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
_FIELDS = "name the fields with prompt_field and target_field of data, or of the source in data.sources"


def check_example(example: Example | BadExample, data: DataConfig, where: str) -> Example:
    """The example. Raises BadExample unless it holds a prompt and, where ``data`` names its field, a target."""
    if isinstance(example, BadExample):
        raise example
    prompt_of(example, data, where)
    target_of(example, data, where)
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
    if len(messages) < len(value) or not all(
        isinstance(message.get(key), str) for message in messages for key in ("role", "content")
    ):
        raise BadExample(
            f"{where}: a message in {name!r} is not {{role: text, content: text}}",
            "each message has a role (system, user, assistant) and a content, both text",
        )
    return messages


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
