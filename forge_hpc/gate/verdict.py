"""Which nodes are not fit, from what they have found: pure, and the same whatever the order in which reports came."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median, median_low
from typing import Any

from forge_hpc.config.errors import UserError
from forge_hpc.gate.environment import differences

MAX_CLOCK_S = 300.0
"""As munge has it, by which Slurm's nodes know each other; certificates of the run bear an hour."""
MIN_MEMORY_SHARE = 0.5
SLOW_LINK_SHARE, SLOW_LINK_BYTES_PER_S = 0.1, 20e6
"""A link is too slow that is a tenth of the others', and no faster than 100 Mbit/s."""


def own_problems(
    reports: Mapping[int, Mapping[str, Any]], *, whole_nodes: bool = True, gpus: int | None = None
) -> dict[int, list[str]]:
    """What the nodes' reports say (``own.look_at_node``), alone and beside each other.

    Args:
        reports: by node.
        whole_nodes: no other jobs run on the nodes, which would have a right to memory, and all should have as much.
        gpus: how many GPUs a node must have; None: those that it is given.

    Raises:
        UserError: the run needs a sandbox, and it starts on none of several that have nothing else.
    """
    found = {node: list(report["problems"]) for node, report in reports.items()}
    told = {node: report for node, report in reports.items() if "memory_bytes" in report}  # else its look has hung
    if not told:
        return found
    usual = median(report["memory_bytes"] for report in told.values())
    clock = median_low([report["clock_s"] for report in told.values()])
    for node, report in told.items():
        if whole_nodes and report["memory_bytes"] < MIN_MEMORY_SHARE * usual:
            has, others = (num_bytes / 2**30 for num_bytes in (report["memory_bytes"], usual))
            found[node].append(f"{has:.1f} GiB of memory are available, elsewhere {others:.1f}")
        if abs(off := report["clock_s"] - clock) > MAX_CLOCK_S:
            found[node].append(f"its clock is {abs(off):.0f} s {'fast' if off > 0 else 'slow'}")
    lacking = _lacking_gpus(told, gpus)
    if len(lacking) < len(told) or len(told) == 1:  # else it is what was asked for that is wrong
        for node, problem in lacking.items():
            found[node].append(problem)
    for node, problem in differences({node: report["environment"] for node, report in told.items()}).items():
        found[node].append(problem)
    for node, problem in _lacking_sandbox(told, found).items():
        found[node].append(problem)
    return found


def late_sandboxes(reports: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """What is to be said of nodes whose sandbox has taken long. It is no reason to leave one out: a sandbox may take
    longer than the gate waits, and what a crowded machine or a file server holds up comes all the same."""
    looked = {node: report.get("sandbox") or {} for node, report in reports.items()}
    return {node: f"its sandbox is slow: {found['late']}" for node, found in looked.items() if "late" in found}


def _lacking_sandbox(reports: Mapping[int, Mapping[str, Any]], problems: Mapping[int, Sequence[str]]) -> dict[int, str]:
    """Nodes on which a sandbox does not start. Raises UserError where that is so on all of several that have tried it,
    and nothing else is wrong with any of them: no node is to blame then, and another start would find the same."""
    looked = {node: report["sandbox"] for node, report in reports.items() if report.get("sandbox") is not None}
    lacking = {node: found for node, found in looked.items() if "message" in found}
    if len(lacking) == len(looked) > 1 and not any(problems[node] for node in lacking):
        first = next(iter(lacking.values()))
        raise UserError(
            f"the run needs a sandbox, and none works on any of its nodes: {first['message']}", first["hint"]
        )
    said = {node: (why["message"], why["hint"]) for node, why in lacking.items()}
    return {
        node: f"its sandbox does not work: {message}{f' ({hint})' if hint else ''}"
        for node, (message, hint) in said.items()
    }


def _lacking_gpus(reports: Mapping[int, Mapping[str, Any]], gpus: int | None) -> dict[int, str]:
    has_driver = any(report["working_gpus"] is not None for report in reports.values())
    lacking = {}
    for node, report in reports.items():
        wanted, working = (report["gpus"] if gpus is None else gpus), report["working_gpus"]
        used = min(wanted, report["gpus"])
        if working is None and wanted and has_driver and len(reports) > 1:
            lacking[node] = "its GPUs' driver does not answer"
        elif working is not None and working < used:
            lacking[node] = f"{working} of its {'first ' * (used < report['gpus'])}{used} GPUs answer"
        elif has_driver and report["gpus"] < wanted:
            what_to_do = f"set cluster.gpus_per_node={report['gpus']}, or leave the node out: slurm.extra.exclude=NODE"
            lacking[node] = f"it has {report['gpus']} of {wanted} GPUs ({what_to_do})"
    return lacking


def slow_nodes(products_s: Mapping[int, float], factor: float) -> dict[int, str]:
    """Nodes whose matrix product took more than ``factor`` times as long as the median of all; of two the faster one
    counts."""
    if len(products_s) < 2 or not factor:
        return {}
    usual = median_low(products_s.values())
    return {
        node: f"it is slow: a matrix product takes {seconds / usual:.1f} times as long as elsewhere"
        for node, seconds in products_s.items()
        if seconds > factor * usual
    }


def cut_off_nodes(links: Mapping[int, float | str], num_nodes: int) -> dict[int, str]:
    """Nodes at the end of links that fail.

    Args:
        links: of each node to the next one: bytes a second, or what went wrong.
    """
    speeds = [speed for speed in links.values() if not isinstance(speed, str)]
    usual = median(speeds) if speeds else 0.0
    failed = {
        node: outcome if isinstance(outcome, str) else f"{outcome / 1e6:.1f} MB/s, elsewhere {usual / 1e6:.1f}"
        for node, outcome in links.items()
        if isinstance(outcome, str) or outcome < min(SLOW_LINK_SHARE * usual, SLOW_LINK_BYTES_PER_S)
    }
    ends: Counter[int] = Counter(_ends(failed, num_nodes))
    found: dict[int, str] = {}
    for node, why in sorted(failed.items()):
        pair = (node, (node + 1) % num_nodes)
        if not found.keys() & set(pair):  # who has more bad links; of two alike the later one: the first holds the run
            worst = max(pair, key=lambda end: (ends[end], end))
            found[worst] = f"numbers cannot be added up with node {next(end for end in pair if end != worst)}: {why}"
    return found


def _ends(links: Iterable[int], num_nodes: int) -> Iterable[int]:
    for node in links:
        yield from (node, (node + 1) % num_nodes)
