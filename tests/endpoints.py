"""An endpoint without a run: its server and records are the real ones, and what samples is a script or an engine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

from one_group import token_routes

from forge_hpc.config import Config
from forge_hpc.config.schema import EnvironmentConfig, SamplingConfig
from forge_hpc.data.types import Completion, Prompt, Turn
from forge_hpc.endpoint import Endpoint, EndpointEpisode
from forge_hpc.endpoint.sampler import Sampler
from forge_hpc.generation import GenerationEngine

QWEN = (
    "{%- if tools %}<|im_start|>system\n# Tools <tool_call>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{%- else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's: results of tools stand together in one turn of the user's."""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


def bpe_tokenizer() -> Any:
    """A byte-level BPE tokenizer, in which most texts can be written in many ways."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ['{"name": "add", "arguments": {"a": 1, "b": 22}}', "what is the sum of these two numbers, user?"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = QWEN
    return fast


def endpoint_config(**environment: Any) -> Config:
    config = Config(reward=[], environment=EnvironmentConfig(name="agent.py:episode", **environment))
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 256, 1024
    return config


def prompt_of(position: int = 0) -> Prompt:
    return Prompt(position, "?", [5], "4", {}, "2+2=")


class Scripted:
    """A sampler that says what ``say`` makes of a context: token ids, and how they end. It remembers all of it."""

    def __init__(self, say: Any, version: int = 0) -> None:
        self.say, self.version = say, version
        self.asked: list[tuple[Turn, SamplingConfig, int]] = []
        self.given: list[tuple[list[int], Completion]] = []

    def _complete(self, turn: Turn, sampling: SamplingConfig, seed: int) -> Completion | ValueError:
        self.asked.append((turn, sampling, seed))
        said = self.say(turn)
        if isinstance(said, Exception):
            if isinstance(said, ValueError):
                return said
            raise said
        text, token_ids, finish = said
        rng = random.Random(len(self.given))
        logprobs = [-rng.random() for _ in token_ids]
        completion = Completion(0, text, token_ids, logprobs, finish, (self.version, self.version))
        completion.routes = token_routes(turn, token_ids)
        self.given.append((list(turn.token_ids), completion))
        return completion

    async def respond(
        self, turns: Sequence[Turn], sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> list[Completion | ValueError]:
        return [self._complete(turn, sampling, seed) for turn in turns]

    async def stream(
        self, turn: Turn, sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> AsyncIterator[Any]:
        completion = self._complete(turn, sampling, seed)
        if isinstance(completion, Completion):
            for pair in zip(completion.token_ids, completion.logprobs, strict=True):
                yield pair
        yield completion


class OfEngine:
    """A sampler over an engine in this process."""

    def __init__(self, engine: GenerationEngine) -> None:
        self.engine = engine
        self.given: list[tuple[list[int], Completion]] = []

    async def respond(
        self, turns: Sequence[Turn], sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> list[Completion | ValueError]:
        answers = await self.engine.generate_turns(turns, seed=seed, sampling=sampling, share=share)
        for turn, answer in zip(turns, answers, strict=True):
            if isinstance(answer, Completion):
                self.given.append((list(turn.token_ids), answer))
        return answers

    async def stream(
        self, turn: Turn, sampling: SamplingConfig, seed: int, share: str, name: str
    ) -> AsyncIterator[Any]:
        import asyncio

        tokens: asyncio.Queue[Any] = asyncio.Queue()
        work = asyncio.ensure_future(
            self.engine.stream_turn(
                turn,
                lambda place, token, logprob: tokens.put_nowait((token, logprob)),
                seed=seed,
                sampling=sampling,
                share=share,
            )
        )
        work.add_done_callback(lambda _: tokens.put_nowait(None))
        try:
            while (token := await tokens.get()) is not None:
                yield token
            answer = work.result()
            if isinstance(answer, Completion):
                self.given.append((list(turn.token_ids), answer))
            yield answer
        finally:
            work.cancel()


@contextlib.asynccontextmanager
async def serving(
    config: Config, tokenizer: Any, sampler: Sampler, **options: Any
) -> AsyncIterator[tuple[Endpoint, EndpointEpisode]]:
    """An endpoint with one episode."""
    endpoint = await Endpoint(config, tokenizer, sampler, **options).start()
    try:
        with endpoint.open(prompt_of(), 0) as episode:
            yield endpoint, episode
    finally:
        await endpoint.close()


def check_record(given: Sequence[tuple[list[int], Completion]], episode: EndpointEpisode) -> None:
    """Every response that was sampled is trained on once, token for token, behind what it was sampled behind."""
    branches = episode.conversations.branches(0)
    for branch in branches:
        if (routes := branch.completion.routes) is not None:  # as a script has them
            assert routes.flatten().tolist() == [*branch.opening, *branch.completion.token_ids][:-1]
    left = [
        (branch.opening + branch.completion.token_ids, [False] * len(branch.opening) + branch.completion.loss_mask,
         [0.0] * len(branch.opening) + branch.completion.logprobs)
        for branch in branches
    ]  # fmt: skip
    for context, completion in given:
        start, end = len(context), len(context) + completion.num_tokens
        found = [
            place
            for place, (tokens, mask, logprobs) in enumerate(left)
            if tokens[:end] == context + completion.token_ids
            and all(mask[start:end])
            and logprobs[start:end] == completion.logprobs
        ]
        assert found, "a response is not in the documents as it was sampled"
        left[found[0]][1][start:end] = [False] * (end - start)
    assert not any(any(mask) for _, mask, _ in left), "tokens are trained that nobody sampled, or twice"
