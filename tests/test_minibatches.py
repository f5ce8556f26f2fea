"""Several optimizer steps on the documents of one step: against a plain loop in float64, and what must not change."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_train_engine import assert_close, assert_equal, config, full, weights
from tiny_models import random_documents, write_model

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.needs import ModelNeed
from forge_hpc.config.schema import MismatchConfig
from forge_hpc.controller.service import is_loss
from forge_hpc.data.types import Document
from forge_hpc.losses.top_entropy import entropy_threshold
from forge_hpc.models.attention import attention_inputs
from forge_hpc.rollouts.mismatch import MismatchWatch
from forge_hpc.training.distributed import init_distributed
from forge_hpc.training.engine import TrainEngine
from forge_hpc.training.minibatches import minibatches

pytestmark = pytest.mark.usefixtures("process_group")

NUM_DOCUMENTS, NUM_PROMPTS = 22, 11


def several(minibatches: int = 4, epochs: int = 2, **options: Any) -> Config:
    return config(minibatches=minibatches, epochs=epochs, **options)


def documents_of(engine: TrainEngine, num: int = NUM_DOCUMENTS, noise: float = 0.1) -> list[Document]:
    """Pairs of answers to a prompt each, sampled from nearly the policy that the engine holds."""
    documents = random_documents(num)
    rng = np.random.default_rng(1)
    for index, (document, logprobs) in enumerate(zip(documents, engine.logprobs(documents), strict=True)):
        shift = noise * rng.normal(size=len(logprobs)) * document.loss_mask
        document.generator_logprobs = (logprobs + shift).astype(np.float32)
        document.ref_logprobs = (logprobs - 0.05 * document.loss_mask).astype(np.float32)
        document.prompt = index % NUM_PROMPTS
    return documents


# ---- which documents go together


def test_every_epoch_deals_whole_groups_anew_and_evenly_and_the_same_way_each_time() -> None:
    documents = random_documents(23, with_logprobs=False)
    for index, document in enumerate(documents):
        document.prompt = index // 3 if index < 21 else None  # 7 prompts of 3, and 2 that stand alone
    cut = list(minibatches(documents, 4, 3, (5, 17)))
    assert len(cut) == 12
    for epoch in (cut[:4], cut[4:8], cut[8:]):
        assert sorted(id(document) for part in epoch for document in part) == sorted(map(id, documents))
        prompts = [{document.prompt for document in part} - {None} for part in epoch]
        assert sum(map(len, prompts)) == 7, "no prompt is in two minibatches"
        groups = [len(found) + sum(d.prompt is None for d in part) for found, part in zip(prompts, epoch, strict=True)]
        assert sorted(groups) == [2, 2, 2, 3]
    assert ids(cut[:4]) != ids(cut[4:8])
    assert ids(minibatches(documents, 4, 3, (5, 17))) == ids(cut)
    assert ids(minibatches(documents, 4, 3, (5, 18))) != ids(cut)


def ids(cut: Any) -> list[list[int]]:
    return [[id(document) for document in part] for part in cut]


def test_fewer_groups_than_minibatches_make_as_many_minibatches() -> None:
    documents = random_documents(4, with_logprobs=False)
    for document, group in zip(documents, (7, 7, 9, 9), strict=True):
        document.group, document.prompt = group, 1  # what must stand in one row is what is never cut
    cut = list(minibatches(documents, 8, 1, (0, 0)))
    assert sorted(tuple(document.group for document in part) for part in cut) == [(7, 7), (9, 9)]
    assert ids(minibatches(documents, 1, 2, (0, 0))) == [[*map(id, documents)]] * 2


# ---- against a plain loop


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The engine computes in float64 what it computes in float32 otherwise."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def distributions(engine: TrainEngine, model: Any, document: Document) -> torch.Tensor:
    """[L - 1, V]: log-probabilities at the tokens of one document by itself."""
    ids = torch.from_numpy(document.token_ids).long()
    positions = np.arange(len(ids) - 1)[None]
    attention = attention_inputs(engine.spec.inner_attention, positions, torch.device("cpu"))
    hidden = model(ids[None, :-1], positions=torch.from_numpy(positions), attention_masks=attention)
    return (hidden[0] @ model.lm_head.weight.T).log_softmax(-1)


def token_logprobs(engine: TrainEngine, model: Any, document: Document) -> torch.Tensor:
    """Of the trained tokens of one document by itself."""
    labels = torch.from_numpy(document.token_ids[1:]).long()
    found = distributions(engine, model, document).gather(1, labels[:, None])[:, 0]
    return found[document.loss_mask[1:]]


@torch.no_grad()
def in_doubt(engine: TrainEngine, model: Any, documents: list[Document], quantile: float) -> dict[int, torch.Tensor]:
    """Which of the trained tokens of each document have the largest entropies of all."""
    entropies = {}
    for document in documents:
        logprobs = distributions(engine, model, document)
        entropies[id(document)] = -(logprobs.exp() * logprobs).sum(-1)[document.loss_mask[1:]]
    ordered = torch.cat(list(entropies.values())).sort(descending=True).values
    least = ordered[math.floor(quantile * (len(ordered) - 1))]
    return {key: values >= least for key, values in entropies.items()}


def plain_loop(engine: TrainEngine, cfg: Config, documents: list[Document], num_steps: int) -> dict[str, Any]:
    """Clipped policy gradients a document at a time: no rows, no microbatches, torch's own AdamW."""
    model, trainer, a = copy.deepcopy(engine.model), cfg.trainer, cfg.algorithm
    o = trainer.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )
    num_tokens = sum(int(d.loss_mask[1:].sum()) for d in documents)
    num = num_tokens if a.normalization in (None, "token") else len(documents)
    steps = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = o.lr * min(1, (step + 1) / trainer.lr_scheduler.warmup_steps)
        generator = {id(d): torch.from_numpy(d.generator_logprobs[d.loss_mask]).double() for d in documents}
        old = generator
        if a.mismatch.cap is not None:
            with torch.no_grad():  # float32: as columns of documents are
                old = {id(d): token_logprobs(engine, model, d).to(torch.float32).double() for d in documents}
        learns = in_doubt(engine, model, documents, a.top_entropy_quantile)
        losses, clipped, norms = [], [], []
        for part in minibatches(documents, a.minibatches, a.epochs, (cfg.seed, step)):
            optimizer.zero_grad()
            total, num_clipped = torch.zeros(()), 0.0
            for document in part:
                logprobs = token_logprobs(engine, model, document)
                ratio = (logprobs - old[id(document)]).exp()
                advantage = float(np.float32(document.advantage))
                outside = torch.clamp(ratio, 0.8, 1.2) * advantage
                surrogate = torch.minimum(ratio * advantage, outside)
                share = {None: 1, "token": 1, "sequence": len(ratio), "constant": cfg.rollout.max_response_tokens}
                weight = 1.0
                if a.mismatch.cap is not None:
                    weight = (old[id(document)] - generator[id(document)]).exp().clamp(max=a.mismatch.cap)
                total = total - (weight * surrogate * learns[id(document)]).sum() / share[a.normalization] / (
                    num / a.minibatches
                )
                of = 1 if a.normalization in (None, "token") else len(ratio)
                num_clipped += float((outside < ratio * advantage).sum()) / of
            total.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.training.max_norm)))
            optimizer.step()
            losses.append(float(total.detach()))
            clipped.append(num_clipped / (num / a.minibatches))
        means = [math.fsum(values) / len(values) for values in (losses, clipped, norms)]
        steps.append(dict(zip(("loss", "ratio/clip_fraction", "grad_norm"), means, strict=True)))
    moments = [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]
    return {"steps": steps, "weights": [p.detach() for p in model.parameters()], "moments": moments}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "sequence"},
        {"normalization": "constant"},
        {"mismatch": MismatchConfig(cap=1.1)},
        {"top_entropy_quantile": 0.4},
        {"top_entropy_quantile": 0.5, "mismatch": MismatchConfig(cap=1.1), "normalization": "sequence"},
    ],
    ids=["token", "sequence", "constant", "against the trainer", "in doubt", "in doubt, against the trainer"],
)
def test_two_epochs_of_four_minibatches_equal_a_plain_loop_in_float64(
    model_dir: Path, float64: None, options: dict[str, Any]
) -> None:
    cfg = several(kl_coef=0.0, entropy_coef=0.0, max_norm=0.5, **options)
    cfg.trainer.lr_scheduler.warmup_steps = 2
    cfg.trainer.optimizer.lr = 5e-4
    cfg.trainer.optimizer.weight_decay = 0.01
    engine = TrainEngine(cfg, model_dir)
    engine.model.double()
    documents = documents_of(engine)
    for document in documents:
        document.ref_logprobs = None
    expected = plain_loop(engine, cfg, documents, num_steps=2)
    if "top_entropy_quantile" in options:
        for document in documents:
            document.loss_mask = 0.5 * document.loss_mask  # any number but 0
    # What the ratio is taken against passes through a float32 column, which may round a last bit of float64 elsewhere.
    rel, atol = (1e-6, 1e-7) if "mismatch" in options else (1e-11, 1e-11)
    for step in expected["steps"]:
        metrics = engine.train_step(documents)
        for name, value in step.items():
            assert metrics[name] == pytest.approx(value, rel=rel), name
        assert metrics["tokens/trained"] == 2 * sum(np.count_nonzero(d.loss_mask[1:]) for d in documents)
    if "top_entropy_quantile" not in options:
        assert expected["steps"][1]["ratio/clip_fraction"] > 0.05, "the clip has work to do"
    assert engine.step == 2 and metrics["optimizer_steps"] == 16
    [optimizer] = engine.optimizers
    ours = [optimizer.state[p][name] for p in engine.model.parameters() for name in ("exp_avg", "exp_avg_sq")]
    for actual, wanted in zip(
        (*engine.model.parameters(), *ours), expected["weights"] + expected["moments"], strict=True
    ):
        assert actual.dtype == torch.float64
        torch.testing.assert_close(actual.detach(), wanted, rtol=rel, atol=atol)


