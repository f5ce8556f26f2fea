"""Checks of a whole configuration before anything is queued: numbers, names, and how the parts fit together.

What needs torch, a GPU or the network is checked later, on the nodes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import symtable
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.config.models import KNOWN_MODEL_TYPES, check_tokenizer, check_weights, looks_local, read_model_config
from forge_hpc.config.schema import Config
from forge_hpc.config.split import plan

RECIPES = ("grpo", "sft")
LOSSES = ("grpo", "reinforce")
ADVANTAGES = ("group_mean_std", "group_mean", "leave_one_out")
REWARDS = ("exact", "math", "gsm8k")
ENVIRONMENTS = ("calculator", "guessing", "code")
BUILTIN_MODELS = ("builtin:qwen3-tiny",)
BUILTIN_DATA = ("builtin:addition",)
_DTYPES = ("float32", "bfloat16")
_NAMES = {
    "recipe": RECIPES,
    "algorithm.loss": LOSSES,
    "algorithm.advantage": ADVANTAGES,
    "model.dtype": _DTYPES,
    "trainer.training.dtype": _DTYPES,
    "trainer.training.mixed_precision_param": _DTYPES,
    "trainer.optimizer.name": ("AdamW", "Adam"),
    "trainer.lr_scheduler.decay_type": ("linear", "sqrt", "cosine"),
    "trainer.activation_checkpoint.mode": ("none", "selective", "full"),
    "reference.device": ("auto", "cpu", "cuda"),
    "logging.console": ("auto", "lines", "none"),
}
_POSITIVE = [
    "algorithm.max_steps_without_signal",
    "environment.max_turns",
    "environment.max_turn_tokens",
    "environment.timeout_s",
    "rollout.group_size",
    "rollout.prompts_per_step",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "rollout.sync_interval",
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
    "trainer.timeout_s",
    "checkpoint.keep",
    "cluster.nodes",
    "cluster.start_timeout_s",
    "slurm.cpus_per_task",
]
_NOT_NEGATIVE = [
    "checkpoint.interval",
    "seed",
    "algorithm.clip_low",
    "algorithm.clip_high",
    "algorithm.kl_coef",
    "algorithm.entropy_coef",
    "rollout.sampling.temperature",
    "rollout.max_staleness",
    "trainer.optimizer.weight_decay",
    "trainer.lr_scheduler.warmup_steps",
    "evaluation.interval",
    "evaluation.num_prompts",
    "cluster.spare_nodes",
    "cluster.max_restarts",
    "cluster.gpus_per_node",
    "slurm.signal_lead_s",
    "logging.num_rollouts_per_step",
]
_UP_TO_ONE = ["rollout.sampling.top_p", "generator.engine.gpu_memory_utilization"]  # above 0, at most 1
_SHARES = ["trainer.lr_scheduler.decay_ratio", "trainer.lr_scheduler.min_lr_factor", "cluster.rollout_ratio"]  # 0 to 1
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
    _check_lengths(cfg)
    _check_slurm(cfg)
    _check_reward_names(cfg)
    _check_environment(cfg)
    plan(cfg, cfg.cluster.gpus_per_node)
    if check_paths:
        _check_model(cfg)
        _check_data(cfg)
        _check_files(cfg)
        _check_environment_file(cfg)


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
    for key, known in _NAMES.items():
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
    shard = cfg.trainer.parallelism.data_parallel_shard_degree
    _require(shard == -1 or shard > 0, cfg, "trainer.parallelism.data_parallel_shard_degree", "-1 or greater than 0")
    top_k = cfg.rollout.sampling.top_k
    _require(top_k == -1 or top_k > 0, cfg, "rollout.sampling.top_k", "-1 (all) or greater than 0")
    _require(cfg.seed < 2**63, cfg, "seed", "less than 2**63")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", cfg.name):
        raise UserError(f"name is {cfg.name!r}", "it names a directory and a job: letters, digits, '.', '_' and '-'")


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
        if cfg.evaluation.interval:
            raise UserError(
                f"evaluation.interval={cfg.evaluation.interval}: SFT evaluates at its end, when the GPUs are free",
                "set evaluation.interval=0",
            )
        return
    a, r = cfg.algorithm, cfg.rollout
    if r.group_size < 2:
        raise UserError(
            f"algorithm.advantage={a.advantage} compares completions of a group, rollout.group_size is {r.group_size}",
            "set rollout.group_size to 2 or more, as a rule 8",
        )
    if a.kl_coef > 0 and not cfg.reference.enable:
        raise UserError(
            f"algorithm.kl_coef={a.kl_coef} needs the reference model",
            "set reference.enable=true, or algorithm.kl_coef=0",
        )
    gpus = cfg.cluster.gpus_per_node
    if cfg.reference.enable and gpus is not None and cfg.reference.device not in ("auto", "cuda" if gpus else "cpu"):
        raise UserError(
            f"reference.device={cfg.reference.device}, and the trainers run on {'cuda' if gpus else 'cpu'}",
            "the reference model computes where the trainers do: set reference.device=auto",
        )
    if a.clip_low >= 1:
        raise UserError(f"algorithm.clip_low must be below 1, it is {a.clip_low}", "usual is 0.2")
    if r.sampling.temperature == 0:
        raise UserError(
            "rollout.sampling.temperature=0 is greedy: all completions of a group are equal, nothing is learned",
            "set rollout.sampling.temperature=1",
        )
    if r.sync_interval > r.max_staleness + 1:
        raise UserError(
            f"rollout.sync_interval={r.sync_interval} makes the generators' policy older than "
            f"rollout.max_staleness={r.max_staleness} allows",
            f"set rollout.sync_interval to {r.max_staleness + 1} or less, or raise rollout.max_staleness",
        )


def _check_lengths(cfg: Config) -> None:
    uses_generator = cfg.recipe != "sft" or cfg.evaluation.num_prompts > 0
    both = cfg.rollout.max_prompt_tokens + cfg.rollout.max_response_tokens
    seq_len, max_model_len = cfg.trainer.training.seq_len, cfg.generator.engine.max_model_len
    if cfg.recipe != "sft" and seq_len < both:
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


def _check_reward_names(cfg: Config) -> None:
    if cfg.recipe != "sft" and not cfg.reward and cfg.environment.name is None:
        raise UserError("no reward is given", "write `reward: [{name: exact}]`")
    names = [reward.name for reward in cfg.reward]
    for i, name in enumerate(names):
        if names.index(name) != i:
            raise UserError(
                f"reward {name!r} is given twice", "its terms are logged by name: keep one, with one weight"
            )
        if ":" not in name:
            _check_name(f"reward.{i}.name", name, REWARDS)


def _check_environment(cfg: Config) -> None:
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


def _check_environment_file(cfg: Config) -> None:
    place, _, cls = (cfg.environment.name or "").rpartition(":")
    if place.endswith(".py"):
        _check_function("environment.name", Path(place).expanduser(), cls)


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
    longest_used = max(cfg.trainer.training.seq_len, cfg.generator.engine.max_model_len or 0)
    if isinstance(longest, int) and longest < longest_used:
        raise UserError(
            f"sequences of {longest_used} tokens (trainer.training.seq_len, generator.engine.max_model_len) are longer "
            f"than the {longest} positions of {where}",
            f"set trainer.training.seq_len={longest} or less, and the limits of rollout to match",
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
    for key in ("data.path", "data.eval_path"):
        path = _get(cfg, key)
        if path is None:
            continue
        if path.startswith("builtin:"):
            _check_name(key, path, BUILTIN_DATA)
            continue
        file = Path(path).expanduser()
        if not file.exists():
            if looks_local(path) or file.suffix in _DATA_SUFFIXES:
                raise UserError(
                    f"{key}: no such file: {path}", "give a JSONL file, or a dataset name such as openai/gsm8k"
                )
            continue
        split = cfg.data.eval_split if key == "data.eval_path" else cfg.data.split
        file = file / f"{split}.jsonl" if (file / f"{split}.jsonl").is_file() else file
        if file.suffix in _JSONL_SUFFIXES:
            _check_jsonl(key, file, (cfg.data.prompt_field, cfg.data.target_field))
    if cfg.evaluation.num_prompts and cfg.data.eval_path is None and Path(cfg.data.path).suffix in _JSONL_SUFFIXES:
        raise UserError(
            f"{cfg.data.path} holds one split, so there are no held-out prompts for evaluation.num_prompts="
            f"{cfg.evaluation.num_prompts}",
            "set data.eval_path to another file, or evaluation.num_prompts=0",
        )


def _check_jsonl(key: str, file: Path, fields: tuple[str, ...]) -> None:
    """The first lines of a JSONL file are JSON objects that have the fields; blank lines are skipped."""
    examples = 0
    try:
        with file.open("rb") as lines:
            for number, line in zip(range(1, _MAX_CHECKED_LINES + 1), lines, strict=False):
                if line.strip():
                    _check_example(f"{file}:{number}", line, fields)
                    examples += 1
    except OSError as error:
        raise UserError(f"{key}: cannot read {file}: {error.strerror}", "check the path and its permissions") from None
    if not examples:
        raise UserError(f"{key}: {file} holds no example", "one JSON object a line")


def _check_example(where: str, line: bytes, fields: tuple[str, ...]) -> None:
    try:
        example = json.loads(line)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8"
        raise UserError(f"{where}: not valid JSON: {reason}", "mend or remove the line") from None
    if not isinstance(example, dict):
        raise UserError(f"{where}: not a JSON object", 'each line reads {"question": …, "answer": …}')
    for name in fields:
        if name not in example:
            raise UserError(
                f"{where}: no field {name!r}, it has {', '.join(map(repr, example)) or 'none'}",
                "name the fields with data.prompt_field and data.target_field",
            )
    if not isinstance(example[fields[0]], str):
        raise UserError(f"{where}: the field {fields[0]!r} is not text", "name the field with data.prompt_field")


def _check_files(cfg: Config) -> None:
    if cfg.warmstart.config is not None and not Path(cfg.warmstart.config).expanduser().is_file():
        raise UserError(f"warmstart.config: no such file: {cfg.warmstart.config}", "give the YAML of an SFT run")
    for i, reward in enumerate(cfg.reward):
        place, colon, function = reward.name.rpartition(":")
        if not colon:
            continue
        if not place or not function.isidentifier():
            raise UserError(f"reward.{i}.name is {reward.name!r}", "write package.module:function or file.py:function")
        if place.endswith(".py"):
            _check_function(f"reward.{i}.name", Path(place).expanduser(), function)


def _check_function(key: str, file: Path, name: str) -> None:
    """`file` compiles, and something at its top level is called `name`."""
    try:
        table = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec")
    except FileNotFoundError:
        raise UserError(
            f"{key}: no such file: {file}", "a relative path is looked for beside the YAML, then here"
        ) from None
    except SyntaxError as error:
        raise UserError(f"{key}: {file}:{error.lineno}: {error.msg}", "mend the file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: cannot read {file}: {error}", "check the path and its permissions") from None
    names = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise UserError(
            f"{key}: {file} has no {name!r}", f"did you mean {close[0]}?" if close else "define it at top level"
        )
