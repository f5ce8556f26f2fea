"""Checks of a whole configuration before anything is queued: numbers, names, and how the parts fit together.

What needs torch, a GPU or the network is checked later, on the nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from forge_hpc.config.adapters import adapter_configs, check_adapters_together
from forge_hpc.config.algorithm import LossFacts, check_fit, check_loss, loss_facts, resolve_advantage
from forge_hpc.config.columns import check_columns
from forge_hpc.config.errors import UserError
from forge_hpc.config.fields import walk
from forge_hpc.config.hub_cache import cached_snapshot, split_name
from forge_hpc.config.models import (
    VALUE_HEAD,
    check_family,
    check_generated,
    check_invariant,
    check_tokenizer,
    check_trainable,
    check_weights,
    looks_local,
    num_experts_of,
    read_model_config,
    token_ids,
)
from forge_hpc.config.needs import Needs, check_models
from forge_hpc.config.recipes import load_recipe, needs_of
from forge_hpc.config.registry import DATA, ENVIRONMENTS, LORA_TARGETS, LOSSES, MODELS, VLLM_LORA_RANKS
from forge_hpc.config.rewards import MODEL, check_reward, reward_model_of
from forge_hpc.config.schema import Config, DataConfig, RewardConfig
from forge_hpc.config.served import check_served
from forge_hpc.config.sources import (
    MAX_SETS,
    RunSource,
    data_sources,
    find_field,
    held_out_sets,
    run_sources,
    with_sft_data,
)
from forge_hpc.config.split import plan, takes_turns, working_nodes
from forge_hpc.config.user_code import find_user_code

_MAX_CHECKED_LINES = 10_000
_JSONL_SUFFIXES = (".jsonl", ".json")  # what forge_hpc.data reads line by line
_DATA_SUFFIXES = (*_JSONL_SUFFIXES, ".parquet", ".csv")


def validate(cfg: Config, *, check_paths: bool = True) -> None:
    """Raise a UserError for the first thing in `cfg` that cannot work.

    Args:
        check_paths: also look at local models, data files and reward files. Hub names are never looked up.
    """
    recipe = load_recipe(cfg)
    needs = needs_of(cfg)
    _check_sources(cfg, needs)
    if needs.models:
        check_models(needs.models)
    _check_values(cfg)
    if needs.has_algorithm:
        _check_algorithm(cfg)
    _check_minibatches(cfg, needs)
    _check_left_out(cfg, needs)
    _check_routing_replay(cfg, needs)
    _check_batch_invariant(cfg, needs)
    runs = run_sources(cfg)
    for run in runs:
        _check_data_values(run, needs)
    _check_sft(cfg, needs)
    _check_evaluation(cfg, needs)
    _check_lengths(cfg, needs)
    _check_slurm(cfg)
    _check_sandbox(cfg)
    for run in runs:
        _check_reward_names(run, needs)
        check_environment(run.config, check_paths=check_paths, key=run.key)
    _check_reward_model(cfg, needs)
    check_served(cfg, check_paths=check_paths)
    recipe.check(cfg)
    plan(cfg, cfg.cluster.gpus_per_node)
    check_generators(cfg)
    check_adapters_together(cfg)
    for own in adapter_configs(cfg) if cfg.trainer.lora.sweep else ():
        validate(own, check_paths=False)
    if check_paths:
        _check_model(cfg, needs)
        _check_other_models(cfg, needs)
        for run in runs:
            _check_data(run)
        _check_files(cfg)
        check_columns(cfg, needs)


def walltime_s(text: str) -> float:
    """Seconds of a time limit in Slurm's notation: minutes, minutes:seconds, hours:minutes:seconds, days-hours,
    days-hours:minutes, days-hours:minutes:seconds; UNLIMITED and INFINITE are inf. Raises UserError."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UserError(
            f"slurm.time is {text!r}", "write minutes, hours:minutes:seconds, or days-hours:minutes:seconds"
        )
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(days) * 86400 + hours * 3600 + minutes * 60 + seconds
    hours, minutes, seconds = {1: (0, parts[0], 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return hours * 3600 + minutes * 60 + seconds


# --- single values


def _check_values(cfg: Config) -> None:
    for key, value in _numbers(dataclasses.asdict(cfg)):
        if not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, it is {value}")
    check_fields(cfg)
    if not cfg.trainer.lora.target_modules:
        raise UserError("trainer.lora.target_modules is empty", f"known: {', '.join(LORA_TARGETS)}")
    if not all(cfg.rollout.sampling.stop):
        raise UserError("rollout.sampling.stop has an empty string", "it would end every response at once")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.name):
        raise UserError(f"name is {cfg.name!r}", "it names a directory and a job: letters, digits, '.', '_' and '-'")


def check_fields(cfg: Any) -> None:
    """Raise a UserError for the first value of a configuration that its field does not take."""
    for key, value, rule in walk(cfg):
        for item in value if isinstance(value, list) else [value]:
            if item is None:
                continue
            if rule.choices and not (rule.code and ":" in item):
                _check_name(key, item, rule.choices, rule.formerly)
            if rule.range is not None and not rule.range.holds(item):
                shown = f"{item:g}" if isinstance(item, float) else item
                raise UserError(f"{key} must be {rule.range.text}, it is {shown}")


def _numbers(tree: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, float):
            yield f"{prefix}{key}", value
        yield from _numbers(value, f"{prefix}{key}.")


def _check_name(key: str, value: str, known: Iterable[str], formerly: Mapping[str, str] | None = None) -> None:
    if value not in (known := tuple(known)):
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        if formerly and value.lower() in formerly:
            hint = f"write {formerly[value.lower()]}"
        raise UserError(f"{key} is {value!r}, which is not known", hint)


# --- how values fit together


def _check_algorithm(cfg: Config) -> None:
    a, r = cfg.algorithm, cfg.rollout
    gpus = cfg.cluster.gpus_per_node
    if cfg.reference.enable and gpus == 0 and cfg.reference.device == "cuda":
        raise UserError(
            "reference.device=cuda, and the trainers have no GPU (cluster.gpus_per_node=0)",
            "the reference model computes where the trainers do: set reference.device=auto",
        )
    check_loss(a)
    # What a loss of the user's own brings with it is known when it is loaded, at the start of the run.
    own_kl_coef = (loss_facts(a.loss) if a.loss in LOSSES else LossFacts()).kl_coef
    advantage = resolve_advantage(a) if a.loss in LOSSES else a.advantage
    check_fit(cfg, advantage, own_kl_coef if a.kl_coef is None else a.kl_coef)
    _check_dynamic_sampling(cfg)
    if r.sampling.temperature == 0:
        raise UserError(
            "rollout.sampling.temperature=0 is greedy: all completions of a group are equal, nothing is learned",
            "set rollout.sampling.temperature=1",
        )
    if r.sampling.repetition_penalty != 1:
        raise UserError(
            f"rollout.sampling.repetition_penalty={r.sampling.repetition_penalty:g} samples from another distribution "
            "than the trainer computes: every ratio would be wrong",
            "leave it out and take the reward `repetition`; recipe=eval may have it",
        )
    if r.sync_interval > r.max_staleness + 1:
        raise UserError(
            f"rollout.sync_interval={r.sync_interval} makes the generators' policy older than "
            f"rollout.max_staleness={r.max_staleness} allows",
            f"set rollout.sync_interval to {r.max_staleness + 1} or less, or raise rollout.max_staleness",
        )
    if r.window > r.max_staleness + 1:
        raise UserError(
            f"rollout.window={r.window} lets a late group be overtaken for {r.window - 1} steps, and after "
            f"rollout.max_staleness={r.max_staleness} it is too old",
            f"set rollout.window to {r.max_staleness + 1} or less, or raise rollout.max_staleness",
        )


def _check_minibatches(cfg: Config, needs: Needs) -> None:
    a, prompts = cfg.algorithm, cfg.rollout.prompts_per_step
    given = next((name for name in ("minibatches", "epochs") if getattr(a, name) > 1), None)
    if given is None:
        return
    if needs.learns_from != "samples":
        hints = {
            "minibatches": "leave it out, and lower trainer.training.global_batch_size: a batch is an optimizer step",
            "epochs": "leave it out, and raise trainer.training.steps: the data begin anew when they are used up",
        }
        raise UserError(
            f"algorithm.{given}={getattr(a, given)} is for what the policy samples, and recipe={cfg.recipe} learns "
            f"from {needs.learns_from}",
            hints[given] if needs.trains else "leave it out",
        )
    if a.minibatches > prompts:
        raise UserError(
            f"algorithm.minibatches={a.minibatches} of rollout.prompts_per_step={prompts} groups: each takes one at "
            "least",
            f"set algorithm.minibatches to {prompts} or less",
        )


def _check_left_out(cfg: Config, needs: Needs) -> None:
    a = cfg.algorithm
    if a.top_entropy_quantile < 1 and not needs.has_algorithm:
        raise UserError(
            f"algorithm.top_entropy_quantile={a.top_entropy_quantile:g} is of algorithm.loss, and recipe={cfg.recipe} "
            "trains nothing with it",
            "leave it out",
        )
    if a.drop_truncated and not needs.drops_truncated:
        raise UserError(f"algorithm.drop_truncated is of recipe=grpo, and not of recipe={cfg.recipe}", "leave it out")


def _check_dynamic_sampling(cfg: Config) -> None:
    a = cfg.algorithm
    if not a.dynamic_sampling:
        return
    if not a.drop_zero_signal_groups:
        raise UserError(
            "algorithm.dynamic_sampling draws prompts in place of groups that algorithm.drop_zero_signal_groups=false "
            "keeps",
            "set one of them to its default",
        )
    if cfg.data.curriculum.enable:
        raise UserError(
            "algorithm.dynamic_sampling and data.curriculum both leave out prompts that teach nothing",
            "set one of them to false",
        )


def _check_sources(cfg: Config, needs: Needs) -> None:
    names = [source.name for source in cfg.sources]
    if cfg.sources and needs.learns_from == "examples":
        raise UserError(
            f"sources have rewards and environments, and recipe={cfg.recipe} learns from examples",
            "name its data in data.sources",
        )
    for i, (name, source) in enumerate(zip(names, cfg.sources, strict=True)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"sources.{i}.name is {name!r}", "it is part of the names of metrics: letters, digits, '.', '_' and '-'"
            )
        if names.index(name) != i:
            raise UserError(f"sources.{i}.name: {name!r} is given twice", "give each source a name of its own")
        if source.data.curriculum != cfg.data.curriculum:
            raise UserError(
                f"sources.{i}.data.curriculum is its own, and there is one curriculum for all",
                "set data.curriculum, outside of sources",
            )


def _check_data_values(run: RunSource, needs: Needs) -> None:
    cfg = run.config
    data, curriculum = cfg.data, cfg.data.curriculum
    for i, source in enumerate(data.sources):
        if not source.path:
            raise UserError(f"{run.key}data.sources.{i} has no path", "give the path of the data, as in data.path")
    if curriculum.enable and needs.learns_from == "examples":
        raise UserError(
            f"data.curriculum goes by rewards, and recipe={cfg.recipe} has none", "set data.curriculum.enable=false"
        )
    bounds, rests = curriculum.bounds, curriculum.rests
    if bounds != sorted(set(bounds)) or (rests and not bounds):
        raise UserError(f"data.curriculum.bounds is {bounds}", "give rewards that rise, such as [0.1, 0.5, 0.9]")
    if bounds and len(rests) != len(bounds) + 1:
        raise UserError(
            f"data.curriculum.rests has {len(rests)} items, and {len(bounds)} bounds make {len(bounds) + 1} buckets",
            "give the epochs that prompts of each bucket rest, hardest first",
        )
    if curriculum.low > curriculum.high:
        raise UserError(
            f"data.curriculum.low={curriculum.low} is above data.curriculum.high={curriculum.high}: "
            "every prompt would be left out",
            "low is where prompts are too hard, high where they are too easy",
        )
    if data.template_date is not None:
        try:
            date.fromisoformat(data.template_date)
        except ValueError:
            raise UserError(
                f"data.template_date is {data.template_date!r}, which is no day", "write YYYY-MM-DD"
            ) from None
    for key, own, _ in data_sources(data):
        if needs.learns_from == "examples" and own.target_field is None and not own.chat_template:
            raise UserError(
                f"{key} has no target_field, so chats are learned, and data.chat_template is false",
                "set data.chat_template=true, or name the field of the answers with data.target_field",
            )


def _check_sft(cfg: Config, needs: Needs) -> None:
    sft = cfg.algorithm.sft
    if not sft.coef:
        if sft.sources:
            raise UserError("algorithm.sft.sources are learned with the weight algorithm.sft.coef=0", "set it above 0")
        return
    if needs.learns_from != "samples" or not needs.has_algorithm:
        raise UserError(
            f"algorithm.sft.coef={sft.coef:g} is beside algorithm.loss on what the policy samples, and "
            f"recipe={cfg.recipe} does not train with it",
            "leave it out",
        )
    if cfg.sources and not sft.sources:
        raise UserError(
            "algorithm.sft.sources is empty, and the run has several sources of its own",
            "say which examples are learned beside them: algorithm.sft.sources=[{path: FILE}]",
        )
    for i, source in enumerate(sft.sources):
        if not source.path:
            raise UserError(f"algorithm.sft.sources.{i} has no path", "give the path of the data, as in data.path")
    examples = with_sft_data(cfg)
    assert examples is not None
    for key, own, _ in data_sources(examples.data):
        if own.target_field is None and not own.chat_template:
            raise UserError(
                f"{_sft_key(key)} has no target_field, so chats are learned, and data.chat_template is false",
                "name the field of the answers with target_field",
            )


def _sft_key(key: str) -> str:
    return key.replace("data.sources", "algorithm.sft.sources")


def _check_evaluation(cfg: Config, needs: Needs) -> None:
    e = cfg.evaluation
    if cfg.checkpoint.best is not None and not (e.interval and e.num_prompts):
        raise UserError(
            f"checkpoint.best={cfg.checkpoint.best} compares evaluations, and there are none while the run trains",
            "set evaluation.interval and evaluation.num_prompts",
        )
    for key, value in (("evaluation.patience", e.patience), ("checkpoint.export_best", cfg.checkpoint.export_best)):
        if value and cfg.checkpoint.best is None:
            raise UserError(f"{key} goes by checkpoint.best, which is null", "name a figure: checkpoint.best=accuracy")
    label, slash, _ = (cfg.checkpoint.best or "").rpartition("/")
    labels = [one.label for one in held_out_sets(cfg) if one.label]
    # What else held-out documents are measured by is the recipe's own: dpo/accuracy, say.
    if slash and label not in labels and needs.generators == "beside":
        raise UserError(
            f"checkpoint.best={cfg.checkpoint.best} is of a held-out set that there is not",
            f"there is {', '.join(labels) or 'but one, without a label'}",
        )
    given = "samples" if e.samples else "sets" if e.sets else None
    if not e.num_prompts and given:
        raise UserError(
            f"evaluation.num_prompts=0 switches evaluation off, and evaluation.{given} is given",
            "set evaluation.num_prompts to the number of held-out prompts",
        )
    _check_held_out_sets(cfg)
    if not e.samples:
        given = "k" if e.k != [1] else "temperature" if e.temperature is not None else None
        if given:
            raise UserError(
                f"evaluation.{given} is for sampled answers, evaluation.samples is 0",
                f"set evaluation.samples, or leave evaluation.{given} out",
            )
        return
    if not e.k or len(set(e.k)) != len(e.k) or not all(1 <= k <= e.samples for k in e.k):
        raise UserError(
            f"evaluation.k is {e.k}, with evaluation.samples={e.samples}",
            f"pass@k needs at least k samples: give different numbers from 1 to {e.samples}",
        )
    if (cfg.rollout.sampling.temperature if e.temperature is None else e.temperature) == 0:
        raise UserError(
            f"a temperature of 0 is greedy: all evaluation.samples={e.samples} answers to a prompt would be equal",
            "set evaluation.temperature above 0, or evaluation.samples=0",
        )


def _check_held_out_sets(cfg: Config) -> None:
    labels = [one.label for one in cfg.evaluation.sets]
    for what, number in (("evaluation.sets", len(labels)), ("sources", len(cfg.sources))):
        if number > MAX_SETS:
            raise UserError(f"{what} are {number}, which is more than {MAX_SETS}", "join some of them")
    if labels and cfg.sources:
        raise UserError(
            "evaluation.sets and sources are given, and each source has held-out prompts of its own",
            "leave evaluation.sets out, and give sources.N.data.eval_path",
        )
    for i, one in enumerate(cfg.evaluation.sets):
        key = f"evaluation.sets.{i}"
        if not one.path:
            raise UserError(f"{key} has no path", "give the path of the data, as in data.path")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", one.label):
            raise UserError(
                f"{key}.label is {one.label!r}", "it names figures: letters, digits, '.', '_' and '-'; such as gsm8k"
            )
        if labels.index(one.label) != i:
            raise UserError(
                f"two of evaluation.sets have the label {one.label!r}", "their figures need names of their own"
            )
        _check_given_once(f"{key}.", one.reward)


def _check_lengths(cfg: Config, needs: Needs) -> None:
    both = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    seq_len, max_model_len = cfg.trainer.training.seq_len, cfg.generator.engine.max_model_len
    if needs.learns_from == "samples" and seq_len < both:
        raise UserError(
            f"trainer.training.seq_len={seq_len} is shorter than a whole episode: rollout.max_prompt_tokens="
            f"{cfg.rollout.max_prompt_tokens} + rollout.max_response_tokens={cfg.rollout.max_response_tokens} = {both}",
            f"set trainer.training.seq_len={both} or more",
        )
    if needs.generators != "none" and max_model_len is not None and max_model_len < both:
        raise UserError(
            f"generator.engine.max_model_len={max_model_len} is shorter than rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens = {both}",
            "leave generator.engine.max_model_len out, or raise it",
        )
    scheduler, steps = cfg.trainer.lr_scheduler, cfg.trainer.training.steps
    if scheduler.warmup_steps > steps:
        raise UserError(
            f"trainer.lr_scheduler.warmup_steps={scheduler.warmup_steps} of trainer.training.steps={steps}: "
            "the peak learning rate is never reached",
            "lower warmup_steps",
        )


def check_generators(cfg: Config) -> None:
    """Raise a UserError where the generators cannot be what the split of the nodes makes of them."""
    _check_engine(cfg)
    _check_transport(cfg)
    _check_adapters(cfg)


def _check_engine(cfg: Config) -> None:
    engines = {"generator": cfg.generator.engine} | {f"served.{i}": one.engine for i, one in enumerate(cfg.served)}
    for key, engine in engines.items():
        if twice := sorted(engine.extra.keys() & {each.name for each in dataclasses.fields(engine)}):
            raise UserError(
                f"{key}.engine.extra.{twice[0]} is vLLM's, and placement and memory are planned with "
                f"{key}.engine.{twice[0]}",
                f"set {key}.engine.{twice[0]}",
            )
        if (stages := engine.extra.get("pipeline_parallel_size", 1)) != 1:
            raise UserError(
                f"{key}.engine.extra.pipeline_parallel_size={stages}: a model's layers are not split into stages",
                f"set {key}.engine.tensor_parallel_size, which shares a model among the GPUs of a node",
            )
    if takes_turns(cfg) and not cfg.generator.engine.extra.get("enable_sleep_mode", True):
        raise UserError(
            "cluster.colocate has generators of a synchronous run sleep while trainers compute, and "
            "generator.engine.extra.enable_sleep_mode=false forbids it",
            "leave enable_sleep_mode out, or set generator.engine.sleep_level=0",
        )


def _check_adapters(cfg: Config) -> None:
    lora = cfg.trainer.lora
    if lora.publish == "merged":
        return
    if not lora.enable:
        raise UserError(
            f"trainer.lora.publish={lora.publish}, and there are no adapters", "set trainer.lora.enable=true"
        )
    if lora.rank > max(VLLM_LORA_RANKS):
        raise UserError(
            f"trainer.lora.rank={lora.rank}, and vLLM takes adapters of rank {max(VLLM_LORA_RANKS)} at most",
            "lower it, or set trainer.lora.publish=merged",
        )
    if takes_turns(cfg):
        raise UserError(
            "trainer.lora.publish=adapters needs the base model in the generators, and with cluster.colocate those "
            "of a synchronous run sleep without it while trainers compute",
            "set trainer.lora.publish=merged, or generator.engine.sleep_level=0 where there is memory for both",
        )


def _check_transport(cfg: Config) -> None:
    if cfg.generator.weight_transport == "nccl" and cfg.generator.send_changes:
        raise UserError(
            "generator.send_changes is of TLS streams, and generator.weight_transport=nccl sends all of the weights",
            hint="leave one of the two out: nccl on a fast network, send_changes on a slow one",
        )
    # The first copy of the model is published: where no other host has a part of it, its own generators read it there.
    is_spread = cfg.trainer.parallelism.data_parallel_replicate_degree % max(1, working_nodes(cfg)) != 0
    if cfg.generator.weight_transport == "nccl" and cfg.cluster.colocate and is_spread:
        raise UserError(
            "generator.weight_transport=nccl connects each generator with each trainer rank, and with cluster.colocate "
            "one of those is on its own GPU, where NCCL takes no two",
            hint="leave one of the two out: with cluster.colocate weights go over TLS streams between hosts",
        )
    if cfg.generator.weight_transport == "nccl" and cfg.cluster.gpus_per_node == 0:
        raise UserError(
            "generator.weight_transport=nccl is between GPUs, and cluster.gpus_per_node is 0",
            hint="leave it out: the weights go over TLS streams",
        )


def _check_slurm(cfg: Config) -> None:
    s = cfg.slurm
    limit = walltime_s(s.time)
    if limit == 0:
        limit = math.inf  # Slurm's 0 is no limit
    if s.signal_lead_s is not None and s.signal_lead_s >= limit:
        raise UserError(
            f"slurm.signal_lead_s={s.signal_lead_s} is not shorter than slurm.time={s.time} ({limit:.0f} s)",
            "ask for a longer slurm.time, or a shorter warning",
        )
    if s.stage_environment is not None and not re.fullmatch(r"[/$][\w./${}+-]*", s.stage_environment):
        raise UserError(
            f"slurm.stage_environment is {s.stage_environment!r}",
            "name a folder on each node's own disk, as /tmp",
        )
    if s.stage_environment is not None and s.container.runtime is not None:
        raise UserError(
            "slurm.stage_environment stages the environment, and slurm.container.runtime has it in the image",
            "leave one of the two out",
        )
    if s.mem is not None and not re.fullmatch(r"\d+[KMGTkmgt]?", s.mem):
        raise UserError(f"slurm.mem is {s.mem!r}", "write 0 (all of the node's) or a size such as 64G")
    if s.container.runtime is not None and not s.container.image:
        raise UserError(
            f"slurm.container.runtime={s.container.runtime} needs an image",
            "set slurm.container.image, best in the site profile",
        )


def _check_sandbox(cfg: Config) -> None:
    runtime, image = cfg.sandbox.runtime, cfg.sandbox.image
    if runtime in ("apptainer", "enroot") and image is None:
        raise UserError(
            f"sandbox.runtime={runtime} needs an image", "set sandbox.image to one with Python 3.10 or newer"
        )
    if runtime in ("auto", "bubblewrap") and image is not None:
        raise UserError(
            f"sandbox.image={image} would be ignored: bubblewrap takes no image",
            "set sandbox.runtime=apptainer or enroot, or leave the image out",
        )


def _check_reward_names(run: RunSource, needs: Needs) -> None:
    cfg = run.config
    if needs.rewards and not cfg.reward and cfg.environment.name is None:
        raise UserError(f"no {run.key}reward is given", "write `reward: [{name: exact}]`")
    _check_given_once(run.key, cfg.reward)


def _check_given_once(key: str, rewards: Sequence[RewardConfig]) -> None:
    names = [reward.name for reward in rewards]
    for i, name in enumerate(names):
        if names.index(name) != i:
            raise UserError(
                f"{key}reward {name!r} is given twice", "its terms are logged by name: keep one, with one weight"
            )


def _check_reward_model(cfg: Config, needs: Needs) -> None:
    others = [("sources", reward) for source in cfg.sources for reward in source.reward]
    others += [("evaluation.sets", reward) for one in cfg.evaluation.sets for reward in one.reward]
    for key, other in others:
        if other.name == MODEL or other.path is not None:
            raise UserError(f"the reward `model` is one of a run with one source, and {key} have it", "leave it out")
    for i, other in enumerate(cfg.reward):
        if other.path is not None and other.name != MODEL:
            raise UserError(
                f"reward.{i}.path is of the reward `model`, and this is {other.name}",
                "write it into args, or leave it out",
            )
    if (reward := reward_model_of(cfg)) is None:
        return
    if not reward.path:
        raise UserError("the reward `model` has no path", "path: RUN_DIR/export, of a run of a reward model")
    if needs.learns_from != "samples" or needs.generators != "beside":
        raise UserError(
            f"the reward `model` is for what the policy samples, and recipe={cfg.recipe} learns from "
            f"{needs.learns_from}",
            "leave it out",
        )
    if cfg.algorithm.dynamic_sampling:
        raise UserError(
            "algorithm.dynamic_sampling asks whether a group's rewards differ before the reward `model` is computed",
            "set algorithm.dynamic_sampling=false",
        )
    if cfg.evaluation.num_prompts and cfg.reward[0] is reward and cfg.environment.name is None:
        raise UserError(
            "an evaluation takes the first reward for what is right, and that of a model has no such value",
            "write one before it that compares with the target: [{name: exact, weight: 0}, {name: model, …}], or set "
            "evaluation.num_prompts=0",
        )


def check_environment(cfg: Config, *, check_paths: bool = True, key: str = "") -> None:
    """Raise a UserError where ``cfg.environment`` cannot work. Also looks at its file, unless told not to. ``key`` is
    what stands before ``environment`` in the configuration."""
    name = cfg.environment.name
    if name is None:
        return
    if not needs_of(cfg).environments:
        raise UserError(
            f"{key}environment.name is set, and recipe={cfg.recipe} plays no episodes",
            f"set {key}environment.name=null",
        )
    place, colon, cls = name.rpartition(":")
    if not colon:
        _check_name(f"{key}environment.name", name, ENVIRONMENTS)
    elif not place or not cls.isidentifier():
        raise UserError(f"{key}environment.name is {name!r}", "write package.module:Class or file.py:Class")
    rewards = [*cfg.reward, *(reward for one in cfg.evaluation.sets for reward in one.reward)]
    if any(reward.name.rpartition(":")[2] == "environment" for reward in rewards):
        raise UserError("a reward is called 'environment', as what the environment gives is", "rename its function")
    if check_paths and place.endswith(".py"):
        find_user_code(f"{key}environment.name", Path(place).expanduser(), cls)
    venv = cfg.environment.venv
    if check_paths and venv is not None and not os.access(Path(venv).expanduser() / "bin/python", os.X_OK):
        hint = "make it: python3 -m venv"
        raise UserError(f"{key}environment.venv: there is no {venv}/bin/python that can be run", hint)


# --- files


def _check_model(cfg: Config, needs: Needs) -> None:
    path = cfg.model.path
    if path == "warmstart":
        if cfg.warmstart.config is None:
            raise UserError("model.path=warmstart needs warmstart.config", "name the SFT configuration that makes it")
        return
    if path.startswith("builtin:"):
        _check_name("model.path", path, MODELS)
        _check_experts(cfg, {}, f"the model {path}")  # all of them are dense
        return
    if not looks_local(path):
        try:
            split_name(path)
        except ValueError:
            raise UserError(
                f"model.path={path!r} is neither a directory nor a hub name", "write DIR or OWNER/NAME"
            ) from None
        if (snapshot := _in_cache(path)) is not None:
            _check_dimensions(cfg, snapshot, needs)
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"model.path: no such directory: {path}", "give a model in Hugging Face format, or a hub name")
    _check_dimensions(cfg, directory, needs)
    check_weights(directory)
    check_tokenizer(directory)


