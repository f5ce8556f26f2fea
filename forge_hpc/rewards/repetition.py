"""Reward for not saying the same thing again."""

from __future__ import annotations

from typing import Any


class RepetitionReward:
    """The share of the response's n-grams that are different: 1.0 where none comes twice, towards 0.0 in a loop.

    distinct n-grams / n-grams, of words in lower case; 1.0 for a response with fewer than n words. After the n-gram
    penalty of https://arxiv.org/abs/2502.03373, which is a price on each repeated token; this is one number a response.

    Args:
        ngram_size: n.
        characters: n-grams of characters instead of words, for languages written without spaces.
    Raises ValueError where n is less than 1.
    """

    def __init__(self, ngram_size: int = 3, characters: bool = False) -> None:
        if ngram_size < 1:
            raise ValueError(f"ngram_size={ngram_size} must be 1 or more")
        self.ngram_size = ngram_size
        self.characters = characters

    def __call__(self, prompt: str, response: str, target: str, **fields: Any) -> float:
        text = response.lower()
        items = text if self.characters else text.split()
        ngrams = list(zip(*(items[i:] for i in range(self.ngram_size)), strict=False))
        return len(set(ngrams)) / len(ngrams) if ngrams else 1.0
