"""Configurations from YAML files and ``key=value`` overrides, into the typed dataclasses of ``schema``.

The walk over the YAML is ours, because it knows the line of every key: whatever is wrong is named by file, line, full
key and the nearest key that exists. OmegaConf resolves ``${other.key}``, and holds the options of recipes, whose types
are their authors'; where there is neither it is not imported, which would take longer than all else.

    base: qwen3_8b.yaml        # optional: begin with this file (relative to this one), then change what follows
    model: {path: ./my-model}  # a relative path is looked for beside the file that names it, then where you are

Mappings merge key by key, lists are replaced. On the command line an index reaches into a list: ``reward.0.weight=2``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
import tempfile
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from forge_hpc.config.errors import UserError
from forge_hpc.config.fields import Rule, hints, item_class, not_none, rules
from forge_hpc.config.schema import Config, RewardConfig, RunSourceConfig

T = typing.TypeVar("T")
_UNASKED = "(the default reward)"
_NULL = "tag:yaml.org,2002:null"
_SOURCES = "sources"
NOT_HERE = {
    "trainer.parallelism.pipeline_parallel_degree": "there is no pipeline parallelism of trainers: "
    "data_parallel_shard_degree shares the weights of all layers among ranks, tensor_parallel_degree matrices, "
    "context_parallel_degree rows",
    "generator.engine.pipeline_parallel_size": "there is no pipeline parallelism of generators: tensor_parallel_size "
    "shares a model among the GPUs of a node",
}
"""What people look for, by the key that they would give it, and what there is in its place."""


# --- YAML as people write it today: the scalars of YAML 1.2 (1e-6 is a number; 24:00:00, no and 2026-01-01 are text)
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
)


_FastLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # where PyYAML was built with libyaml


class _Loader(_FastLoader):  # type: ignore[misc]
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)  # 010 is ten, as in YAML 1.2


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # quotes exactly what _Loader would not read as text


for _tag, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text and not re.search(r"[ \t]\n|^\s", text) else None
    ),
)


@dataclass(frozen=True)
class _Source:
    """Where a value was written."""

    name: str
    """The file as the user named it, or the override."""
    folder: Path | None
    """Where relative paths are looked for before the working directory."""
    is_file: bool
    keep_paths: bool = False
    """Take paths as they are: they were resolved when the file was written."""

    def at(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.is_file else self.name


_Later = list[tuple[yaml.Node, _Source]]


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration: the defaults of the schema, then the file, then the overrides, each over the one before.

    Args:
        path: YAML file; None takes the defaults alone.
        overrides: ``key=value``, the value in YAML; ``reward.0.weight=2`` reaches into a list.

    Returns:
        Plain dataclasses, interpolations resolved, local paths absolute. Not yet validated (see ``validate``).

    Raises:
        UserError: a missing or broken file, an unknown key, a wrong type; with the place and what to write instead.
    """
    cfg = Config(reward=[RewardConfig(_UNASKED)])
    later: _Later = []
    if path is not None:
        _merge_file(cfg, Path(path).expanduser(), seen=(), keep_paths=False, later=later)
    for override in overrides:
        _merge_override(cfg, override, later)
    return _with_default_reward(_resolved(_with_sources(cfg, later)))


def _with_sources(cfg: Config, later: _Later) -> Config:
    """What was written of ``sources``, now that what they leave out is known."""
    for node, source in later:
        if isinstance(node, yaml.SequenceNode):
            cfg.sources = [_new_source(cfg, item) for item in node.value]
            indices = [(yaml.ScalarNode("", str(i)), item) for i, item in enumerate(node.value)]
            node = yaml.MappingNode("", indices, node.start_mark)
        cfg.sources = _merge_items(cfg.sources, RunSourceConfig, node, "sources", source)
    return cfg


def _new_source(cfg: Config, node: yaml.Node) -> RunSourceConfig:
    """A source of which nothing is read yet."""
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    reward = [RewardConfig(_UNASKED)] if "environment" in keys else copy.deepcopy(cfg.reward)
    return RunSourceConfig(data=copy.deepcopy(cfg.data), environment=copy.deepcopy(cfg.environment), reward=reward)