def _in_cache(name: str) -> Path | None:
    """The directory of a model of the hub, as far as it was fetched here: what it is, is known."""
    snapshot = cached_snapshot(name)
    return snapshot if snapshot is not None and (snapshot / "config.json").is_file() else None


def _check_other_models(cfg: Config, needs: Needs) -> None:
    policy = Path(cfg.model.path).expanduser() if looks_local(cfg.model.path) else _in_cache(cfg.model.path)
    for name, need in needs.models.items():
        if need.path is None:
            continue
        is_local = looks_local(need.path)
        directory = Path(need.path).expanduser() if is_local else _in_cache(need.path)
        if directory is None:
            continue
        if not directory.is_dir():
            raise UserError(
                f"the model {name!r} of the recipe: no such directory: {need.path}",
                "give a model in Hugging Face format, or a hub name",
            )
        where = f"the model {name!r} of the recipe ({directory})"
        _check_trained(cfg, read_model_config(directory), needs, where)
        if is_local and VALUE_HEAD not in check_weights(directory) and need.head == "value" and not need.trained:
            raise UserError(
                f"{where} has no value head ({VALUE_HEAD}): it is no reward model",
                "name the export of a run of recipe=reward_model",
            )
        ids, others = token_ids(directory), {} if policy is None else token_ids(policy)
        token = next((token for token, number in ids.items() if others.get(token, number) != number), None)
        if token is not None:
            raise UserError(
                f"{where} has another vocabulary than the policy in {policy}: {token!r} is {ids[token]} in one and "
                f"{others[token]} in the other",
                "take one with the same tokenizer",
            )


