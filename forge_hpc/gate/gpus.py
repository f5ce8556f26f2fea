"""Nodes whose GPUs are others than those of most nodes: of another kind, or not as many. Pure.

No node is unfit for that: some want two kinds, or all that the cluster has. But it costs the other nodes something, so
it is said; and where there are spare nodes for all of them, they are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_Reports = Mapping[int, Mapping[str, Any]]
_SHOWN = 4


def odd_nodes(reports: _Reports, gpus: int | None) -> dict[int, str]:
    """Nodes with fewer GPUs than most, or of another kind, each with what it has. Of two kinds, or numbers, that as
    many nodes have, that of the lower node is the usual one.

    Args:
        reports: of fit nodes (``own.look_at_node``), in order.
        gpus: how many a node uses (``cluster.gpus_per_node``); None: all that it has.
    """
    odd: dict[int, list[str]] = {}
    numbers, kinds = _numbers(reports, gpus), _kinds(reports)
    number = _usual(numbers.values()) if numbers else 0
    for node, has in numbers.items():
        if has < number:
            odd.setdefault(node, []).append(f"it has {has} GPUs, elsewhere {number}")
    kind = _usual(kinds.values()) if kinds else ""
    for node, found in kinds.items():
        if found != kind:
            odd.setdefault(node, []).append(f"its GPUs are {found}, elsewhere {kind}")
    return {node: "; ".join(texts) for node, texts in odd.items()}


def remarks(reports: _Reports, gpus: int | None, named: Callable[[int], str]) -> list[str]:
    """What is to be said of the GPUs of the nodes of a start, a line each: who has others, what follows, what to do."""
    said, numbers, kinds = [], _numbers(reports, gpus), _kinds(reports)
    if len({*numbers.values()}) > 1:
        least, most = min(numbers.values()), max(numbers.values())
        idle = sum(numbers.values()) - least * len(numbers)
        has = _told({node: f"{number} GPUs" for node, number in numbers.items()}, named)
        said.append(
            f"{has}: each node uses {least}, and {idle} of the run's GPUs {'is' if idle == 1 else 'are'} idle. "
            f"cluster.gpus_per_node={most} keeps out nodes that have fewer, {least} says that this is meant"
        )
    if len({*kinds.values()}) > 1 or any(len(_counts(report)) > 1 for report in reports.values()):
        said.append(
            f"{_told(kinds, named)}: trainers plan with the smallest memory among theirs, and a step waits for the "
            "slowest GPU. slurm.constraint, or a type in slurm.gres (gpu:TYPE:NUMBER), asks for one kind"
        )
    if orders := {node: report["gpu_order"] for node, report in reports.items() if report.get("gpu_order")}:
        nodes = [*orders]
        said.append(
            f"{_listed(nodes, named)} {_have(nodes)} CUDA_DEVICE_ORDER={orders[nodes[0]]}: CUDA counts GPUs in another "
            "order than the driver, whose figures (kind, memory, health, utilisation) may then be those of other GPUs. "
            "Unset it, or name GPUs by UUID in CUDA_VISIBLE_DEVICES"
        )
    return said


def _numbers(reports: _Reports, gpus: int | None) -> dict[int, int]:
    """How many GPUs each node uses if it uses all that it may."""
    return {node: report["gpus"] if gpus is None else gpus for node, report in reports.items()}


def _kinds(reports: _Reports) -> dict[int, str]:
    """Of nodes whose driver tells it."""
    counts = {node: _counts(report) for node, report in reports.items()}
    return {node: _in_words(found) for node, found in counts.items() if found}


def _counts(report: Mapping[str, Any]) -> Counter[str]:
    return Counter(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in report.get("gpu_kinds", ()))


def _in_words(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return " and ".join(f"{number} x {kind}" for kind, number in sorted(counts.items()))


def _usual(values: Iterable[T]) -> T:
    return Counter(values).most_common(1)[0][0]


def _told(has: Mapping[int, str], named: Callable[[int], str]) -> str:
    """Who has what, those last of which there are most."""
    groups: dict[str, list[int]] = {}
    for node, what in has.items():
        groups.setdefault(what, []).append(node)
    usual = _usual(has.values())
    others = groups.pop(usual)
    said = [f"{_listed(nodes, named)} {_have(nodes)} {what}" for what, nodes in groups.items()]
    if said:
        rest = "the other node" if len(others) == 1 else f"the other {len(others)} nodes"
    else:
        rest = _listed(others, named)
    return ", ".join([*said, f"{rest} {_have(others)} {usual}"])


def _have(nodes: list[int]) -> str:
    return "has" if len(nodes) == 1 else "have"


def _listed(nodes: list[int], named: Callable[[int], str]) -> str:
    more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return ", ".join(map(named, nodes[:_SHOWN])) + more
