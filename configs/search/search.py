"""Search and answer: questions about a small corpus, and one tool that searches it by BM25 (docs/environments.md).

BM25: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

from forge_hpc.environments import Step, Tools, tool

K1, B = 1.2, 0.75


class Search(Tools):
    """An episode is right where the final answer holds the reference answer.

    Args:
        corpus: a JSONL file of {"title", "text"}, beside this one.
        top: passages that a search gives.
    """

    def __init__(self, corpus: str = "corpus.jsonl", top: int = 2) -> None:
        lines = (Path(__file__).parent / corpus).read_text(encoding="utf-8").splitlines()
        self._passages = [f"{passage['title']}: {passage['text']}" for passage in map(json.loads, lines)]
        self._counts = [Counter(words(passage)) for passage in self._passages]
        self._found_in = Counter(word for counts in self._counts for word in counts)
        self._mean = sum(counts.total() for counts in self._counts) / len(self._counts)
        self._top = top

    async def reset(self, prompt):
        self._answer = prompt.target.lower()
        return await super().reset(prompt)

    @tool
    def search(self, query: str) -> str:
        """The passages of the encyclopedia that fit a query best."""
        scores = [self._score(set(words(query)), counts) for counts in self._counts]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[: self._top]
        return "\n".join(self._passages[i] for i in best if scores[i] > 0) or "nothing was found"

    async def finish(self, response):
        return Step(reward=float(self._answer in response.lower()), done=True)

    def _score(self, query, counts) -> float:
        norm = K1 * (1 - B + B * counts.total() / self._mean)
        return sum(self._rarity(word) * counts[word] * (K1 + 1) / (counts[word] + norm) for word in query)

    def _rarity(self, word) -> float:
        num = self._found_in[word]
        return math.log(1 + (len(self._counts) - num + 0.5) / (num + 0.5))


def words(text):
    return re.findall(r"\w+", text.lower())
