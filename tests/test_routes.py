"""Routes of experts from the generator to the trainer (R3): the engine's process, then the trainer's process group."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch.distributed as dist
from endpoints import OfEngine, prompt_of, serving
from safetensors.torch import load_file
from test_environments import InProcess, played
from test_experts import routed
from test_families import tiny_config
from tiny_models import VOCAB_SIZE, write_model

from forge_hpc.checkpoint.episodes import dump_groups, load_groups
from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import Config
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.types import Completion, Document, Episode, Group, Prompt, Turn
from forge_hpc.environments import Step
from forge_hpc.environments.agent import AgentResult
from forge_hpc.generation import GenerationEngine
from forge_hpc.rollouts.agents import AgentPlayer
from forge_hpc.rollouts.documents import documents_of
from forge_hpc.rollouts.episodes import EpisodePlayer
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine

RATIOS = {"single": 0.3, "turns": 0.5}
"""Mismatch with the generator's routes over that without them, at most; of several turns there are fewer tokens."""
Asked = list[tuple[list[int], Completion]]
"""What stood before each response, and the response as it came from the engine."""


class Talk:
    """Is never content."""

    async def reset(self, prompt: Prompt) -> None: ...

    async def step(self, response: str) -> Step:
        return Step("NO.", reward=1.0)


@dataclasses.dataclass
class Sampled:
    """What a generator in bfloat16 has sampled, with its routes: all but ``updated`` after it got its weights."""

    model_dir: Path
    cfg: Config
    single: list[Document] = dataclasses.field(default_factory=list)
    updated: list[Episode] = dataclasses.field(default_factory=list)
    """Episodes whose first turn older weights have answered."""
    episodes: list[Episode] = dataclasses.field(default_factory=list)
    conversations: list[Episode] = dataclasses.field(default_factory=list)
    asked: Asked = dataclasses.field(default_factory=list)
    refused: Any = None

    async def sample(self, generator: GenerationEngine) -> None:
        async def update() -> None:
            await generator.load_weights(1, load_file(self.model_dir / "model.safetensors").items())

        self.updated = await self.play(generator, update)
        self.episodes = await self.play(generator)
        self.conversations = [await self.converse(generator)]
        draw = np.random.default_rng(0)
        prompts = [Prompt(i, "", draw.integers(0, VOCAB_SIZE, 4 + i).tolist(), "") for i in range(8)]
        answers: Any = await generator.generate_batch(prompts, 4, seed=1, max_tokens=24)
        pairs = [(prompt, completion) for prompt, some in zip(prompts, answers, strict=True) for completion in some]
        self.single = [d for prompt, completion in pairs for d in documents_of(Episode(prompt, completion, 0.0))]
        begun = asyncio.Event()
        given_up = asyncio.ensure_future(
            generator.stream_turn(Turn(8, 0, 0, [5, 6], 20), lambda *_: begun.set(), seed=1)
        )
        await begun.wait()
        given_up.cancel()
        await asyncio.wait({given_up})
        await generator.relabel(1)  # behind what ends the request
        assert generator._routes is not None and not generator._routes._routes
        [self.refused] = await generator.generate_turns([Turn(7, 0, 0, [5, 6], 2, num_routed=3)], seed=1)

    async def play(self, generator: GenerationEngine, after_first: Any = None) -> list[Episode]:
        async def generate(turns: Sequence[Turn], sampling: Any, seed: Any, share: Any, key: Any) -> list[Any]:
            answers: list[Any] = await generator.generate_turns(turns, seed=1, sampling=sampling, share=share)
            self.asked += [(turn.token_ids, answer) for turn, answer in zip(turns, answers, strict=True)]
            if after_first is not None and turns[0].turn == 0:
                await after_first()
            return answers

        player = EpisodePlayer(self.cfg, char_tokenizer(), generate, InProcess(Talk))  # type: ignore[arg-type]
        prompts = [Prompt(i, "", list(range(3 + i, 9 + 2 * i)), "") for i in range(8)]
        return [episode for some in await played(player, prompts, key=0) for episode in some]

    async def converse(self, generator: GenerationEngine) -> Episode:
        """An agent that asks for two answers at once, goes on twice from one, streamed too, and edits its past."""
        sampler, cfg = OfEngine(generator), copy.deepcopy(self.cfg)
        cfg.environment.max_turns = 20
        async with (
            serving(cfg, char_tokenizer(), sampler) as (endpoint, episode),
            openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=episode.key, max_retries=0) as client,
        ):

            async def ask(prompt: list[int], **options: Any) -> list[int]:
                await client.completions.create(model="policy", prompt=prompt, max_tokens=6, **options)
                context, completion = sampler.given[-1]
                return [*context, *completion.token_ids]

            first = await ask([5, 6, 7, 8], n=2)
            second = await ask([*first, 9, 10])
            await ask([*second, 11])
            async for _ in await client.completions.create(
                model="policy", prompt=[*first, 30, 31, 32], max_tokens=9, stream=True
            ):
                pass
            edited = await ask([*second[:-1], 40])
            await ask([*edited, 12], temperature=0.5)  # context at most, and here it is the end
        self.asked += sampler.given
        player = AgentPlayer(cfg, char_tokenizer(), endpoint, InProcess(Talk))  # type: ignore[arg-type]
        return player._episode(prompt_of(), episode, AgentResult(reward=1.0))

    def documents(self, episodes: list[Episode]) -> list[Document]:
        """Of episodes that have waited in a checkpoint."""
        [group] = load_groups(dump_groups([Group(episodes[0].prompt, episodes)]))
        return [document for episode in group.episodes for document in documents_of(episode)]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Sampled:
    directory = tmp_path_factory.mktemp("sampled")
    experts = {"num_experts": 64, "num_hidden_layers": 4, "head_dim": 32}
    write_model(directory / "model", "qwen3_moe", **experts)
    write_model(directory / "stale", "qwen3_moe", seed=1, **experts)
    char_tokenizer().save_pretrained(directory / "stale")
    cfg = tiny_config()
    cfg.model.dtype = "bfloat16"
    cfg.algorithm.routing_replay = True
    cfg.data.chat_template = False
    cfg.rollout.group_size, cfg.reward = 2, []
    cfg.environment.max_turns, cfg.environment.max_turn_tokens = 3, 6
    result = Sampled(directory / "model", cfg)
    generator = GenerationEngine(directory / "stale", cfg, device="cpu")
    try:
        asyncio.run(result.sample(generator))
    finally:
        generator.close()
    return result


