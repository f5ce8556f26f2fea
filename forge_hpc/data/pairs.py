"""From examples of preference data to documents: two answers to a prompt, the better one first, or one with a label."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from forge_hpc.config.schema import DataConfig
from forge_hpc.config.sources import find_field
from forge_hpc.data.bad import BadExample
from forge_hpc.data.examples import Example, prompt_of, target_of
from forge_hpc.data.render import DocumentRenderer
from forge_hpc.data.types import Document

_FIELDS = "name the fields with data.prompt_field, data.target_field (the better answer) and recipe_args.rejected"


class PairRenderer:
    """Two documents an example, as SFT renders them: the better answer with the column ``side`` 1, then the worse one
    with -1, in one group.

    Answers are text, messages that answer the prompt, or whole chats, which open with the same messages: then those are
    the prompt.

    Args:
        data: ``target_field`` is the better answer.
        rejected: field of the worse one.
    """

    def __init__(self, tokenizer: Any, data: DataConfig, rejected: str) -> None:
        self._data, self._worse = data, replace(data, target_field=rejected)
        own = replace(data, prompt_field="prompt")
        self._renderers = [DocumentRenderer(tokenizer, replace(own, target_field=f)) for f in ("chosen", "rejected")]

    def __call__(self, example: Example | BadExample, where: str = "data") -> list[Document]:
        """The pair. Raises BadExample, which ``where`` names, for one that says nothing: equal answers, say."""
        if isinstance(example, BadExample):
            raise example
        prompt = prompt_of(example, self._data, where)
        try:
            answers = [target_of(example, data, where) for data in (self._data, self._worse)]
        except BadExample as error:
            raise BadExample(error.message, _FIELDS) from None
        if answers[0] == answers[1]:
            raise BadExample(f"{where}: the two answers are equal: nothing is preferred", "leave the pair out")
        chats = [answer for answer in answers if isinstance(answer, list)]
        if len(chats) == 2 and chats[0][0]["role"] != "assistant":
            num = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*chats, strict=False)))
            prompt, chats = chats[0][:num], [chat[num:] for chat in chats]
            answers = [*chats]
            if not prompt or not all(chat and chat[0]["role"] == "assistant" for chat in chats):
                raise BadExample(f"{where}: the two chats do not part at a turn of the assistant", _FIELDS)
        whole = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        made = [render(whole, where) for render in self._renderers]
        if any(len(documents) > 1 for documents in made):
            raise BadExample(
                f"{where}: the chat template renders earlier turns of the answer otherwise than the last",
                "leave the example out, or have answers of one turn",
            )
        pair = [documents[0] for documents in made]
        for document, side in zip(pair, (1.0, -1.0), strict=True):
            document.group, document.columns["side"] = 0, side
        return pair


class LabelRenderer:
    """A document an example, as SFT renders it, with the column ``side``: 1 where the label says that the answer is
    good, else -1.

    Args:
        label: field of the label: true, 1 or "true", and false, 0 or "false".
    """

    def __init__(self, tokenizer: Any, data: DataConfig, label: str) -> None:
        self._render, self._label = DocumentRenderer(tokenizer, data), label

    def __call__(self, example: Example | BadExample, where: str = "data") -> list[Document]:
        """The document. Raises BadExample, which ``where`` names."""
        documents = self._render(example, where)
        assert isinstance(example, Mapping)
        try:
            label = str(find_field(example, self._label)).lower()
        except KeyError:
            raise BadExample(f"{where}: no field {self._label!r}", "name it with recipe_args.label") from None
        if label not in ("true", "1", "1.0", "false", "0", "0.0"):
            raise BadExample(f"{where}: the label is {label!r}", "write true or false")
        for document in documents:
            document.columns["side"] = 1.0 if label in ("true", "1", "1.0") else -1.0
        return documents


def at_its_end(document: Document) -> Document:
    """The document with its last token once more behind it, which alone is trained: there a value head says what it
    makes of the whole."""
    token_ids = np.append(document.token_ids, document.token_ids[-1:])
    mask = np.arange(len(token_ids)) == len(token_ids) - 1
    return Document(token_ids, mask, columns=document.columns, group=document.group)


def exchanged(documents: Sequence[Document], seq_len: int) -> list[Document]:
    """The prompt of each document with the answer of the one before it, without what is longer than ``seq_len``."""
    starts = [int(np.argmax(document.loss_mask)) for document in documents]
    made = []
    for place, (document, start) in enumerate(zip(documents, starts, strict=True)):
        answer = documents[place - 1].token_ids[starts[place - 1] :]
        token_ids = np.concatenate([document.token_ids[:start], answer])
        made.append(Document(token_ids, np.arange(len(token_ids)) >= start))
    return [document for document in made if len(document.token_ids) <= seq_len]
