"""How quickly examples become documents, and how long a step waits for its own, with and without workers beside.

    python benchmarks/documents.py [--examples 128] [--processes 0 2]

Chats of three turns, some 1,100 tokens each, through a chat template and a tokenizer of 8,192 tokens that is trained
here on the same made-up words. 0 processes: a thread beside the step, as on nodes of fewer than 8 cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rows import row

from forge_hpc.config.schema import Config, DataConfig
from forge_hpc.data.mixture import open_sources
from forge_hpc.data.prompts import DocumentStream

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ROUNDS = 5


def made_up_words() -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), rng.integers(2, 9))) for _ in range(5000)]


def trained_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def write_chats(file: Path, words: list[str], num: int) -> None:
    rng = np.random.default_rng(1)

    def said(role: str, num_words: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choice(words, num_words))}

    with file.open("w") as lines:
        for _ in range(num):
            turns = [said(role, size) for _ in range(3) for role, size in (("user", 80), ("assistant", 200))]
            lines.write(json.dumps({"messages": turns}) + "\n")


def waits(stream: DocumentStream, num: int) -> tuple[float, int]:
    """Median seconds that ``take`` needs where what is made ahead is there, and tokens of the documents."""
    seconds = []
    for number in range(ROUNDS + 1):
        for source in stream._ahead:  # a step that takes long enough
            for each in source._ahead:
                if each.begun is not None:
                    each.begun.result()
        start = time.perf_counter()
        documents = stream.take(num)
        if number:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), sum(len(document.token_ids) for document in documents)


def per_second(stream: DocumentStream, num: int) -> float:
    """Tokens a second where nothing else is to be done."""
    stream.take(num)
    start = time.perf_counter()
    tokens = sum(len(document.token_ids) for _ in range(ROUNDS) for document in stream.take(num))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128, help="of a step")
    parser.add_argument("--processes", type=int, nargs="*", default=[0, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-hpc-documents-") as directory:
        words, file = made_up_words(), Path(directory) / "chats.jsonl"
        write_chats(file, words, 4 * args.examples)
        tokenizer = trained_tokenizer(words)
        config = Config(data=DataConfig(path=str(file), prompt_field="messages", target_field=None))
        config.trainer.training.seq_len = 4096
        plain = DocumentStream(open_sources(config), tokenizer, config)
        alone_s, _ = waits(plain, args.examples)
        alone = per_second(plain, args.examples)
        for num in args.processes:
            stream = DocumentStream(open_sources(config), tokenizer, config, ahead=True, num_processes=num)
            beside = f"{num} processes" if num else "a thread"
            wait_s, tokens = waits(stream, args.examples)
            row(f"{args.examples} chats of a step ({tokens:,} tokens): waited for, {beside} beside", 1e3 * wait_s,
                1e3 * alone_s, target=0.1, better="less", unit="ms", peer="one after the other")  # fmt: skip
            row(f"documents without a pause, {beside}", per_second(stream, args.examples), alone, unit="tokens/s",
                peer="one after the other")  # fmt: skip
            stream.close()


if __name__ == "__main__":
    main()
