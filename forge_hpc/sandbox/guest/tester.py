"""Runs a test against a program that it does not trust.

The test runs here, in a process that the program can neither read nor fake; what the program defines runs over there.
A name that the test uses and does not define is, in this order: a builtin; a module of the standard library (or ``np``)
where the test takes attributes of it; what the program calls so. Calls go over with plain data and come back as plain
data, so each comparison is made here, between builtin values. Objects of the program's own classes stay there, and the
test holds a reference: it can call it, take attributes and items, and iterate over it. It cannot leave a judgement to
it: to compare it with another one, to look for something in it, and to call a predicate that plain data has
(``islower``) fails the test. What else a test asks of such an object (``Stack().is_empty()``) the program answers.

A test cannot hand a function of its own to the program, nor catch an exception class that the program defines. Files
in /tmp are the program's to change.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import frames
from .values import decode, encode

_MODULE_ALIASES = {"np": "numpy"}
_PREDICATES = {"startswith", "endswith"} | {
    name for kind in (str, bytes, int, float, set) for name in dir(kind) if name.startswith("is")
}
_MAX_REASON_CHARS = 500
_MAX_FRAME_BYTES = 16 * 2**20


class NotPlainError(Exception):
    """The test would have had an object of the program judge."""


class ProgramError(Exception):
    """What the program raised, where it is no builtin exception; or that the program has ended."""


def pair() -> tuple[int, int]:
    """The two ends of the way between tester and program."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def main(test: str, report_fd: int, socket_fd: int) -> NoReturn:
    """Run `test`, write {"passed", "reason"} and end."""
    try:
        _run(test, Program(socket_fd))
        verdict = {"passed": True, "reason": ""}
    except BaseException as error:  # also a SystemExit: only the test itself can raise one here
        passed = isinstance(error, SystemExit) and not error.code  # unittest.main() ends so
        verdict = {"passed": passed, "reason": "" if passed else _reason(error)}
    os.write(report_fd, json.dumps(verdict).encode())
    os._exit(0)


def _run(test: str, program: Program) -> None:
    tree = ast.parse(test, "test")
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    owners = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module  # where unittest.main() looks
    sys.argv = ["test"]
    wanted = sorted(name for name in loaded if not name.startswith("__") and not hasattr(builtins, name))
    for name in [name for name in wanted if name in owners]:
        full = _MODULE_ALIASES.get(name, name)
        if full in sys.stdlib_module_names or name in _MODULE_ALIASES:
            with contextlib.suppress(ImportError):
                setattr(module, name, importlib.import_module(full))
            wanted.remove(name)  # where it is missing, the program has none to offer
    vars(module).update(program.globals(wanted))
    exec(compile(tree, "test", "exec"), vars(module))


def _reason(error: BaseException) -> str:
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "test":
            line = trace.tb_lineno
        trace = trace.tb_next
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return (text if line is None else f"{text} (line {line} of the test)")[:_MAX_REASON_CHARS]


class Program:
    """The program, seen from the test."""

    def __init__(self, socket_fd: int) -> None:
        self._socket_fd = socket_fd

    def globals(self, names: list[str]) -> dict[str, Any]:
        """Those of `names` that the program defines."""
        answer = self._ask({"names": names})
        return {name: decode(answer["globals"][name], self._reference) for name in names if name in answer["globals"]}

    def do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """Have the program do `operation`; lists, dicts and sets among `args` change as they do there."""
        request = {
            "do": operation,
            "args": [encode(arg, _index) for arg in args],
            "kwargs": {name: encode(arg, _index) for name, arg in kwargs.items()},
        }
        answer = self._ask(request)
        for i, data in answer["changed"].items():
            _change(args[int(i)], decode(data, self._reference))
        return decode(answer["value"], self._reference)

    def _reference(self, index: int) -> Reference:
        return Reference(self, index)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            frames.send(self._socket_fd, json.dumps(request).encode())
            payload = frames.receive(self._socket_fd, _MAX_FRAME_BYTES)
        except (BrokenPipeError, ConnectionError):
            payload = None
        if payload is None:
            raise ProgramError("the program ended")
        answer = json.loads(payload)
        if "raised" in answer:
            name, message = answer["raised"]
            raise _builtin_error(str(name), str(message)) or ProgramError(f"{name}: {message}")
        return answer


def _builtin_error(name: str, message: str) -> Exception | None:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # some take more than a message
            return kind(message)
    return None


def _index(value: Any) -> int:
    if isinstance(value, Reference):
        return vars(value)["_index"]
    raise TypeError(f"a test can hand plain data to a program, and no {type(value).__name__}")


def _change(target: Any, new: Any) -> None:
    if isinstance(target, list):
        target[:] = new
    elif isinstance(target, (dict, set)):
        target.clear()
        target.update(new)


class Reference:
    """An object that lives in the program. It equals nothing that lives here."""

    def __init__(self, program: Program, index: int) -> None:
        vars(self).update(_program=program, _index=index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _PREDICATES:
            raise NotPlainError(f"{name}() was asked of an object of the program's own")
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Reference) and other is not self:
            raise NotPlainError("two objects of the program's own were compared")
        return other is self

    def __contains__(self, item: object) -> bool:
        raise NotPlainError("something was looked for in an object of the program's own")

    __hash__ = object.__hash__

    def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_program"].do(operation, self, *args, **kwargs)


def _forward(operation: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: self._do(operation, *args, **kwargs)


for _operation in ("call", "iter", "next", "len", "bool", "getitem", "setitem", "str", "repr"):
    setattr(Reference, f"__{_operation}__", _forward(_operation))