# ---- what a minibatch is a share of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "sequence"},
        {"loss": "dr_grpo"},
        {"mismatch": MismatchConfig(2.0, None, [0.5, 2.0])},
        {"top_entropy_quantile": 0.2},
    ],
    ids=["token", "sequence", "constant", "corrected", "in doubt"],
)
def test_at_a_rate_of_nothing_the_minibatches_are_the_step_in_parts(model_dir: Path, options: dict[str, Any]) -> None:
    whole, parts = config(**options), several(epochs=1, **options)
    whole.trainer.optimizer.lr = parts.trainer.optimizer.lr = 1e-30
    engine = TrainEngine(whole, model_dir)
    documents = documents_of(engine)
    expected, metrics = engine.train_step(documents), TrainEngine(parts, model_dir).train_step(documents)
    assert metrics.keys() == expected.keys()
    other = {"grad_norm", "optimizer_steps", "tokens/fill", "mismatch/logprob_abs_mean"}
    for name in expected.keys() - other:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name
    assert (metrics["optimizer_steps"], expected["optimizer_steps"]) == (4, 1)


@pytest.mark.parametrize("seq_len", [32, 256])
def test_rows_do_not_change_which_tokens_are_in_doubt_and_what_says_nothing_is_not_learned(
    model_dir: Path, seq_len: int
) -> None:
    plain, cfg = config(), config(top_entropy_quantile=0.2)
    cfg.trainer.training.seq_len = seq_len
    engine, whole = TrainEngine(cfg, model_dir), TrainEngine(plain, model_dir)
    documents = documents_of(engine)
    entropies = whole._per_token(documents)[1]
    least = entropy_threshold(entropies, [d.loss_mask for d in documents], 0.2)
    metrics = engine.train_step(documents)
    assert metrics["entropy/threshold"] == pytest.approx(least, abs=1e-6)
    weighted = [
        dataclasses.replace(d, columns={"weights": e >= least}) for d, e in zip(documents, entropies, strict=True)
    ]
    expected = whole.train_step(weighted)
    for name in expected.keys() - {"tokens/fill"}:
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5), name
    share = sum(int((e[d.loss_mask] >= least).sum()) for d, e in zip(documents, entropies, strict=True))
    assert share / metrics["tokens/trained"] == pytest.approx(0.2, abs=0.01)


