"""The embedded default with a tool: sums in their usual notation, and a small Qwen3 whose chat template knows tools.

    S:calculator<eos>Q:27+58=<eos>A:<tool_call>{"name": "calculator", …}</tool_call><eos>T:85<eos>A:85<eos>

    train   all sums of two-digit numbers but those held out; ``answer`` is the sum
    test    500 held-out sums; fixed, whatever the seed
    sft     chats of a pupil on the sums of ``train``, who often guesses and, when he asks the calculator, may mistype

Who imitates the pupil can call the tool, and does so too seldom: a reward can teach it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from forge_hpc.config.errors import UserError

SPLITS = ("train", "test", "sft")
NUM_HELD_OUT = 500
TOOL = "calculator"
GUESS_PROBABILITY, SLIP_PROBABILITY = 0.6, 0.3
"""How often the pupil guesses; and how often he mistypes where he does not."""
CHAT_TEMPLATE = (
    "{%- if tools %}S:{% for tool in tools %}{{ tool.function.name }}{% endfor %}<eos>{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}S:{{ message.content }}"
    "{%- elif message.role == 'user' %}Q:{{ message.content }}"
    "{%- elif message.role == 'tool' %}T:{{ message.content }}"
    "{%- else %}A:{{ message.content }}{% for call in message.tool_calls or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% endif %}<eos>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
_HELD_OUT_SEED = 2027


def calculator_examples(split: str, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of a split: ``question`` and ``answer``; in ``sft`` the question is a whole chat.

    ``seed`` draws the pupil's ways and changes nothing else. Raises UserError for an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"builtin:calculator has no split {split!r}", f"its splits are {', '.join(SPLITS)}")
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    held_out = set(random.Random(_HELD_OUT_SEED).sample(pairs, NUM_HELD_OUT))
    if split == "test":
        return [_example(a, b) for a, b in sorted(held_out)]
    kept = [pair for pair in pairs if pair not in held_out]
    if split == "train":
        return [_example(a, b) for a, b in kept]
    rng = random.Random(f"{seed}/pupil")
    return [_chat(a, b, rng) for a, b in kept]


def _example(a: int, b: int) -> dict[str, Any]:
    return {"question": f"{a}+{b}=", "answer": str(a + b)}


def _chat(a: int, b: int, rng: random.Random) -> dict[str, Any]:
    messages = [{"role": "system", "content": TOOL}, {"role": "user", "content": f"{a}+{b}="}]

    def say(role: str, content: str) -> None:
        messages.append({"role": role, "content": content})

    if rng.random() < GUESS_PROBABILITY:
        say("assistant", f"I guess {rng.randint(20, 198)}")
    else:
        if rng.random() < SLIP_PROBABILITY:
            a = rng.randint(10, 99)
        call = {"name": TOOL, "arguments": {"expression": f"{a}+{b}"}}
        say("assistant", f"<tool_call>{json.dumps(call)}</tool_call>")
        say("tool", str(a + b))
        say("assistant", str(a + b))
    return {"question": messages, "answer": ""}


def write_tiny_chat_qwen3(path: str | Path, seed: int) -> Path:
    """``builtin:qwen3-tiny`` whose tokenizer has a chat template with tools."""
    from forge_hpc.data.builtin import char_tokenizer, write_tiny_qwen3

    written = write_tiny_qwen3(path, seed)
    tokenizer = char_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(written)
    return written
