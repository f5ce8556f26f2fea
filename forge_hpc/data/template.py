"""The tokenizer's chat template, rendered in one way wherever a run uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from forge_hpc.config.schema import DataConfig


class TemplateRefused(Exception):
    """The chat template does not render these messages; the text says which roles, and why."""


def render_chat(tokenizer: Any, data: DataConfig, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """``messages`` through the chat template, with what ``data`` says of it: text unless ``options`` ask for more.

    ``strftime_now``, with which templates write today's date, says ``data.template_date``, so that a run's prompts are
    the same on every day.

    Raises:
        TemplateRefused: it says that it cannot, or breaks on what they hold.
    """
    from jinja2 import TemplateError

    if data.template_date is not None:
        options = {"strftime_now": datetime.fromisoformat(data.template_date).strftime} | options
    try:
        return tokenizer.apply_chat_template(
            list(messages), **({"tokenize": False} | options), **data.chat_template_args
        )
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise TemplateRefused(f"the chat template does not render the roles {roles}: {error}") from None


def takes_tools(
    tokenizer: Any, data: DataConfig, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the chat template writes anything of ``tools``. Raises TemplateRefused."""
    with_tools = render_chat(tokenizer, data, messages, tools=list(tools))
    return bool(with_tools != render_chat(tokenizer, data, messages))
