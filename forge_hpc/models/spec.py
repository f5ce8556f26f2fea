"""From a Hugging Face directory to a TorchTitan model: Qwen2, Qwen3, Llama 3 and Mistral of any size, and Qwen3 MoE.

Dimensions come from ``config.json``. All families are built with rotary embeddings in Hugging Face's layout (halves
rotated, not pairs), so every weight has the same values and shape on both sides: publishing and exporting them is
renaming, whatever the sharding.

TorchTitan 0.3.0 has no Qwen2. Its transformers backend would, but computes attention by flex alone, which has no
backward pass on the CPU; so Qwen2 is Llama's block with a bias in the query, key and value projections. Mistral is
Llama's block as it is.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torchtitan.config import ParallelismConfig
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_routed_experts_config,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3 import Llama3Model, parallelize_llama
from torchtitan.models.llama3.model import Llama3TransformerBlock
from torchtitan.models.qwen3 import Qwen3Model, parallelize_qwen3
from torchtitan.models.qwen3.model import Qwen3TransformerBlock
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter
from torchtitan.protocols.module import Module

from forge_hpc.config.errors import UserError
from forge_hpc.config.models import VALUE_HEAD, architecture_of, check_trainable, num_experts_of, rope_of
from forge_hpc.expert_stacks import STACKED
from forge_hpc.models.experts import Experts, Router
from forge_hpc.models.head import LogprobHead

_EXPERTS = ".routed_experts.inner_experts."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Hugging Face's names of the first and the last layer, which may be one tensor."""
_NORMAL = {"weight": partial(nn.init.normal_, std=0.02)}
_NORMAL_WITH_BIAS = {**_NORMAL, "bias": nn.init.zeros_}
_ONES = {"weight": nn.init.ones_}


class LlamaRoPE(CosSinRoPE):
    """Rotary embeddings in Hugging Face's layout with the frequency scaling of Llama 3.1.

    Formula: ``_compute_llama3_parameters`` of transformers' ``modeling_rope_utils``. TorchTitan 0.3.0 has this scaling
    only in its complex layout, whose weights are permuted; this class can go when ``CosSinRoPE`` knows "llama".
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        pass

    def _precompute_cache(self) -> torch.Tensor:
        """[max_seq_len, 2 * dim]: cosines, then sines."""
        cfg = self.config
        inv_freq = 1.0 / (cfg.theta ** (torch.arange(0, cfg.dim, 2).float() / cfg.dim))
        if cfg.scaling == "llama":
            context = cfg.original_max_position_embeddings
            wavelength = 2 * math.pi / inv_freq
            low, high = cfg.low_freq_factor, cfg.high_freq_factor
            smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)  # 0: scaled, 1: as it was
            inv_freq = (1 - smooth) * inv_freq / cfg.scaling_factor + smooth * inv_freq
        freqs = torch.outer(torch.arange(cfg.max_seq_len, device=inv_freq.device).float(), inv_freq)
        angles = torch.cat([freqs, freqs], dim=-1)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class HFNames(Qwen3StateDictAdapter):
    """Renames state dicts to and from Hugging Face's names: those of Qwen3 are Llama's too, and Qwen2's with biases.

    A sharded stack of experts has one name here (``expert_stacks``), the same on all ranks.
    """

    def __init__(self, model_config: Any, hf_assets_path: str | None = None) -> None:
        super().__init__(model_config, hf_assets_path)
        for letter in "qkv":
            hf_name = f"model.layers.{{}}.self_attn.{letter}_proj.bias"
            self.from_hf_map[hf_name] = f"layers.{{}}.attention.qkv_linear.w{letter}.bias"

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """By Hugging Face's names; views, where they are not the tensors themselves."""
        stacks = {name: value for name, value in state_dict.items() if _EXPERTS in name and isinstance(value, DTensor)}
        named = super().to_hf({name: value for name, value in state_dict.items() if name not in stacks})
        names = {ours: theirs for theirs, ours in self.from_hf_map.items() if ours is not None and _EXPERTS in ours}
        for name, value in stacks.items():
            layer = name.split(".")[1]
            named[names[name.replace(layer, "{}", 1)].format(layer, STACKED)] = value
        return named

    def held_to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What this rank holds, for ``from_hf``: its own experts alone."""
        return super().to_hf(state_dict)


@dataclass(frozen=True)
class ModelSpec:
    """A TorchTitan model, not yet built."""

    config: Decoder.Config
    parallelize: Callable[..., nn.Module]
    """TorchTitan's parallelize function for the family."""
    adapter: HFNames
    hf_config: dict[str, Any]
    inner_attention: Module.Config

    @property
    def is_moe(self) -> bool:
        return self.config.layers[0].moe is not None

    @property
    def is_tied(self) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return self.config.enable_weight_tying

    @property
    def has_logprobs(self) -> bool:
        """Whether its output layer gives log-probabilities of tokens, as that of a language model does."""
        return isinstance(self.config.lm_head, LogprobHead.Config)