def _check_positions(cfg: Config, needs: Needs, config: dict[str, Any], where: str) -> None:
    both = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    used = {}
    if needs.models:
        used["trainer.training.seq_len"] = cfg.trainer.training.seq_len
    if needs.generators != "none":
        given = cfg.generator.engine.max_model_len
        used["rollout.max_prompt_tokens + rollout.max_response_tokens"] = both if given is None else given
    longest_used = max(used.values())
    limits = {where: config.get("max_position_embeddings")}
    if config.get("model_type") == "mistral":
        limits[f"the sliding window of {where}"] = config.get("sliding_window")
    for place, longest in limits.items():
        if isinstance(longest, int) and longest < longest_used:
            names = [name for name, value in used.items() if value > longest]
            raise UserError(
                f"sequences of {longest_used} tokens ({', '.join(names)}) are longer than the {longest} positions of "
                f"{place}",
                f"lower {' and '.join(names)} to {longest} or less, with the limits of rollout to match",
            )


def _check_routing_replay(cfg: Config, needs: Needs) -> None:
    if not cfg.algorithm.routing_replay:
        return
    engine, on_cpu = cfg.generator.engine, cfg.cluster.gpus_per_node == 0
    refusals = {
        f"recipe={cfg.recipe} trains on nothing that generators sampled": not needs.has_algorithm
        or needs.learns_from != "samples",
        "algorithm.sft learns examples that no generator has chosen experts for": cfg.algorithm.sft.coef > 0,
        "trainer.parallelism.context_parallel_degree cuts the rows that routes belong to, set it to 1": (
            cfg.trainer.parallelism.context_parallel_degree > 1
        ),
        "trainer.parallelism.tensor_parallel_degree cuts the tokens that routes belong to, set it to 1": (
            cfg.trainer.parallelism.tensor_parallel_degree > 1
        ),
        "vLLM returns routes with generator.engine.enable_prefix_caching=true alone": (
            not on_cpu and not engine.enable_prefix_caching
        ),
    }
    for reason in (reason for reason, applies in refusals.items() if applies):
        raise UserError(f"algorithm.routing_replay: {reason}", "leave it off, or change that")


