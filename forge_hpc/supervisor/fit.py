"""Whether the nodes that are fit can hold the run: looked at when they are known, before anything of it has begun.

    reports of the members ─► placement ─► GPUs that torch can use ─► memory of GPUs ─► memory of nodes

A warm start comes after it, so that none is made for a run that cannot follow. Pure but for the ``config.json`` of the
models, which the first node reads.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from forge_hpc.cluster.given_gpus import CPU_BUILD, INVARIANT, not_invariant, unusable, why_too_old
from forge_hpc.config import Config, UserError, load_config, read_config
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.split import Placement, place
from forge_hpc.files import in_thread
from forge_hpc.gate.deadlines import OWN_S
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.host import GIB, HostPlan, Sizes, plan_host, room_of
from forge_hpc.sizing.memory import plan_memory
from forge_hpc.sizing.model import sizes_with


@dataclass(frozen=True)
class Fit:
    """What is too small for the run."""

    refused: UserError | None = None
    """Why none of the nodes can hold its part: another start would meet the same."""
    unfit: Mapping[int, str] = field(default_factory=dict)
    """Nodes that have too little memory for their part, where others have enough of it."""
    remarks: tuple[str, ...] = ()
    """What may become too little, a line each."""


def look_at_fit(
    config: Config,
    run_dir: RunDir,
    reports: Mapping[int, Mapping[str, Any]],
    num_left_out: int,
    named: Callable[[int], str],
) -> Fit:
    """Look whether the run fits.

    Args:
        reports: of the members of the start (``gate.own.look_at_node``), in order.
        num_left_out: nodes of the allocation that are none.
    """
    config = copy.deepcopy(config)
    try:
        placement = place(config, [report["gpus"] for report in reports.values()], num_left_out)
        _check_builds(placement, reports, named)
        old = _old_drivers(placement, reports, named)
        sizes = sizes_of(config, run_dir)
        _check_gpus(config, placement, reports, sizes)
        others = _not_invariant(config, placement, reports)
    except UserError as error:
        return Fit(error)
    if old:
        return Fit(None, old)
    if others:
        node, has = next(iter(others.items()))
        if len(others) == len(reports):
            return Fit(not_invariant(named(node), has))
        return Fit(None, {node: f"it {has}, which model.batch_invariant is not for" for node, has in others.items()})
    host = plan_host(config, needs_of(config), placement, sizes)
    return Fit() if host is None else _look_at_memory(host, reports, named)


def model_of(config: Config, run_dir: RunDir) -> str:
    """The policy's model: that of ``model.path``, or of the warm start, which has the same shape.

    Raises:
        UserError: the warm start's configuration cannot be read.
    """
    if config.model.path != "warmstart":
        return config.model.path
    saved = RunDir(run_dir.warmstart)
    if saved.has_config:
        return read_config(saved.config).model.path
    return load_config(config.warmstart.config, config.warmstart.overrides).model.path


def sizes_of(config: Config, run_dir: RunDir) -> Sizes:
    """Of a run's models; where the disk does not answer none is known."""
    paths = [None, *(need.path for need in needs_of(config).models.values()), *(one.path for one in config.served)]

    def look() -> dict[str | None, Any]:
        size_of = sizes_with(model_of(config, run_dir))
        return {path: size_of(path) for path in paths}

    with contextlib.suppress(TimeoutError, OSError):
        return in_thread(look, within_s=OWN_S).get
    return lambda path: None


def _check_builds(placement: Placement, reports: Mapping[int, Mapping[str, Any]], named: Callable[[int], str]) -> None:
    """Raises UserError where torch is built for the CPU, and the run is to have GPUs."""
    for node, report in reports.items() if placement.gpus_per_node else ():
        if (build := report.get("cpu_build")) is not None:
            raise unusable(named(node), report["gpu_names"][: placement.gpus_per_node], build, CPU_BUILD)


def _old_drivers(
    placement: Placement, reports: Mapping[int, Mapping[str, Any]], named: Callable[[int], str]
) -> dict[int, str]:
    """Nodes whose driver is too old for torch. Raises UserError where all are such."""
    found = {
        node: why
        for node, report in reports.items()
        if placement.gpus_per_node and (why := why_too_old(report.get("cuda_driver"), report.get("cuda_build")))
    }
    if found and len(found) == len(reports):
        node, why = next(iter(found.items()))
        version, _ = reports[node]["cuda_build"]
        raise unusable(named(node), reports[node]["gpu_names"][: placement.gpus_per_node], version, why)
    return {node: f"torch cannot use its GPUs: {why}" for node, why in found.items()}


def _check_gpus(config: Config, placement: Placement, reports: Mapping[int, Mapping[str, Any]], sizes: Sizes) -> None:
    """Raises UserError where not even the largest GPU holds its part: of several kinds each role may have its own."""
    memory = [gpu["memory_bytes"] for report in reports.values() for gpu in report.get("gpu_kinds", ())]
    if memory:
        gib = config.cluster.gpu_memory_gib or round(max(memory) / GIB, 1)
        plan_memory(config, needs_of(config), placement, gib, sizes)


def _not_invariant(config: Config, placement: Placement, reports: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """What nodes have that ``model.batch_invariant`` is not for."""
    found = {}
    for node, report in reports.items() if config.model.batch_invariant and placement.gpus_per_node else ():
        for kind in report.get("gpu_kinds", ()):
            if (capability := kind.get("capability")) is not None and capability[0] != INVARIANT:
                found[node] = f"has a {kind['name']}, of compute capability {'.'.join(map(str, capability))}"
    return found


def _look_at_memory(host: HostPlan, reports: Mapping[int, Mapping[str, Any]], named: Callable[[int], str]) -> Fit:
    """A node that is smaller than most is left out; where most cannot hold such a part, none is looked for that can."""
    members, unfit, remarks = [*reports], dict[int, str](), list[str]()
    limits = {node: room_of(**report["memory_limit"]) for node, report in reports.items()}
    for places in host.alike().values():
        nodes = [members[place_] for place_ in places]
        able = sum(host.refusal(places[0], limit, "") is None for limit in limits.values())
        errors = {node: host.refusal(places[0], limits[node], named(node)) for node in nodes}
        for node, error in errors.items():
            if error is None:
                continue
            if 2 * able < len(nodes):
                return Fit(error)
            unfit[node] = f"it{error.message.removeprefix(named(node))} ({error.hint})"
        free = {
            node: room_of(**reports[node]["memory_limit"], available=reports[node]["memory_bytes"])
            for node in nodes
            if node not in unfit
        }
        short = [node for node, now in free.items() if host.warning(places[0], now, "") is not None]
        if short:
            least = min(short, key=lambda node: free[node].num_bytes)
            who = named(least) + (f", and so do {len(short) - 1} more: each" if len(short) > 1 else "")
            remarks += filter(None, [host.warning(places[0], free[least], who)])
    return Fit(None, unfit, tuple(remarks))
