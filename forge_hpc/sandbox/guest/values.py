"""Values between the tester and the program: plain data by copy, all else by reference.

A copy is rebuilt from JSON out of builtin types only, so nothing that the program sends carries code or an ``==`` of
its own into the tester.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAX_JSON_INT = 2**62


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """`value` as JSON. Subclasses of builtin types (named tuples, counters, NumPy floats) become the builtin type.

    Args:
        refer: gives a number to what is not plain data, or raises TypeError.
    """
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if -_MAX_JSON_INT < value < _MAX_JSON_INT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: value.hex()}
    if isinstance(value, list):
        return [encode(item, refer) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, refer) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in value.items()]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), refer)
    return {"reference": refer(value)}


_BUILDERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*parts),
}
_COLLECTIONS: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """What ``encode`` was given, `resolve` giving what a number refers to. Raises on anything else."""
    if isinstance(data, list):
        return [decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "reference":
        return resolve(content)
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](decode(item, resolve) for item in content)
    return _BUILDERS[kind](content)
