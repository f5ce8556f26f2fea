"""From examples to tokens: prompts through the chat template, documents with the tokens that SFT learns."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.config.sources import data_sources
from forge_hpc.data.bad import BadExample
from forge_hpc.data.fields import target_text
from forge_hpc.data.source import Example, check_example
from forge_hpc.data.types import Document, Prompt

Messages = list[dict[str, str]]
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ue000{}\ue001"  # private-use characters, which no text holds and no template strips
_PLAIN_CHAT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2."},
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "3."},
]
_MARKS = re.compile("\ue000\\d+\ue001")


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

    def __call__(self, example: Example | BadExample, position: int, where: str = "data") -> Prompt:
        """The prompt at ``position`` of the run. Raises BadExample for a bad example, which ``where`` names."""
        data = self.data
        example = check_example(example, data, where)
        text = example[data.prompt_field]
        if data.chat_template:
            messages = self.messages(example)
            if messages[-1]["role"] == "assistant":
                raise BadExample(
                    f"{where}: the prompt ends with the assistant's turn, so there is nothing to answer",
                    "leave the last message out; SFT learns whole chats where data.target_field is null",
                )
            text = self.apply(messages, where, add_generation_prompt=True)
        elif not isinstance(text, str):
            raise BadExample(f"{where}: messages need a chat template", "set data.chat_template=true")
        # A rendered template holds its special tokens already.
        token_ids = self.tokenizer.encode(text, add_special_tokens=not data.chat_template)
        fields = {k: v for k, v in example.items() if k not in (data.prompt_field, data.target_field)}
        target = "" if data.target_field is None else target_text(example[data.target_field])
        question = example[data.prompt_field]
        return Prompt(position, text, token_ids, target, fields, question if isinstance(question, str) else text)

    def messages(self, example: Example) -> Messages:
        """The prompt field as the messages of a chat, after the system prompt where they bring none."""
        prompt = example[self.data.prompt_field]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self.data.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.data.system_prompt})
        return messages

    def apply(self, messages: Messages, where: str, **options: Any) -> Any:
        """The tokenizer's chat template on messages, as text unless ``options`` ask for more."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, **({"tokenize": False} | options), **self.data.chat_template_args
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise BadExample(
                f"{where}: the chat template does not render the roles {roles}: {error}",
                "leave the example out, or mend the tokenizer's chat template",
            ) from None