def _with_default_reward(cfg: Config) -> Config:
    """Nobody may have asked for a reward: an environment gives its own, and without one it is the default."""
    asked: list[Config | RunSourceConfig] = [cfg, *cfg.sources]
    for source in asked:
        if source.environment.name is not None and source.reward == [RewardConfig(_UNASKED)]:
            source.reward = []
        for reward in source.reward:
            if reward.name == _UNASKED:
                reward.name = RewardConfig().name
    return cfg


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read what ``save_config`` wrote: the same values, whatever the working directory is now; then the overrides.

    Raises UserError."""
    cfg = Config()
    later: _Later = []
    _merge_file(cfg, Path(path), seen=(), keep_paths=True, later=later)
    for override in overrides:
        _merge_override(cfg, override, later)
    return _resolved(_with_sources(cfg, later))


def with_overrides(cfg: Config, overrides: Sequence[str]) -> Config:
    """A copy of `cfg` with the overrides. Raises UserError."""
    cfg, later = copy.deepcopy(cfg), _Later()
    for override in overrides:
        _merge_override(cfg, override, later)
    return _resolved(_with_sources(cfg, later))


def config_text(cfg: Config) -> str:
    """`cfg` as YAML that ``load_config`` and ``read_config`` read."""
    return yaml.dump(_escape(dataclasses.asdict(cfg)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def save_config(cfg: Config, path: str | Path) -> None:
    """Write the text of `cfg` atomically, readable by the owner alone (0600)."""
    path, text = Path(path), config_text(cfg)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


def diff_config(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, as (key, old, new), in the schema's order; None stands for a key that one lacks."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [(k, before.get(k), after.get(k)) for k in {**before, **after} if before.get(k) != after.get(k)]


def typed_options(cls: type[T], values: dict[str, Any], prefix: str, where: str, folder: Path | None = None) -> T:
    """``values`` as an instance of the dataclass `cls`: its keys, types and defaults, as those of the schema.

    Args:
        prefix: the key that holds them, ``where`` who has these options; both for messages.
        folder: where relative paths are looked for before the working directory.

    Raises:
        UserError: an unknown key, a wrong type.
    """
    from omegaconf import OmegaConf

    options = OmegaConf.structured(cls)
    text = yaml.dump(_escape(values), Dumper=_Dumper, sort_keys=False)
    _merge(options, cls, _compose(text, source := _Source(where, folder, is_file=False)), f"{prefix}.", source)
    return _to_dataclasses(options)


# --- files and overrides


def override_of(key: str, value: Any) -> str:
    """``key=value`` as on a command line, of a value of Python: a number, text, a list, a mapping, a path, None."""
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def _merge_file(cfg: Config, path: Path, seen: tuple[Path, ...], keep_paths: bool, later: _Later) -> None:
    real = path.resolve()
    if real in seen:
        raise UserError(f"{path}: base files include each other in a circle", "remove one of the `base:` lines")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no such configuration file: {path}", _similar_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration file {path}: {error}") from error
    source = _Source(str(path), path.parent, is_file=True, keep_paths=keep_paths)
    root = _compose(text, source)
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{source.at(root)}: a configuration is a mapping of keys to values", "begin with `name: …`")
    base = [value for key, value in root.value if key.value == "base"]
    root.value = [(key, value) for key, value in root.value if key.value != "base"]
    if base:
        if len(base) > 1 or not isinstance(base[0], yaml.ScalarNode):
            raise UserError(f"{source.at(base[-1])}: base names one file", "write `base: other.yaml`")
        _merge_file(cfg, path.parent / Path(base[0].value).expanduser(), (*seen, real), keep_paths, later)
    _merge_now(cfg, root, source, later)


def _merge_override(cfg: Config, override: str, later: _Later) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise UserError(
            f"not an override: {override!r}", "overrides read key=value, for example trainer.optimizer.lr=1e-6"
        )
    source = _Source(override, None, is_file=False)
    node = _compose(text, source)
    if node is None:
        node = yaml.ScalarNode(_NULL, "")
    for part in reversed(key.split(".")):
        node = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", part), node)])
    _merge_now(cfg, node, source, later)


def _merge_now(cfg: Config, node: yaml.Node, source: _Source, later: _Later) -> None:
    """All but ``sources``, which begin as the sections that may still be written behind them."""
    if isinstance(node, yaml.MappingNode):
        later += [(value, source) for key, value in node.value if key.value == _SOURCES and value.tag != _NULL]
        node.value = [(key, value) for key, value in node.value if key.value != _SOURCES]
    _merge(cfg, Config, node, "", source)


def _compose(text: str, source: _Source) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source.name}:{mark.line + 1}" if source.is_file and mark else source.name
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}: broken YAML: {problem}", "check indentation, colons, quotes and brackets") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source.name}: broken YAML: {' '.join(str(error).split())}") from None


# --- the walk


def _merge(target: Any, cls: type, node: yaml.Node, prefix: str, source: _Source) -> None:
    """Set what `node` gives in `target`, a `cls`, or OmegaConf's structured config of that dataclass."""
    known = hints(cls)
    for key, value in _items(node, prefix, source):
        full, hint = prefix + key, known.get(key)
        if hint is None:
            raise UserError(f"{source.at(value)}: unknown key {full}", _nearest_key(full, prefix, list(known)))
        if dataclasses.is_dataclass(hint):
            if value.tag != _NULL:  # a section whose lines are all commented out
                _merge(getattr(target, key), typing.cast(type, hint), value, full + ".", source)
        elif item_class(hint) is not None:
            setattr(target, key, _merge_items(getattr(target, key), item_class(hint), value, full, source))
        else:
            _set(target, key, hint, rules(cls)[key], value, full, source)


