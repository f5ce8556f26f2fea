"""A shipped configuration as it stands, on the GPUs of this host: whole runs of a random model of its dimensions.

    python benchmarks/shipped.py [--config configs/grpo/qwen3_1_7b.yaml] [--staleness 0 1] [--steps 12] [--splits]
                                 [key=value ...]

What is replaced is the model (weights from a seed; so many tokens end an answer that its length is near 750 in the
mean where no limit cuts it), the data (random words) and the reward (noise, and shorter is better). Nothing is
evaluated or saved: a run is ended once it has done so many steps, of which the first two do not count. With
``--splits`` the split that ``forge-hpc plan --from`` proposes after the run is compared with its two neighbours.
Without a GPU it is a tiny model on the CPU, for its own sake.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_weights import SHAPES
from experts import alone
from faults import Watched
from ranks import MODELS as SIZES
from rows import MEMORY, PROJECT, median, row

from forge_hpc.before_queue import memory_of
from forge_hpc.config import Config, Placement, load_config, plan
from forge_hpc.config.recipes import needs_of
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.gpus import Gpu
from forge_hpc.sizing.memory import MemoryPlan
from forge_hpc.sizing.proposal import Proposal, proposals
from forge_hpc.sizing.speed import measured

LLAMA = {**SHAPES["8b"], "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Qwen/Qwen3-0.6B": ("qwen3", SIZES["0.6b"]),
    "Qwen/Qwen3-1.7B": ("qwen3", SIZES["1.7b"]),
    "Qwen/Qwen3-1.7B-Base": ("qwen3", SIZES["1.7b"]),
    "Qwen/Qwen3-8B": ("qwen3", SIZES["8b"]),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", LLAMA),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", LLAMA),
}
TINY = {**SHAPES["tiny"], "vocab_size": 1200}
MISMATCH = 0.08
"""The largest that was seen of these models, 8B's, and a quarter."""
MEAN_LENGTH = 750
"""Of an answer without a limit, in tokens."""
RUN_S = 1200.0
REWARD = """import random
def noisy(prompt, response, target, *, num_tokens=0, **fields):
    return random.random() - num_tokens / 1024
"""
ON_THE_CPU = (
    "cluster.gpus_per_node=0", "model.dtype=float32", "trainer.training.seq_len=256", "rollout.max_prompt_tokens=64",
    "rollout.max_response_tokens=32", "rollout.group_size=4", "rollout.prompts_per_step=8",
    "generator.engine.kv_cache_memory_gib=0.25",
)  # fmt: skip


