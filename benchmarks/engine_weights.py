"""A policy version from a real TrainEngine to a real vLLM engine in other processes of one host, by each of our ways.

    python benchmarks/engine_weights.py [--model 0.6b|8b|tiny] [--gpus shared|split|fsdp2|tp2|tp4] [--rounds 5]

Weights are made from a seed; vLLM starts on its own random ones. Each round changes all weights and brings them over
by the offer of the trainers' memory (A) and by the store (B), A B A B …; after each the generator's whole model has to
have the trainers' checksum. Columns, medians in seconds: ``publish -> loaded`` as the controller sees it; ``snapshot``,
for which training stands still; ``load``, for which generation does. GPUs: ``shared`` puts all on one, ``split`` the
trainer on the first and the generator on the second, ``fsdp2`` two trainer ranks on the first two and the generator on
the last, ``tp2`` and ``tp4`` one trainer and so many workers. Without a GPU everything runs on the CPU (``tiny``).
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monarch.actor import default_bootstrap_cmd, endpoint, this_host
from rows import row

from forge_hpc.actors.generator import Generator
from forge_hpc.actors.trainer import Trainer
from forge_hpc.cluster.worker import gpu_order, visible_gpus
from forge_hpc.config import Config
from forge_hpc.controller.generators import WeightSync
from forge_hpc.controller.service import Service
from forge_hpc.controller.store_at_need import StoreAtNeed
from forge_hpc.controller.trainers import Trainers
from forge_hpc.weights import WeightStore
from forge_hpc.weights.checksum import Checksum, checksum
from forge_hpc.weights.layout import plan

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, vocab_size=67, tie_word_embeddings=True),
    "0.6b": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                 num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
}  # fmt: skip
WAYS = ("offer", "store")


def write_model(directory: Path, shape: Mapping[str, Any], dtype: str, max_positions: int = 4096) -> int:
    """A Qwen3 model directory whose weights are a hole in a file: zeros that take no time to write. Its bytes."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<unk>": 61, "<eos>": 62}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    config = Qwen3Config(
        **shape, max_position_embeddings=max_positions, bos_token_id=None, eos_token_id=62, pad_token_id=60,
        dtype=dtype, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(directory)
    with torch.device("meta"):
        tensors = Qwen3ForCausalLM(config).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and shape["tie_word_embeddings"]:
            continue
        start, end = end, end + tensor.numel() * getattr(torch, dtype).itemsize
        kind = {"bfloat16": "BF16", "float32": "F32"}[dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


class BenchTrainer(Trainer):
    """The trainer, whose weights a seed changes."""

    offers = True

    @endpoint
    async def change(self, seed: int, offers: bool) -> None:
        self.offers = offers
        await self._in_thread(self._change, seed)

    def _change(self, seed: int) -> None:
        torch.manual_seed(seed + 1000 * self._rank)
        with torch.no_grad():
            for parameter in self._models.policy.model.parameters():
                getattr(parameter, "_local_tensor", parameter).normal_(0, 0.02)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _snapshot(self, *args: Any) -> Any:
        start = time.perf_counter()
        part = super()._snapshot(*args) if self.offers else None
        self.snapshot_s = time.perf_counter() - start
        return part

    def _weights(self, copies: bool) -> Any:
        start = time.perf_counter()
        weights = super()._weights(copies)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.snapshot_s += time.perf_counter() - start
        return weights

    @endpoint
    async def figures(self) -> tuple[float, Checksum, int]:
        """Seconds of the last snapshot, checksum of this rank's weights, most GPU memory in use (bytes)."""
        return self.snapshot_s, await self._in_thread(self._sum), peak_bytes()

    def _sum(self) -> Checksum:
        state = self._models.policy.hf_state_dict()
        _, sources = plan(state, version=0, rank=self._rank, dtype=None, max_bucket_bytes=1 << 60)
        return checksum(sources.values())


def held_by(worker: Any) -> Checksum:
    """The checksum of a worker's model, a tied head once."""
    model = worker.model_runner.get_model()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return checksum(p for name, p in model.named_parameters() if not (tied and name == "lm_head.weight"))


class BenchGenerator(Generator):
    @endpoint
    async def figures(self) -> tuple[float, Checksum | None]:
        """Seconds that generation has stood still for weights so far, and what the model holds; on the CPU, where vLLM
        packs its weights, and for several workers None."""
        engine = self._engine
        if not torch.cuda.is_available() or self._config.generator.engine.tensor_parallel_size > 1:
            return engine.stats().weight_load_s, None
        done: Any = __import__("concurrent.futures").futures.Future()
        engine._post(lambda: done.set_result(engine._engine.collective_rpc(held_by)[0]), [])
        return engine.stats().weight_load_s, await asyncio.wrap_future(done)


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def placement(gpus: str) -> tuple[list[int], list[int]]:
    """The GPUs of the trainer ranks and of the generator."""
    last = max(torch.cuda.device_count() - 1, 0)
    if gpus.startswith("tp"):
        return [0], list(range(int(gpus[2:])))
    return {"shared": ([0], [0]), "split": ([0], [1]), "fsdp2": ([0, 1], [last])}[gpus]


def configuration(args: argparse.Namespace, is_cuda: bool) -> Config:
    cfg = Config()
    cfg.model.dtype = "bfloat16" if is_cuda else "float32"
    cfg.trainer.training.dtype = args.training_dtype if is_cuda else "float32"
    cfg.trainer.training.seq_len = 256
    cfg.trainer.activation_checkpoint.mode = "full"
    cfg.rollout.max_staleness = 1
    cfg.rollout.max_prompt_tokens = cfg.rollout.max_response_tokens = 128
    engine = cfg.generator.engine
    engine.max_num_seqs = 16
    engine.gpu_memory_utilization = args.utilization
    if is_cuda:
        engine.extra = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL"}}
    else:
        engine.kv_cache_memory_gib = 0.25
    return cfg


async def measure(args: argparse.Namespace) -> None:
    is_cuda = torch.cuda.is_available()
    cfg = configuration(args, is_cuda)
    trainer_gpus, generator_gpus = placement(args.gpus)
    place = Path(tempfile.mkdtemp(prefix="engine-weights-", dir="/dev/shm"))
    model_dir = place / "model"
    num_bytes = write_model(model_dir, SHAPES[args.model], cfg.model.dtype)
    log_dir = place / "logs"
    log_dir.mkdir()

    def spawn(name: str, num: int, gpus: list[int]) -> Any:
        env = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        if is_cuda:
            env |= gpu_order() | {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[gpu] for gpu in gpus)}
        command = default_bootstrap_cmd().with_env(env)
        return this_host().spawn_procs(per_host={"procs": num}, name=name, bootstrap_command=command)

    meshes = [spawn("volume", 1, []), spawn("trainer", len(trainer_gpus), trainer_gpus)]
    meshes.append(spawn("generator", 1, generator_gpus))
    store = StoreAtNeed(lambda: WeightStore.start(meshes[0], len(trainer_gpus)))
    await store.open()
    trainer_mesh = meshes[1].spawn("trainer", BenchTrainer, cfg, log_dir)
    trainers = Trainers(trainer_mesh, 600.0, asyncio.get_running_loop().create_future())
    theirs = copy.deepcopy(cfg)  # of its own: the trainer plans its memory for a node that has one GPU
    theirs.generator.engine.tensor_parallel_size = len(generator_gpus)
    generator = meshes[2].spawn("generator", BenchGenerator, theirs, 0, log_dir)
    start = time.perf_counter()
    try:
        await trainers.start({"policy": model_dir}, place / "process-group", None, 600.0)
        print(f"trainer {time.perf_counter() - start:.1f} s", flush=True)
        await generator.start.call_one(model_dir)
        print(f"generator {time.perf_counter() - start:.1f} s", flush=True)
        lost: list[str] = []
        service = Service("generator", 1, 600.0, lambda index, reason: lost.append(str(reason)))
        await service.admit(0, generator)
        result = await rounds(args, trainers, trainer_mesh, generator, service, store, lost)
    except BaseException:
        for log in sorted(log_dir.glob("*.log")):
            print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
        raise
    finally:
        import shutil

        shutil.rmtree(place)
    device = torch.cuda.get_device_name(0) if is_cuda else "CPU"
    result |= {"model": args.model, "gpus": args.gpus, "device": device, "bytes": num_bytes, "rounds": args.rounds}
    show(result)
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1))
    await asyncio.gather(*(mesh.stop() for mesh in meshes))


