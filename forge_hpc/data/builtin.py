"""The embedded default: a small Qwen3 with its tokenizer, and sums to learn, both from a seed. No network needed.

The task: ``72+85=`` asks for 27 + 58. Digits are written lowest first, so that a carry is known when it is needed; the
answer is ``58``. Answers are verifiable, and the held-out sums are absent from every other split, in either order of
their operands: who answers them has learned to add.

    train   all other sums with their right answers
    test    500 held-out sums; fixed, whatever the seed, so that no run can have trained on them
    sft     the sums of ``train``, answered by a pupil who usually forgets to carry

A model that imitates the pupil knows the format and the digits, adds wrongly most of the time, and tries the right
carry often enough for a reward to teach it.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError

SPLITS = ("train", "test", "sft")
NUM_HELD_OUT = 500
FORGET_PROBABILITY = 0.8
"""How often the pupil drops a carry."""
ANSWERS_PER_SUM = 4
"""Answers of the pupil to each sum of the sft split; they differ where he carries at random."""

_LOWEST, _HIGHEST = 10, 99
_HELD_OUT_SEED = 2026


def _lowest_digit_first(number: int) -> str:
    return str(number)[::-1]


def _pupils_answer(a: int, b: int, rng: random.Random) -> str:
    digits, carry = "", 0
    for x, y in zip(_lowest_digit_first(a), _lowest_digit_first(b), strict=True):
        total = int(x) + int(y) + carry
        digits += str(total % 10)
        carry = total // 10
        if carry and rng.random() < FORGET_PROBABILITY:
            carry = 0
    return digits + ("1" if carry else "")


def _example(a: int, b: int, answer: str) -> dict[str, Any]:
    return {
        "question": f"{_lowest_digit_first(a)}+{_lowest_digit_first(b)}=",
        "answer": answer,
        "a": a,
        "b": b,
    }


def addition_examples(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of a split: ``question``, ``answer`` and the operands ``a`` and ``b``.

    ``seed`` draws the pupil's slips and changes nothing else. Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"builtin:addition has no split {split!r}", f"its splits are {', '.join(SPLITS)}")
    numbers = range(_LOWEST, _HIGHEST + 1)
    unordered = [(a, b) for a in numbers for b in numbers if a <= b]
    held_out = set(random.Random(_HELD_OUT_SEED).sample(unordered, NUM_HELD_OUT))
    if split == "test":
        # Either order of the operands is held out; which one is asked alternates.
        pairs = [(a, b) if i % 2 else (b, a) for i, (a, b) in enumerate(sorted(held_out))]
    else:
        pairs = [(a, b) for a in numbers for b in numbers if (min(a, b), max(a, b)) not in held_out]
    if split == "sft":
        rng = random.Random(f"{seed}/pupil")
        return [_example(a, b, _pupils_answer(a, b, rng)) for a, b in pairs for _ in range(ANSWERS_PER_SUM)]
    return [_example(a, b, _lowest_digit_first(a + b)) for a, b in pairs]


def addition_pairs(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Preferences: of each sum of ``train`` or ``test`` the right answer (``chosen``) and a wrong one (``rejected``),
    that of a pupil who forgets to carry, or with one wrong digit where nothing is carried.

    ``seed`` draws the wrong answers. Raises UserError for an unknown split.
    """
    if split not in ("train", "test"):
        raise UserError(f"builtin:addition-pairs has no split {split!r}", "its splits are train, test")
    rng = random.Random(f"{seed}/pairs")
    pairs = []
    for example in addition_examples(split):
        right = example["answer"]
        wrong = _pupils_answer(example["a"], example["b"], rng)
        while wrong == right:
            place = rng.randrange(len(right))
            wrong = right[:place] + str(rng.randrange(10)) + right[place + 1 :]
        pairs.append({"prompt": example["question"], "chosen": right, "rejected": wrong})
    return pairs


def addition_labels(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """The answers of ``addition_pairs`` one by one: ``prompt``, ``answer``, and a ``label``, true where it is right."""
    return [
        {"prompt": pair["prompt"], "answer": pair[name], "label": name == "chosen"}
        for pair in addition_pairs(split, seed)
        for name in ("chosen", "rejected")
    ]


def char_tokenizer() -> Any:
    """A tokenizer with one token a character (printable ASCII and newline), ``<pad>``, ``<eos>`` and ``<unk>``.

    Returns a ``transformers.PreTrainedTokenizerFast``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def write_tiny_qwen3(
    path: str | Path,
    seed: int,
    *,
    dim: int = 128,
    num_layers: int = 3,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    hidden_dim: int = 384,
    vocab_size: int = 128,
    max_position_embeddings: int = 4096,
    tie_word_embeddings: bool = False,
) -> Path:
    """Write a small Qwen3 with random weights (float32) and its tokenizer to `path`, in Hugging Face format.

    The same seed gives the same bytes. ``head_dim`` must be one that vLLM's CPU attention has (32, 64, 80, 96, 112,
    128, ...). The weights are drawn wider (0.1) than a large model's, without which a model this small learns three
    times as slowly.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = char_tokenizer()
    if len(tokenizer) > vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is smaller than the tokenizer's {len(tokenizer)}")
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    weights = model.state_dict()
    if tie_word_embeddings:
        del weights["lm_head.weight"]  # the same tensor as the embedding
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(path)
    GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(path)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(path)
    return path


def write_small_qwen3(path: str | Path, seed: int) -> Path:
    """The same, of 2.6 M parameters instead of 0.6: a teacher for it."""
    return write_tiny_qwen3(path, seed, dim=256, num_layers=4, num_heads=8, num_kv_heads=4, hidden_dim=768)
