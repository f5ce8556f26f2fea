"""Which runs take generators that other jobs lend (``forge-hpc join``), and what a lent node holds. Pure."""

from __future__ import annotations

from forge_hpc.config.errors import UserError
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config


def check_takes_lent(cfg: Config) -> None:
    """Raise a UserError that says why the run can have no other generators than its own."""
    needs = needs_of(cfg)
    if not needs.trains or needs.generators != "beside":
        raise UserError(
            f"recipe={cfg.recipe} does not generate beside its training: there is nothing to join",
            "nodes can be lent to runs that learn from samples, such as recipe=grpo",
        )
    if cfg.slurm.container.runtime is not None:
        raise UserError(
            f"the run is in a container (slurm.container.runtime={cfg.slurm.container.runtime}), lent nodes are not",
            "nodes can be lent to runs without a container",
        )
    if cfg.rollout.max_staleness == 0:
        raise UserError(
            "the run is synchronous (rollout.max_staleness=0): it repeats exactly, with the generators it began with",
            "nodes can be lent to runs with rollout.max_staleness of 1 or more",
        )


def takes_lent(cfg: Config) -> bool:
    """Whether the run can have other generators than its own."""
    try:
        check_takes_lent(cfg)
    except UserError:
        return False
    return True


def lent_replicas(cfg: Config, run_gpus: int, gpus: int) -> tuple[tuple[int, ...], ...]:
    """The GPUs of each generator of a lent node; one generator, without any, where the run is on the CPU.

    Args:
        run_gpus: that each node of the run itself uses; 0 is the CPU.
        gpus: of the lent node.

    Raises:
        UserError: generators of the run do not fit the node.
    """
    if run_gpus == 0:
        return ((),)
    size = cfg.generator.engine.tensor_parallel_size
    if gpus == 0:
        raise UserError("the node has no GPU, and the run's generators are on GPUs", "lend nodes with GPUs")
    if gpus % size:
        raise UserError(
            f"generator.engine.tensor_parallel_size={size} does not divide the {gpus} GPUs of the node",
            f"lend nodes with a multiple of {size} GPUs, or part of them: cluster.gpus_per_node={size}",
        )
    return tuple(tuple(range(first, first + size)) for first in range(0, gpus, size))
