"""What the endpoint costs: conversations over HTTP, beside the same ones asked of the generators directly.

    python benchmarks/endpoint.py [--conversations 200] [--turns 3] [--repeats 3]

A real generator (the tiny model on the CPU) answers all conversations at once, each of several turns of 80
tokens, greedily: once through the service alone, as a run's episodes of environments do, and once through the endpoint,
from clients in a process of their own. The two ways take turns. Then the time to the first streamed token, by the
number of streams at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rows import row

MAX_TOKENS = 80
STREAMS = (1, 20, 200)


def without_end(model: Path) -> Path:
    """The logit of its end of text is 0 from here on, and never the greatest: answers have all the tokens they may."""
    from safetensors.torch import load_file, save_file

    file, end = model / "model.safetensors", json.loads((model / "config.json").read_text())["eos_token_id"]
    weights = load_file(file)
    weights["lm_head.weight"][end] = 0
    save_file(weights, file, {"format": "pt"})
    return model


def opening(number: int) -> str:
    return f"{number}+{7 * number % 90}="


# ---- the clients' process


async def client(job: dict[str, Any]) -> dict[str, Any]:
    import aiohttp

    url = f"{job['base_url']}/chat/completions"
    first: list[float] = []
    lengths: list[int] = []

    async def ask(session: aiohttp.ClientSession, key: str, messages: list[dict[str, str]]) -> dict[str, str]:
        body = {"model": "policy", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        async with session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200, await answer.text()
            said = await answer.json()
        lengths.append(said["usage"]["completion_tokens"])
        return said["choices"][0]["message"]

    async def converse(session: aiohttp.ClientSession, number: int, key: str) -> None:
        messages = [{"role": "user", "content": opening(number)}]
        for turn in range(job["turns"]):
            messages += [await ask(session, key, messages), {"role": "user", "content": opening(turn)}]

    async def stream(session: aiohttp.ClientSession, number: int, key: str) -> None:
        messages = [{"role": "user", "content": opening(number)}]
        body = {"model": "policy", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
        start, is_first = time.perf_counter(), True
        async with session.post(url, json=body, headers={"Authorization": f"Bearer {key}"}) as answer:
            async for line in answer.content:
                if is_first and b'"content": "' in line and b'"content": ""' not in line:
                    first.append(time.perf_counter() - start)
                    is_first = False

    one = stream if job["stream"] else converse
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        start, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(one(session, number, key) for number, key in enumerate(job["keys"])))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_s": cpu, "lengths": lengths, "first_s": first}


# ---- the run's side


async def measure(args: argparse.Namespace) -> None:
    from monarch.actor import this_host

    from forge_hpc.actors.generator import Generator
    from forge_hpc.config import Config
    from forge_hpc.config.schema import EnvironmentConfig
    from forge_hpc.controller.service import Service
    from forge_hpc.data.builtin_tools import write_tiny_chat_qwen3
    from forge_hpc.data.hub import load_tokenizer
    from forge_hpc.data.types import Prompt, Turn
    from forge_hpc.endpoint import Endpoint, GeneratorSampler
    from forge_hpc.endpoint.render import ChatRenderer

    config = Config(reward=[], environment=EnvironmentConfig(name="agent.py:episode", max_turns=args.turns))
    config.model.dtype = "float32"
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 64, 448
    with tempfile.TemporaryDirectory() as folder:
        model = without_end(await asyncio.to_thread(write_tiny_chat_qwen3, Path(folder) / "model", 0))
        tokenizer = load_tokenizer(model)
        mesh = this_host().spawn_procs(per_host={"gpus": 1})
        generator = mesh.spawn("generator", Generator, config, 0, Path(folder))
        await generator.start.call_one(model)
        service = Service("generator", 1, 600, print)
        await service.admit(0, generator)
        endpoint = await Endpoint(config, tokenizer, GeneratorSampler(service)).start()
        renderer, sampling = ChatRenderer(tokenizer, config.data), replace(config.rollout.sampling, temperature=0.0)

        async def directly() -> tuple[float, list[int], float]:
            lengths: list[int] = []

            async def converse(number: int) -> None:
                context = renderer.opening([{"role": "user", "content": opening(number)}], [])
                for turn in range(args.turns):
                    request = Turn(number, 0, turn, context, MAX_TOKENS)
                    [said] = await service.generate_turns.route([request], sampling, 0, f"direct-{number}")
                    lengths.append(said.num_tokens)
                    more = [{"role": "user", "content": opening(turn)}]
                    context = context + said.token_ids + renderer.following(more, [], said.token_ids[-1])

            start, cpu = time.perf_counter(), cpu_s()
            await asyncio.gather(*map(converse, range(args.conversations)))
            return time.perf_counter() - start, lengths, cpu_s() - cpu

        async def asked(num: int, stream: bool) -> tuple[dict[str, Any], float]:
            with ExitStack() as stack:
                prompts = [Prompt(number, "", [1], "") for number in range(num)]
                keys = [stack.enter_context(endpoint.open(prompt, 0)).key for prompt in prompts]
                job = {"base_url": endpoint.base_url, "keys": keys, "turns": args.turns, "stream": stream}
                command = [sys.executable, str(Path(__file__).resolve()), "--client"]
                process = await asyncio.create_subprocess_exec(
                    *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, limit=1 << 26
                )
                cpu = cpu_s()
                output, _ = await process.communicate(json.dumps(job).encode())
                assert process.returncode == 0
                return json.loads(output), cpu_s() - cpu

        ways: dict[str, list[float]] = {"directly": [], "endpoint": []}
        costs: dict[str, list[float]] = {"directly": [], "endpoint": [], "clients": []}
        shortest: list[int] = []
        for repeat in range(args.repeats + 1):
            seconds, lengths, cpu = await directly()
            answer, endpoint_cpu = await asked(args.conversations, stream=False)
            shortest += [*lengths, *answer["lengths"]]
            if repeat:  # the first one warms up
                ways["directly"].append(sum(lengths) / seconds)
                ways["endpoint"].append(sum(answer["lengths"]) / answer["seconds"])
                costs["directly"].append(1e3 * cpu / len(lengths))
                costs["endpoint"].append(1e3 * endpoint_cpu / len(lengths))
                costs["clients"].append(1e3 * answer["cpu_s"] / len(lengths))
        mean, least, load = statistics.mean(shortest), min(shortest), os.getloadavg()[0]
        print(f"{args.conversations} conversations of {args.turns} turns, median of {args.repeats}; load {load:.1f}")
        print(f"an answer has {mean:.1f} tokens in the mean, {least} at least")
        for name in ways:
            print(f"  {name:10} {statistics.median(ways[name]):9.0f} tokens/s   {spread(ways[name])}")
        for name, values in costs.items():
            print(f"  {name:10} {statistics.median(values):9.2f} ms of CPU a request")
        print("time to the first streamed token, ms")
        print("| streams at once | median | 95th percentile |")
        print("| ---: | ---: | ---: |")
        for num in STREAMS:
            firsts = sorted((await asked(num, stream=True))[0]["first_s"])
            print(
                f"| {num} | {1e3 * statistics.median(firsts):.0f} | {1e3 * firsts[int(0.95 * (len(firsts) - 1))]:.0f} |"
            )
        row(
            f"{args.conversations} conversations through the endpoint, tokens a second",
            statistics.median(ways["endpoint"]),
            statistics.median(ways["directly"]),
            target=0.8,
            unit="tokens/s",
            peer="the generators directly",
        )
        await endpoint.close()
        await generator.leave.call_one()
        await mesh.stop()


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def spread(values: Sequence[float]) -> str:
    return f"({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(json.dumps(asyncio.run(client(json.load(sys.stdin)))))
    else:
        asyncio.run(measure(args))


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
