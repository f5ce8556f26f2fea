"""Examples learned beside what is sampled: the loss and its gradient against float64, and where the examples stand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import DEMO
from tiny_models import random_documents
from transformers import AutoModelForCausalLM

from forge_hpc.config import Config, UserError, load_config, validate
from forge_hpc.config.schema import SFTMixConfig
from forge_hpc.config.sources import with_sft_data
from forge_hpc.data.builtin import char_tokenizer
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream
from forge_hpc.data.types import Document
from forge_hpc.rollouts.sft import SFTMix
from forge_hpc.training.engine import TrainEngine

COEF = 0.3


class Examples:
    """A stream of documents like those of SFT."""

    def __init__(self) -> None:
        self.documents = [Document(d.token_ids, d.loss_mask) for d in random_documents(9)[6:]]

    def take(self, num: int) -> list[Document]:
        return self.documents[:num]


def config(**algorithm: Any) -> Config:
    cfg = Config()
    cfg.model.dtype = "float32"
    cfg.trainer.training.seq_len = 64
    cfg.checkpoint.async_save = False
    cfg.trainer.training.max_norm = 1e9
    cfg.algorithm.sft = SFTMixConfig(COEF, 3)
    for name, value in algorithm.items():
        setattr(cfg.algorithm, name, value)
    return cfg


def episodes() -> list[Document]:
    return [replace(document, ref_logprobs=None) for document in random_documents(6)]


def mean_nll(model: Any, documents: list[Document]) -> torch.Tensor:
    """In float64, over all trained tokens."""
    terms = []
    for document in documents:
        ids = torch.tensor(document.token_ids[None].astype(np.int64))
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        terms.append(-logprobs[torch.tensor(document.loss_mask[1:])])
    return torch.cat(terms).mean()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loss", ["grpo", "gspo"], ids=["over tokens", "over sequences"])
def test_a_step_minimises_the_loss_on_episodes_and_that_on_examples_with_its_weight(loss: str, model_dir: Path) -> None:
    examples, own = Examples(), episodes()
    cfg = config(loss=loss)
    mixed = SFTMix(examples, cfg.algorithm.sft).mix(own)  # type: ignore[arg-type]
    engine = TrainEngine(cfg, model_dir)
    alone = engine.train_step(own, update=False)
    both = engine.train_step(mixed, update=False)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    expected = mean_nll(model, examples.documents)
    assert both["sft/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert both["loss"] == pytest.approx(alone["loss"] + COEF * expected.item(), rel=1e-5)
    for name in ("entropy/mean", "mismatch/logprob_abs_mean", "ratio/mean"):
        assert both[name] == pytest.approx(alone[name], rel=1e-5)
    silent = [replace(document, advantage=0.0, columns={}) for document in own]
    of_examples = engine.train_step(SFTMix(examples, cfg.algorithm.sft).mix(silent))  # type: ignore[arg-type]
    (COEF * expected).backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
    assert of_examples["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.usefixtures("process_group")
def test_several_optimizer_steps_share_the_examples_of_a_step(model_dir: Path) -> None:
    cfg = config(minibatches=2, epochs=2)
    cfg.trainer.optimizer.lr = 1e-12
    mixed = SFTMix(Examples(), cfg.algorithm.sft).mix(episodes())  # type: ignore[arg-type]
    engine = TrainEngine(cfg, model_dir)
    whole = engine.train_step(mixed, update=False)
    parts = engine.train_step(mixed)
    assert parts["optimizer_steps"] == 4
    assert parts["sft/loss"] == pytest.approx(whole["sft/loss"], rel=1e-5)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)


def test_the_examples_come_in_an_order_of_their_own_and_go_on_where_they_stood() -> None:
    cfg = load_config(DEMO, ["algorithm.sft={coef: 0.1, documents: 4}"])
    validate(cfg)
    examples = with_sft_data(cfg)
    assert examples is not None and with_sft_data(load_config(DEMO)) is None

    def mix() -> SFTMix:
        return SFTMix(DocumentStream(open_sources(examples), char_tokenizer(), examples), cfg.algorithm.sft)

    def texts(documents: list[Document]) -> list[list[int]]:
        return [document.token_ids.tolist() for document in documents[6:]]

    first, own = mix(), episodes()
    prompts = DocumentStream(open_sources(cfg), char_tokenizer(), cfg)
    assert texts(first.mix(own)) != [document.token_ids.tolist() for document in prompts.take(4)]
    again = mix().load_state_dict(first.state_dict())
    assert texts(first.mix(own)) == texts(again.mix(own))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["algorithm.sft.sources=[{path: 'builtin:addition'}]"], r"the weight algorithm\.sft\.coef=0"),
        (["algorithm.sft.coef=1", "recipe=best_of_n"], "recipe=best_of_n does not train with it"),
        (["algorithm.sft={coef: 1, sources: [{weight: 1}]}"], r"algorithm\.sft\.sources\.0 has no path"),
        (["algorithm.sft={coef: 1, sources: [{path: none.jsonl}]}"], r"algorithm\.sft\.sources\.0\.path: no such file"),
        (["algorithm.sft.coef=1", "data.target_field=null"], "data has no target_field, so chats are learned"),
    ],
    ids=["no weight", "another loss", "no path", "no file", "no answers"],
)
def test_what_examples_cannot_be_is_said_before_the_queue(overrides: list[str], why: str) -> None:
    with pytest.raises(UserError, match=why):
        validate(load_config(DEMO, ["model.path=builtin:qwen3-tiny", *overrides]))
