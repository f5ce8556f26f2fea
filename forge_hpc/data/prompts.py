"""Examples become prompts (GRPO) or documents (SFT), in a seeded order whose position can be saved and restored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.types import Document, Prompt


class PromptRenderer:
    """Renders examples for a model: through the tokenizer's chat template, or as they are.

    Raises UserError where ``data`` asks for a chat template or a system prompt that the tokenizer cannot render.
    """

    def __init__(self, tokenizer: Any, data: DataConfig) -> None:
        if data.chat_template and not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template", "set data.chat_template=false")
        if data.system_prompt is not None and not data.chat_template:
            raise UserError("data.system_prompt needs a chat template", "set data.chat_template=true")
        self._tokenizer = tokenizer
        self._data = data

    def __call__(self, example: Mapping[str, Any], position: int) -> Prompt:
        data = self._data
        text = question = example[data.prompt_field]
        if data.chat_template:
            messages = [{"role": "user", "content": text}]
            if data.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": data.system_prompt})
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **data.chat_template_args
            )
        # A rendered template holds its special tokens already.
        token_ids = self._tokenizer.encode(text, add_special_tokens=not data.chat_template)
        fields = {k: v for k, v in example.items() if k not in (data.prompt_field, data.target_field)}
        return Prompt(position, text, token_ids, str(example[data.target_field]), fields, question)


class ExampleOrder:
    """An endless seeded order over ``num_examples`` indices: a new permutation every epoch, the plain order unshuffled.

    Index ``cursor`` of the order is a function of the seed alone, so the cursor is all there is to save.
    """

    def __init__(self, num_examples: int, seed: int, shuffle: bool) -> None:
        self.num_examples = num_examples
        self.seed = seed
        self.shuffle = shuffle
        self.cursor = 0
        self._epoch = -1
        self._permutation: np.ndarray | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next index, from 0."""
        return self.cursor // self.num_examples

    def __next__(self) -> int:
        epoch, place = divmod(self.cursor, self.num_examples)
        self.cursor += 1
        if not self.shuffle:
            return place
        if epoch != self._epoch or self._permutation is None:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
            self._epoch = epoch
        return int(self._permutation[place])


class PromptStream:
    """An endless stream of prompts in a deterministic order. Too long ones are left out and counted.

    Example:
        stream = PromptStream(examples, tokenizer, config, seed=config.seed)
        prompts = stream.take(32)
        state = stream.state_dict()  # another stream that loads it goes on with the 33rd
    """

    def __init__(self, examples: Sequence[Mapping[str, Any]], tokenizer: Any, config: Config, seed: int) -> None:
        self._examples = examples
        self._render = PromptRenderer(tokenizer, config.data)
        self._max_prompt_tokens = config.rollout.max_prompt_tokens
        self._order = ExampleOrder(len(examples), seed, config.data.shuffle)
        self.position = 0
        """Position that the next prompt gets: prompts yielded so far."""
        self.num_too_long = 0
        """Prompts left out so far because they are longer than ``rollout.max_prompt_tokens``."""

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._order.epoch

    def __iter__(self) -> Iterator[Prompt]:
        return self

    def __next__(self) -> Prompt:
        for _ in range(len(self._examples) * 2):  # a whole epoch lies in there, wherever it begins
            prompt = self._render(self._examples[next(self._order)], self.position)
            if len(prompt.token_ids) <= self._max_prompt_tokens:
                self.position += 1
                return prompt
            self.num_too_long += 1
        raise UserError(
            f"every prompt is longer than rollout.max_prompt_tokens={self._max_prompt_tokens}",
            "raise rollout.max_prompt_tokens",
        )

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [next(self) for _ in range(count)]

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands. JSON can hold it."""
        return {
            "position": self.position,
            "cursor": self._order.cursor,
            "num_too_long": self.num_too_long,
            "num_examples": len(self._examples),
            "seed": self._order.seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> Self:
        """Go on where the saved stream stood. Raises UserError where the data or the seed is not the one saved."""
        mine = self.state_dict()
        for key in ("num_examples", "seed"):
            if state[key] != mine[key]:
                raise UserError(
                    f"the saved position in the data has {key} {state[key]}, this run {mine[key]}",
                    "resume with the data and the seed of the saved run, or start a new run directory",
                )
        self.position = state["position"]
        self.num_too_long = state["num_too_long"]
        self._order.cursor = state["cursor"]
        return self


def evaluation_prompts(
    examples: Sequence[Mapping[str, Any]], tokenizer: Any, config: Config, num_prompts: int
) -> list[Prompt]:
    """The first ``num_prompts`` examples as prompts, in the order of the data; too long ones are left out.

    Raises UserError where none is left.
    """
    render = PromptRenderer(tokenizer, config.data)
    prompts: list[Prompt] = []
    for example in examples:
        if len(prompts) == num_prompts:
            break
        prompt = render(example, len(prompts))
        if len(prompt.token_ids) <= config.rollout.max_prompt_tokens:
            prompts.append(prompt)
    if num_prompts and not prompts:
        raise UserError(
            f"every held-out prompt is longer than rollout.max_prompt_tokens={config.rollout.max_prompt_tokens}",
            "raise rollout.max_prompt_tokens",
        )
    return prompts


def sft_document(prompt: Prompt, tokenizer: Any) -> Document:
    """Prompt, reference answer and end-of-sequence token; the loss covers the answer and the end."""
    answer = [*tokenizer.encode(prompt.target, add_special_tokens=False), tokenizer.eos_token_id]
    token_ids = np.asarray([*prompt.token_ids, *answer], dtype=np.int32)
    loss_mask = np.zeros(len(token_ids), dtype=bool)
    loss_mask[len(prompt.token_ids) :] = True
    return Document(token_ids, loss_mask)


class DocumentStream:
    """An endless stream of SFT documents over a PromptStream, in its order and with its position.

    Documents longer than ``trainer.training.seq_len`` fit no row: they are left out and counted.
    """

    def __init__(self, prompts: PromptStream, tokenizer: Any, seq_len: int) -> None:
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._seq_len = seq_len
        self.num_too_long = 0
        """Documents left out so far (prompts that were too long by themselves are the PromptStream's)."""

    def __iter__(self) -> Iterator[Document]:
        return self

    def __next__(self) -> Document:
        first_epoch = self._prompts.epoch
        while self._prompts.epoch < first_epoch + 2:
            document = sft_document(next(self._prompts), self._tokenizer)
            if len(document.token_ids) <= self._seq_len:
                return document
            self.num_too_long += 1
        raise UserError(
            f"every example is longer than trainer.training.seq_len={self._seq_len}", "raise trainer.training.seq_len"
        )

    def take(self, count: int) -> list[Document]:
        """The next ``count`` documents."""
        return [next(self) for _ in range(count)]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands. JSON can hold it."""
        return {"prompts": self._prompts.state_dict(), "num_too_long": self.num_too_long}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Go on where the saved stream stood."""
        self._prompts.load_state_dict(state["prompts"])
        self.num_too_long = state["num_too_long"]
        return self
