"""Generated tokens a second of the whole loop beside TRL's trainers on the GPUs of this host, one after the other.

    python benchmarks/trl_gpus.py [--peers colocate server async] [--ours synchronous ahead] [--steps 6] [--rounds 1]
                                  [--trl FOLDER] [--logs FOLDER] [key=value ...]

Qwen3 0.6B with random weights, 32 prompts of 8 answers a step, at most 512 tokens each, 370 in the mean. TRL 1.16 has
to be there, on PYTHONPATH or in ``--trl`` (``pip install --no-deps --target FOLDER trl==1.16.0 accelerate``): nothing
is downloaded. Its modes, each with this environment's vLLM and TRL's defaults (float32 weights, bf16 computation, the
generator's log-probabilities corrected by those of one more forward pass), without activation checkpointing:

    colocate  GRPOTrainer, vLLM in the trainers' processes, on all GPUs
    server    GRPOTrainer on all GPUs but the last one, `vllm serve` there
    async     its experimental AsyncGRPOTrainer, on the same, at most one step behind

Ours are runs of `configs/grpo/qwen3_0_6b.yaml`, on several GPUs with trainers and generators on all of them at once
(docs/colocate.md). The first two steps of each, in which things are compiled, do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from experts import alone
from ranks import MODELS
from rows import PROJECT, row
from shipped import Shipped, write_data, write_model
from trl_cpu import REWARD, environ
from whole_run import TOGETHER

PROMPTS, GROUP_SIZE, LENGTH = 32, 8, 512
MICROBATCH = 16
"""Answers of TRL's: their logits take 5 GB in float32, several times."""
MAX_LEN = 2048
WARM_UP_STEPS = 2
PEERS = ("colocate", "server", "async")
OURS = {"synchronous": "rollout.max_staleness=0", "ahead": "rollout.max_staleness=1"}
TARGETS = {"synchronous": 1.2, "ahead": 2.0}
LIMIT_S = 400.0

Steps = list[tuple[float, float]]
"""Of each step its seconds and its generated tokens."""


def rate(steps: Steps) -> float:
    return sum(tokens for _, tokens in steps) / sum(seconds for seconds, _ in steps)


def ours(shipped: Shipped, name: str, kind: str) -> Steps:
    shared = TOGETHER if torch.cuda.device_count() > 1 else ()
    records = shipped.run(name, OURS[kind], *shared)
    return [(record["time/step_s"], record["tokens/generated"]) for record in records]


