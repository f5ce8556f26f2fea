"""Checks of a whole configuration before anything is queued: numbers, names, and how the parts fit together.

What needs torch, a GPU or the network is checked later, on the nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from forge_hpc.config.algorithm import (
    ADVANTAGES,
    KL_ESTIMATORS,
    LOSSES,
    NORMALIZATIONS,
    LossFacts,
    check_fit,
    check_loss,
    resolve_advantage,
)
from forge_hpc.config.errors import UserError
from forge_hpc.config.models import KNOWN_MODEL_TYPES, check_tokenizer, check_weights, looks_local, read_model_config
from forge_hpc.config.rewards import BUILTIN_REWARDS, check_reward
from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.config.sources import data_sources, find_field
from forge_hpc.config.split import evaluates_by_generation, plan
from forge_hpc.config.user_code import find_user_code

RECIPES = ("grpo", "sft", "eval")
REWARDS = tuple(BUILTIN_REWARDS)
ENVIRONMENTS = ("calculator", "guessing", "code")
BUILTIN_MODELS = ("builtin:qwen3-tiny",)
BUILTIN_DATA = ("builtin:addition",)
LORA_TARGETS = ("wq", "wkv", "wo", "w1", "w2", "w3")
REQUEUE = ("auto", "successor", "never")
_DTYPES = ("float32", "bfloat16")
_NAMES = {
    "algorithm.advantage": ADVANTAGES,
    "algorithm.kl_estimator": KL_ESTIMATORS,
    "algorithm.normalization": NORMALIZATIONS,
    "model.dtype": _DTYPES,
    "trainer.training.dtype": _DTYPES,
    "trainer.training.mixed_precision_param": _DTYPES,
    "trainer.optimizer.name": ("AdamW", "Adam"),
    "trainer.lr_scheduler.decay_type": ("linear", "sqrt", "cosine"),
    "trainer.activation_checkpoint.mode": ("auto", "none", "selective", "full"),
    "reference.device": ("auto", "cpu", "cuda"),
    "sandbox.runtime": ("auto", "bubblewrap", "apptainer", "enroot"),
    "logging.console": ("auto", "lines", "none"),
}
_POSITIVE = [
    "algorithm.max_steps_without_signal",
    "environment.max_turns",
    "environment.max_turn_tokens",
    "environment.timeout_s",
    "environment.max_open_episodes",
    "rollout.group_size",
    "rollout.prompts_per_step",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "rollout.sync_interval",
    "rollout.sampling.repetition_penalty",
    "generator.timeout_s",
    "generator.replicas",
    "generator.engine.tensor_parallel_size",
    "generator.engine.max_model_len",
    "generator.engine.max_num_seqs",
    "generator.engine.kv_cache_memory_gib",
    "trainer.processes_per_node",
    "trainer.optimizer.lr",
    "trainer.optimizer.eps",
    "trainer.training.steps",
    "trainer.training.seq_len",
    "trainer.training.local_batch_size",
    "trainer.training.global_batch_size",
    "trainer.training.max_norm",
    "trainer.parallelism.data_parallel_replicate_degree",
    "trainer.parallelism.tensor_parallel_degree",
    "trainer.parallelism.expert_parallel_degree",
    "trainer.lora.rank",
    "trainer.lora.alpha",
    "trainer.timeout_s",
    "checkpoint.keep",
    "cluster.nodes",
    "cluster.start_timeout_s",
    "data.shuffle_buffer",
    "data.curriculum.rest_epochs",
    "slurm.cpus_per_task",
    "sandbox.parallel",
    "sandbox.limits.wall_s",
    "sandbox.limits.cpu_s",
    "sandbox.limits.memory_mb",
    "sandbox.limits.processes",
    "sandbox.limits.output_kb",
    "sandbox.limits.disk_mb",
]
_NOT_NEGATIVE = [
    "checkpoint.interval",
    "checkpoint.export_interval",
    "seed",
    "algorithm.clip_low",
    "algorithm.clip_high",
    "algorithm.kl_coef",
    "algorithm.entropy_coef",
    "rollout.max_staleness",
    "trainer.optimizer.weight_decay",
    "trainer.lr_scheduler.warmup_steps",
    "evaluation.interval",
    "evaluation.num_prompts",
    "evaluation.samples",
    "cluster.spare_nodes",
    "cluster.max_restarts",
    "cluster.gpus_per_node",
    "slurm.signal_lead_s",
    "logging.num_rollouts_per_step",
    "logging.num_groups_per_step",
    "logging.num_answers_per_evaluation",
]
_UP_TO_ONE = ["rollout.sampling.top_p", "generator.engine.gpu_memory_utilization"]  # above 0, at most 1
_SHARES = [  # 0 to 1
    "rollout.sampling.min_p",
    "trainer.lr_scheduler.decay_ratio",
    "trainer.lr_scheduler.min_lr_factor",
    "cluster.rollout_ratio",
]
_BELOW_ONE = ["trainer.optimizer.beta1", "trainer.optimizer.beta2"]  # 0 to less than 1
UNMEASURED_LEAD_S = 300.0
_MAX_CHECKED_LINES = 10_000
_JSONL_SUFFIXES = (".jsonl", ".json")  # what forge_hpc.data reads line by line
_DATA_SUFFIXES = (*_JSONL_SUFFIXES, ".parquet", ".csv")


def validate(cfg: Config, *, check_paths: bool = True) -> None:
    """Raise a UserError for the first thing in `cfg` that cannot work.

    Args:
        check_paths: also look at local models, data files and reward files. Hub names are never looked up.
    """
    _check_values(cfg)
    _check_algorithm(cfg)
    _check_data_values(cfg)
    _check_evaluation(cfg)
    _check_lengths(cfg)
    _check_slurm(cfg)
    _check_sandbox(cfg)
    _check_reward_names(cfg)
    check_environment(cfg, check_paths=check_paths)
    plan(cfg, cfg.cluster.gpus_per_node)
    if check_paths:
        _check_model(cfg)
        _check_data(cfg)
        _check_files(cfg)


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


def signal_lead_s(cfg: Config, measured_s: float = 0.0) -> int:
    """Seconds before the walltime at which the run is to save and leave.

    ``measured_s`` is ``Status.lead_s`` of an earlier start, or of this one; 0 where nothing was measured.
    """
    if cfg.slurm.signal_lead_s is not None:
        return cfg.slurm.signal_lead_s
    limit = walltime_s(cfg.slurm.time) or math.inf
    return math.ceil(min(measured_s or UNMEASURED_LEAD_S, limit / 2))


# --- single values


def _get(cfg: Config, key: str) -> Any:
    value: Any = cfg
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _require(ok: bool, cfg: Config, key: str, rule: str) -> None:
    if not ok:
        raise UserError(f"{key} must be {rule}, it is {_get(cfg, key)}", None)


def _check_values(cfg: Config) -> None:
    for key, value in _numbers(dataclasses.asdict(cfg)):
        if not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, it is {value}")
    if ":" not in cfg.recipe:
        _check_name("recipe", cfg.recipe, RECIPES)
    for key, known in _NAMES.items():
        if _get(cfg, key) is not None:
            _check_name(key, _get(cfg, key), known)
    for keys, rule, holds in (
        (_POSITIVE, "greater than 0", lambda v: v > 0),
        (_NOT_NEGATIVE, "0 or more", lambda v: v >= 0),
        (_UP_TO_ONE, "greater than 0 and at most 1", lambda v: 0 < v <= 1),
        (_SHARES, "from 0 to 1", lambda v: 0 <= v <= 1),
        (_BELOW_ONE, "from 0 to less than 1", lambda v: 0 <= v < 1),
    ):
        for key in keys:
            value = _get(cfg, key)
            _require(value is None or holds(value), cfg, key, rule)
    for name in cfg.trainer.lora.target_modules:
        _check_name("trainer.lora.target_modules", name, LORA_TARGETS)
    if not cfg.trainer.lora.target_modules:
        raise UserError("trainer.lora.target_modules is empty", f"known: {', '.join(LORA_TARGETS)}")
    shard = cfg.trainer.parallelism.data_parallel_shard_degree
    _require(shard == -1 or shard > 0, cfg, "trainer.parallelism.data_parallel_shard_degree", "-1 or greater than 0")
    _check_sampling(cfg)
    _require(cfg.seed < 2**63, cfg, "seed", "less than 2**63")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.name):
        raise UserError(f"name is {cfg.name!r}", "it names a directory and a job: letters, digits, '.', '_' and '-'")


def _check_sampling(cfg: Config) -> None:
    s = cfg.rollout.sampling
    for key in ("rollout.sampling.temperature", "evaluation.temperature"):
        value = _get(cfg, key)
        # vLLM takes what is below 0.01 for 0.01, and refuses what is above 2.
        ok = value is None or value == 0 or 0.01 <= value <= 2
        _require(ok, cfg, key, "from 0.01 to 2, or 0 (greedy)")
    _require(s.top_k == -1 or s.top_k > 0, cfg, "rollout.sampling.top_k", "-1 (all) or greater than 0")
    if not all(s.stop):
        raise UserError("rollout.sampling.stop has an empty string", "it would end every response at once")
    _require(min(s.stop_token_ids, default=0) >= 0, cfg, "rollout.sampling.stop_token_ids", "token ids, 0 or more")


def _numbers(tree: Any, prefix: str = "") -> Iterable[tuple[str, float]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, float):
            yield f"{prefix}{key}", value
        yield from _numbers(value, f"{prefix}{key}.")


def _check_name(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        close = difflib.get_close_matches(value, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        raise UserError(f"{key} is {value!r}, which is not known", hint)


# --- how values fit together


def _check_algorithm(cfg: Config) -> None:
    if cfg.recipe == "sft":
        return
    if cfg.recipe == "eval":
        return
    a, r = cfg.algorithm, cfg.rollout
    if cfg.recipe == "grpo" and r.group_size < 2:
        raise UserError(
            f"the advantage compares completions of a group, and rollout.group_size is {r.group_size}",
            "set rollout.group_size to 2 or more, as a rule 8",
        )
    gpus = cfg.cluster.gpus_per_node
    if cfg.reference.enable and gpus == 0 and cfg.reference.device == "cuda":
        raise UserError(
            "reference.device=cuda, and the trainers have no GPU (cluster.gpus_per_node=0)",
            "the reference model computes where the trainers do: set reference.device=auto",
        )
    if ":" not in a.loss:
        _check_name("algorithm.loss", a.loss, tuple(LOSSES))
    check_loss(a)
    # What a loss of the user's own brings with it is known when it is loaded, at the start of the run.
    own_kl_coef = LOSSES.get(a.loss, LossFacts()).kl_coef
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


def _check_data_values(cfg: Config) -> None:
    data, curriculum = cfg.data, cfg.data.curriculum
    for i, source in enumerate(data.sources):
        if not source.path:
            raise UserError(f"data.sources.{i} has no path", "give the path of the data, as in data.path")
        if source.weight <= 0:
            raise UserError(
                f"data.sources.{i}.weight must be greater than 0, it is {source.weight} ({source.path})",
                "leave the source out, or give it a weight",
            )
    if curriculum.enable and cfg.recipe == "sft":
        raise UserError("data.curriculum goes by rewards, and SFT has none", "set data.curriculum.enable=false")
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
        if cfg.recipe == "sft" and own.target_field is None and not own.chat_template:
            raise UserError(
                f"{key} has no target_field, so SFT learns chats, and data.chat_template is false",
                "set data.chat_template=true, or name the field of the answers with data.target_field",
            )


def _check_evaluation(cfg: Config) -> None:
    e = cfg.evaluation
    if not e.num_prompts and (e.samples or cfg.recipe == "eval"):
        raise UserError(
            "evaluation.num_prompts=0 switches evaluation off, and "
            + ("recipe=eval does nothing else" if cfg.recipe == "eval" else f"evaluation.samples is {e.samples}"),
            "set evaluation.num_prompts to the number of held-out prompts",
        )
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


def _check_lengths(cfg: Config) -> None:
    uses_generator = cfg.recipe != "sft" or evaluates_by_generation(cfg)
    both = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    seq_len, max_model_len = cfg.trainer.training.seq_len, cfg.generator.engine.max_model_len
    if cfg.recipe not in ("sft", "eval") and seq_len < both:
        raise UserError(
            f"trainer.training.seq_len={seq_len} is shorter than a whole episode: rollout.max_prompt_tokens="
            f"{cfg.rollout.max_prompt_tokens} + rollout.max_response_tokens={cfg.rollout.max_response_tokens} = {both}",
            f"set trainer.training.seq_len={both} or more",
        )
    if uses_generator and max_model_len is not None and max_model_len < both:
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


def _check_slurm(cfg: Config) -> None:
    s = cfg.slurm
    if s.requeue not in REQUEUE:
        was = {"true": "auto", "false": "never"}.get(s.requeue.lower())
        hint = f"write {was}" if was else f"known: {', '.join(REQUEUE)}"
        raise UserError(f"slurm.requeue is {s.requeue!r}, which is not known", hint)
    limit = walltime_s(s.time)
    if limit == 0:
        limit = math.inf  # Slurm's 0 is no limit
    if s.signal_lead_s is not None and s.signal_lead_s >= limit:
        raise UserError(
            f"slurm.signal_lead_s={s.signal_lead_s} is not shorter than slurm.time={s.time} ({limit:.0f} s)",
            "ask for a longer slurm.time, or a shorter warning",
        )
    if s.mem is not None and not re.fullmatch(r"\d+[KMGTkmgt]?", s.mem):
        raise UserError(f"slurm.mem is {s.mem!r}", "write 0 (all of the node's) or a size such as 64G")


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


def _check_reward_names(cfg: Config) -> None:
    needs_reward = cfg.recipe in ("grpo", "eval") or (cfg.recipe != "sft" and cfg.evaluation.num_prompts > 0)
    if needs_reward and not cfg.reward and cfg.environment.name is None:
        raise UserError("no reward is given", "write `reward: [{name: exact}]`")
    names = [reward.name for reward in cfg.reward]
    for i, name in enumerate(names):
        if names.index(name) != i:
            raise UserError(
                f"reward {name!r} is given twice", "its terms are logged by name: keep one, with one weight"
            )
        if ":" not in name:
            _check_name(f"reward.{i}.name", name, REWARDS)
        for key in ("timeout_s", "workers", "concurrency", "memory_gib"):
            value = getattr(cfg.reward[i], key)
            if value is not None and value <= 0:
                raise UserError(f"reward.{i}.{key} must be greater than 0, it is {value:g}")


def check_environment(cfg: Config, *, check_paths: bool = True) -> None:
    """Raise a UserError where ``cfg.environment`` cannot work. Also looks at its file, unless told not to."""
    name = cfg.environment.name
    if name is None:
        return
    if cfg.recipe == "sft":
        raise UserError("environment.name is set, and SFT learns from examples alone", "set environment.name=null")
    place, colon, cls = name.rpartition(":")
    if not colon:
        _check_name("environment.name", name, ENVIRONMENTS)
    elif not place or not cls.isidentifier():
        raise UserError(f"environment.name is {name!r}", "write package.module:Class or file.py:Class")
    if any(reward.name.rpartition(":")[2] == "environment" for reward in cfg.reward):
        raise UserError("a reward is called 'environment', as what the environment gives is", "rename its function")
    if check_paths and place.endswith(".py"):
        find_user_code("environment.name", Path(place).expanduser(), cls)


# --- files


def _check_model(cfg: Config) -> None:
    path = cfg.model.path
    if path == "warmstart":
        if cfg.warmstart.config is None:
            raise UserError("model.path=warmstart needs warmstart.config", "name the SFT configuration that makes it")
        return
    if path.startswith("builtin:"):
        _check_name("model.path", path, BUILTIN_MODELS)
        return
    if not looks_local(path):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
            raise UserError(f"model.path={path!r} is neither a directory nor a hub name", "write DIR or OWNER/NAME")
        return
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"model.path: no such directory: {path}", "give a model in Hugging Face format, or a hub name")
    _check_dimensions(cfg, directory)
    check_weights(directory)
    check_tokenizer(directory)


def _check_dimensions(cfg: Config, directory: Path) -> None:
    config = read_model_config(directory)
    where = f"the model in {directory}"
    kind = config.get("model_type")
    if kind not in KNOWN_MODEL_TYPES:
        raise UserError(f"{where} is of model_type {kind!r}", f"supported: {', '.join(KNOWN_MODEL_TYPES)}")
    longest = config.get("max_position_embeddings")
    used = {"trainer.training.seq_len": cfg.trainer.training.seq_len}
    if cfg.recipe == "eval":
        used = {"rollout": cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens}
    used["generator.engine.max_model_len"] = cfg.generator.engine.max_model_len or 0
    longest_used = max(used.values())
    if isinstance(longest, int) and longest < longest_used:
        raise UserError(
            f"sequences of {longest_used} tokens ({', '.join(used)}) are longer than the {longest} positions of "
            f"{where}",
            f"lower {' and '.join(used)} to {longest} or less, with the limits of rollout to match",
        )
    vocab_size, stop = config.get("vocab_size"), max(cfg.rollout.sampling.stop_token_ids, default=0)
    if isinstance(vocab_size, int) and stop >= vocab_size:
        raise UserError(
            f"rollout.sampling.stop_token_ids has {stop}, and {where} has {vocab_size} tokens",
            "take the ids of its own tokenizer",
        )
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise UserError(f"config.json of {where} gives no num_attention_heads", "is it a language model?")
    train_tp = cfg.trainer.parallelism.tensor_parallel_degree
    if heads % train_tp or kv_heads % train_tp:
        raise UserError(
            f"trainer.parallelism.tensor_parallel_degree={train_tp} does not divide the {heads} attention heads and "
            f"{kv_heads} key-value heads of {where}",
            f"choose a divisor of {math.gcd(heads, kv_heads)}",
        )
    tp = cfg.generator.engine.tensor_parallel_size
    if heads % tp or (kv_heads % tp and tp % kv_heads):  # vLLM copies key-value heads where there are fewer than ranks
        raise UserError(
            f"generator.engine.tensor_parallel_size={tp} does not divide the {heads} attention heads and "
            f"{kv_heads} key-value heads of {where}",
            f"choose a divisor of {math.gcd(heads, kv_heads)}",
        )


def _check_data(cfg: Config) -> None:
    for key, data, _ in data_sources(cfg.data):
        _check_examples(f"{key}.path", data.path, data.split, data)
    if cfg.data.eval_path is not None:
        _check_examples("data.eval_path", cfg.data.eval_path, cfg.data.eval_split, cfg.data)
    elif cfg.evaluation.num_prompts and (cfg.data.sources or Path(cfg.data.path).suffix in _DATA_SUFFIXES):
        what = "data.sources are" if cfg.data.sources else f"{cfg.data.path} holds one split, which is"
        raise UserError(
            f"{what} trained on: there are no held-out prompts for evaluation.num_prompts={cfg.evaluation.num_prompts}",
            "set data.eval_path to other data, or evaluation.num_prompts=0",
        )


def _check_examples(key: str, path: str, split: str, data: DataConfig) -> None:
    if path.startswith("builtin:"):
        _check_name(key, path, BUILTIN_DATA)
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
    for i, reward in enumerate(cfg.reward):
        check_reward(f"reward.{i}", reward)
    for key, name in (("algorithm.loss", cfg.algorithm.loss), ("recipe", cfg.recipe)):
        place, colon, function = name.rpartition(":")
        if colon and (not place or not function.isidentifier()):
            raise UserError(f"{key} is {name!r}", "write package.module:name or file.py:name")
        if place.endswith(".py"):
            find_user_code(key, Path(place).expanduser(), function)
