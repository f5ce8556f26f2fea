"""Rollouts: prompts become groups of rewarded episodes, in the order of the steps."""
