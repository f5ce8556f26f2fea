"""What a machine with GPUs must show, in one table and one JSON file: `make gpu-check`.

    python benchmarks/gpu_check.py [--part trainer weights ...] [--out FILE]

It takes the Python that it is started with (torch, vllm, torchtitan, monarch) and 1, 2, 4 or 8 GPUs as it finds them;
nothing is set up, nothing is downloaded. A part takes at most ten minutes:

    trainer   TrainEngine beside TorchTitan's own model and step; the head's memory                  trainer.py
    weights   publish → loaded, between processes on one GPU, and on two and four                    engine_weights.py
              between two GPUs by NCCL over sockets, as between hosts                                links.py
    ranks     FSDP over 2, 4 and 8 GPUs beside one, and memory beside the plan                       ranks.py
    long      a row of 65,536 tokens that two GPUs share, beside one                                 long_rows.py
    experts   a mixture of experts over all GPUs beside FSDP alone, and replayed routes              experts.py
    mismatch  log-probabilities of generator and trainer, each way that either computes              mismatch.py
              and that none of their operations differs where they are batch invariant               operations.py
    families  the latter of models other than Qwen3                                                  operations.py
    run       a whole run of a model of 0.4 B with random weights, synchronous and a step ahead      whole_run.py
    turns     the same, synchronous, with trainers and generators on the same GPUs in turns          whole_run.py
    faults    what a killed generator, a killed trainer rank and SIGTERM cost such a run             faults.py
    together  the whole run, and
    together-faults  the faults, with trainers and generators on the same GPUs at once
    start     a job's start with and without compile caches, its saves and its end                   job.py
              a rank's part of a save beside dd                                                      save.py
    peer      the whole loop beside TRL's, which has to be there (trl_gpus.py says how)              trl_gpus.py
    peer-async  a step ahead beside TRL's asynchronous trainer                                       trl_gpus.py

Without a GPU everything runs on the CPU with tiny models, for its own sake, and targets say nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from rows import PROJECT, Script, about_this_machine, run

PART_S = 600.0
PARTS = (
    *("trainer", "weights", "ranks", "long", "experts", "mismatch", "families"),
    *("run", "turns", "faults", "together", "together-faults", "start", "peer", "peer-async"),
)
PEERS = ("peer", "peer-async")
"""Left out where TRL is not, unless they are asked for."""
FAMILIES = ("qwen2", "llama", "mistral")
"""Dense ones, beside Qwen3."""
COUNTS = (1, 2, 4, 8)
"""Of ranks that are compared."""


def parts(num_gpus: int) -> dict[str, list[Script]]:
    """The scripts of each part on so many GPUs."""
    if num_gpus == 0:
        tiny, small = ("--tiny",), ("--prompts", "5", "--layers", "2")
        return {
            "trainer": [Script("trainer.py", (*tiny, "--steps", "2")), Script("trainer.py", (*tiny, "--head", "256"))],
            "weights": [Script("engine_weights.py", ("--model", "tiny", "--rounds", "2"))],
            "ranks": [Script("ranks.py", ("--ranks", "1", "2", "--steps", "1", "--recipe", "grpo"))],
            "long": [Script("long_rows.py", ("--steps", "1"))],
            "experts": [Script("experts.py")],
            "mismatch": [Script("mismatch.py"), Script("operations.py", small)],
            "families": [Script("operations.py", (*small, "--family", family)) for family in FAMILIES],
            "run": [Script("whole_run.py", tiny)],
            "turns": [Script("whole_run.py", (*tiny, "--in-turns", "--rounds", "1"))],
            "faults": [Script("faults.py")],
            "together": [Script("whole_run.py", (*tiny, "--together", "--rounds", "1"))],
            "together-faults": [Script("faults.py", ("--together",))],
            "start": [Script("job.py", ("--steps", "5", "--warm", "1"))],
        }
    counts = [str(count) for count in COUNTS if count <= num_gpus]
    apart = "split" if num_gpus == 2 else "fsdp2"
    weights = [Script("engine_weights.py", ("--model", "0.6b", "--gpus", "shared"))]
    if num_gpus > 1:
        weights.append(Script("engine_weights.py", ("--model", "0.6b", "--gpus", apart)))
        weights.append(Script("engine_weights.py", ("--model", "0.6b", "--gpus", "tp4" if num_gpus >= 4 else "tp2")))
        weights.append(Script("links.py"))
    several = {"long": [Script("long_rows.py")], "experts": [Script("experts.py", ("--ranks", counts[-1]))]}
    together = {
        "together": [Script("whole_run.py", ("--together", "--rounds", "1"))],
        "together-faults": [Script("faults.py", ("--together",))],
    }
    peer_async = ("--peers", "async", "--ours", "ahead")
    return {
        # as the plan of a shipped configuration has it, and the same shape for both
        "trainer": [Script("trainer.py", ("--rows", "0", "--ac", "auto")), Script("trainer.py", ("--head", "32768"))],
        "weights": weights,
        "ranks": [Script("ranks.py", ("--ranks", *counts))],
        **(several if num_gpus > 1 else {}),
        "mismatch": [Script("mismatch.py", limit_s=480), Script("operations.py", ("--invariant",))],
        "families": [Script("operations.py", ("--invariant", "--family", family)) for family in FAMILIES],
        "run": [Script("whole_run.py")],
        "turns": [Script("whole_run.py", ("--in-turns", "--steps", "4"))],
        "faults": [Script("faults.py")],
        **(together if num_gpus > 1 else {}),  # one is shared anyway
        "start": [Script("job.py"), Script("save.py", ("runs", "--gb", "4", "--repeats", "3"))],
        "peer": [Script("trl_gpus.py")],
        **({"peer-async": [Script("trl_gpus.py", peer_async)]} if num_gpus > 1 else {}),
    }


def gpus() -> list[str]:
    """Names of the GPUs."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS)
    parser.add_argument("--out", type=Path, default=PROJECT / "runs/gpu-check.json")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    try:
        found = gpus()
        import monarch.actor  # noqa: F401
        import torchtitan  # noqa: F401
        import vllm  # noqa: F401
    except ImportError as error:
        print(f"error: {sys.executable} lacks {error.name}", file=sys.stderr)
        print(
            "hint: name another Python: make gpu-check PYTHON=...; `make setup EXTRA=cuda` makes one", file=sys.stderr
        )
        return 2
    print(f"{len(found)} GPUs: {', '.join(sorted(set(found)))}" if found else "no GPU: on the CPU", file=sys.stderr)
    scripts, code = parts(len(found)), 0
    if missing := [part for part in args.part or () if part not in scripts]:
        print(f"error: --part {' '.join(missing)}: not with {len(found)} GPUs", file=sys.stderr)
        return 2
    has_trl = importlib.util.find_spec("trl") is not None
    for part in args.part or [part for part in scripts if has_trl or part not in PEERS]:
        about = about_this_machine() | {"gpus": found, "part": part}
        out = args.out.with_name(f"{args.out.stem}-{part}{args.out.suffix}")
        code |= run(scripts[part], PART_S, out, about=about)
    return code if found else 0  # what a CPU shows of targets for GPUs is nothing


if __name__ == "__main__":
    sys.exit(main())