def given_to(peer: str, ranks: int, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """What trl_trainer.py takes, but for the files."""
    microbatches = PROMPTS * GROUP_SIZE // MICROBATCH // ranks
    options: dict[str, Any] = {
        "per_device_train_batch_size": MICROBATCH, "gradient_accumulation_steps": microbatches,
        "max_steps": args.steps + WARM_UP_STEPS, "num_generations": GROUP_SIZE, "max_completion_length": LENGTH,
        "bf16": True,
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    match peer:
        case "colocate":
            options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": MAX_LEN}
        case "server":
            options |= {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url}
        case _:  # so many answers a microbatch, and not so many tokens, for as many a step as everywhere
            options |= {"vllm_server_base_url": url, "max_staleness": 1, "token_budget": 0}
    return {"episodes": MICROBATCH * microbatches * ranks, "asynchronous": peer == "async", "options": options}


def theirs(directory: Path, name: str, peer: str, prompts: Sequence[str], args: argparse.Namespace) -> Steps:
    gpus, port, out = torch.cuda.device_count(), free_port(), directory / f"{name}-steps.json"
    ranks = gpus if peer == "colocate" else gpus - 1
    files = {"model": str(directory / "model"), "prompts": prompts, "out": str(out)}
    given = directory / f"{name}.json"
    given.write_text(json.dumps(given_to(peer, ranks, port, args) | files))
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--shutdown-timeout=5"]
        command += [f"--nproc-per-node={ranks}"]
    command += [str(PROJECT / "benchmarks/trl_trainer.py"), str(given)]
    # Its processes look for an address of the network that they may not have.
    env = environ(PROJECT, *([args.trl] if args.trl else [])) | {
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env["GLOO_SOCKET_IFNAME"] = "lo"
    logs = [directory / f"{name}.log"]
    with ExitStack() as stack:
        processes = []
        if peer != "colocate":
            logs.append(directory / f"{name}-server.log")
            processes.append(stack.enter_context(server(directory / "model", logs[1], gpus - 1, port, env)))
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
        processes.append(stack.enter_context(started(command, env, logs[0])))
        end = time.monotonic() + LIMIT_S
        while not out.exists() and all(each.poll() is None for each in processes) and time.monotonic() < end:
            time.sleep(0.2)
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
        for log in logs:
            shutil.copy(log, args.logs)
    if not out.exists():
        raise SystemExit("\n".join(f"{log.name}:\n{tail(log)}" for log in logs) + f"\nTRL, {peer}: no figures")
    found = json.loads(out.read_text())
    steps = list(zip(found["seconds"], found["tokens"], strict=True))[WARM_UP_STEPS:]
    print(f"TRL, {peer}: seconds {[round(seconds, 2) for seconds, _ in steps]}, {rate(steps):.0f} tokens/s", flush=True)
    return steps


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a log; at the end it and all of its group are ended."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sent)
                process.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


@contextmanager
def server(model: Path, log: Path, gpu: int, port: int, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """`vllm serve` as TRL asks for it; TRL waits until it answers."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_LEN)]
    command += ["--weight-transfer-config", json.dumps({"backend": "nccl"})]
    command += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    with started(command, {**env, "CUDA_VISIBLE_DEVICES": str(gpu), "VLLM_SERVER_DEV_MODE": "1"}, log) as process:
        yield process


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-150:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all but async, of one GPU colocate")
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--steps", type=int, default=6, help="that count, of each run; an even number")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--trl", type=Path, help="a folder that has TRL")
    parser.add_argument("--logs", type=Path, help="a folder for what TRL and its server say")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of ours")
    args = parser.parse_intermixed_args()
    gpus = torch.cuda.device_count()
    peers = args.peers or (["colocate", "server"] if gpus > 1 else ["colocate"])
    if not gpus or (gpus == 1 and peers != ["colocate"]):
        parser.error("TRL's server and its asynchronous trainer take two GPUs, the others one (on the CPU: trl_cpu.py)")
    if args.trl is None and not importlib.util.find_spec("trl"):
        parser.error("TRL is not here: pip install --no-deps --target FOLDER trl==1.16.0 accelerate; --trl FOLDER")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found: dict[str, Steps] = {name: [] for name in (*args.ours, *peers)}
    with tempfile.TemporaryDirectory(prefix="forge-hpc-benchmark-") as name:
        directory, shape = Path(name), MODELS["0.6b"]
        gpu_gib = alone(write_model, directory / "model", "qwen3", shape, "bfloat16")
        given = [f"model.path={directory / 'model'}", *write_data(directory, shape["vocab_size"])]
        (directory / "reward.py").write_text(REWARD)
        given += [f"reward=[{{name: {directory / 'reward.py'}:length}}]", f"cluster.gpus_per_node={gpus}"]
        given += [f"rollout.prompts_per_step={PROMPTS}", f"rollout.group_size={GROUP_SIZE}"]
        given += [f"rollout.max_response_tokens={LENGTH}", "trainer.training.steps=10000", "trainer.optimizer.lr=1e-6"]
        config = PROJECT / "configs/grpo/qwen3_0_6b.yaml"
        total = args.steps + WARM_UP_STEPS
        shipped = Shipped(config, [*given, *args.overrides], directory, total, gpu_gib)
        prompts = [json.loads(line)["question"] for line in (directory / "data.jsonl").read_text().splitlines()]
        for number in range(args.rounds):
            for kind in args.ours:
                found[kind] += ours(shipped, f"{kind}-{number}", kind)
            for peer in peers:
                found[peer] += theirs(directory, f"{peer}-{number}", peer, prompts, args)
                if number == args.rounds - 1:
                    report({kind: rate(found[kind]) for kind in args.ours}, peer, rate(found[peer]), gpus)
    return 0


def report(ours: Mapping[str, float], peer: str, value: float, gpus: int) -> None:
    for kind, own in ours.items():
        # The targets are for two GPUs, beside TRL's synchronous modes.
        target = TARGETS[kind] if peer != "async" and (gpus > 1 or kind == "synchronous") else None
        words = "a step ahead" if kind == "ahead" else kind
        row(f"whole loop, {words}: generated", own, value, target=target, unit="tokens/s", peer=f"TRL 1.16, {peer}")


if __name__ == "__main__":
    sys.exit(main())
