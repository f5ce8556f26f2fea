#!/usr/bin/env bash
# One would guess that giving a model's configuration the degrees of parallelism computes with numbers. torchtitan 0.3.0's
# asks whether it was given the configuration of its own trainer, and imports that trainer for the question: with datasets,
# pandas and pyarrow, a thousand modules and most of a second of CPU in each process that builds a model by itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchtitan==0.3.0 triton==3.9.0

cat > imports.py <<'PYTHON'
import sys
import time
from importlib.metadata import version
from types import SimpleNamespace

import torch
import torch._utils

torch._utils._get_available_device_type = lambda: "cpu"  # torchtitan takes "cuda" where torch has no accelerator
import torchtitan.distributed
from torchtitan.config import ParallelismConfig
from torchtitan.models.qwen3 import qwen3_configs

config = qwen3_configs["debugmodel"]("flex")
given = SimpleNamespace(parallelism=ParallelismConfig(spmd_backend="partial_dtensor"))
before, start = set(sys.modules), time.process_time()
config.update_from_config(config=given)
seconds, new = time.process_time() - start, set(sys.modules) - before
packages = {name.partition(".")[0] for name in new}
print(f"torchtitan {version('torchtitan')}, torch {torch.__version__}")
print(f"update_from_config of a Qwen3: {len(new)} modules of {len(packages)} packages, {seconds:.1f} s of CPU")
print("among them:", ", ".join(sorted(packages & {"datasets", "pandas", "pyarrow", "fsspec", "aiohttp"})))
if not {"datasets", "pandas", "pyarrow"} <= packages or "torchtitan.trainer" not in new:
    raise SystemExit("it has changed")
PYTHON
venv/bin/python imports.py
