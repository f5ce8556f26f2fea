#!/usr/bin/env bash
# One would guess: an error that refuses an engine's options reaches whoever started the engine in another process, since
# pydantic's validation errors can be pickled.
# What happens: that of a single field can. One raised by a validator of the whole dataclass (as the configuration classes
# of inference engines have them, for lengths beyond the model, say) holds the arguments as ArgsKwargs and cannot: what
# arrives is a TypeError about pickling, and the reason stays behind.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pydantic==2.14.3
"$work/venv/bin/python" - <<'PYTHON'
import pickle
import sys

import pydantic
from pydantic import ValidationError, model_validator
from pydantic.dataclasses import dataclass


@dataclass
class EngineOptions:
    max_length: int

    @model_validator(mode="after")
    def fits(self):
        if self.max_length > 1024:
            raise ValueError("max_length is beyond the model's 1024 positions")
        return self


def sent(max_length):
    try:
        EngineOptions(max_length=max_length)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        try:
            return reason, pickle.loads(pickle.dumps(error)).errors()[0]["msg"]
        except TypeError as failure:
            return reason, f"TypeError: {failure}"


print("pydantic", pydantic.VERSION)
field, whole = sent("many"), sent(1536)
for told, arrived in (field, whole):
    print(f"refused: {told!r}; arrives as: {arrived!r}")
sys.exit(not (field[0] == field[1] and "cannot pickle" in whole[1] and "ArgsKwargs" in whole[1]))
PYTHON
