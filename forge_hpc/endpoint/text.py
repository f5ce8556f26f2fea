"""The text of a response as it comes, without what may turn out to be no text: a tool call, a stop string, an end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


class TextStream:
    """Text of tokens, as much as is sure.

    Args:
        markers: from the first of them on nothing is sure; nor is an end of the text with which one may begin.
        only_at_start: markers that count at the beginning alone.
    """

    def __init__(self, tokenizer: Any, markers: Sequence[str], only_at_start: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._special = {*tokenizer.all_special_ids, tokenizer.eos_token_id}
        self._special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self._markers, self._at_start = [marker for marker in markers if marker], only_at_start
        self._held: list[int] = []  # special tokens at the end, one of which may have ended it
        self._text = ""
        self.sent = ""

    def add(self, token_id: int) -> str:
        """What is sure with this token, and was not before."""
        if token_id in self._special:
            self._held.append(token_id)
            return ""
        for held in (*self._held, token_id):
            self._text += self._stream.step(self._tokenizer._tokenizer, held) or ""
        self._held = []
        sure = self._text[: self._num_sure()]
        new, self.sent = sure[len(self.sent) :], max(self.sent, sure, key=len)
        return new

    def rest(self, whole: str) -> str:
        """Of the text that it came to."""
        return whole.removeprefix(self.sent) if whole.startswith(self.sent) else ""

    def _num_sure(self) -> int:
        text = self._text
        start = text.lstrip()
        if any(start.startswith(marker) or marker.startswith(start) for marker in self._at_start):
            return 0
        found = [place for marker in self._markers if (place := text.find(marker)) >= 0]
        for marker in self._markers:
            size = min(len(marker) - 1, len(text))
            while size and not text.endswith(marker[:size]):
                size -= 1
            found.append(len(text) - size)
        return min(found, default=len(text))
