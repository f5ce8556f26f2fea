"""Models that a run serves beside itself: where they stand, who may ask them, and a judge that dies and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from endpoints import Scripted, bpe_tokenizer, serving
from runs import PROJECT, left_over, processes, read, small_run, start_local, status, unexplained_metrics, wait_for
from test_other_nodes import Node, certificates, node  # noqa: F401

from forge_hpc.config import Config, UserError, load_config, plan, read_config, save_config, validate
from forge_hpc.config.needs import Needs
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import RewardConfig
from forge_hpc.config.served import served_config
from forge_hpc.controller.served import _ServedModel
from forge_hpc.data.types import Completion, Prompt, Turn
from forge_hpc.endpoint import tls_context
from forge_hpc.endpoint.conversations import NothingKept
from forge_hpc.endpoint.requests import Model
from forge_hpc.hub.assets import assets_of
from forge_hpc.observability.watching import render_status
from forge_hpc.rewards import RewardPool
from forge_hpc.run_dir import RunDir
from forge_hpc.served import Served, announce, announced, served
from forge_hpc.sizing.memory import plan_memory
from forge_hpc.sizing.model import ModelSize
from forge_hpc.sizing.table import split_table
from forge_hpc.wire.tls import Certificates

TINY = "builtin:qwen3-tiny"
JUDGE = f"served=[{{name: judge, path: '{TINY}', nodes: 1}}]"


def config(*overrides: str) -> Config:
    return load_config(None, [f"model.path={TINY}", *overrides])


# ---- placement


def test_nodes_of_served_models_come_between_those_of_frozen_ones_and_the_spares() -> None:
    two = f"served=[{{name: judge, path: '{TINY}', nodes: 2, engine: {{tensor_parallel_size: 2}}}}, {{name: critic, path: '{TINY}', nodes: 1}}]"  # noqa: E501
    keys = ["cluster.nodes=9", "cluster.spare_nodes=1", "cluster.frozen_nodes=1", "reference.enable=true"]
    cfg = config(two, *keys, "algorithm.kl_coef=0.1")
    validate(cfg)
    placement = plan(cfg, 4)
    judge, critic = placement.served
    assert (placement.trainer_nodes, placement.rollout_nodes) == (range(2), range(2, 4))
    assert (placement.frozen_nodes, judge.nodes, critic.nodes) == (range(4, 5), range(5, 7), range(7, 8))
    assert placement.spare_nodes == range(8, 9) and placement.nodes == 9
    assert judge.gpus == ((0, 1), (2, 3)) and critic.gpus == ((0,), (1,), (2,), (3,))
    assert "  nodes 5-6      judge       4 replicas, 2 a node, GPUs 0-3, 2 GPUs each, served\n" in placement.describe()
    assert [place.nodes for place in plan(cfg, None).served] == [range(5, 7), range(7, 8)]
    own = placement.with_served(0)  # as the judge's engines see it
    assert (own.rollout_nodes, own.replica_gpus, own.spare_nodes) == (range(5, 7), judge.gpus, range(0))
    assert [own.processes_on(n) for n in range(9)] == [placement.processes_on(n) for n in range(9)]


def test_on_one_node_they_take_its_last_gpus_or_are_processes_beside_the_others() -> None:
    cfg = config(f"served=[{{name: judge, path: '{TINY}', replicas: 2}}, {{name: critic, path: '{TINY}'}}]")
    validate(cfg)
    placement = plan(cfg, 8)
    assert [place.gpus for place in placement.served] == [((6,), (7,)), ((5,),)]
    assert (placement.trainer_gpus, placement.replica_gpus) == (((0,), (1,)), ((2,), (3,), (4,)))
    assert placement.gpus_per_node == 8 and {place.nodes for place in placement.served} == {range(1)}
    on_cpu = plan(cfg, 0)
    assert [place.gpus for place in on_cpu.served] == [((), ()), ((),)]
    assert on_cpu.processes_on(0) == 5 and on_cpu.with_served(1).processes_on(0) == 5
    frozen = ["cluster.frozen_processes=1", "reference.enable=true", "algorithm.kl_coef=0.1"]
    both = plan(config(f"served=[{{name: judge, path: '{TINY}'}}]", *frozen), 8)
    assert (both.frozen_gpus, both.served[0].gpus) == (((6,),), ((7,),))


@pytest.mark.parametrize(
    ("overrides", "gpus", "words"),
    [
        ([JUDGE], 0, r"1 node with cluster.spare_nodes=0 and served.0.nodes=1 leaves none to work"),
        ([f"served=[{{name: judge, path: '{TINY}'}}]", "cluster.nodes=2"], 8, r"served.0.nodes is 0, .* has 2 nodes"),
        ([f"served=[{{name: judge, path: '{TINY}', replicas: 8}}]"], 8, "takes 8 GPUs .* leaves none to train"),
        ([JUDGE, "cluster.nodes=2", "served.0.engine.tensor_parallel_size=3"], 8, "does not take all of the 8 GPUs"),
        ([JUDGE, "cluster.nodes=2", "served.0.replicas=4"], 8, "served.0.replicas=4 of .* does not take all"),
        ([JUDGE, "cluster.nodes=2", "served.0.engine.tensor_parallel_size=2"], 0, "tensor_parallel_size=2 needs GPUs"),
        ([JUDGE, "cluster.nodes=2", "recipe=sft"], 0, "recipe=sft samples nothing while it runs"),
    ],
)
def test_a_place_that_does_not_add_up_is_refused_in_a_line(overrides: list[str], gpus: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        plan(config(*overrides), gpus)
    assert "\n" not in refused.value.message and refused.value.hint


@pytest.mark.parametrize(
    ("served_models", "words"),
    [
        ("{name: judge, path: /no/such/model}", "served.0.path: no such directory: /no/such/model"),
        ("{name: judge, path: 'builtin:qwen4'}", "served.0.path is 'builtin:qwen4', which is not known"),
        ("{name: judge}", "served.0.path is ''"),
        (f"{{name: Judge-1, path: '{TINY}'}}", "served.0.name is 'Judge-1'"),
        (f"{{name: policy, path: '{TINY}'}}", "served.0.name is 'policy'"),
        (f"{{name: judge, path: '{TINY}'}}, {{name: judge, path: '{TINY}'}}", "'judge' is given twice"),
        (f"{{name: judge, path: '{TINY}', engine: {{max_model_len: 9}}}}", "max_model_len is not for served models"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_in_a_line(served_models: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        validate(config(f"served=[{served_models}]"))
    assert words in refused.value.message and "\n" not in refused.value.message and refused.value.hint


def test_a_judge_without_an_address_has_to_be_one_of_them() -> None:
    reward = "reward=[{name: llm_judge, args: {model: judge}}]"
    validate(config(f"served=[{{name: judge, path: '{TINY}'}}]", reward))
    with pytest.raises(UserError, match="its model 'judge' is none that the run serves: there is no `served`"):
        validate(config(reward))


def test_a_run_keeps_them_and_fetches_what_a_hub_has(tmp_path: Path) -> None:
    cfg = config("served=[{name: judge, path: Qwen/Qwen3-8B, nodes: 1}]", "cluster.nodes=2")
    assert [(asset.name, asset.keys) for asset in assets_of(cfg) if asset.kind == "model"] == [
        ("Qwen/Qwen3-8B", ("served.0.path",))
    ]
    save_config(cfg, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == cfg
    assert served_config(cfg, cfg.served[0]).model.path == "Qwen/Qwen3-8B"


def test_the_table_before_the_queue_shows_them_with_what_they_hold() -> None:
    cfg = config(JUDGE, "cluster.nodes=3", "served.0.engine.tensor_parallel_size=2")
    needs: Needs = needs_of(cfg)
    hf = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
    hf |= {"num_key_value_heads": 8, "vocab_size": 151936, "head_dim": 128}
    sizes = {None: ModelSize(600_000_000, None), TINY: ModelSize(8_000_000_000, hf)}
    placement = plan(cfg, 8)
    memory = plan_memory(cfg, needs, placement, 80.0, sizes.__getitem__)
    assert memory is not None and memory.roles["served judge"].gib["weights"] == pytest.approx(8e9 * 2 / 2 / 2**30)
    [row] = [line for line in split_table(placement, memory) if "served judge" in line]
    assert "node 2" in row and "GPUs 0-7" in row and "sequences of 4096 tokens" in row
    sizes[TINY] = ModelSize(200_000_000_000, hf)
    with pytest.raises(UserError, match=r"an engine of judge's weights take 186.3 GiB") as refused:
        plan_memory(cfg, needs, placement, 80.0, sizes.__getitem__)
    assert refused.value.hint and "served.0.engine.tensor_parallel_size=" in refused.value.hint


def test_the_pages_example_is_valid_and_has_its_four_nodes(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n(cluster:.*?)```", PAGE, re.DOTALL)
    (tmp_path / "config.yaml").write_text(text)
    validate(cfg := load_config(tmp_path / "config.yaml"))
    placement = plan(cfg, 8)
    assert (placement.nodes, placement.served[0].nodes) == (4, range(3, 4))
    assert placement.served[0].gpus == ((0, 1, 2, 3), (4, 5, 6, 7))


# ---- the address

BPE = bpe_tokenizer()
WHAT = Model("judge", "the model that is served", "served.0.max_tokens", "the model is sampled by temperature alone")


def scored(turn: Turn) -> tuple[str, list[int], str]:
    text = "Yes, it is fine. Score: 0.5"
    return text, [*BPE.encode(text), BPE.eos_token_id], "stop"


def test_each_request_stands_for_itself_and_is_counted() -> None:
    async def scenario() -> None:
        cfg = config(f"served=[{{name: judge, path: '{TINY}', max_tokens: 512}}]")
        sampler, kept = Scripted(scored), NothingKept()
        async with serving(served_config(cfg, cfg.served[0]), BPE, sampler, model=WHAT) as (endpoint, key):
            key.conversations = kept
            async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=key.key, max_retries=0) as client:
                assert [model.id async for model in client.models.list()] == ["judge"]
                ask: dict[str, Any] = {"model": "judge", "messages": [{"role": "user", "content": "what is this?"}]}
                for _ in range(20):  # more than an environment's turns, and always from the beginning
                    answer = await client.chat.completions.create(**ask, temperature=0)
                assert answer.model == "judge" and answer.choices[0].message.content == "Yes, it is fine. Score: 0.5"
                assert len({tuple(turn.token_ids) for turn, *_ in sampler.asked}) == 1
                assert all(sampling.temperature == 0 for _, sampling, _ in sampler.asked)
                said = {"role": "assistant", "content": answer.choices[0].message.content}
                await client.chat.completions.create(
                    **{**ask, "messages": [*ask["messages"], said, *ask["messages"]]}, stream=False
                )
                assert not kept.sampled and not kept.branches(0)
                with pytest.raises(openai.NotFoundError, match="ask for 'judge', the model that is served"):
                    await client.chat.completions.create(**ask | {"model": "policy"})
                with pytest.raises(openai.BadRequestError, match=r"512 tokens of served.0.max_tokens"):
                    await client.chat.completions.create(**ask, max_tokens=513)
                with pytest.raises(openai.BadRequestError, match="is refused: the model is sampled by temperature"):
                    await client.chat.completions.create(**ask, presence_penalty=1)
            async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="none", max_retries=0) as stranger:
                with pytest.raises(openai.AuthenticationError):
                    await stranger.chat.completions.create(**ask)
            counts = endpoint.metrics()
            assert [counts[f"endpoint/{name}"] for name in ("requests", "refused", "strangers")] == [25, 3, 1]
            given = [(len(context), completion.num_tokens) for context, completion in sampler.given]
            assert kept.take_counts() == (sum(n for n, _ in given), sum(n for _, n in given))
            assert kept.take_counts() == (0, 0)

    asyncio.run(scenario())


def test_nobody_finds_a_model_whose_run_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        cfg = config(f"served=[{{name: judge, path: '{TINY}', max_tokens: 512}}]")
        async with serving(served_config(cfg, cfg.served[0]), BPE, Scripted(scored), model=WHAT) as (endpoint, key):
            model: Any = object.__new__(_ServedModel)  # without its engines
            model.name, model._endpoint, model._open = "judge", endpoint, contextlib.ExitStack()
            announce("judge", Served(endpoint.base_url, key.key))
            assert served("judge").api_key == key.key
            await model.close()
            assert not announced()
            with pytest.raises(UserError, match="no model 'judge' is served here"):
                served("judge")

    asyncio.run(scenario())


PAGE = (PROJECT / "docs/rewards.md").read_text(encoding="utf-8")
_, JUDGED = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NOTING = """
class Noting(Judged):
    async def __call__(self, prompt, response, target, **fields):
        import os, pathlib
        with open(pathlib.Path(__file__).parent / "ran", "a") as file:
            file.write(os.environ.get("WHERE", "first") + "\\n")
        return await super().__call__(prompt, response, target, **fields)