def _merge_items(items: Sequence[Any], cls: type, node: yaml.Node, prefix: str, source: _Source) -> list[Any]:
    """A list of dataclasses: a sequence replaces it, a mapping of indices changes some of its items."""
    if isinstance(node, yaml.SequenceNode):
        new = [cls() for _ in node.value]
        for i, item in enumerate(node.value):
            _merge(new[i], cls, item, f"{prefix}.{i}.", source)
        return new
    new = list(items)
    if isinstance(node, yaml.MappingNode) and all(key.value.isdecimal() for key, _ in node.value):
        for key, item in _items(node, f"{prefix}.", source):
            if int(key) >= len(new):
                raise UserError(
                    f"{source.at(item)}: {prefix} has {len(new)} items, none with index {key}", "count from 0"
                )
            _merge(new[int(key)], cls, item, f"{prefix}.{key}.", source)
        return new
    raise UserError(f"{source.at(node)}: {prefix} is a list", f"write `{prefix}: [{{name: …}}]`")


def _set(target: Any, key: str, hint: Any, rule: Rule, node: yaml.Node, full: str, source: _Source) -> None:
    _refuse_doubled(node, full, source)
    try:
        value = _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{source.at(node)}: {full}: {getattr(error, 'problem', error)}") from None
    kind = not_none(hint)
    if kind is str and isinstance(node, yaml.ScalarNode) and value is not None:
        value = node.value  # as it was written: 0123 stays 0123
        if not source.keep_paths and (rule.path or (rule.code and ":" in value)):
            value = _local_path(value, source.folder)
    if full == "slurm.extra" and isinstance(value, dict):
        value = {k: _as_written(v, value[k]) for k, v in _items(node, f"{full}.", source)}
    if typing.get_args(kind) == (str,) and isinstance(node, yaml.SequenceNode):
        value = [_as_written(item, old) for item, old in zip(node.value, value, strict=True)]
        if rule.path and not source.keep_paths:
            value = [_local_path(item, source.folder) for item in value]
    wrong = UserError(f"{source.at(node)}: {full} must be {_describe(hint)}, not {_shown(node, value)}", None)
    if kind is bool and isinstance(value, str):
        value = {"yes": True, "on": True, "no": False, "off": False}.get(value.lower(), value)
    if kind is float and type(value) is int:
        value = float(value)
    if typing.get_args(kind) == (float,) and isinstance(value, list):
        value = [float(item) if type(item) is int else item for item in value]
    if kind in (bool, int, float) and value is not None and type(value) is not kind and "${" not in str(value):
        raise wrong  # OmegaConf would take 3 for true and "7" for a number
    if not dataclasses.is_dataclass(type(target)):
        _set_option(target, key, value, wrong)
        return
    old = getattr(target, key)
    try:
        new = value if isinstance(value, str) and "${" in value else _checked(hint, value)
    except TypeError:
        raise wrong from None
    setattr(target, key, _merged(old, new) if isinstance(old, dict) and isinstance(new, dict) else new)


def _set_option(target: Any, key: str, value: Any, wrong: UserError) -> None:
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if isinstance(target[key], DictConfig) and isinstance(value, dict):
            value = OmegaConf.merge(target[key], value)
        target[key] = value
    except OmegaConfBaseException:
        raise wrong from None


def _checked(hint: Any, value: Any) -> Any:
    """`value` if it is of the type of a field; a text that is a number in a list of numbers as one, as OmegaConf takes
    it. Raises TypeError."""
    kind = not_none(hint)
    if value is None and kind is not hint:
        return None
    if kind is Any:
        return _plain(value)
    if (origin := typing.get_origin(kind)) is not None:
        if not isinstance(value, origin):
            raise TypeError
        if origin is list:
            return [_item(typing.get_args(kind)[0], item) for item in value]
        return _plain(value)
    if type(value) is not kind:
        raise TypeError
    return value


def _item(kind: type, value: Any) -> Any:
    if isinstance(value, str) and "${" in value:
        return value
    if kind is str and isinstance(value, str | bool | int | float):
        return str(value)
    if type(value) is bool or not isinstance(value, str | int | float):
        raise TypeError
    try:
        return value if type(value) is kind else kind(value)
    except ValueError:
        raise TypeError from None


