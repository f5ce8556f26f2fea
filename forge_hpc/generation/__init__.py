"""Generation: completions and their log-probabilities from vLLM, under weights that change while it runs."""

from forge_hpc.generation.engine import EngineStats, GenerationEngine, GenerationError
from forge_hpc.generation.seeds import sample_seed

__all__ = ["EngineStats", "GenerationEngine", "GenerationError", "sample_seed"]
