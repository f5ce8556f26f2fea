"""Evaluation: what answers to held-out prompts say of a policy."""
