"""The keys of ``metrics.jsonl`` that others rely on."""

from __future__ import annotations

METRIC_KEYS: dict[str, str] = {
    "step": "steps done",
    "optimizer_steps": "optimizer steps taken, of the whole run",
    "wall_time": "unix time in seconds",
    "policy_version": "version of the weights after the step",
    "reward/mean": "mean reward of all completions of the step, before any filtering",
    "reward/std": "standard deviation of the same",
    "loss": "loss of the step, a mean over trained tokens or sequences as the loss says",
    "grad_norm": "global gradient norm before clipping",
    "kl/mean": "mean KL to the reference per trained token, weighted as in the loss, nats",
    "entropy/mean": "mean entropy per trained token, nats",
    "staleness/max": "largest staleness of the episodes of the step, optimizer steps",
    "staleness/mean": "mean of the same",
    "tokens/generated": "sampled tokens of the step",
    "tokens/trained": "tokens in the loss of the step",
    "tokens/fill": "share of the token slots of all rows that hold a token",
    "time/step_s": "the whole step, seconds",
    "time/generate_s": "generation, seconds",
    "time/train_s": "forward, backward and optimizer, seconds",
    "time/weight_sync_s": "publishing and loading weights, seconds",
    "time/publish_s": "training stood still for its weights, seconds",
    "time/wait_generator_s": "waiting for generators, seconds",
    "time/wait_trainer_s": "waiting for trainers, seconds",
    "time/checkpoint_s": "the step was held up by checkpointing, seconds",
    "mismatch/logprob_abs_mean": "mean |generator - trainer| log-probability of the sampled tokens, nats",
}
"""What each means: the keys of a step that learns from samples. Others have those that do not speak of samples."""
