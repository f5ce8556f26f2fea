#!/usr/bin/env bash
# One would guess that textarena's env.reset(seed=...) ("for reproducibility") makes a game that repeats, whatever else
# runs. It seeds Python's global random and draws from there in every step: two games with one seed that are played side
# by side in a process draw from each other's, and neither is the game that the seed gives alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet textarena==0.7.4

cat > play.py <<'PYTHON'
import importlib.metadata
import sys

import textarena


def begin():
    env = textarena.make("Blackjack-v0-raw")
    env.reset(num_players=1, seed=7)
    return env


def hand(env):
    return list(env.state.game_state["player_hand"])


def hit(env):
    env.step("[Hit]")


alone = begin()
first = hand(alone)
hit(alone)
one, two = begin(), begin()
side_by_side = [hand(one), hand(two)]
hit(one)
hit(two)

print("version    textarena", importlib.metadata.version("textarena"))
print("expected   games with seed 7 that do the same are the same, alone or side by side")
print("seen       alone:        ", first, "then", hand(alone))
print("           side by side: ", *side_by_side, "then", hand(one), "and", hand(two))
differ = side_by_side == [first, first] and hand(one) != hand(two)
print("behaviour  they open alike and go on differently" if differ else "behaviour  no longer so")
sys.exit(not differ)
PYTHON
venv/bin/python play.py
