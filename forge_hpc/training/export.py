"""Writing a model in Hugging Face format, from weights that may be sharded over ranks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchtitan.config import TORCH_DTYPE_MAP

from forge_hpc.config.models import VALUE_HEAD, looks_local
from forge_hpc.config.schema import Config, LoRAConfig
from forge_hpc.expert_stacks import part_names, parts
from forge_hpc.models.spec import ModelSpec
from forge_hpc.training.lora import adapters_of, merge_adapters, whole

_MAX_SHARD_BYTES = 5 * 10**9
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json", "*.gguf")


def export_model(
    state: Mapping[str, torch.Tensor],
    spec: ModelSpec,
    cfg: Config,
    model_dir: Path,
    directory: Path,
    ends: Sequence[int] = (),
    *,
    owns_state: bool = False,
) -> None:
    """Write a model in training as ``export_hf`` does, in ``model.dtype``: with LoRA the merged weights, and the
    adapters beside them in ``adapter/``, as PEFT writes them.

    Args:
        state: weights by TorchTitan's name.
        model_dir: the model that training started from.
        ends: tokens that the model has learned to end an answer with.
        owns_state: the weights may be overwritten: merging needs no second copy of them.
    """
    lora = cfg.trainer.lora
    adapter = PeftAdapter(state, spec, lora, _name_of(cfg, model_dir)) if lora.enable else None
    weights = spec.adapter.to_hf(merge_adapters(state, lora, in_place=owns_state))
    export_hf(weights, model_dir, directory, TORCH_DTYPE_MAP[cfg.model.dtype], ends, adapter)


def export_hf(
    state: Mapping[str, torch.Tensor],
    source_dir: Path,
    directory: Path,
    dtype: torch.dtype,
    ends: Sequence[int] = (),
    adapter: PeftAdapter | None = None,
) -> None:
    """Write weights, ``config.json`` and the tokenizer's files to a directory that transformers and vLLM load.

    A collective call where there is a process group: every rank takes part in gathering, one tensor at a time; rank 0
    writes. The directory appears whole or not at all, and replaces one of that name.

    Args:
        state: weights by Hugging Face name, tensors or DTensors, without a tied ``lm_head.weight``.
        source_dir: the model that training started from; all its small files are copied.
        dtype: of the weights written.
        ends: tokens that the model has learned to end an answer with. Generators stop at them, and at those that the
            model had: all stand in ``generation_config.json``.
        adapter: written to ``directory/adapter``.

    Raises:
        OSError: rank 0 cannot write; the other ranks do not wait for it.
    """
    writer = _Writer(directory.with_name(f".{directory.name}.tmp"))
    writer.do(lambda tmp: _begin(source_dir, tmp, dtype, ends, state.keys()))
    shards = _plan_shards(state, dtype)
    for index, names in enumerate(shards):
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            full = whole(state[name].detach())
            if writer.is_needed:
                full = full.to("cpu", dtype).contiguous()
                tensors |= parts(name, full)
        writer.do(partial(_save, tensors, _shard_name(index, len(shards))))
    if adapter is not None:
        tensors = {name: whole(tensor).to("cpu").contiguous() for name, tensor in adapter.tensors().items()}
        writer.do(partial(adapter.write, tensors))
    if len(shards) > 1:
        writer.do(lambda tmp: _write_index(shards, state, dtype, tmp))
    writer.do(lambda tmp: _replace(tmp, directory))
    if dist.is_initialized():
        dist.barrier()
    writer.finish()


class _Writer:
    """What rank 0 writes. Its first error waits until all ranks have gathered: they would wait for it in vain."""

    def __init__(self, tmp: Path) -> None:
        self._tmp = tmp
        self._error: OSError | None = None
        self._is_mine = not dist.is_initialized() or dist.get_rank() == 0

    @property
    def is_needed(self) -> bool:
        """Whether this rank is to write, and still can."""
        return self._is_mine and self._error is None

    def do(self, write: Callable[[Path], None]) -> None:
        if self.is_needed:
            try:
                write(self._tmp)
            except OSError as error:
                self._error = error

    def finish(self) -> None:
        if self._error is not None:
            shutil.rmtree(self._tmp, ignore_errors=True)
            raise self._error


def _begin(source_dir: Path, tmp: Path, dtype: torch.dtype, ends: Sequence[int], names: Collection[str]) -> None:
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    _copy_small_files(source_dir, tmp, dtype, names)
    _add_ends(tmp, ends)


def _save(tensors: Mapping[str, torch.Tensor], name: str, directory: Path) -> None:
    path = directory / name
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk, which is no OSError here
        raise OSError(f"cannot write {path}: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


class PeftAdapter:
    """The adapters of a model as the package ``peft`` has them: ``adapter_config.json``, ``adapter_model.safetensors``.

    They stay in the dtype that they are trained in: only the sum with the base is rounded to ``model.dtype``.

    Args:
        state: weights by TorchTitan's name.
        base: name or directory of the model that they belong to.
    """

    def __init__(self, state: Mapping[str, torch.Tensor], spec: ModelSpec, lora: LoRAConfig, base: str) -> None:
        self._lora, self._base = lora, base
        self._by_layer: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for prefix, pair in adapters_of(state).items():
            [name] = spec.adapter.to_hf({f"{prefix}.weight": pair[1]})
            self._by_layer[name.removesuffix(".weight")] = pair

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by PEFT's names, as they are: on their device, and sharded where the model is."""
        return {
            f"base_model.model.{layer}.lora_{letter}.weight": tensor.detach()
            for layer, pair in self._by_layer.items()
            for letter, tensor in zip("AB", pair, strict=True)
        }

    def write(self, tensors: Mapping[str, torch.Tensor], export: Path) -> None:
        """Write what ``tensors`` gave, whole and in host memory, into ``export/adapter``."""
        alpha = self._lora.alpha
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base,
            "r": self._lora.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted({layer.rpartition(".")[2] for layer in self._by_layer}),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        directory = export / "adapter"
        directory.mkdir()
        _save(tensors, "adapter_model.safetensors", directory)
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _name_of(cfg: Config, model_dir: Path) -> str:
    """How others find the model that training started from: its name on the hub where it has one, else its place."""
    path = cfg.model.path
    is_hub_name = ":" not in path and path != "warmstart" and not looks_local(path)
    return path if is_hub_name else str(model_dir)


