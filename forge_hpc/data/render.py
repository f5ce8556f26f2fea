"""From examples to tokens: prompts through the chat template, documents with the tokens that SFT learns."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.config.sources import data_sources
from forge_hpc.data.bad import BadExample
from forge_hpc.data.examples import Example, Messages, prompt_of, target_of, tools_of
from forge_hpc.data.template import TemplateRefused, render_chat, takes_tools
from forge_hpc.data.types import Document, Prompt

logger = logging.getLogger(__name__)
Tools: TypeAlias = Sequence[Mapping[str, Any]]
"""Schemas of functions, as chat templates take them."""
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THINKING = re.compile(r"</?think>")
_MARK = "\ue000"  # a private-use character, which no text holds and no template strips
_TWO_FIELDS = "give question and answer as two fields, data.prompt_field and data.target_field, joined as they are"
_PLAIN_CHAT: Messages = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "3."},
]


class PromptRenderer:
    """Renders examples for a model: through the tokenizer's chat template, or as they are.

    Raises UserError where ``data`` asks for a chat template or a system prompt that the tokenizer cannot render.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        if data.chat_template and not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template", "set data.chat_template=false")
        if data.system_prompt is not None and not data.chat_template:
            raise UserError("data.system_prompt needs a chat template", "set data.chat_template=true")
        self.tokenizer = tokenizer
        self.data = data
        self._takes_tools = False

    def __call__(self, example: Example | BadExample, position: int, where: str = "data") -> Prompt:
        """The prompt at ``position`` of the run. Raises BadExample for a bad example, which ``where`` names."""
        data = self.data
        if isinstance(example, BadExample):
            raise example
        question = prompt_of(example, data, where)
        if data.chat_template:
            messages = self.messages(question)
            if messages[-1]["role"] == "assistant":
                raise BadExample(
                    f"{where}: the prompt ends with the assistant's turn, so there is nothing to answer",
                    "leave the last message out; SFT learns whole chats where data.target_field is null",
                )
            text = self.apply(messages, where, self.tools(example, where), add_generation_prompt=True)
        elif isinstance(question, str):
            text = question
        else:
            raise BadExample(f"{where}: messages need a chat template", "set data.chat_template=true")
        # A rendered template holds its special tokens already.
        token_ids = self.tokenizer.encode(text, add_special_tokens=not data.chat_template)
        fields = {k: v for k, v in example.items() if k not in (data.prompt_field, data.target_field)}
        target = target_of(example, data, where)
        answer = target if isinstance(target, str) else target[-1]["content"]
        return Prompt(position, text, token_ids, answer, fields, question if isinstance(question, str) else text)

    def messages(self, prompt: str | Messages) -> Messages:
        """The prompt as the messages of a chat, after the system prompt where they bring none."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.data.system_prompt is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.data.system_prompt}, *messages]
        return messages

    def tools(self, example: Example, where: str) -> Tools:
        """The tools that an example may call; none where there is no chat template to be told."""
        return tools_of(example, self.data, where) if self.data.chat_template else []

    def apply(self, messages: Messages, where: str, tools: Tools = (), **options: Any) -> Any:
        """The tokenizer's chat template on messages, as text unless ``options`` ask for more.

        Raises BadExample where it does not render them, and UserError where it knows of no tools and there are some.
        """
        try:
            if not tools:
                return render_chat(self.tokenizer, self.data, messages, **options)
            if not self._takes_tools:
                self._takes_tools = takes_tools(self.tokenizer, self.data, messages, tools)
            if self._takes_tools:
                return render_chat(self.tokenizer, self.data, messages, tools=list(tools), **options)
            raise UserError(
                f"{where}: the example has tools (data.tools_field={self.data.tools_field}), and the model's chat "
                "template takes none",
                "take a model whose template does, or leave the tools out: data.tools_field=null",
            )
        except TemplateRefused as error:
            raise BadExample(
                f"{where}: {error}", "leave the example out, or mend the tokenizer's chat template"
            ) from None


class DocumentRenderer:
    """Renders examples as SFT documents: prompt and target, or the chat in the prompt field where no target is named.

    The loss covers what the model will have to write where it is asked: the target, or in a chat all that follows the
    template's generation prompt, through the token that ends the turn. A chat is one document, unless its template
    renders earlier turns otherwise than when they were the last (Qwen3 takes their thinking away): then what was
    rendered otherwise is a document of its own, which ends with that turn.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._prompts = PromptRenderer(tokenizer, data)
        self._tokenizer = tokenizer
        self._data = data
        self._special = {*tokenizer.all_special_ids, tokenizer.eos_token_id}
        self._special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self._marks_itself = data.chat_template and bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template()))
        self._has_generation_prompt: bool | None = None
        self._has_split = False

    def __call__(self, example: Example | BadExample, where: str = "data") -> list[Document]:
        """The documents of an example. Raises BadExample for one with nothing to learn, which ``where`` names."""
        data = self._data
        if isinstance(example, BadExample):
            raise example
        question, target = prompt_of(example, data, where), target_of(example, data, where)
        if data.target_field is not None and isinstance(target, str):
            if not target:
                raise BadExample(
                    f"{where}: the field {data.target_field!r} is empty, so there is nothing to learn",
                    "leave the example out",
                )
            return [sft_document(self._prompts(example, 0, where), self._tokenizer, where)]
        if not data.chat_template or (data.target_field is None and isinstance(question, str)):
            raise BadExample(
                f"{where}: without a target_field, {data.prompt_field!r} must hold messages, rendered through a "
                "chat template",
                "name the field of the answers with data.target_field, or that of the messages with data.prompt_field",
            )
        messages = self._prompts.messages(question)
        first = 0 if isinstance(target, str) else len(messages)
        chat = messages if isinstance(target, str) else [*messages, *target]
        return self._chat(chat, first, where, self._prompts.tools(example, where))

    def turn_ends(self) -> list[int]:
        """The special tokens that documents of this source teach as the end of a turn: what a generator must stop at.

        Those of the chat template are left out where it renders no plain chat.
        """
        ends = [] if self._data.target_field is None else [self._tokenizer.eos_token_id]
        try:
            documents = self._chat(_PLAIN_CHAT, 0, "") if self._data.chat_template else []
        except BadExample:
            return ends
        for document in documents:
            ends += self._ends(document.token_ids.tolist(), document.loss_mask.tolist())
        return list(dict.fromkeys(ends))

    def _ends(self, token_ids: list[int], mask: list[bool]) -> list[int]:
        """The learned special tokens behind which nothing but white space is learned of the turn."""
        ends = []
        for i, token in enumerate(token_ids):
            if mask[i] and token in self._special:
                rest = itertools.takewhile(lambda k: mask[k], range(i + 1, len(mask)))
                if not self._tokenizer.decode([token_ids[k] for k in rest]).strip():
                    ends.append(token)
        return ends

    def _chat(self, messages: Messages, first: int, where: str, tools: Tools = ()) -> list[Document]:
        """The documents of a chat of which the assistant's turns from the message ``first`` on are learned."""
        if self._marks_itself and any(message["role"] == "assistant" for message in messages[first:]):
            return [self._by_blocks(messages, first, where, tools)]
        turns = [i for i in range(first, len(messages)) if _says_something(messages[i])]
        if not turns:
            raise BadExample(
                f"{where}: no turn of the assistant, so there is nothing to learn", "leave the example out"
            )
        texts = {i: self._prompts.apply(messages[: i + 1], where, tools) for i in turns}
        asked = {i: self._asked(messages, i, texts[i], where, tools) for i in turns}
        documents = []
        while turns:
            whole, parts, end, others = texts[turns[-1]], [], 0, []
            for i in turns:
                if whole.startswith(texts[i]) and end <= len(asked[i]):
                    parts += [whole[end : len(asked[i])], whole[len(asked[i]) : len(texts[i])]]
                    end = len(texts[i])
                else:
                    others.append(i)
            documents.append(self._document(parts))
            turns = others
        if len(documents) > 1 and not self._has_split:
            self._has_split = True
            logger.info(
                "the chat template renders earlier turns otherwise than the last: each is a document of its own"
            )
        return documents[::-1]

    def _asked(self, messages: Messages, i: int, text: str, where: str, tools: Tools) -> str:
        """What the model is given when it has to write turn ``i``; ``text`` is the chat with that turn."""
        before, turn = messages[:i], messages[i]
        asked = self._prompts.apply(before, where, tools, add_generation_prompt=True) if before else ""
        if before and self._has_generation_prompt is None:
            self._has_generation_prompt = asked != self._prompts.apply(before, where, tools)
        if not before or not self._has_generation_prompt:  # then the answer begins where its words do
            marked = self._prompts.apply([*before, turn | {"content": _MARK}], where, tools)
            asked = marked.partition(_MARK)[0]
        if not text.startswith(asked):
            same = next(k for k, (a, b) in enumerate(zip(asked, text + _MARK, strict=False)) if a != b)
            raise BadExample(
                f"{where}: the chat template asks for the assistant's turn with {asked[same:][:40]!r}, and renders "
                f"{text[same:][:40]!r} there",
                f"change data.chat_template_args (Qwen3: enable_thinking), or {_TWO_FIELDS}",
            )
        self._check_said(turn, text[len(asked) :], where)
        for key in [key for key, value in turn.items() if value and key not in ("role", "content")]:
            if self._prompts.apply([*before, {k: v for k, v in turn.items() if k != key}], where, tools) == text:
                raise BadExample(
                    f"{where}: a turn of the assistant holds {key} beside role and content, and the chat template "
                    "leaves it out",
                    "leave it out of the data too, or take a chat template that renders it",
                )
        return asked

    def _check_said(self, turn: dict[str, Any], rendered: str, where: str) -> None:
        """Raise BadExample unless the template renders all that the turn says, thinking included."""
        place = 0
        for part in filter(None, map(str.strip, _THINKING.split(turn["content"]))):
            found = rendered.find(part, place)
            if found < 0:
                thinks = "</think>" in turn["content"]
                what = "leaves out the thinking" if thinks else "does not render the assistant's turns"
                raise BadExample(
                    f"{where}: the chat template {what} as {'it is' if thinks else 'they are'} written",
                    f"{_TWO_FIELDS}; or mark the turns in the tokenizer's chat template with {{% generation %}} blocks",
                )
            place = found + len(part)

    def _document(self, parts: list[str]) -> Document:
        """Of the parts every second one is learned, through what ends its turn."""
        token_ids: list[int] = []
        mask: list[bool] = []
        for number, part in enumerate(parts):
            words = part.rstrip() if number % 2 else ""
            for text, is_learned in ((words, True), (part[len(words) :], False)):
                ids = self._tokenizer.encode(text, add_special_tokens=False) if text else []
                if is_learned and ids and number == len(parts) - 1 and ids[-1] not in self._special:
                    ids, part = [*ids, self._tokenizer.eos_token_id], words
                token_ids += ids
                mask += [is_learned] * len(ids)
        return Document(np.asarray(token_ids, dtype=np.int32), np.asarray(mask, dtype=bool))

    def _by_blocks(self, messages: Messages, first: int, where: str, tools: Tools) -> Document:
        """The mask that the template gives by its ``{% generation %}`` blocks."""
        rendered = self._prompts.apply(
            messages, where, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        token_ids, mask = rendered["input_ids"], [bool(flag) for flag in rendered["assistant_masks"]]
        if first:
            asked = self._prompts.apply(messages[:first], where, tools, add_generation_prompt=True)
            num_asked = len(self._tokenizer.encode(asked, add_special_tokens=False))
            mask = [flag and i >= num_asked for i, flag in enumerate(mask)]
        token_ids, mask = self._with_turn_ends(token_ids, mask)
        if not any(mask):
            raise BadExample(
                f"{where}: the chat template marks no token of the assistant's", "check its {% generation %} blocks"
            )
        return Document(np.asarray(token_ids, dtype=np.int32), np.asarray(mask, dtype=bool))

    def _with_turn_ends(self, token_ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
        """Also learn the special token that ends each turn; a last turn without one gets the end of sequence."""
        ends = [i for i in range(len(mask)) if mask[i] and not (i + 1 < len(mask) and mask[i + 1])]
        for i in ends:
            stop = next((k for k in range(i + 1, len(mask)) if token_ids[k] in self._special), None)
            if token_ids[i] in self._special or stop is None:
                continue
            if not self._tokenizer.decode(token_ids[i + 1 : stop]).strip():
                mask[i + 1 : stop + 1] = [True] * (stop - i)
        if ends and ends[-1] == len(mask) - 1 and token_ids[-1] not in self._special:
            return [*token_ids, self._tokenizer.eos_token_id], [*mask, True]
        return token_ids, mask


def sft_document(prompt: Prompt, tokenizer: Any, where: str = "data") -> Document:
    """Prompt, reference answer and end-of-sequence token; the loss covers the answer and the end.

    A target that thinks is put behind the prompt as it is, but for a ``<think>`` that the prompt has written already.
    Raises BadExample where the prompt has closed the thinking.
    """
    target, before = prompt.target, prompt.text.rstrip()
    if target.lstrip().startswith("<think>"):
        if before.endswith("<think>"):
            target = target.lstrip().removeprefix("<think>").lstrip("\n")
        elif before.endswith("</think>"):
            raise BadExample(
                f"{where}: the target thinks, and the chat template has closed the thinking before it",
                "change data.chat_template_args (Qwen3: leave out enable_thinking: false)",
            )
    answer = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eos_token_id]
    token_ids = np.asarray([*prompt.token_ids, *answer], dtype=np.int32)
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    loss_mask[len(prompt.token_ids) :] = True
    return Document(token_ids, loss_mask)


def _says_something(message: dict[str, Any]) -> bool:
    said = {key: value for key, value in message.items() if key != "role" and value}
    return message["role"] == "assistant" and bool(said) and bool(said.get("content", "x").strip())


def learned_ends(tokenizer: Any, config: Config) -> list[int]:
    """The tokens that SFT on the sources of ``config.data`` teaches as the end of an answer."""
    ends = (DocumentRenderer(tokenizer, data).turn_ends() for _, data, _ in data_sources(config.data))
    return list(dict.fromkeys(itertools.chain.from_iterable(ends)))