"""
"""The page's own, which says where it runs."""


@pytest.fixture
def tls(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> Iterator[Certificates]:  # noqa: F811
    for name, value in certificates.environment().items():
        monkeypatch.setenv(name, value)
    for name in ("FORGE_HPC_SERVED_JUDGE_URL", "FORGE_HPC_SERVED_JUDGE_KEY"):
        monkeypatch.setenv(name, "")  # so that what is announced goes with the test
        monkeypatch.delenv(name)
    yield certificates


@pytest.mark.timeout(300)
def test_rewards_on_every_node_find_the_address_and_trust_it(node: Node, tls: Certificates, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "user.py").write_text(JUDGED + NOTING)
    (ran := tmp_path / "ran").touch()
    own = RewardConfig(f"{tmp_path / 'user.py'}:Noting", workers=2)
    judge = RewardConfig("llm_judge", args={"model": "judge"})

    async def score(pool: RewardPool) -> list[float]:
        prompt, completion = Prompt(0, "go", [1], "", {}), Completion(0, "text", [3], [-0.1], "stop", (0, 0))
        return [result[0] for result in await asyncio.gather(*(pool.score(prompt, completion) for _ in range(20)))]

    async def scenario() -> None:
        cfg = config(f"served=[{{name: judge, path: '{TINY}'}}]")
        context, _ = tls_context("0.0.0.0")
        async with serving(served_config(cfg, cfg.served[0]), BPE, Scripted(scored), model=WHAT, tls=context) as (
            endpoint,
            key,
        ):
            assert endpoint.base_url.startswith("https://127.0.0.1:")
            key.conversations = NothingKept()
            announce("judge", Served(endpoint.base_url, key.key))
            async with RewardPool(Config(reward=[own]), others=[node.place]) as pool:
                while "other" not in ran.read_text():
                    assert await score(pool) == [1.0] * 20
            async with RewardPool(Config(reward=[judge])) as pool:
                assert await score(pool) == [0.5] * 20

    asyncio.run(asyncio.wait_for(scenario(), 240))
    assert set(announced()) == {"FORGE_HPC_SERVED_JUDGE_URL", "FORGE_HPC_SERVED_JUDGE_KEY"}
    with pytest.raises(UserError, match="no model 'critic' is served here"):
        served("critic")


# ---- a whole run

# The reward is the log-probability of the token that the judge finds likeliest after the answer.
LIKELY = """
import openai
from forge_hpc.served import served

class Likely:
    timeout_s = 900

    def __init__(self):
        judge = served("judge")
        http = openai.DefaultAsyncHttpxClient(verify=judge.tls, trust_env=False, timeout=900)
        self.client = openai.AsyncOpenAI(base_url=judge.base_url, api_key=judge.api_key, http_client=http, timeout=900)

    async def __call__(self, prompt, response, target, **fields):
        ask = {"model": "judge", "prompt": prompt + response, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        reply = await self.client.completions.create(**ask)
        return reply.choices[0].logprobs.token_logprobs[0]
"""


@pytest.mark.timeout(900)
def test_a_judge_that_is_killed_comes_back_and_every_reward_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "likely.py").write_text(LIKELY)
    steps, run_dir = 5, tmp_path / "run"
    overrides = [
        f"served=[{{name: judge, path: '{TINY}', dtype: float32, max_tokens: 64}}]",
        "served.0.engine.kv_cache_memory_gib=0.25",
        f"reward=[{{name: '{tmp_path / 'likely.py'}:Likely'}}]",
        "rollout.prompts_per_step=8",
        "evaluation.num_prompts=0",
        "logging.num_rollouts_per_step=8",
    ]
    run = start_local(run_dir, small_run(tmp_path, steps, "", *overrides))
    try:
        wait_for(lambda: read(run_dir) or run.poll() is not None, "a step")
        judge, *_ = processes(run_dir, "served-judge-0.log")
        judge.kill()
        _, err = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 0, err
    assert not left_over(run_dir)
    assert status(run_dir)["state"] == "completed"
    records = read(run_dir)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert (records[0]["recoveries/served"], records[-1]["recoveries/served"]) == (0, 1)
    assert records[-1]["recoveries/generators"] == records[-1]["recoveries/trainers"] == 0
    assert not sum(value for record in records for key, value in record.items() if key.startswith("rewards/failed"))
    requests = sum(record["served/judge/requests"] for record in records)
    assert requests == sum(record["served/judge/generated_tokens"] for record in records) == steps * 8 * 8
    assert not unexplained_metrics(run_dir)
    assert "served     judge  64 requests  " in render_status(RunDir(run_dir))
    expected = likeliest(next((run_dir / "served-judge").iterdir()))
    rollouts = read(run_dir, "rollouts.jsonl")
    assert len(rollouts) == steps * 8
    for rollout in rollouts:
        assert rollout["reward"] == pytest.approx(expected(rollout["prompt"] + rollout["completion"]), abs=1e-4)
    secrets = [path for path in run_dir.rglob("*") if path.is_file() and b"SERVED_JUDGE_KEY" in path.read_bytes()]
    assert not secrets, f"the key stands in {secrets}"


def likeliest(model_dir: Path) -> Any:
    """By transformers: the log-probability of the likeliest token after a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def logprob(text: str) -> float:
        with torch.no_grad():
            return model(torch.tensor([tokenizer.encode(text)])).logits[0, -1].log_softmax(-1).max().item()

    return logprob


def test_status_says_what_they_were_asked(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "status.json").write_text(json.dumps({"state": "running", "step": 1, "heartbeat": 0}))
    figures = {"served/judge/requests": 1500.0, "served/judge/prompt_tokens": 2e5, "served/judge/generated_tokens": 5e4}
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "time/step_s": 1.0, **figures}) + "\n")
    assert "served     judge  1,500 requests  250,000 tokens  last step" in render_status(RunDir(run_dir)).splitlines()
