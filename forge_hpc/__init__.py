"""forge_hpc: reinforcement-learning post-training of language models on Slurm clusters."""

__version__ = "0.1.0"