def _plain(value: Any) -> Any:
    """What YAML and JSON both have, with texts for keys."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }
    return old | both


def _as_written(node: yaml.Node, value: Any) -> Any:
    """What is a number to YAML, and text to whom it is for: 0123 stays 0123, and 1.10 does not become 1.1."""
    return node.value if isinstance(node, yaml.ScalarNode) and type(value) in (int, float) else value


def _items(node: yaml.Node, prefix: str, source: _Source) -> Iterator[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        name = prefix.rstrip(".")
        raise UserError(
            f"{source.at(node)}: {name} must be a mapping, not {_shown(node)}", f"write `{name}: {{key: value}}`"
        )
    seen = set()
    for key, value in node.value:
        name = key.value if isinstance(key, yaml.ScalarNode) else _shown(key)
        if name in seen:
            raise UserError(f"{source.at(key)}: {prefix}{name} is given twice", "keep one of them")
        seen.add(name)
        yield name, value


def _refuse_doubled(node: yaml.Node, full: str, source: _Source) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in _items(node, f"{full}.", source):
            _refuse_doubled(value, f"{full}.{key}", source)


def _resolved(cfg: Config) -> Config:
    """`cfg` with what ``${…}`` stands for in it. Raises UserError."""
    if not _has_references(cfg):
        return cfg
    from omegaconf import OmegaConf

    resolved: Config = _to_dataclasses(OmegaConf.structured(cfg))
    return resolved


def _has_references(value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        return any(_has_references(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, dict):
        return any(_has_references(item) for item in value.values())
    if isinstance(value, list):
        return any(map(_has_references, value))
    return isinstance(value, str) and "${" in value


def _to_dataclasses(cfg: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        text = str(error).splitlines()[0]
        raise UserError(
            f"{key}: {text}" if key else text, r"text that holds ${ without meaning a key is written \${"
        ) from None


def _local_path(text: str, folder: Path | None) -> str:
    """`text` as an absolute path where a file or directory of that name is there, else unchanged (a hub name)."""
    if text == "warmstart" or text.startswith("builtin:"):
        return text
    name, colon, rest = text.partition(":")  # rewards, losses and recipes: file.py:name
    for candidate in ([] if folder is None else [folder]) + [Path()]:
        path = candidate / Path(name).expanduser()
        if path.exists():
            return f"{path.resolve()}{colon}{rest}"
    return text


# --- what types and keys are called


def _describe(hint: Any) -> str:
    kind = not_none(hint)
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    items = {(float,): "numbers", (int,): "whole numbers"}.get(typing.get_args(kind), "texts")
    name = names.get(kind) or ("a mapping" if typing.get_origin(kind) is dict else f"a list of {items}")
    return name if kind is hint else f"{name} or null"


def _shown(node: yaml.Node, value: Any = None) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "null" if node.tag == _NULL else repr(node.value)


def all_keys() -> list[str]:
    """Every key of the schema in full, such as ``trainer.optimizer.lr``; an item of a list has the index 0."""
    return list(_keys_of(Config, ""))


def _keys_of(cls: type, prefix: str) -> Iterator[str]:
    for key, hint in hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _keys_of(typing.cast(type, hint), f"{prefix}{key}.")
        elif item_class(hint) is not None:
            yield from _keys_of(item_class(hint), f"{prefix}{key}.0.")
        else:
            yield prefix + key


def _nearest_key(full: str, prefix: str, siblings: list[str]) -> str:
    if full in NOT_HERE:
        return NOT_HERE[full]
    name = full[len(prefix) :]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    last = name.rpartition(".")[2]
    elsewhere = [key for key in all_keys() if difflib.SequenceMatcher(None, key.rpartition(".")[2], last).ratio() > 0.8]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"known keys{' of ' + prefix.rstrip('.') if prefix else ''}: {', '.join(siblings)}"


def _similar_file(path: Path) -> str | None:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    if close:
        return f"did you mean {path.parent / close[0]}?"
    return f"in {path.parent}: {', '.join(sorted(names))}" if names else "give --config FILE"


# --- values


def _escape(value: Any) -> Any:
    """Values in which OmegaConf finds no interpolation: ``${`` written as ``\\${``."""
    if isinstance(value, dict):
        return {k: _escape(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat: dict[str, Any] = {}
    for key, item in items:
        full = f"{prefix}.{key}" if prefix else str(key)
        flat.update(_flatten(item, full) if isinstance(item, (dict, list)) and item else {full: item})
    return flat