_OTHER_KERNELS = {
    *("dtype", "quantization", "kv_cache_dtype", "attention_backend", "attention_config", "speculative_config"),
    *("block_size", "enable_lora", "model_impl", "hf_overrides", "kernel_config"),
}
"""Arguments of vLLM's engine that choose what it computes with."""


def _check_batch_invariant(cfg: Config, needs: Needs) -> None:
    if not cfg.model.batch_invariant:
        return
    trainer, degrees, sampling = cfg.trainer, cfg.trainer.parallelism, cfg.rollout.sampling
    cuts = [key for key, none in {"top_p": 1.0, "top_k": -1, "min_p": 0.0}.items() if getattr(sampling, key) != none]
    given = cfg.generator.engine.extra
    others = [f"generator.engine.extra.{key}" for key in sorted(given.keys() & _OTHER_KERNELS)]
    compiled = given.get("compilation_config", {})
    if not isinstance(compiled, dict) or compiled.keys() & {"mode", "level", "custom_ops", "cudagraph_mode"}:
        others.append("generator.engine.extra.compilation_config (mode, custom_ops, cudagraph_mode)")
    refusals = {
        f"recipe={cfg.recipe} compares no log-probabilities of what generators sampled": not needs.has_algorithm
        or needs.learns_from != "samples",
        "it is for GPUs, and cluster.gpus_per_node is 0": cfg.cluster.gpus_per_node == 0,
        "it is for bfloat16, which model.dtype is not": cfg.model.dtype != "bfloat16",
        "it is for bfloat16, which trainer.training.mixed_precision_param is not": (
            trainer.training.mixed_precision_param != "bfloat16"
        ),
        "compiled trainers round elsewhere, leave out trainer.compile.enable": bool(trainer.compile.enable),
        "generators have the adapters of trainer.lora in their weights, trainers beside them": trainer.lora.enable,
        f"{' and '.join(others)} would have vLLM compute otherwise, leave it out": bool(others),
        f"rollout.sampling.{', '.join(cuts)} cuts the distribution by other kernels, leave it out": bool(cuts),
    } | {
        f"{key} adds up parts of the model on several GPUs, set it to 1": degree > 1
        for key, degree in {
            "generator.engine.tensor_parallel_size": cfg.generator.engine.tensor_parallel_size,
            "trainer.parallelism.tensor_parallel_degree": degrees.tensor_parallel_degree,
            "trainer.parallelism.context_parallel_degree": degrees.context_parallel_degree,
        }.items()
    }
    for reason in (reason for reason, applies in refusals.items() if applies):
        raise UserError(f"model.batch_invariant: {reason}", "leave it off, or change that")


