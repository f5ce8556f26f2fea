#!/usr/bin/env bash
# TRL's trainers take a model or its path. One would guess that GRPOTrainer(path) and GRPOTrainer(from_pretrained(path))
# train alike. With TRL 1.16.0 on transformers 5.19.0 the path is loaded in float32, and a model in the precision of its
# file, since transformers 5 reads that by default. With a file in bfloat16, as most are, and TRL's own learning rate of
# 1e-6, AdamW's steps then vanish in the rounding of nearly all weights: no error, no warning, reward and loss are logged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check uv
torch=(--torch-backend cpu)
if [[ -n "${PIP_FIND_LINKS:-}" ]]; then torch=(--find-links "$PIP_FIND_LINKS"); fi
venv/bin/uv pip install --quiet --python venv/bin/python "${torch[@]}" torch==2.13.0 trl==1.16.0 transformers==5.19.0 \
  accelerate==1.15.0 tokenizers==0.23.3

cat > precisions.py <<'PYTHON'
import os
import random

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

words = {f"w{i}": i for i in range(253)} | {"<pad>": 253, "<unk>": 254, "<eos>": 255}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left"
)
torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, bos_token_id=None, eos_token_id=255, pad_token_id=253,
)
Qwen3ForCausalLM(config).bfloat16().save_pretrained("model")
tokenizer.save_pretrained("model")
before = load_file("model/model.safetensors")
prompts = [{"prompt": f"w{a} w{b}"} for a in range(8) for b in range(8)]


def changed(model):
    """The share of the weights that three steps change, and their precision."""
    draw = random.Random(0)
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [draw.random() for _ in completions],
        train_dataset=Dataset.from_list(prompts), processing_class=tokenizer,
        args=GRPOConfig(
            output_dir="out", use_cpu=True, bf16=False, per_device_train_batch_size=8, num_generations=4, max_steps=3,
            max_completion_length=8, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            lr_scheduler_type="constant",
        ),
    )
    assert trainer.args.learning_rate == 1e-6
    trainer.train()
    after = {name: value for name, value in trainer.model.named_parameters() if value.ndim == 2}
    differ = sum(int((value.detach() != before[name].to(value.dtype)).sum()) for name, value in after.items())
    return differ / sum(value.numel() for value in after.values()), next(iter(after.values())).dtype


by_path, model = changed("model"), changed(AutoModelForCausalLM.from_pretrained("model"))
print(f"trl {trl.__version__}, transformers {transformers.__version__}: weights that three steps of 1e-6 change")
for how, (share, dtype) in (("GRPOTrainer(path)", by_path), ("GRPOTrainer(from_pretrained(path))", model)):
    print(f"{how:36} {dtype}, {share:.3f}")
assert by_path[1] == torch.float32 and by_path[0] > 0.9, by_path
assert model[1] == torch.bfloat16 and model[0] < 0.2, model
PYTHON
venv/bin/python precisions.py 2> log || { tail -15 log; exit 1; }