def write_model(directory: Path, family: str, shape: Mapping[str, Any], dtype: str, results: Any) -> None:
    """Weights of a normal distribution from a seed, norms of 1, and a tokenizer of words that fill the vocabulary. Puts
    the GiB of a GPU, 0 where there is none."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    num_words = shape["vocab_size"] - 3
    words = {f"w{i}": i for i in range(num_words)} | {
        "<pad>": num_words,
        "<unk>": num_words + 1,
        "<eos>": num_words + 2,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)
    ids = {"bos_token_id": None, "eos_token_id": num_words + 2, "pad_token_id": num_words}
    config = AutoConfig.for_model(family, **shape, max_position_embeddings=8192, dtype=dtype, **ids)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    ends = [num_words + 2, *random.Random(0).sample(range(num_words), max(0, shape["vocab_size"] // MEAN_LENGTH - 1))]
    GenerationConfig(eos_token_id=ends, pad_token_id=num_words).save_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and shape["tie_word_embeddings"]:
            continue
        value = torch.empty(tensor.shape, dtype=getattr(torch, dtype), device=device)
        tensors[name] = (value.fill_(1.0) if "norm" in name else value.normal_(0, 0.02)).cpu()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    results.put(torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0)


def write_data(directory: Path, vocab_size: int) -> list[str]:
    """Questions and answers of random words, and the overrides that train on them."""
    draw = random.Random(1)
    longest = (200, 600) if torch.cuda.is_available() else (40, 60)

    def words(most: int) -> str:
        return " ".join(f"w{draw.randrange(vocab_size - 3)}" for _ in range(draw.randint(most // 3, most)))

    lines = [json.dumps({"question": words(longest[0]), "answer": words(longest[1])}) for _ in range(3000)]
    (directory / "data.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "reward.py").write_text(REWARD)
    given = [f"data.path={directory / 'data.jsonl'}", "data.name=null", "data.chat_template=false"]
    given += [f"reward=[{{name: {directory / 'reward.py'}:noisy}}]", "data.system_prompt=null"]
    return [*given, "evaluation.interval=0", "evaluation.num_prompts=0", "checkpoint.interval=0"]


@dataclass
class Shipped:
    """Runs of one configuration."""

    config: Path
    overrides: list[str]
    directory: Path
    steps: int
    gpu_gib: float

    def cfg(self, *overrides: str) -> Config:
        return load_config(self.config, [*self.overrides, *overrides])

    def run(self, name: str, *overrides: str) -> list[dict[str, float]]:
        """The records of the steps that count."""
        watched = Watched(self.directory / name, str(self.config), [*self.overrides, *overrides])
        watched.start()
        try:
            records = watched.wait_for(self.steps, RUN_S)[2 : self.steps]
        finally:
            watched.end()
        for key in ("time/step_s", "time/generate_s", "time/train_s", "tokens/generated"):
            if values := [round(record[key], 3) for record in records if key in record]:
                print(f"{name} {key}: {values}", flush=True)
        return records

    def memory(self, cfg: Config, placement: Placement) -> MemoryPlan | None:
        gpu = Gpu("", self.gpu_gib, 0.0) if self.gpu_gib else None
        return memory_of(cfg, placement, gpu, cfg.model.path)


def tokens_per_s(records: Sequence[Mapping[str, float]]) -> float:
    """Of a GPU, over all steps: two may come at once, and the next ones after a while."""
    weights = [record["time/step_s"] for record in records]
    figures = [record["perf/tokens_per_s"] * weight for record, weight in zip(records, weights, strict=True)]
    return sum(figures) / sum(weights)


def report(label: str, records: Sequence[Mapping[str, float]], shipped: Shipped, *given: str) -> None:
    cfg, gpus = shipped.cfg(*given), torch.cuda.device_count()
    row(f"{label}: tokens/s a GPU", tokens_per_s(records), unit="tokens/s")
    if (mfu := _median(records, "perf/mfu")) is not None:  # of a GPU that is known
        row(f"{label}: MFU of the trainers", mfu)
    memory = shipped.memory(cfg, plan(cfg, gpus))
    if memory is not None:
        trainers = memory.roles["trainers"]
        planned = trainers.total_gib - trainers.gib["other"]  # contexts, which torch does not count
        row(f"{label}: memory of a trainer", _median(records, "perf/trainer_memory_peak_gib"), planned, unit="GiB",
            peer="planned", target=MEMORY, better="less",
            note=trainers.remark)  # fmt: skip
    if (mismatch := _median(records, "mismatch/logprob_abs_mean")) is not None:
        known = (
            "0 with model.batch_invariant; else both sides round, each in its own way" if mismatch <= MISMATCH else ""
        )
        row(f"{label}: mismatch", mismatch, target=0.003 if gpus else None, better="less", unit="nats",
            known=known)  # fmt: skip
        row(f"{label}: weights, published to loaded", _median(records, "time/weight_sync_s"), unit="s")


def _median(records: Sequence[Mapping[str, float]], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return median(values) if values else None


def compare_splits(shipped: Shipped, label: str) -> None:
    """The split that is proposed from what the run a step ahead has measured, beside its neighbours."""
    cfg = shipped.cfg("rollout.max_staleness=1")
    found = proposals(cfg, measured(RunDir(shipped.directory / "ahead"), cfg), shipped.memory)
    if not neighbours(found):
        print(f"{label}: there is no other split", flush=True)
        return
    best, *others = [found[0], *neighbours(found)]
    figures = {}
    for number, each in enumerate((best, *others)):
        records = shipped.run(f"split-{number}", "rollout.max_staleness=1", *each.overrides)
        figures[each.overrides] = tokens_per_s(records)
        print(f"{' '.join(each.overrides)}: {figures[each.overrides]:.0f} tokens/s a GPU", flush=True)
    quickest = max(others, key=lambda each: figures[each.overrides])
    row(f"{label}: the proposed split ({' '.join(best.overrides)})", figures[best.overrides],
        figures[quickest.overrides], target=0.97, unit="tokens/s", peer=" ".join(quickest.overrides))  # fmt: skip


def neighbours(found: Sequence[Proposal]) -> list[Proposal]:
    """Those with one replica more and less than the first; of GPUs in common the two quickest that have none."""
    best = found[0]
    apart = [each for each in found if not each.placement.shared_gpus]
    if best not in apart:
        return apart[:2]
    return [each for each in apart if abs(each.placement.replicas - best.placement.replicas) == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=PROJECT / "configs/grpo/qwen3_1_7b.yaml")
    parser.add_argument("--staleness", type=int, nargs="*", choices=(0, 1), default=[0, 1])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--splits", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    if args.splits and 1 not in args.staleness:
        parser.error("--splits takes what the run a step ahead has measured: --staleness 1")
    gpus, label = torch.cuda.device_count(), args.config.stem
    if (path := load_config(args.config).model.path) not in MODELS:
        parser.error(f"{args.config}: the dimensions of {path} are not here: {', '.join(MODELS)}")
    family, shape = MODELS[path]
    if not gpus:
        shape = TINY
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="forge-hpc-shipped-") as name:
        directory = Path(name)
        gpu_gib = alone(write_model, directory / "model", family, shape, "bfloat16" if gpus else "float32")
        overrides = [f"model.path={directory / 'model'}", *write_data(directory, shape["vocab_size"])]
        overrides += ["trainer.training.steps=10000"]
        overrides += [f"cluster.gpus_per_node={gpus}"] if gpus else ON_THE_CPU
        shipped = Shipped(args.config, [*overrides, *args.overrides], directory, args.steps, gpu_gib)
        if needs_of(shipped.cfg()).generators != "beside":
            report(label, shipped.run("run"), shipped)
            return
        runs: dict[int, list[dict[str, float]]] = {}
        for staleness in args.staleness:
            who, given = ("ahead" if staleness else "synchronous"), f"rollout.max_staleness={staleness}"
            runs[staleness] = shipped.run(who, given)
            report(f"{label}, {'a step ahead' if staleness else who}", runs[staleness], shipped, given)
        if len(runs) == 2:
            shares = plan(shipped.cfg("rollout.max_staleness=1"), gpus).shared_gpus
            longest = max(_median(runs[0], f"time/{part}_s") or 0.0 for part in ("generate", "train"))
            step_s = sum(record["time/step_s"] for record in runs[1]) / len(runs[1])
            row(f"{label}: the longer of generation and training over a step ahead", longest, step_s,
                target=None if shares else 0.95, unit="s", peer="s the step")  # fmt: skip
        if args.splits:
            compare_splits(shipped, label)


if __name__ == "__main__":
    sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
    main()