def _check_experts(cfg: Config, config: dict[str, Any], where: str) -> None:
    degree, num_experts = cfg.trainer.parallelism.expert_parallel_degree, num_experts_of(config)
    if num_experts % degree:
        raise UserError(
            f"trainer.parallelism.expert_parallel_degree={degree} does not divide the {num_experts} experts of {where}",
            f"choose a divisor of {num_experts}",
        )
    if cfg.algorithm.routing_replay and not num_experts:
        raise UserError(f"algorithm.routing_replay, and {where} has no experts", "leave it off")
    if degree > 1 and not num_experts:
        raise UserError(
            f"trainer.parallelism.expert_parallel_degree={degree}, and {where} has no experts",
            "leave it at 1: FSDP and tensor parallelism cut a dense model",
        )


def _check_dimensions(cfg: Config, directory: Path, needs: Needs) -> None:
    """The policy's."""
    config = read_model_config(directory)
    where = f"the model in {directory}"
    if needs.models:
        _check_trained(cfg, config, needs, where)
    else:
        check_family(config.get("model_type"), where)
        check_generated(config, where)
    _check_positions(cfg, needs, config, where)
    vocab_size, stop = config.get("vocab_size"), max(cfg.rollout.sampling.stop_token_ids, default=0)
    if isinstance(vocab_size, int) and stop >= vocab_size:
        raise UserError(
            f"rollout.sampling.stop_token_ids has {stop}, and {where} has {vocab_size} tokens",
            "take the ids of its own tokenizer",
        )
    _check_experts(cfg, config, where)
    heads, kv_heads = _heads_of(config, where)
    tp = cfg.generator.engine.tensor_parallel_size
    if heads % tp or (kv_heads % tp and tp % kv_heads):  # vLLM copies key-value heads where there are fewer than ranks
        raise UserError(
            f"generator.engine.tensor_parallel_size={tp} does not divide the {heads} attention heads and "
            f"{kv_heads} key-value heads of {where}",
            f"choose a divisor of {math.gcd(heads, kv_heads)}",
        )


