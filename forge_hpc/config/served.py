"""The models of ``served``: what their engines are configured with, and whether they can be served at all."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.config.hub_cache import split_name
from forge_hpc.config.models import check_generated, check_tokenizer, check_weights, looks_local, read_model_config
from forge_hpc.config.registry import MODELS
from forge_hpc.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    EnvironmentConfig,
    GeneratorConfig,
    RewardConfig,
    RolloutConfig,
    ServedConfig,
    TrainerConfig,
)

JUDGE = "llm_judge"
"""The reward that asks a model of ``served`` where it is told no address."""


def served_config(cfg: Config, one: ServedConfig) -> Config:
    """The run as its generators would see it if the served model were its policy, and nothing trained it."""
    data = DataConfig(template_date=cfg.data.template_date, chat_template_args=one.chat_template_args)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, path=one.path, dtype=one.dtype or cfg.model.dtype, batch_invariant=False),
        data=data,
        environment=EnvironmentConfig(max_turns=sys.maxsize),
        algorithm=AlgorithmConfig(),
        rollout=RolloutConfig(max_prompt_tokens=one.max_tokens - 1, max_response_tokens=1),
        generator=GeneratorConfig(one.replicas, cfg.generator.timeout_s, engine=one.engine),
        trainer=TrainerConfig(),
        cluster=dataclasses.replace(cfg.cluster, colocate=False),
        reward=[],
        sources=[],
        served=[],
    )


def check_served(cfg: Config, *, check_paths: bool) -> None:
    """Raise a UserError for the first model of ``served`` that cannot be, or a judge that is not there."""
    names = [one.name for one in cfg.served]
    for i, one in enumerate(cfg.served):
        key = f"served.{i}"
        if not re.fullmatch("[a-z]+", one.name) or one.name == "policy":
            raise UserError(f"{key}.name is {one.name!r}", "small letters alone, such as judge; `policy` is the policy")
        if names.index(one.name) != i:
            raise UserError(f"{key}.name: {one.name!r} is given twice", "give each served model a name of its own")
        if one.engine.max_model_len is not None:
            raise UserError(f"{key}.engine.max_model_len is not for served models", f"set {key}.max_tokens")
        if one.max_tokens < 2:
            raise UserError(f"{key}.max_tokens={one.max_tokens} leaves no room for a response", "raise it")
        if check_paths:
            _check_path(key, one)
    asked = [(f"reward.{i}", reward) for i, reward in enumerate(cfg.reward)]
    for i, source in enumerate(cfg.sources):
        asked += [(f"sources.{i}.reward.{j}", reward) for j, reward in enumerate(source.reward)]
    for i, held_out in enumerate(cfg.evaluation.sets):
        asked += [(f"evaluation.sets.{i}.reward.{j}", reward) for j, reward in enumerate(held_out.reward)]
    for key, reward in asked:
        _check_judge(key, reward, names)


def _check_judge(key: str, reward: RewardConfig, names: list[str]) -> None:
    model = reward.args.get("model")
    if reward.name != JUDGE or reward.args.get("base_url") is not None or model in names:
        return
    there = f"`served` has {', '.join(names)}" if names else "there is no `served`"
    raise UserError(
        f"{key}.args: {JUDGE} has no base_url, and its model {model!r} is none that the run serves: {there}",
        f"set {key}.args.base_url to its endpoint, or name a model of `served`",
    )


def _check_path(key: str, one: ServedConfig) -> None:
    path = one.path
    if path.startswith("builtin:"):
        if path not in MODELS:
            raise UserError(f"{key}.path is {path!r}, which is not known", f"known: {', '.join(MODELS)}")
        return
    if not path or path == "warmstart":
        raise UserError(f"{key}.path is {path!r}", "give a model in Hugging Face format, or a hub name")
    if not looks_local(path):
        try:
            split_name(path)
        except ValueError:
            raise UserError(
                f"{key}.path={path!r} is neither a directory nor a hub name", "write DIR or OWNER/NAME"
            ) from None
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{key}.path: no such directory: {path}", "give a model in Hugging Face format, or a hub name")
    config = read_model_config(directory)
    check_generated(config, f"{key}.path: the model in {directory}")
    check_weights(directory)
    check_tokenizer(directory)
    longest, tp = config.get("max_position_embeddings"), one.engine.tensor_parallel_size
    if isinstance(longest, int) and longest < one.max_tokens:
        raise UserError(
            f"{key}.max_tokens={one.max_tokens}, and the model in {directory} has {longest} positions",
            f"set {key}.max_tokens to {longest} or less",
        )
    heads = config.get("num_attention_heads")
    if isinstance(heads, int) and heads % tp:
        raise UserError(
            f"{key}.engine.tensor_parallel_size={tp} does not divide the {heads} attention heads of the model in "
            f"{directory}",
            "choose a divisor",
        )
