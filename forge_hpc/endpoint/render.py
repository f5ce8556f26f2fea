"""From messages to tokens: a conversation as it is opened, and what is said after a response that was sampled.

Only what is new is encoded. The tokens of a response stay as they were sampled: what follows it is rendered behind a
placeholder that stands for it, and put behind the tokens that are there.

What a client says cannot close its own turn or open another: where a text holds a special token of the tokenizer, it is
encoded by itself, with its special tokens as plain text. Other conversations are encoded whole, as servers do it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from forge_hpc.config.schema import DataConfig
from forge_hpc.data.template import TemplateRefused, render_chat
from forge_hpc.endpoint.requests import Refused

_RESPONSE = "PLACE-OF-THE-RESPONSE"
_PLACE = re.compile("\ue001(\\d+)\ue002")  # private-use characters, which no template touches
_PRIVATE = re.compile("[\ue001\ue002]")

Messages = Sequence[Mapping[str, Any]]


class ChatRenderer:
    """Renders for one tokenizer."""

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._data = data
        added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        special = sorted(filter(None, {*tokenizer.all_special_tokens, *added}), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)) or "$^")

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered at all."""
        return bool(self._data.chat_template and self._tokenizer.chat_template)

    def opening(self, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens of a whole conversation, up to where the response begins. Raises Refused."""
        text, texts = self._render(messages, tools)
        return self._encode(text, texts)

    def following(self, messages: Messages, tools: Sequence[Mapping[str, Any]], last_token: int) -> list[int]:
        """What stands between a response whose last token is ``last_token`` and the next one, with ``messages`` said in
        between. Raises Refused."""
        before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _RESPONSE}]
        text, texts = self._render(messages, tools, before)
        _, found, rest = text.partition(_RESPONSE)
        if not found:
            raise Refused("the chat template leaves out a response that other messages follow")
        token_ids = self._encode(rest, texts)
        return token_ids[1:] if token_ids and token_ids[0] == last_token else token_ids

    def text(self, text: str) -> list[int]:
        """Of a raw prompt's beginning: its special tokens are what they say."""
        return self._tokenizer.encode(text)

    def more_text(self, text: str) -> list[int]:
        """Of what is put behind a raw prompt."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], before: Messages = ()
    ) -> tuple[str, list[str]]:
        """The text, in which what must not be read as special tokens has its place in a list."""
        if not self.has_template:
            raise Refused("the model has no chat template: use /v1/completions")
        texts: list[str] = []
        safe = [self._safe(message, texts) for message in messages]
        try:
            options = {"tools": list(tools)} if tools else {}
            return render_chat(
                self._tokenizer, self._data, [*before, *safe], add_generation_prompt=True, **options
            ), texts
        except TemplateRefused as error:
            raise Refused(str(error), param="messages") from None

    def _safe(self, message: Mapping[str, Any], texts: list[str]) -> Mapping[str, Any]:
        content = message["content"]
        if message["role"] == "assistant" or not (self._special.search(content) or _PRIVATE.search(content)):
            return message
        texts.append(content)
        return {**message, "content": f"\ue001{len(texts) - 1}\ue002"}

    def _encode(self, text: str, texts: Sequence[str]) -> list[int]:
        token_ids: list[int] = []
        for number, part in enumerate(_PLACE.split(text)):
            if number % 2:
                plain = _PRIVATE.sub("", texts[int(part)])
                token_ids += self._tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)
            elif part:
                token_ids += self._tokenizer.encode(part, add_special_tokens=False)
        return token_ids