def _check_trained(cfg: Config, config: dict[str, Any], needs: Needs, where: str) -> None:
    """A model that trainers hold."""
    check_family(config.get("model_type"), where)
    check_trainable(config, where)
    if cfg.model.batch_invariant:
        check_invariant(config, where)
    _check_positions(cfg, dataclasses.replace(needs, generators="none"), config, where)
    heads, kv_heads = _heads_of(config, where)
    train_tp = cfg.trainer.parallelism.tensor_parallel_degree
    if heads % train_tp or kv_heads % train_tp:
        raise UserError(
            f"trainer.parallelism.tensor_parallel_degree={train_tp} does not divide the {heads} attention heads and "
            f"{kv_heads} key-value heads of {where}",
            f"choose a divisor of {math.gcd(heads, kv_heads)}",
        )


def _heads_of(config: dict[str, Any], where: str) -> tuple[int, int]:
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UserError(f"config.json of {where} gives no num_attention_heads", "is it a language model?")
    return heads, kv_heads


def _check_data(run: RunSource) -> None:
    cfg = run.config
    for key, data, _ in data_sources(cfg.data):
        _check_examples(f"{run.key}{key}.path", data.path, data.split, data)
    if (examples := with_sft_data(cfg)) is not None and cfg.algorithm.sft.sources:
        for key, data, _ in data_sources(examples.data):
            _check_examples(f"{_sft_key(key)}.path", data.path, data.split, data)
    if cfg.evaluation.sets:
        for one in held_out_sets(cfg):
            _check_examples(one.key, one.config.data.path, one.config.data.eval_split, one.config.data)
    elif cfg.data.eval_path is not None:
        _check_examples(f"{run.key}data.eval_path", cfg.data.eval_path, cfg.data.eval_split, cfg.data)
    elif cfg.evaluation.num_prompts and (cfg.data.sources or Path(cfg.data.path).suffix in _DATA_SUFFIXES):
        what = f"{run.key}data.sources are" if cfg.data.sources else f"{cfg.data.path} holds one split, which is"
        raise UserError(
            f"{what} trained on: there are no held-out prompts for evaluation.num_prompts={cfg.evaluation.num_prompts}",
            f"set {run.key}data.eval_path to other data, or evaluation.num_prompts=0",
        )