def load_spec(
    model_dir: Path, *, max_positions: int, inner_attention: Module.Config, parallelism: ParallelismConfig
) -> ModelSpec:
    """The TorchTitan model for a Hugging Face directory.

    Args:
        max_positions: longest document plus rounding, in tokens: size of the rotary cache.
        inner_attention: from ``forge_hpc.models.attention.inner_attention_config``.

    Raises:
        UserError: no or broken ``config.json``; an architecture or option that is not supported; a context that is
            too short; heads that the tensor-parallel degree does not divide.
    """
    hf = read_hf_config(model_dir)
    check_trainable(hf, f"the model in {model_dir}")
    families = {
        "Qwen3ForCausalLM": (Qwen3Model, Qwen3TransformerBlock, parallelize_qwen3),
        "Qwen3MoeForCausalLM": (Qwen3Model, Qwen3TransformerBlock, parallelize_qwen3),
        "Qwen2ForCausalLM": (Llama3Model, Llama3TransformerBlock, parallelize_llama),
        "MistralForCausalLM": (Llama3Model, Llama3TransformerBlock, parallelize_llama),
        "LlamaForCausalLM": (Llama3Model, Llama3TransformerBlock, parallelize_llama),
    }
    model_cls, block_cls, parallelize = families[architecture_of(hf)]
    if max_positions > hf["max_position_embeddings"]:
        raise UserError(
            f"trainer.training.seq_len needs {max_positions} positions; the model in {model_dir} has "
            f"{hf['max_position_embeddings']}",
            f"set trainer.training.seq_len to at most {hf['max_position_embeddings']}",
        )
    window = hf.get("sliding_window") if hf.get("model_type") == "mistral" else None
    if window is not None and max_positions > window:
        raise UserError(
            f"trainer.training.seq_len needs {max_positions} positions; tokens of the model in {model_dir} see "
            f"{window} back (sliding_window), which is supported where no document is longer",
            f"set trainer.training.seq_len to at most {window}",
        )
    block = _block_config(hf, block_cls, inner_attention, max_positions)
    dim, vocab_size, is_tied = hf["hidden_size"], hf["vocab_size"], shares_head(model_dir, hf)
    config = model_cls.Config(
        dim=dim,
        vocab_size=vocab_size,
        enable_weight_tying=is_tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=vocab_size,
            embedding_dim=dim,
            param_init={"weight": skip_param_init} if is_tied else _NORMAL,
        ),
        norm=RMSNorm.Config(normalized_shape=dim, eps=hf["rms_norm_eps"], param_init=_ONES),
        lm_head=LogprobHead.Config(in_features=dim, out_features=vocab_size, param_init=_NORMAL),
        layers=[block() for _ in range(hf["num_hidden_layers"])],
    )
    try:
        with _no_trainer_of_torchtitan():
            config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    except ValueError as error:
        raise UserError(str(error), "choose trainer.parallelism.tensor_parallel_degree to divide the heads") from error
    return ModelSpec(config, parallelize, HFNames(config), hf, inner_attention)


@contextmanager
def _no_trainer_of_torchtitan() -> Iterator[None]:
    """Within this ``torchtitan.trainer`` is there, without being imported.

    The configurations of torchtitan 0.3.0's models ask whether they were given that of its trainer, and import it for
    the question, with datasets, pandas and pyarrow: about a second of CPU in each process. It can go when they
    import it for type checks alone.
    """
    name = "torchtitan.trainer"
    if name in sys.modules:
        yield
        return
    stand_in = cast(Any, ModuleType(name))
    stand_in.Trainer = type("Trainer", (), {"Config": type("Config", (), {})})
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]


