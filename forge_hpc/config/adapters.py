"""Several adapters on one base (``trainer.lora.sweep``): what each varies, and which runs can train them. No torch."""

from __future__ import annotations

import shlex

from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import POLICY
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config

VARIED = (
    "seed",
    "algorithm.",
    "trainer.optimizer.",
    "trainer.lr_scheduler.",
    "trainer.lora.alpha",
    "trainer.training.steps",
    "trainer.training.max_norm",
    "rollout.group_size",
    "rollout.prompts_per_step",
)
"""What adapters on one base may differ in: nothing that the model, its engine, data or processes are made of."""


def adapter_configs(cfg: Config) -> list[Config]:
    """The configuration of each adapter, as a run of it alone has it; of a run without ``trainer.lora.sweep`` its own.

    Raises:
        UserError: something that is no override, or that adapters on one base cannot differ in.
    """
    if not cfg.trainer.lora.sweep:
        return [cfg]
    from forge_hpc.config.load import with_overrides  # brings YAML, which workers in a venv of their own may lack

    base = with_overrides(cfg, ["trainer.lora.sweep=[]"])
    return [_varied(base, item) for item in cfg.trainer.lora.sweep]


def total_steps(cfg: Config) -> int:
    """Optimizer steps of the whole run, 0 where it trains nothing; of several adapters those of the one with most."""
    return max(own.trainer.training.steps for own in adapter_configs(cfg)) if needs_of(cfg).trains else 0


def _varied(base: Config, item: str) -> Config:
    from forge_hpc.config.load import diff_config, with_overrides

    try:
        overrides = shlex.split(item)
    except ValueError as error:
        raise UserError(f"trainer.lora.sweep: {item!r}: {error}", "write key=value key=value") from None
    own = with_overrides(base, overrides)
    for key, _, _ in diff_config(base, own):
        if not key.startswith(VARIED) or key == "algorithm.routing_replay":
            raise UserError(
                f"trainer.lora.sweep: adapters on one base cannot differ in {key}",
                f"they can in {', '.join(name.rstrip('.') for name in VARIED)}; without --one-base each run of a sweep "
                "has a base of its own",
            )
    return own


def check_adapters_together(cfg: Config) -> None:
    """Raise a UserError where the run cannot train several adapters at once."""
    lora = cfg.trainer.lora
    if not lora.sweep:
        return
    if not lora.sends_adapters:
        raise UserError(
            "trainer.lora.sweep has generators hold several adapters, and they get merged weights",
            "set trainer.lora.enable=true and trainer.lora.publish=adapters",
        )
    if cfg.generator.weight_transport == "nccl":
        raise UserError(
            "generator.weight_transport=nccl links generators to one policy, and trainer.lora.sweep has several",
            "leave it out: adapters are some MB",
        )
    if cfg.logging.prometheus_port is not None:
        raise UserError(
            "logging.prometheus_port is of one run, and trainer.lora.sweep has several",
            "leave it out: RUN_DIR/adapters/N/metrics.jsonl and TensorBoard have the figures",
        )
    if cfg.served:
        raise UserError(
            "served models stand beside one run, and trainer.lora.sweep has several",
            "submit the sweep without --one-base: each run then serves its own",
        )
    for own in adapter_configs(cfg):
        needs = needs_of(own)
        others = [name for name, need in needs.models.items() if name != POLICY and (need.trained or need.path)]
        if needs.generators != "beside" or others:
            has = f"it has {others[0]!r} beside the policy" if others else "it does not generate beside its training"
            raise UserError(
                f"recipe={cfg.recipe} cannot train several adapters at once: {has}",
                "submit the sweep without --one-base: each run then has a base of its own",
            )
