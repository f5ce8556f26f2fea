"""TorchTitan models built from Hugging Face directories give the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, random_documents, write_model

from forge_hpc.config.errors import UserError
from forge_hpc.data.packing import pack
from forge_hpc.models.attention import attention_inputs, document_batches, inner_attention_config
from forge_hpc.models.head import LogprobHead, Truncation
from forge_hpc.models.spec import ModelSpec, load_hf_weights, load_spec

CPU = torch.device("cpu")


def titan_model(model_dir: Path, max_positions: int = 256) -> tuple[Any, ModelSpec]:
    from torchtitan.config import ParallelismConfig
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")
    spec = load_spec(
        model_dir,
        max_positions=max_positions,
        inner_attention=inner_attention_config(torch.float32),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
    )
    model: Any = spec.config.build()
    with torch.no_grad():
        model.init_weights()
    load_hf_weights(model, spec, model_dir)
    return model, spec


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("qwen3", True),
        ("qwen3", False),
        ("qwen2", True),
        ("qwen2", False),
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("qwen3_moe", False),
    ],
)
def test_logits_of_packed_rows_equal_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    reference = write_model(tmp_path, family, tied=tied)
    model, spec = titan_model(tmp_path)
    documents = random_documents(9, max_tokens=90)
    batch = pack(documents, 128)
    arrays = batch.rows(0, batch.num_rows)
    assert batch.num_rows > 1 and arrays["segment_ids"].max() > 1
    with torch.no_grad():
        logits = model(
            torch.from_numpy(arrays["input_ids"]),
            positions=torch.from_numpy(arrays["positions"]),
            attention_masks=attention_inputs(spec.inner_attention, arrays["positions"], CPU),
        )
        for document, (row, start) in zip(documents, batch.placements, strict=True):
            ids = torch.from_numpy(document.token_ids[:-1]).long()
            expected = reference(ids[None]).logits[0]
            torch.testing.assert_close(logits[row, start : start + len(ids)], expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_weights_keep_their_values_under_their_names(tmp_path: Path, family: str) -> None:
    write_model(tmp_path, family)
    expected = load_file(tmp_path / "model.safetensors")
    model, spec = titan_model(tmp_path)
    state = spec.adapter.to_hf(model.state_dict())
    assert state.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(state[name], weight), name
    assert state["lm_head.weight"].data_ptr() == model.lm_head.weight.data_ptr()  # renamed, not copied


def test_documents_are_regrouped_without_loss_and_at_bounded_cost() -> None:
    lengths = [200, 3, 17, 90, 1, 1, 40, 120]
    positions = np.concatenate([np.arange(n) for n in lengths]).reshape(2, -1)
    batches = document_batches(positions, CPU)
    tokens = torch.arange(positions.size)
    assert torch.equal(batches.slots[batches.token_slots], tokens)
    assert sum(num * length for num, length in batches.shapes) == len(batches.slots) <= 2 * positions.size + 32 * 8


def test_a_document_sees_neither_its_neighbours_nor_its_future(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3")
    model, spec = titan_model(tmp_path)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    masks = attention_inputs(spec.inner_attention, positions, CPU)
    ids = torch.randint(0, VOCAB_SIZE, (1, 10))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % VOCAB_SIZE
    with torch.no_grad():
        before, after = (model(x, positions=torch.from_numpy(positions), attention_masks=masks) for x in (ids, changed))
    differs = (before != after).any(-1)[0].tolist()
    assert differs == [False] * 7 + [True] * 3


def kept(z: torch.Tensor, truncation: Truncation) -> torch.Tensor:
    """One token after the other, as the options are defined."""
    result = torch.zeros_like(z, dtype=torch.bool)
    for row, flags in zip(z.flatten(0, 1), result.flatten(0, 1), strict=True):
        p = row.softmax(-1)
        order = [i for i in p.argsort(descending=True).tolist() if p[i] >= truncation.min_p * p.max()]
        order = order[: truncation.top_k] if truncation.top_k > 0 else order
        mass, total = 0.0, sum(float(p[i]) for i in order)
        for i in order:
            flags[i] = mass < truncation.top_p * total
            mass += float(p[i])
    return result


@pytest.mark.parametrize("keeps", [True, False], ids=["logits kept", "logits computed again"])
@pytest.mark.parametrize(
    ("temperature", "truncation"),
    [
        (1.0, Truncation()),
        (0.7, Truncation()),
        (0.7, Truncation(min_p=0.1)),
        (0.7, Truncation(top_k=4)),
        (1.3, Truncation(top_p=0.8)),
        (1.3, Truncation(0.05, 6, 0.9)),
        (1.0, Truncation(top_k=50, top_p=1e-9)),
    ],
)
def test_the_head_gives_values_and_gradients_of_log_softmax_at_the_slots_that_are_asked_for(
    temperature: float, truncation: Truncation, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge_hpc.models.head.CHUNK_BYTES", {"cpu": 160})  # several chunks
    monkeypatch.setattr("forge_hpc.models.head.KEPT_BYTES", 2**20 if keeps else 0)
    torch.manual_seed(0)
    head = LogprobHead.Config(in_features=5, out_features=11).build()
    hidden, slots, labels = 3 * torch.randn(2, 7, 5), torch.tensor([0, 3, 4, 8, 9, 13]), torch.randint(0, 11, (6,))
    weights = torch.randn(2, 6)
    gradients, values = [], []
    for is_ours in (True, False):
        head.weight.grad, x = None, hidden.clone().requires_grad_()
        if is_ours:
            logprobs, entropy = head(x, labels, slots, temperature, truncation)
        else:
            z = head(x).flatten(0, 1)[slots] / temperature
            is_kept = kept(z.detach()[None], truncation)[0].scatter(-1, labels[:, None], True)
            p = torch.where(is_kept, z, -1e9).log_softmax(-1)
            logprobs, entropy = p.gather(-1, labels[:, None]).squeeze(-1), -(p.exp() * p).sum(-1)
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        gradients.append([x.grad, head.weight.grad])
        values.append(torch.stack([logprobs, entropy]).detach())
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_a_bfloat16_head_with_float32_logits_rounds_nothing_between_hidden_states_and_log_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("forge_hpc.models.head.CHUNK_BYTES", {"cpu": 4 * 300 * 10})  # several chunks
    torch.manual_seed(0)
    head = LogprobHead.Config(in_features=64, out_features=300).build().bfloat16()
    hidden, slots, labels = torch.randn(1, 40, 64).bfloat16(), torch.arange(40), torch.randint(0, 300, (40,))
    with torch.no_grad():
        head.weight.copy_(torch.randn_like(head.weight))
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, head.weight))
    exact = (x @ weight.t())[0].log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    exact.sum().backward()
    errors, gradients = [], []
    for head.logits_dtype in (torch.float32, None):
        head.weight.grad, mine = None, hidden.clone().requires_grad_()
        logprobs, _ = head(mine, labels, slots)
        logprobs.sum().backward()
        errors.append((logprobs - exact).abs().max().item())
        assert mine.grad is not None and mine.grad.dtype == head.weight.grad.dtype == torch.bfloat16
        gradients.append([mine.grad.double(), head.weight.grad.double()])
    assert errors[0] < 1e-4 < 1e-2 < errors[1]
    torch.testing.assert_close(gradients[0], [x.grad, weight.grad], rtol=0.02, atol=0.1)


def edit_config(model_dir: Path, **changes: Any) -> None:
    path = model_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel, which cannot be trained"),
        ({"attention_bias": True}, "has attention_bias"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "type yarn"),
        ({"max_position_embeddings": 100}, "needs 256 positions; .* has 100"),
        ({"vocab_size": 99}, "model.embed_tokens.weight .* has shape"),
        ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
    ],
)
def test_models_that_cannot_be_trained_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_model(tmp_path, "qwen3")
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        titan_model(tmp_path)


def test_a_sliding_window_is_supported_where_no_document_reaches_beyond_it(tmp_path: Path) -> None:
    write_model(tmp_path, "mistral")
    edit_config(tmp_path, sliding_window=256)
    titan_model(tmp_path)
    edit_config(tmp_path, sliding_window=255)
    with pytest.raises(UserError, match="see 255 back"):
        titan_model(tmp_path)


def test_directories_without_config_or_weights_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        titan_model(tmp_path)
    write_model(tmp_path, "qwen3")
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"model.norm.weight is missing"):
        titan_model(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="holds no weights"):
        titan_model(tmp_path)