def _check_examples(key: str, path: str, split: str, data: DataConfig) -> None:
    if path.startswith("builtin:"):
        _check_name(key, path, DATA)
        return
    file = Path(path).expanduser()
    if not file.exists():
        if looks_local(path) or file.suffix in _DATA_SUFFIXES:
            raise UserError(
                f"{key}: no such file: {path}",
                "give a JSONL, Parquet or CSV file, or a dataset name such as openai/gsm8k",
            )
        return
    file = file / f"{split}.jsonl" if (file / f"{split}.jsonl").is_file() else file
    if file.suffix in _JSONL_SUFFIXES:
        _check_jsonl(key, file, (data.prompt_field, data.target_field))


def _check_jsonl(key: str, file: Path, fields: tuple[str, str | None]) -> None:
    """The first lines of a JSONL file are JSON objects that have the fields; blank lines are skipped."""
    examples = 0
    try:
        with file.open("rb") as lines:
            for number, line in zip(range(1, _MAX_CHECKED_LINES + 1), lines, strict=False):
                if examples == 0 and line.startswith(b"["):
                    return  # an array of objects, which is read as a whole
                if line.strip():
                    _check_example(f"{file}:{number}", line, fields)
                    examples += 1
    except OSError as error:
        raise UserError(f"{key}: cannot read {file}: {error.strerror}", "check the path and its permissions") from None
    if not examples:
        raise UserError(f"{key}: {file} holds no example", "one JSON object a line")