def is_behind(document: Document, context: list[int], response: Completion) -> bool:
    tokens = [*context, *response.token_ids]
    return document.token_ids[: len(tokens)].tolist() == tokens


@pytest.mark.slow
def test_each_token_of_many_turns_keeps_the_experts_that_it_was_sampled_with(sampled: Sampled) -> None:
    kinds = {"updated": sampled.updated, "episodes": sampled.episodes, "conversations": sampled.conversations}
    documents = {name: sampled.documents(episodes) for name, episodes in kinds.items()}
    assert {name: len(found) for name, found in documents.items()} == {
        "updated": 16,
        "episodes": 16,
        "conversations": 4,
    }
    num_others = 0
    for document in (document for some in documents.values() for document in some):
        assert document.routes is not None and document.routes.dtype == np.int16
        end = 0
        for context, response in sampled.asked:
            if not is_behind(document, context, response):
                continue
            assert response.routes is not None
            whole = response.routes.base  # all that this request has computed
            assert whole is not None and whole.shape == (len(context) + response.num_tokens - 1, 4, 2)
            num_others += int((np.sort(document.routes[:end]) != np.sort(whole[:end])).any(-1).sum())
            assert len(response.routes) == len(whole) - end, "what is known is not sent again"
            assert np.array_equal(document.routes[end : len(whole)], whole[end:])
            end = len(whole)
        assert end == len(document.routes) == len(document.token_ids) - 1
    assert num_others > 0, "older weights have computed some of them otherwise"


@pytest.mark.slow
def test_more_known_routes_than_tokens_are_refused(sampled: Sampled) -> None:
    assert isinstance(sampled.refused, ValueError)
    assert "prompt 7: vLLM refuses the request" in str(sampled.refused)


@pytest.mark.slow
def test_the_trainer_takes_the_experts_that_sampled_and_so_differs_less_from_the_generator(
    sampled: Sampled, tmp_path: Path
) -> None:
    init_distributed(tmp_path / "store", rank=0, world_size=1, local_rank=0)
    try:
        compare(sampled)
    finally:
        dist.destroy_process_group()


def compare(sampled: Sampled) -> None:
    cfg = sampled.cfg
    kinds = {"single": sampled.single, "turns": sampled.documents([*sampled.episodes, *sampled.conversations])}
    engine = TrainEngine(cfg, sampled.model_dir)
    documents = [dataclasses.replace(d, advantage=1.0) for some in kinds.values() for d in some]
    for ours, document in zip(routed(engine, documents), documents, strict=True):
        assert document.routes is not None and document.routes.dtype == np.int16
        assert np.array_equal(ours, document.routes)
    own = [dataclasses.replace(document, routes=None) for document in documents]
    differing = [
        (np.sort(ours) != np.sort(document.routes)).any(-1).mean()
        for ours, document in zip(routed(engine, own), documents, strict=True)
    ]
    assert 0 < np.mean(differing) < 0.2, "rounding changes some routes, and no more"
    replayed = {name: mismatch(engine, some) for name, some in kinds.items()}
    with pytest.raises(UserError, match="the documents have no routes"):
        engine.train_step(own)
    cfg.algorithm.routing_replay = False
    plain = TrainEngine(cfg, sampled.model_dir)
    without = {name: mismatch(plain, some) for name, some in kinds.items()}
    for name, ratio in RATIOS.items():
        assert replayed[name] <= ratio * without[name], name


def mismatch(engine: TrainEngine, documents: list[Document]) -> float:
    return engine.train_step(documents, update=False)["mismatch/logprob_abs_mean"]
