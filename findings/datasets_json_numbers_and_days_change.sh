#!/usr/bin/env bash
# One would guess: what a JSON file holds as whole numbers and as texts, datasets gives back as whole numbers and texts.
# What happens: one number of 2**63 or more makes floats of the whole column (2**53 + 1 becomes 2**53), and a column of
# texts like "2024-01-01" becomes timestamps: the text is gone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==4.7.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import datetime
import json
import sys
from pathlib import Path

import datasets


def read(name, written):
    Path(f"{name}.jsonl").write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in written))
    found = [row["answer"] for row in datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train")]
    print(f"{name}: expected {written}, read {found}")
    return found


print("datasets", datasets.__version__)
numbers = read("numbers", [2**63, 2**53 + 1])
days = read("days", ["2024-01-01", "2024-01-02"])
same = repr(numbers) == repr([2.0**63, 2.0**53]) and days == [datetime.datetime(2024, 1, d) for d in (1, 2)]
sys.exit(not same)
PYTHON
