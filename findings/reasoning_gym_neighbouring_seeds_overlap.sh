#!/usr/bin/env bash
# One would guess that reasoning-gym's data sets of two seeds are independent, so that seed 42 trains and seed 43
# evaluates. Item i is drawn from seed + i: the data set of seed 43 is that of seed 42 shifted by one, and all of its
# questions but the last have been trained on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet reasoning-gym==0.1.25

cat > compare.py <<'PYTHON'
import importlib.metadata
import sys

import reasoning_gym

SIZE = 1000
NAMES = ("chain_sum", "basic_arithmetic", "spell_backward")


def questions(name, seed):
    return [item["question"] for item in reasoning_gym.create_dataset(name, size=SIZE, seed=seed)]


print("version    reasoning-gym", importlib.metadata.version("reasoning-gym"))
print(f"expected   of {SIZE} held-out questions of seed 43 few are among those of seed 42")
shifted = []
for name in NAMES:
    train, held_out = questions(name, 42), questions(name, 43)
    seen = len(set(held_out) & set(train))
    shifted.append(held_out[:-1] == train[1:])
    print(f"seen       {name}: {seen} of {len(set(held_out))} are; shifted by one: {shifted[-1]}")
print("behaviour  seed s + 1 is seed s shifted by one" if all(shifted) else "behaviour  no longer so")
sys.exit(not all(shifted))
PYTHON
venv/bin/python compare.py