class DocumentRenderer:
    """Renders examples as SFT documents: prompt and target, or the chat in the prompt field where no target is named.

    The loss covers what the model will have to write: the target, or the assistant's turns, and the token that ends it.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        self._prompts = PromptRenderer(tokenizer, data)
        self._tokenizer = tokenizer
        self._data = data
        self._special = {*tokenizer.all_special_ids, tokenizer.eos_token_id}
        self._special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        self._marks_itself = data.chat_template and bool(_GENERATION_BLOCK.search(tokenizer.get_chat_template()))

    def __call__(self, example: Example | BadExample, where: str = "data") -> Document:
        """The document of an example. Raises BadExample for one with nothing to learn, which ``where`` names."""
        if self._data.target_field is not None:
            prompt = self._prompts(example, 0, where)
            if not prompt.target:
                raise BadExample(
                    f"{where}: the field {self._data.target_field!r} is empty, so there is nothing to learn",
                    "leave the example out",
                )
            return sft_document(prompt, self._tokenizer)
        example = check_example(example, self._data, where)
        if not self._data.chat_template or isinstance(example[self._data.prompt_field], str):
            raise BadExample(
                f"{where}: without a target_field, {self._data.prompt_field!r} must hold messages, rendered through a "
                "chat template",
                "name the field of the answers with data.target_field, or that of the messages with data.prompt_field",
            )
        messages = self._prompts.messages(example)
        if not any(message["role"] == "assistant" for message in messages):
            raise BadExample(
                f"{where}: no turn of the assistant, so there is nothing to learn", "leave the example out"
            )
        token_ids, mask = (self._by_blocks if self._marks_itself else self._by_comparison)(messages, where)
        token_ids, mask = self._with_turn_ends(token_ids, mask)
        if not any(mask):
            raise BadExample(
                f"{where}: the chat template marks no token of the assistant's", "check its {% generation %} blocks"
            )
        return Document(np.asarray(token_ids, dtype=np.int32), np.asarray(mask, dtype=bool))

    def turn_ends(self) -> list[int]:
        """The special tokens that documents of this source teach as the end of a turn: what a generator must stop at.

        Empty where the chat template renders no plain chat.
        """
        if self._data.target_field is not None:
            return [self._tokenizer.eos_token_id]
        try:
            document = self({self._data.prompt_field: _PLAIN_CHAT})
        except BadExample:
            return []
        ends, token_ids, mask = [], document.token_ids.tolist(), document.loss_mask.tolist()
        for i, token in enumerate(token_ids):
            if mask[i] and token in self._special:
                rest = itertools.takewhile(lambda k: mask[k], range(i + 1, len(mask)))  # of the turn
                if not self._tokenizer.decode([token_ids[k] for k in rest]).strip():
                    ends.append(token)
        return list(dict.fromkeys(ends))

    def _by_blocks(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """The mask that the template gives by its ``{% generation %}`` blocks."""
        rendered = self._prompts.apply(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return rendered["input_ids"], [bool(flag) for flag in rendered["assistant_masks"]]

    def _by_comparison(self, messages: Messages, where: str) -> tuple[list[int], list[bool]]:
        """Render the chat a second time with marks for the assistant's words: what stands between them is the
        template's, and must be the same around the words themselves."""
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        more = {key for i in spoken for key, value in messages[i].items() if value and key not in ("role", "content")}
        if more:
            raise BadExample(
                f"{where}: a turn of the assistant holds {', '.join(sorted(more))} beside role and content",
                "mark what is to be learned in the tokenizer's chat template with {% generation %} blocks",
            )
        marks = {i: _MARK.format(i) for i in spoken}
        marked = self._prompts.apply(
            [m | {"content": marks.get(i, m["content"])} for i, m in enumerate(messages)], where
        )
        frame = _MARKS.split(marked)
        text = self._prompts.apply(messages, where)
        for clean in (str, str.strip):  # many templates strip what is said
            said = [clean(messages[i]["content"]) for i in spoken]
            parts = [part for pair in zip(frame, [*said, ""], strict=False) for part in pair]
            if len(frame) == len(said) + 1 and "".join(parts) == text:
                break
        else:
            raise BadExample(
                f"{where}: the chat template does not render the assistant's turns as they are written",
                "mark them in the tokenizer's chat template with {% generation %} blocks",
            )
        token_ids: list[int] = []
        mask: list[bool] = []
        for number, part in enumerate(parts):
            ids = self._tokenizer.encode(part, add_special_tokens=False) if part else []
            token_ids += ids
            mask += [number % 2 == 1] * len(ids)
        return token_ids, mask

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


def sft_document(prompt: Prompt, tokenizer: Any) -> Document:
    """Prompt, reference answer and end-of-sequence token; the loss covers the answer and the end."""
    answer = [*tokenizer.encode(prompt.target, add_special_tokens=False), tokenizer.eos_token_id]
    token_ids = np.asarray([*prompt.token_ids, *answer], dtype=np.int32)
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    loss_mask[len(prompt.token_ids) :] = True
    return Document(token_ids, loss_mask)


def learned_ends(tokenizer: Any, config: Config) -> list[int]:
    """The tokens that SFT on the sources of ``config.data`` teaches as the end of an answer."""
    ends = (DocumentRenderer(tokenizer, data).turn_ends() for _, data, _ in data_sources(config.data))
    return list(dict.fromkeys(itertools.chain.from_iterable(ends)))
