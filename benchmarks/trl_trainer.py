"""TRL's side of ``trl_cpu.py`` and ``trl_gpus.py``: a process of an environment that has TRL.

    python benchmarks/trl_trainer.py GIVEN

GIVEN is a JSON file: ``model`` (a folder), ``prompts``, ``episodes`` a step, ``asynchronous``, ``options`` of TRL's
configuration class, and ``out``, the file that the first rank writes: of each step its seconds and generated tokens.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class Clock(TrainerCallback):
    """Seconds from one step's end to the next one's, and what TRL logs of a step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.logs: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_begin(self, *args: Any, **options: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *args: Any, **options: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now

    def on_log(self, *args: Any, **options: Any) -> None:
        logs = options["logs"]
        if "train_runtime" not in logs:  # the summary at the end
            self.logs.append(dict(logs))


@cache
def flash_attention() -> Any:
    """For TRL's asynchronous trainer, which takes FlashAttention 3 from the model hub: the one that our trainer has."""
    from torch.nn.attention.varlen import varlen_attn

    from forge_hpc.models import flash3

    if flash3.serves():
        flash3.activate()

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, longest_q: Any, longest_k: Any, *, softmax_scale: Any,
        causal: bool, window_size: Any,
    ) -> Any:  # fmt: skip
        assert causal and tuple(window_size) == (-1, -1)
        return varlen_attn(q, k, v, starts_q, starts_k, int(longest_q), int(longest_k),
                           scale=softmax_scale, window_size=(-1, 0), enable_gqa=True)  # fmt: skip

    return SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)


def reward(completions: list[Any], **fields: Any) -> list[float]:
    """Of texts, or of messages where prompts are such."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [len(text) / 100 for text in texts]


def as_chat(tokenizer: Any, prompts: list[str]) -> list[list[dict[str, str]]]:
    """The same tokens as messages, which is what TRL's asynchronous trainer takes."""
    from trl.chat_template_utils import qwen3_template

    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.response_template = qwen3_template
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    clock, out, prompts = Clock(), Path(given["out"]), given["prompts"]
    tokenizer = AutoTokenizer.from_pretrained(given["model"], padding_side="left")
    if given["asynchronous"]:
        prompts = as_chat(tokenizer, prompts)
    common: dict[str, Any] = {
        "reward_funcs": reward, "train_dataset": Dataset.from_dict({"prompt": prompts}),
        "processing_class": tokenizer, "callbacks": [clock],
    }  # fmt: skip
    options = {
        "output_dir": str(out.with_suffix("")), "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "temperature": 1.0, "learning_rate": 1e-6,
        "ddp_find_unused_parameters": False, **given["options"],
    }  # fmt: skip
    trainer: Any
    if given["asynchronous"]:
        from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, packing

        packing._flash_attn = flash_attention
        trainer = AsyncGRPOTrainer(given["model"], args=AsyncGRPOConfig(**options), **common)
    else:
        from trl import GRPOConfig, GRPOTrainer

        config = GRPOConfig(beta=0.0, shuffle_dataset=False, **options)
        model = AutoModelForCausalLM.from_pretrained(given["model"], dtype="float32")  # as TRL loads one by its name
        trainer = GRPOTrainer(model, args=config, **common)
    trainer.train()
    if os.environ.get("RANK", "0") != "0":
        return
    episodes = given["episodes"]
    tokens = [
        log.get("batch/trained_tokens_per_step") or episodes * log["completions/mean_length"] for log in clock.logs
    ]
    part = out.with_suffix(".part")  # who waits for the file ends this process, and is to find it whole
    part.write_text(json.dumps({"seconds": clock.seconds, "tokens": tokens}))
    part.replace(out)


if __name__ == "__main__":
    main()
