#!/usr/bin/env bash
# math-verify compares answers as mathematics, so one would guess that what it calls equal is equal.
# It rounds to six decimals (1e-7 is 2e-7), chops small differences (1/2^99 is 1/2^98), takes words for products of
# letters (east is seat), drops units (5 cm is 5 m), and takes a pair in brackets for a set ({1,2} is (1,2)).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 antlr4-python3-runtime==4.13.2

"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from math_verify import parse, verify

PAIRS = [
    ("0.0000001", "0.0000002"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("east", "seat"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"\{1,2\}", "(1,2)"),
    ("1", "x^2+y^2=1"),
]
print("math-verify", version("math-verify"))
print("expected: each of these pairs is different")
verdicts = [verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")) for gold, answer in PAIRS]
for (gold, answer), verdict in zip(PAIRS, verdicts):
    print(f"target {gold!r}, answer {answer!r}: {'equal' if verdict else 'different'}")
print("as described" if all(verdicts) else "no longer as described")
sys.exit(0 if all(verdicts) else 1)
PYTHON
