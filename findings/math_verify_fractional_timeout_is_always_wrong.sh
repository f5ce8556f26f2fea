#!/usr/bin/env bash
# math-verify counts the time of parse and verify in seconds, so one would guess that 2.0 means 2, or is refused.
# It hands the number to signal.alarm, which takes integers alone; the TypeError is swallowed, parse finds nothing in any
# text and verify calls every pair different, without a word: a reward built on it is 0 for the whole run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet math-verify==0.9.0 antlr4-python3-runtime==4.13.2

"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from math_verify import parse, verify

print("math-verify", version("math-verify"))
print("expected: parse(…, parsing_timeout=2.0) reads what parsing_timeout=2 reads, or raises")
whole, fractional = parse("$1/2$", parsing_timeout=2), parse("$1/2$", parsing_timeout=2.0)
print(f"parsing_timeout=2: {whole}; parsing_timeout=2.0: {fractional}")
same = [verify(whole, whole, timeout_seconds=seconds) for seconds in (2, 2.0)]
print(f"verify(1/2, 1/2): timeout_seconds=2: {same[0]}; timeout_seconds=2.0: {same[1]}")
as_described = whole and not fractional and same == [True, False]
print("as described" if as_described else "no longer as described")
sys.exit(0 if as_described else 1)
PYTHON
