"""Values of the data's fields as JSON and back, exactly: also of what Parquet and ``datasets`` know beyond JSON.

What JSON has no word for becomes ``{"$": kind, "value": ...}``. No pickle: other people's data must not run as code.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np

_KIND = "$"
_MODULES = ("builtins", "datetime", "decimal", "uuid", "numpy", "pandas")


class _Kind(NamedTuple):
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def to_json(value: Any) -> Any:
    """The value as JSON can hold it, for ``from_json`` to make an equal one of the same type.

    Raises:
        TypeError: it holds something of a kind that is not known here, or a dict whose keys are no text.
    """
    kind = type(value)
    if value is None or kind in (str, bool, int, float):
        return value
    if kind is list:
        return [to_json(item) for item in value]
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise TypeError(f"dict {value!r:.60} has keys that are no text")
        items = {key: to_json(item) for key, item in value.items()}
        return {_KIND: "dict", "value": items} if _KIND in value else items
    name = "scalar" if isinstance(value, np.generic) else kind.__name__
    if name not in _KINDS or kind.__module__.partition(".")[0] not in _MODULES:
        raise TypeError(f"{kind.__name__} {value!r:.60} cannot be saved")
    return {_KIND: name, "value": _KINDS[name].write(value)}


def target_text(value: Any) -> str:
    """The text of a reference answer: nothing for None, JSON for a list or a dict, else as Python writes it."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


def from_json(value: Any) -> Any:
    """The inverse of ``to_json``."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if isinstance(value, dict):
        return _KINDS[value[_KIND]].read(value["value"]) if _KIND in value else _items(value)
    return value


def _items(value: dict[str, Any]) -> dict[str, Any]:
    return {key: from_json(item) for key, item in value.items()}


def _zone_to_json(zone: tzinfo | None, moment: Any) -> str | float | None:
    """A name of the time zone database, or seconds from UTC."""
    if zone is None:
        return None
    name = getattr(zone, "key", None) or getattr(zone, "zone", None)  # of zoneinfo, of pytz
    offset = zone.utcoffset(moment)
    return name or (None if offset is None else offset.total_seconds())


def _zone(saved: str | float | None) -> tzinfo | None:
    if saved is None:
        return None
    return ZoneInfo(saved) if isinstance(saved, str) else timezone(timedelta(seconds=saved))


def _write_clock(value: datetime | time) -> list[Any]:
    moment = value if isinstance(value, datetime) else None
    return [value.replace(tzinfo=None).isoformat(), _zone_to_json(value.tzinfo, moment), value.fold]


def _read_clock(kind: type[datetime] | type[time]) -> Callable[[Any], Any]:
    return lambda saved: kind.fromisoformat(saved[0]).replace(tzinfo=_zone(saved[1]), fold=saved[2])


def _write_array(value: Any) -> list[Any]:
    array = np.asarray(value)
    if array.dtype.names:
        raise TypeError(f"an array of {array.dtype} cannot be saved")
    if array.dtype.hasobject:
        return ["O", array.shape, [to_json(item) for item in array.ravel().tolist()]]
    return [array.dtype.str, array.shape, base64.b64encode(array.tobytes()).decode()]


def _read_array(saved: list[Any]) -> np.ndarray:
    dtype, shape, data = saved
    if dtype != "O":
        return np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
    array = np.empty(len(data), object)
    array[:] = [from_json(item) for item in data]
    return array.reshape(shape)


def _pandas() -> Any:
    import pandas  # a dependency of ``datasets``, and slow to import

    return pandas


_KINDS = {
    "dict": _Kind(dict, _items),
    "tuple": _Kind(lambda v: [to_json(item) for item in v], lambda v: tuple(map(from_json, v))),
    "bytes": _Kind(lambda v: base64.b64encode(v).decode(), base64.b64decode),
    "Decimal": _Kind(str, Decimal),
    "UUID": _Kind(str, UUID),
    "date": _Kind(date.isoformat, date.fromisoformat),
    "datetime": _Kind(_write_clock, _read_clock(datetime)),
    "time": _Kind(_write_clock, _read_clock(time)),
    "timedelta": _Kind(lambda v: [v.days, v.seconds, v.microseconds], lambda v: timedelta(*v)),
    "Timestamp": _Kind(
        lambda v: [v.as_unit("ns").value, v.unit, _zone_to_json(v.tzinfo, v)],
        lambda v: _pandas().Timestamp(v[0], unit="ns", tz=_zone(v[2])).as_unit(v[1]),
    ),
    "Timedelta": _Kind(
        lambda v: [v.as_unit("ns").value, v.unit], lambda v: _pandas().Timedelta(v[0], unit="ns").as_unit(v[1])
    ),
    "ndarray": _Kind(_write_array, _read_array),
    "scalar": _Kind(_write_array, lambda v: _read_array(v)[()]),
}
"""By the name of the type. pandas gives moments and durations in nanoseconds, which Python has no type for."""
