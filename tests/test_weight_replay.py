"""What is repeated of vLLM's own loading is what it does, in a real engine. On the CPU vLLM packs the parameters of its
layers; here it is kept from it, so that they stay as they are on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import write_model
from transformers import PreTrainedTokenizerFast

from forge_hpc.config import Config
from forge_hpc.generation import GenerationEngine, direct
from forge_hpc.weights import CorruptWeightsError, Offer, Snapshots

pytest.importorskip("vllm")


def tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(60)} | {"<pad>": 60, "<unk>": 61, "<eos>": 62}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_worker_reads_in_place_are_those_that_vllm_would_have_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    def keep(method: Any, layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", keep)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    hf = write_model(tmp_path, "qwen3", tied=tied)
    tokenizer(tmp_path)
    config = Config()
    config.model.dtype = "float32"
    config.rollout.max_prompt_tokens = config.rollout.max_response_tokens = 32
    config.generator.engine.kv_cache_memory_gib = 0.25
    engine = GenerationEngine(tmp_path, config, device="cpu")
    try:
        worker = engine._engine.engine_core.engine_core.model_executor.driver_worker.worker
        model = worker.model_runner.get_model()
        weights = {
            name: tensor.detach() for name, tensor in hf.state_dict().items() if "lm_head" not in name or not tied
        }
        snapshots = Snapshots(0, torch.float32, torch.device("cpu"), 1 << 20)

        def bring(version: int) -> None:
            for tensor in weights.values():
                tensor.normal_(0, 0.1)
            part = snapshots.take(version, lambda: weights, weights.values(), with_checksum=True)
            assert part is not None
            direct.load_offer(worker, Offer.of([part]), torch.float32, tied)

        bring(1)
        replay = direct._replays[model]  # it did nothing but copy
        assert replay._padding  # of 63 tokens to 64
        loads: list[int] = []
        monkeypatch.setattr(type(model), "load_weights", lambda self, tensors: loads.append(1))
        for version in (2, 3):
            with torch.no_grad():
                for parameter in model.parameters():  # as after a sleep without the weights, padding included
                    parameter.fill_(torch.nan)
            bring(version)
        assert not loads and direct._replays[model] is replay
        monkeypatch.undo()
        held = [parameter.clone() for parameter in model.parameters()]
        model.load_weights((name, tensor) for name, tensor in weights.items())
        assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))
        with torch.no_grad():
            next(iter(weights.values())).add_(1)
        part = snapshots.take(4, lambda: weights, weights.values(), with_checksum=True)
        found = snapshots.find(4)
        assert part is not None and found is not None
        found[1][5] ^= 1
        with pytest.raises(CorruptWeightsError, match="version 4"):
            direct.load_offer(worker, Offer.of([part]), torch.float32, tied)
    finally:
        engine.close()
