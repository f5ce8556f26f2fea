#!/usr/bin/env bash
# One would guess: a JSON column that holds texts and numbers comes out of datasets as it went in ("Json" feature).
# What happens: texts that read as JSON are no longer texts: "12" is the number 12, "null" is None, "1.10" is 1.1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==4.7.0
cd "$work"
HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 venv/bin/python - <<'PYTHON'
import json
import sys
from pathlib import Path

import datasets

written = ["12", 12, "null", "1.10", "true", "twelve"]
Path("data.jsonl").write_text("".join(json.dumps({"answer": answer}) + "\n" for answer in written))
column = datasets.load_dataset("json", data_files="data.jsonl", split="train")
read = [row["answer"] for row in column]
print("datasets", datasets.__version__, "feature:", column.features["answer"])
print("written: ", written)
print("expected:", written)
print("read:    ", read)
sys.exit(repr(read) != repr([12, 12, None, 1.1, True, "twelve"]))
PYTHON