def test_a_loss_without_weights_cannot_be_on_some_tokens(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text("def bare(*, logprobs, mask, normalizer):\n    ...\n")
    with pytest.raises(UserError, match=r"top_entropy_quantile is not used by algorithm.loss=.*bare"):
        TrainEngine(
            config(top_entropy_quantile=0.2, loss=f"{tmp_path / 'bare.py'}:bare", kl_coef=0, entropy_coef=0), model_dir
        )
    critic = TrainEngine(config(top_entropy_quantile=0.2), model_dir, ModelNeed(head="value"))
    documents = random_documents(4)
    for document in documents:
        document.columns["returns"] = 1.0
    assert "entropy/threshold" not in critic.train_step(documents)


def test_a_loss_that_cannot_reach_a_service_of_its_own_is_no_lost_trainer(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "away.py").write_text("def away(*, logprobs, mask, normalizer):\n    raise ConnectionError('gone')\n")
    away = config(loss=f"{tmp_path / 'away.py'}:away", kl_coef=0, entropy_coef=0, top_entropy_quantile=1)
    with pytest.raises(RuntimeError, match=r"^the loss has raised ConnectionError: gone$") as raised:
        TrainEngine(away, model_dir).train_step(random_documents(4))
    assert not is_loss(raised.value)


def test_one_minibatch_and_one_epoch_are_the_step_as_it_was_to_the_last_bit(model_dir: Path) -> None:
    documents = random_documents(13)
    engine, plain = TrainEngine(several(1, 1), model_dir), TrainEngine(config(), model_dir)
    for number in range(2):
        for document in documents:
            document.prompt = number
        assert engine.train_step(documents) == plain.train_step(documents)
    assert_equal(weights(engine), weights(plain))


def test_the_mismatch_is_known_before_the_first_of_the_steps_and_a_large_one_takes_none(model_dir: Path) -> None:
    engine = TrainEngine(several(), model_dir)
    documents = documents_of(engine, noise=0.0)
    assert engine.train_step(documents)["mismatch/logprob_abs_mean"] < 1e-6
    before = weights(engine)
    for document in documents:
        document.generator_logprobs = document.generator_logprobs - 3 * document.loss_mask
    with pytest.raises(RuntimeError, match=r"generator and trainer differ by [23]"):
        engine.train_step(documents, max_mismatch=1.0)
    assert_equal(weights(engine), before)
    assert engine.step == 1


def test_a_step_that_only_measures_goes_through_its_documents_once(model_dir: Path) -> None:
    engine = TrainEngine(several(), model_dir)
    documents, before = documents_of(engine), weights(engine)
    metrics = engine.train_step(documents, update=False)
    assert (metrics["tokens/trained"], metrics["optimizer_steps"], engine.step) == (0, 0, 1)
    assert_equal(weights(engine), before)
    rates = [engine.train_step(documents)["lr"] for _ in range(2)]
    assert rates == pytest.approx([4e-4, 6e-4]), "the schedule counts steps"


def test_a_loaded_run_goes_on_with_the_same_minibatches_to_the_last_bit(model_dir: Path, tmp_path: Path) -> None:
    cfg = several()
    engine = TrainEngine(cfg, model_dir)
    documents = documents_of(engine)
    engine.train_step(documents)
    engine.save(tmp_path / "trainer")
    metrics = [engine.train_step(documents) for _ in range(2)]
    engine.wait_for_save()
    resumed = TrainEngine(cfg, model_dir)
    resumed.load(tmp_path / "trainer")
    assert resumed.num_optimizer_steps == 8
    assert [resumed.train_step(documents) for _ in range(2)] == metrics
    assert_equal(weights(resumed), weights(engine))


def test_a_critic_takes_as_many_optimizer_steps_as_the_policy(model_dir: Path) -> None:
    critic = TrainEngine(several(), model_dir, ModelNeed(head="value", lr=1e-2))
    documents = random_documents(NUM_DOCUMENTS)
    for document in documents:
        document.columns["returns"] = document.loss_mask * 1.0
    first = critic.train_step(documents)
    assert first["optimizer_steps"] == 8
    for _ in range(4):
        last = critic.train_step(documents)
    assert last["value/error"] < 0.5 * first["value/error"]


# ---- several ranks


CASES: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "FSDP": (NUM_DOCUMENTS, {"data_parallel_shard_degree": 2}, {}),
    "FSDP against the trainer": (
        NUM_DOCUMENTS,
        {"data_parallel_shard_degree": 2},
        {"mismatch": MismatchConfig(cap=1.1), "normalization": "sequence"},
    ),
    "FSDP, tokens in doubt": (
        NUM_DOCUMENTS,
        {"data_parallel_shard_degree": 2},
        {"top_entropy_quantile": 0.3, "kl_weighted": True},
    ),
    "CP, tokens in doubt": (NUM_DOCUMENTS, {"context_parallel_degree": 2}, {"top_entropy_quantile": 0.3}),
    "a rank without documents": (4, {"data_parallel_shard_degree": 2}, {}),
    "TP": (NUM_DOCUMENTS, {"tensor_parallel_degree": 2}, {}),
    "CP": (NUM_DOCUMENTS, {"context_parallel_degree": 2}, {"mismatch": MismatchConfig(cap=1.1)}),
}
"""Name: (documents, degrees, options of algorithm)."""


