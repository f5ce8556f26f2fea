"""The reward of a trained reward model outside a run, where ``forge-hpc reward`` asks for it. In a run a frozen model
beside the trainers, or in processes of its own, computes it: ``rollouts.reward_model``."""

from __future__ import annotations

from typing import Any

from forge_hpc.config.errors import UserError


class ModelReward:
    """The value that a reward model gives the prompt and the response.

    Args:
        path: the export of a run of ``recipe: reward_model``, as ``model.path`` names a model.
    """

    def __init__(self, path: str = "") -> None:
        if not path:
            raise UserError("the reward `model` has no path", "path: RUN_DIR/export, of a run of a reward model")
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForSequenceClassification.from_pretrained(path).eval()

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        import torch

        # Texts alone: the end of the response is taken for the end of its turn.
        ids = [*self._tokenizer.encode(prompt + response, add_special_tokens=False), self._tokenizer.eos_token_id]
        with torch.no_grad():
            return float(self._model(torch.tensor([ids])).logits[0, 0])
