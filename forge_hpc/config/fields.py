"""The rules of a field, which stand at it in ``schema``: the values it takes, whether a run may go on with another one,
whether it names a file. Validation, resume, path resolution and docs/configuration.md read them here.

Example:
    @dataclass
    class EngineConfig:
        max_num_seqs: int = setting(256, POSITIVE, resume=ROUNDING)
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIXED, FREE, ROUNDING = "fixed", "free", "rounding"
"""Whether a run may go on with another value: no; yes, it changes nothing of what is computed, or only how long the run
goes on; yes, but sums may be added up in another order, so that the last bit may move."""


@dataclass(frozen=True)
class Range:
    """Which values a field takes."""

    text: str
    """What they are, after "must be"."""
    holds: Callable[[Any], bool]


POSITIVE = Range("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Range("0 or more", lambda v: v >= 0)
UP_TO_ONE = Range("greater than 0 and at most 1", lambda v: 0 < v <= 1)
SHARE = Range("from 0 to 1", lambda v: 0 <= v <= 1)
BELOW_ONE = Range("from 0 to less than 1", lambda v: 0 <= v < 1)


@dataclass(frozen=True)
class Rule:
    """What a field's metadata says. A list's rule holds for each of its items; None is always allowed where the type
    allows it."""

    range: Range | None = None
    choices: tuple[str, ...] = ()
    """The names it takes; ``code`` takes a user's own place too."""
    formerly: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Choices that there are no longer, or never were: what to write instead."""
    resume: str = FIXED
    path: bool = False
    """It names a file or directory, relative to the file that says so, or something elsewhere."""
    code: bool = False
    """It may be a place of the user's own, ``file.py:name`` or ``package.module:name``; the file's path is resolved."""


def setting(
    default: Any = dataclasses.MISSING,
    range: Range | None = None,
    *,
    factory: Any = dataclasses.MISSING,
    choices: Iterable[str] = (),
    formerly: Mapping[str, str] | None = None,
    resume: str | None = None,
    path: bool = False,
    code: bool = False,
) -> Any:
    """A dataclass field with its rules; ``resume`` is by default that of the section which the field is in."""
    given = {"range": range, "choices": tuple(choices), "formerly": formerly or {}, "path": path, "code": code}
    metadata = {"rule": given | ({} if resume is None else {"resume": resume})}
    if factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls)


@functools.cache
def rules(cls: type, resume: str = FIXED) -> dict[str, Rule]:
    """The rule of each field of a dataclass whose own fields are ``resume`` where they do not say."""
    return {f.name: Rule(**{"resume": resume} | f.metadata.get("rule", {})) for f in dataclasses.fields(cls)}


def not_none(hint: Any) -> Any:
    """The type T of Optional[T], or `hint` itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def item_class(hint: Any) -> Any:
    """The dataclass T of List[T], or None."""
    args = typing.get_args(hint)
    return args[0] if typing.get_origin(hint) is list and dataclasses.is_dataclass(args[0]) else None


def walk(value: Any, prefix: str = "", resume: str = FIXED) -> Iterator[tuple[str, Any, Rule]]:
    """Every key of a configuration in full, its value and its rule; those of a list of sections by index."""
    cls: type = type(value)
    for name, rule in rules(cls, resume).items():
        key, item = f"{prefix}{name}", getattr(value, name)
        if dataclasses.is_dataclass(item):
            yield from walk(item, f"{key}.", rule.resume)
        elif item_class(hints(cls)[name]) is not None:
            for i, section in enumerate(item):
                yield from walk(section, f"{key}.{i}.", rule.resume)
        else:
            yield key, item, rule


def rule_of(cls: type, key: str) -> Rule:
    """The rule of a key: a field of the dataclass, something in one (``slurm.extra.gres``), a section."""
    rule = Rule()
    for part in key.split("."):
        if part.isdecimal():  # an item of a list of sections has its class already
            continue
        rule = rules(cls, rule.resume)[part]
        inner = hints(cls)[part]
        if (section := item_class(inner) or not_none(inner)) and dataclasses.is_dataclass(section):
            cls = typing.cast(type, section)
        else:
            break
    return rule