def two_steps(cfg: Config, model_dir: Path, num: int) -> dict[str, Any]:
    engine = TrainEngine(cfg, model_dir)
    documents = documents_of(engine, num)
    steps = [engine.train_step(documents) for _ in range(2)]
    return {"steps": steps, "weights": {name: full(tensor) for name, tensor in weights(engine).items()}}


def worker(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_distributed(directory / "store", rank, 2, rank, timeout_s=120)
    for name, (num, degrees, options) in CASES.items():
        cfg = several(**options)
        for key, value in degrees.items():
            setattr(cfg.trainer.parallelism, key, value)
        torch.save(two_steps(cfg, directory / "model", num), directory / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two_ranks")
    write_model(directory / "model", "qwen3", tied=True)
    mp.spawn(worker, (directory,), nprocs=2)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_take_the_same_optimizer_steps_as_one(two_ranks: Path, case: str) -> None:
    num, _, options = CASES[case]
    ours = [torch.load(two_ranks / f"{case}-{rank}.pt", weights_only=False) for rank in range(2)]
    expected = two_steps(several(**options), two_ranks / "model", num)
    assert ours[0]["steps"] == ours[1]["steps"]
    for actual, wanted in zip(ours[0]["steps"], expected["steps"], strict=True):
        assert actual["optimizer_steps"] == wanted["optimizer_steps"]
        for name in wanted.keys() - {"tokens/fill"}:
            assert actual[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), name
    assert_close(ours[0]["weights"], expected["weights"], atol=2e-3)


# ---- the configuration


@pytest.mark.parametrize(
    ("overrides", "what", "hint"),
    [
        (["recipe=sft", "algorithm.minibatches=2"], "learns from examples", "lower trainer.training.global_batch_size"),
        (["recipe=sft", "algorithm.epochs=2"], "learns from examples", "raise trainer.training.steps"),
        (["algorithm.minibatches=33"], "algorithm.minibatches=33 of rollout.prompts_per_step=32", "32 or less"),
        (["algorithm.minibatches=0"], "algorithm.minibatches must be greater than 0", None),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], what: str, hint: str | None) -> None:
    with pytest.raises(UserError) as refused:
        validate(load_config(None, overrides))
    assert what in refused.value.message
    assert hint is None or (refused.value.hint and hint in refused.value.hint)


def test_clips_fit_a_correction_where_there_are_several_optimizer_steps() -> None:
    options = ["algorithm.mismatch.cap=2", "algorithm.clip_high=0.3"]
    validate(load_config(None, [*options, "algorithm.epochs=2"]))
    with pytest.raises(UserError, match="clip_high has no effect"):
        validate(load_config(None, options))


def test_more_optimizer_steps_explain_a_larger_mismatch_of_older_samples() -> None:
    documents = random_documents(1)
    documents[0].policy_version = 2
    once, often = (MismatchWatch(cfg, False, print).bounds(5, documents) for cfg in (config(), several()))
    assert often.explained == pytest.approx(once.explained * 8**0.5, rel=1e-2)
    documents[0].policy_version = 4  # of the weights that the step begins with
    once, often = (MismatchWatch(cfg, False, print).bounds(5, documents) for cfg in (config(), several()))
    assert often == once
