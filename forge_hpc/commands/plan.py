"""``forge-hpc plan``."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from forge_hpc.before_queue import asked_memory, gpu_of, host_of, memory_here, memory_of
from forge_hpc.commands.arguments import add_overrides
from forge_hpc.config import Config, Placement, UserError
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.gpus import Gpu, gpu_named
from forge_hpc.sizing.gpus_here import gpu_here, num_gpus_here
from forge_hpc.sizing.host import Room
from forge_hpc.sizing.memory import MemoryPlan
from forge_hpc.sizing.model import model_size
from forge_hpc.sizing.proposal import describe, proposals
from forge_hpc.sizing.speed import Speed, estimated, measured
from forge_hpc.sizing.table import host_table, split_table
from forge_hpc.slurm import partitions
from forge_hpc.submission import Request, resolve_config


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="configuration; default configs/grpo/demo.yaml")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes to split, over cluster.nodes")
    parser.add_argument("--from", dest="source", type=Path, metavar="RUN_DIR", help="take what this run has measured")
    parser.add_argument("--gpu", metavar="NAME", help="such as h100; by default as Slurm or the constraint names it")
    parser.add_argument("--site", metavar="NAME", help="site profile; default $FORGE_HPC_SITE")
    add_overrides(parser, "such as cluster.gpus_per_node=8")


def run(args: argparse.Namespace) -> int:
    config = args.config
    if config is None and args.source is not None and RunDir(args.source).has_config:
        config = RunDir(args.source).config
    cfg = resolve_config(Request(config, tuple(args.overrides), nodes=args.nodes, site=args.site))
    on_slurm = partitions.slurm_is_here()
    known = partitions.partitions() if on_slurm else []
    here = not on_slurm and cfg.cluster.nodes == 1 and args.gpu is None
    if here:
        cfg.cluster.gpus_per_node = num_gpus_here(cfg)
    if known and cfg.cluster.gpus_per_node is None:
        cfg.cluster.gpus_per_node = partitions.gpus_per_node(cfg, known)
    if cfg.cluster.gpus_per_node is None:
        raise UserError("how many GPUs a node has is not known here", "set cluster.gpus_per_node=8")
    gpu = gpu_of(cfg, known) if args.gpu is None else gpu_named(args.gpu)
    speed = measured(RunDir(args.source), cfg) if args.source is not None else _estimated(cfg, gpu, args.gpu)
    held = (gpu_here(cfg) if here else None) or gpu
    model = cfg.model.path
    rooms: tuple[Room | None, ...] = memory_here() if here else (asked_memory(cfg),)

    def check(changed: Config, placement: Placement) -> MemoryPlan | None:
        host_of(changed, placement, model, *rooms)
        return memory_of(changed, placement, held, model)

    found = proposals(cfg, speed, check)
    best = found[0]
    memory = memory_of(best.config, best.placement, held, model)
    host, said = host_of(best.config, best.placement, model, *rooms)
    print("\n".join([*split_table(best.placement, memory), *host_table(host), "", *describe(found, speed)]))
    for text in said:
        print(f"warning: {text}", file=sys.stderr)
    nodes = f" --nodes {cfg.cluster.nodes}" if args.nodes else ""
    given = f" --config {shlex.quote(str(config))}" if config else ""
    overrides = dict.fromkeys([*args.overrides, *best.overrides])  # what was given already once
    print(f"\nforge-hpc submit{given}{nodes} {shlex.join(overrides)}")
    return 0


def _estimated(cfg: Config, gpu: Gpu | None, name: str | None) -> Speed:
    if gpu is None:
        unknown = "which GPUs the nodes have is not known here"
        if cfg.cluster.gpus_per_node == 0:
            unknown = "the nodes have no GPU, and how fast their CPUs are is not known here"
        what = f"--gpu {name}: no such GPU is known here" if name else unknown
        raise UserError(what, "--gpu h100, or --from RUN_DIR takes what a run has measured")
    if (size := model_size(cfg.model.path)) is None:
        raise UserError(
            f"the size of model.path={cfg.model.path} is not known here", "--from RUN_DIR takes what a run has measured"
        )
    return estimated(cfg, size, gpu)