async def rounds(
    args: argparse.Namespace,
    trainers: Trainers,
    trainer_mesh: Any,
    generator: Any,
    service: Service,
    store: Any,
    lost: list[str],
) -> dict[str, Any]:
    """Bring one version after the other over; the figures of each, the first of each way apart."""
    sync = WeightSync(trainers, store, service, None, tell=lambda text: print(text, flush=True))
    records: list[dict[str, Any]] = []
    for version in range(1, 2 * args.rounds + 3):
        way = WAYS[(version + 1) % 2]
        await trainer_mesh.change.call(version, way == "offer")
        stood_still, _ = await generator.figures.call_one()
        sync.is_changed = True
        start = time.perf_counter()
        await sync.publish(version)
        published = time.perf_counter()
        await sync.delivered()
        loaded = time.perf_counter()
        assert not lost, f"the generator is lost: {lost[0]}"
        ranks = [value for _, value in await trainer_mesh.figures.call()]
        load_s, held = await generator.figures.call_one()
        sent = sum((total for _, total, _ in ranks), Checksum())
        same = None if held is None else held == sent
        record = {"version": version, "way": way, "told": sync._ways, "total_s": loaded - start,
                  "publish_s": published - start, "snapshot_s": max(s for s, _, _ in ranks),
                  "load_s": load_s - stood_still, "checksum": str(sent), "same": same,
                  "trainer_peak_bytes": max(peak for _, _, peak in ranks)}  # fmt: skip
        records.append(record)
        print(json.dumps(record), flush=True)
        assert same is not False, f"the generator holds {held}, the trainers {sent}"
    return {"records": records}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']} ({result['bytes'] / 1e9:.2f} GB), {result['gpus']}, {result['device']}")
    print(f"{'':10}{'publish -> loaded':>18}{'snapshot':>10}{'load':>10}{'first':>10}{'checksums':>11}{'rounds':>8}")
    medians = {}
    for way in WAYS:
        first, *later = [record for record in result["records"] if record["way"] == way]
        median = {key: statistics.median(r[key] for r in later) for key in ("total_s", "snapshot_s", "load_s")}
        medians[way] = median
        same = {True: "equal", False: "DIFFER", None: "-"}[first["same"]]
        print(
            f"{way:10}{median['total_s']:18.4f}{median['snapshot_s']:10.4f}{median['load_s']:10.4f}"
            f"{first['total_s']:10.3f}{same:>11}{len(later):8d}"
        )
    print(f"store ÷ offer: {medians['store']['total_s'] / medians['offer']['total_s']:.1f}")
    result["medians"] = medians
    target = {"0.6b": 0.06, "8b": 0.4}.get(result["model"])
    seconds = medians["offer"]["total_s"]
    known = "four workers read one GPU at once" if result["gpus"] == "tp4" and seconds <= 0.1 else ""
    row(f"weights, {result['model']}, {result['gpus']}: publish to loaded", seconds, target=target, better="less",
        unit="s", note=f"by the store {medians['store']['total_s']:.3f} s", known=known)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Weights from a TrainEngine to a vLLM engine on one host.")
    parser.add_argument("--model", choices=SHAPES, default="0.6b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--gpus", choices=("shared", "split", "fsdp2", "tp2", "tp4"), default="shared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--training-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--utilization", type=float, default=0.3, help="of the generator's GPU, for vLLM")
    parser.add_argument("--threads", type=int, default=8 if torch.cuda.is_available() else 1)
    parser.add_argument("--out", default="")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    # The processes import this file by its name.
    folders = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    sys.path[:0] = folders
    import engine_weights

    engine_weights.main()
