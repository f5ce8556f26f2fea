#!/usr/bin/env bash
# One would guess that a task of reasoning-gym with one right answer gives a wrong answer nothing, or the same little for
# every wrong one, so that a reward tells right from wrong. Its common scorer pays for any text in which the right answer
# occurs, by the share of the length: "10" earns 0.5 where 1 is right and "2" nothing, and to answer "Yes No" to every
# yes-or-no question earns nearly what guessing does, without ever being wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check reasoning-gym==0.1.25

cat > score.py <<'PYTHON'
import importlib.metadata
import sys

import reasoning_gym

SIZE = 200


def mean(name, answer):
    """The mean score of one and the same answer to all questions."""
    tasks = reasoning_gym.create_dataset(name, size=SIZE, seed=7)
    return sum(tasks.score_answer(answer, task) for task in tasks) / SIZE


print("version    reasoning-gym", importlib.metadata.version("reasoning-gym"))
print("expected   numbers that are wrong earn 0, and so does an answer that says both yes and no")
divisors = reasoning_gym.create_dataset("gcd", size=SIZE, seed=7)
one = next(task for task in divisors if task["answer"] == "1")
paid = {answer: divisors.score_answer(answer, one) for answer in ("1", "10", "-1", "1234567890", "2")}
print("seen       gcd, where 1 is right:", ", ".join(f"{answer!r} earns {score:.2f}" for answer, score in paid.items()))
both = {name: mean(name, answer) for name, answer in (("syllogism", "Yes No"), ("course_schedule", "True False"))}
for name, score in both.items():
    print(f"seen       {name}: both words to each of {SIZE} questions earn {score:.3f} on the mean")
as_described = paid == {"1": 1.0, "10": 0.5, "-1": 0.5, "1234567890": 0.1, "2": 0.0} and min(both.values()) > 0.4
print("behaviour  a wrong answer earns what it holds of the right one" if as_described else "behaviour  no longer so")
sys.exit(not as_described)
PYTHON
venv/bin/python score.py