def _check_example(where: str, line: bytes, fields: tuple[str, str | None]) -> None:
    try:
        example = json.loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise UserError(f"{where}: not valid JSON: {reason}", "mend or remove the line") from None
    if not isinstance(example, dict):
        raise UserError(f"{where}: not a JSON object", 'each line reads {"question": …, "answer": …}')
    for name in filter(None, fields):
        try:
            find_field(example, name)
        except KeyError:
            raise UserError(
                f"{where}: no field {name!r}, it has {', '.join(map(repr, example)) or 'none'}",
                "name the fields with data.prompt_field and data.target_field",
            ) from None
    if not isinstance(find_field(example, fields[0]), str | list):
        raise UserError(
            f"{where}: the field {fields[0]!r} is neither text nor a list of messages",
            "name the field with data.prompt_field",
        )


def _check_files(cfg: Config) -> None:
    if cfg.warmstart.config is not None and not Path(cfg.warmstart.config).expanduser().is_file():
        raise UserError(f"warmstart.config: no such file: {cfg.warmstart.config}", "give the YAML of an SFT run")
    for run in run_sources(cfg):
        for i, reward in enumerate(run.config.reward):
            check_reward(f"{run.key}reward.{i}", reward)
    for i, one in enumerate(cfg.evaluation.sets):
        for j, reward in enumerate(one.reward):
            check_reward(f"evaluation.sets.{i}.reward.{j}", reward)
    place, colon, function = cfg.algorithm.loss.rpartition(":")
    if colon and (not place or not function.isidentifier()):
        raise UserError(f"algorithm.loss is {cfg.algorithm.loss!r}", "write package.module:name or file.py:name")
    if place.endswith(".py"):
        find_user_code("algorithm.loss", Path(place).expanduser(), function)
