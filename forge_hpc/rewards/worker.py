"""A process that computes rewards one at a time: ``python -m forge_hpc.rewards.worker``, started by the pool.

Requests come on the standard input, each a length (8 bytes, little endian) and a pickle; answers go to what was the
standard output, one JSON object a line. What rewards print goes to the standard error. It ends with its input.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

from forge_hpc.cluster.processes import die_with_parent
from forge_hpc.config.errors import UserError
from forge_hpc.rewards.compute import Answer, compute, describe
from forge_hpc.rewards.registry import RewardFunction, load_reward


def _answer(request: dict[str, Any], loaded: dict[str, RewardFunction]) -> Answer:
    """Load the reward where that has not been done; compute it unless the request is only to load it."""
    name = request["name"]
    try:
        if name not in loaded:
            loaded[name] = load_reward(name)
    except UserError as error:
        return {"error": error.message, "hint": error.hint}
    except Exception as error:  # importing a user's module may raise anything
        return {"error": describe(error)}
    return compute(loaded[name], request) if "response" in request else {"value": 0.0}


def main() -> None:
    die_with_parent()
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    loaded: dict[str, RewardFunction] = {}
    while len(header := requests.read(8)) == 8:
        (length,) = struct.unpack("<Q", header)
        answer = _answer(pickle.loads(requests.read(length)), loaded)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
