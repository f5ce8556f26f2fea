"""The program's side of a test: runs the program as a module, then does what the tester asks for."""

from __future__ import annotations

import json
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from . import frames
from .values import decode, encode

_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
}


def main(code: str, path: str, socket_fd: int) -> NoReturn:
    """Execute `code` as the module ``main`` and serve the tester until it hangs up."""
    module = types.ModuleType("main")
    module.__file__ = path
    sys.modules["main"] = module
    sys.argv, sys.path[0] = [path], os.path.dirname(path)
    raised: BaseException | None = None
    try:
        exec(compile(code, path, "exec"), module.__dict__)
    except BaseException as error:
        raised = error
    objects: list[Any] = [module]

    def refer(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while (payload := frames.receive(socket_fd, max_bytes=2**31)) is not None:
        try:
            if raised is not None:
                raise raised
            answer = _answer(json.loads(payload), objects, refer)
        except BaseException as error:
            answer = {"raised": [type(error).__name__, str(error)[:500]]}
        frames.send(socket_fd, json.dumps(answer).encode())
    os._exit(0)


def _answer(request: dict[str, Any], objects: list[Any], refer: Any) -> dict[str, Any]:
    if "names" in request:
        module = vars(objects[0])
        return {"globals": {name: encode(module[name], refer) for name in request["names"] if name in module}}
    args = [decode(arg, objects.__getitem__) for arg in request["args"]]
    kwargs = {name: decode(arg, objects.__getitem__) for name, arg in request["kwargs"].items()}
    value = _OPERATIONS[request["do"]](*args, **kwargs)
    changed = {}
    for i, arg in enumerate(args):  # the tester's own lists, dicts and sets must show what was done to them
        if isinstance(arg, (list, dict, set)) and (now := encode(arg, refer)) != request["args"][i]:
            changed[str(i)] = now
    return {"value": encode(value, refer), "changed": changed}
