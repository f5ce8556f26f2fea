#!/usr/bin/env bash
# One would guess that the `answer` of a reasoning-gym item is a right answer, as it is the field that one fine-tunes on,
# shows to a judge and checks a reward with. For five of its tasks it is None: only the scorer knows what is right, from
# the metadata. And a trailing line break, as most answers of a model have, costs the whole reward in some tasks, a part
# of it in many, and nothing in others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check reasoning-gym==0.1.25

cat > answers.py <<'PYTHON'
import importlib.metadata
import sys

import reasoning_gym

NAMES = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour", "chain_sum", "gcd")
LINE_BREAK = {"ab": 0.0, "binary_matrix": 0.0, "n_queens": 0.0, "chain_sum": 1.0, "countdown": 1.0}

print("version    reasoning-gym", importlib.metadata.version("reasoning-gym"))
print("expected   each item's answer is a right one, with or without a line break at its end")
without, scores = [], {}
for name in NAMES:
    tasks = reasoning_gym.create_dataset(name, size=20, seed=7)
    if all(task["answer"] is None for task in tasks):
        without.append(name)
for name in (*LINE_BREAK, "aiw", "gcd"):
    tasks = reasoning_gym.create_dataset(name, size=20, seed=7)
    assert all(tasks.score_answer(task["answer"], task) == 1.0 for task in tasks)
    scores[name] = sum(tasks.score_answer(task["answer"] + "\n", task) for task in tasks) / 20
print("seen       no answer at all:", ", ".join(without))
print("seen       the right answer and a line break earn", ", ".join(f"{score:.2f} in {name}" for name, score in scores.items()))
as_described = without == list(NAMES[:5]) and LINE_BREAK.items() <= scores.items()
as_described = as_described and 0.4 < scores["aiw"] < 0.6 and 0.4 < scores["gcd"] < 0.7
print("behaviour  five tasks have none, and a line break counts" if as_described else "behaviour  no longer so")
sys.exit(not as_described)
PYTHON
venv/bin/python answers.py