def read_hf_config(model_dir: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face directory.

    Raises:
        UserError: where it is missing or is not JSON.
    """
    path = model_dir / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist", "model.path must be a model in Hugging Face format") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}", "copy the model again") from error


def shares_head(model_dir: Path, hf: dict[str, Any]) -> bool:
    """Whether the output layer is the embedding: ``config.json`` says so, and the file has no head of its own.

    A head in the file that differs from the embedding wins over the config, as in transformers 5 and vLLM 0.32; one
    that is a copy of it is no other head.
    """
    if not hf.get("tie_word_embeddings", False):
        return False
    files = _names_of(model_dir)
    if not {HEAD, EMBEDDING} <= files.keys():
        return True
    with safe_open(files[HEAD], framework="pt") as one, safe_open(files[EMBEDDING], framework="pt") as other:
        return torch.equal(one.get_tensor(HEAD), other.get_tensor(EMBEDDING))


def _names_of(model_dir: Path) -> dict[str, Path]:
    """The file of each tensor by its name."""
    names: dict[str, Path] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names |= dict.fromkeys(file.keys(), path)
    return names


def load_hf_weights(model: nn.Module, spec: ModelSpec, model_dir: Path, *, needs_head: bool = False) -> None:
    """Load a directory's safetensors into the model, sharded or not; each rank reads what it holds. A value head that
    they do not have stays at 0.

    Raises:
        UserError: no safetensors, a missing weight or one of another shape, or no value head where there
            must be one (``needs_head``).
    """
    titan_state = model.state_dict()
    if not spec.has_logprobs and VALUE_HEAD not in _names_of(model_dir):
        if needs_head:
            raise UserError(
                f"the model in {model_dir} has no value head ({VALUE_HEAD}): it is no reward model",
                "name the export of a run of recipe=reward_model",
            )
        del titan_state["lm_head.weight"]
    state = spec.adapter.held_to_hf(titan_state)
    # The adapter passes over names that it does not know.
    num_named = sum(".lora_" not in name for name in titan_state) - spec.is_tied
    assert spec.is_moe or len(state) == num_named, "a weight has no Hugging Face name"
    _check_weights(state, model_dir)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(model_dir)))
    if spec.is_moe:  # expert weights are stacked here and separate there, so the load went into copies
        model.load_state_dict(spec.adapter.from_hf(state), strict=False)


def _check_weights(state: dict[str, torch.Tensor], model_dir: Path) -> None:
    shapes: dict[str, list[int]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    if not shapes:
        raise UserError(f"{model_dir} holds no weights", "it needs *.safetensors files beside config.json")
    for name, tensor in state.items():
        if name not in shapes:
            raise UserError(f"the weight {name} is missing from {model_dir}", "copy the model again")
        if list(tensor.shape) != list(shapes[name]):
            raise UserError(
                f"the weight {name} in {model_dir} has shape {shapes[name]}, config.json implies {list(tensor.shape)}",
                "config.json and the weights belong to different models",
            )


def _block_config(
    hf: dict[str, Any], block_cls: Any, inner_attention: Module.Config, max_positions: int
) -> Callable[[], Any]:
    """Makes the configuration of one layer; each layer gets its own, as TorchTitan fills in shardings."""
    dim, num_heads = hf["hidden_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or dim // num_heads
    has_qkv_bias = hf.get("model_type") == "qwen2"
    num_experts = num_experts_of(hf)

    def norm(size: int) -> RMSNorm.Config:
        return RMSNorm.Config(normalized_shape=size, eps=hf["rms_norm_eps"], param_init=_ONES)

    def block() -> Any:
        mlp: dict[str, Any]
        if num_experts:
            mlp = {"moe": _moe_config(hf, num_experts)}
        else:
            mlp = {
                "feed_forward": make_ffn_config(
                    dim=dim, hidden_dim=hf["intermediate_size"], w1_param_init=_NORMAL, w2w3_param_init=_NORMAL
                )
            }
        attention = make_gqa_config(
            dim=dim,
            n_heads=num_heads,
            n_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            wqkv_param_init=_NORMAL_WITH_BIAS if has_qkv_bias else _NORMAL,
            wo_param_init=_NORMAL,
            inner_attention=replace(inner_attention),
            fuse_qkv=False,  # fused, every state dict would be a copy
            rope=_rope_config(hf, head_dim, max_positions),
            qk_norm=norm(head_dim) if block_cls is Qwen3TransformerBlock else None,
        )
        attention.qkv_linear.wq.bias = attention.qkv_linear.wkv.bias = has_qkv_bias
        return block_cls.Config(attention_norm=norm(dim), ffn_norm=norm(dim), attention=attention, **mlp)

    return block


def _rope_config(hf: dict[str, Any], head_dim: int, max_positions: int) -> CosSinRoPE.Config:
    rope = rope_of(hf)
    if rope["rope_type"] == "default":
        return CosSinRoPE.Config(dim=head_dim, max_seq_len=max_positions, theta=rope["rope_theta"])
    return LlamaRoPE.Config(
        dim=head_dim,
        max_seq_len=max_positions,
        theta=rope["rope_theta"],
        scaling="llama",
        scaling_factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def _moe_config(hf: dict[str, Any], num_experts: int) -> Any:
    dim, top_k = hf["hidden_size"], hf["num_experts_per_tok"]
    expert_init = {name: _NORMAL["weight"] for name in ("w1_EFD", "w2_EDF", "w3_EFD")}
    routed_experts = make_routed_experts_config(
        dim=dim,
        hidden_dim=hf["moe_intermediate_size"],
        num_experts=num_experts,
        top_k=top_k,
        param_init=expert_init,
        comm_backend="standard",
    )
    routed_experts.inner_experts = Experts.Config(
        dim=dim, hidden_dim=hf["moe_intermediate_size"], num_experts=num_experts, param_init=expert_init
    )
    return make_moe_config(
        num_experts=num_experts,
        router=Router.Config(
            num_experts=num_experts,
            gate=Linear.Config(in_features=dim, out_features=num_experts, param_init=_NORMAL),
            top_k=top_k,
            score_func="softmax",
            route_norm=True,
        ),
        routed_experts=routed_experts,
        # A balancing bias would change the routing in the trainer alone: the generator knows nothing of it.
        load_balance_coeff=None,
    )