def _plan_shards(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name, tensor in state.items():
        num_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size_bytes + num_bytes > _MAX_SHARD_BYTES:
            shards.append([])
            size_bytes = 0
        shards[-1].append(name)
        size_bytes += num_bytes
    return shards


def _shard_name(index: int, num_shards: int) -> str:
    return "model.safetensors" if num_shards == 1 else f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _copy_small_files(source_dir: Path, target: Path, dtype: torch.dtype, names: Collection[str]) -> None:
    for path in sorted(source_dir.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in _WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text())
    config.pop("torch_dtype", None)  # the name before transformers 5
    config["dtype"] = str(dtype).removeprefix("torch.")
    if VALUE_HEAD in names:
        config["architectures"] = [
            name.replace("ForCausalLM", "ForSequenceClassification") for name in config["architectures"]
        ]
        config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    elif "lm_head.weight" in names and config.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = False  # the model's file had a head of its own, which its config denied
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _add_ends(target: Path, ends: Sequence[int]) -> None:
    path = target / "generation_config.json"
    model = json.loads((target / "config.json").read_text())
    options = json.loads(path.read_text()) if path.exists() else {}
    known = options.get("eos_token_id", model.get("eos_token_id"))
    known = [] if known is None else known if isinstance(known, list) else [known]
    if set(ends) <= set(known):
        return
    stops = list(dict.fromkeys([*ends, *known]))
    options["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    path.write_text(json.dumps(options, indent=2) + "\n")


def _write_index(shards: list[list[str]], state: Mapping[str, torch.Tensor], dtype: torch.dtype, target: Path) -> None:
    weight_map = {
        part: _shard_name(i, len(shards))
        for i, names in enumerate(shards)
        for name in names
        for part in part_names(name, state[name])
    }
    total_bytes = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _replace(tmp: Path, directory: Path) -> None:
    if directory.exists():
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
        tmp.rename(directory)
        shutil.rmtree(old)
    else:
        tmp.rename(directory)
