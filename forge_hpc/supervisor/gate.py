"""The first node's part in the gate: it gathers what all nodes have found, and decides who takes part.

node-N (all are there) ─► port-N, link-N within ``GATE_S`` ─► Verdict ─► members of the start, or an ending
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from forge_hpc import slurm
from forge_hpc.cluster.allocation import host_address
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError
from forge_hpc.gate.complaints import ComplaintsDesk
from forge_hpc.gate.deadlines import CALM_S, GATE_S, PRODUCT_S
from forge_hpc.gate.gpus import odd_nodes, remarks
from forge_hpc.gate.verdict import cut_off_nodes, late_sandboxes, own_problems, slow_nodes
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.ending import Cause, Ending, Exit
from forge_hpc.supervisor.fit import look_at_fit
from forge_hpc.supervisor.node import Node

_SHOWN = 4


@dataclass(frozen=True)
class Verdict:
    """Who takes part in a start, and who does not."""

    members: list[int]
    """Nodes of the allocation that are fit, in order."""
    unfit: dict[int, str]
    """The others, each with its problem."""
    introductions: dict[int, dict[str, Any]]
    """Records of the members, by node."""
    slurm_names: dict[int, str]
    """Of every node that is known by one."""
    remarks: tuple[str, ...] = ()
    """What the user is to know of the members, a line each."""
    refused: UserError | None = None
    """The members are fit, and cannot hold the run."""

    def ending(self, num_spares: int) -> Ending | None:
        """Why the start cannot go on with its members; None where it can: spare nodes take the place of the unfit ones,
        and the first node, which holds the run, is fit."""
        if self.refused is not None:
            return Ending(Cause.FAILED, self.refused.message, self.refused.hint, exit=Exit.USAGE)
        if 0 not in self.unfit and len(self.unfit) <= num_spares:
            return None
        all_of_many = len(self.unfit) > 1 and not self.members  # then it is not the nodes: they are not shut out
        lost = () if all_of_many else tuple(self.slurm_names[n] for n in sorted(self.unfit) if n in self.slurm_names)
        return Ending(Cause.GATE, self.describe(), None, lost)

    def without(self, unfit: Mapping[int, str]) -> Verdict:
        """The same, but for more nodes that are not fit."""
        left = [node for node in self.members if node not in unfit]
        introductions = {node: self.introductions[node] for node in left}
        return replace(self, members=left, unfit={**self.unfit, **unfit}, introductions=introductions)

    def describe(self) -> str:
        """In words, the nodes by name."""
        named = [f"{self.named(node)} is not fit: {why}" for node, why in sorted(self.unfit.items())]
        return ". ".join(named[:_SHOWN]) + (f". And {len(named) - _SHOWN} more" if len(named) > _SHOWN else "")

    def named(self, node: int) -> str:
        """A node as Slurm and we call it."""
        name = self.slurm_names.get(node)
        return f"node {node}" + (f" ({name})" if name else "")


def open_gate(node: Node, config: Config, rendezvous: Rendezvous, stop: Callable[[], None]) -> tuple[str, Verdict]:
    """Introduce the first node, wait for what all have found, and judge: its address, and who takes part.

    Raises what ``stop`` raises, and UserError where no node has what the run needs.
    """
    num_nodes = node.allocation.num_nodes
    with ComplaintsDesk(host_address(num_nodes)) as desk:
        rendezvous.publish("gate", {"desk": desk.where})
        address = node.introduce(rendezvous, config)
        verdict = _judge(config, rendezvous, num_nodes, desk, stop)
    return address, fitting(config, node.run_dir, verdict)


def _judge(
    config: Config, rendezvous: Rendezvous, num_nodes: int, desk: ComplaintsDesk, stop: Callable[[], None]
) -> Verdict:
    nodes, timeout_s = range(num_nodes), config.cluster.start_timeout_s
    complained = lambda prefix: {f"{prefix}-{node}" for node in desk.complaints}  # noqa: E731
    found = rendezvous.gather([f"node-{n}" for n in nodes], timeout_s, stop, lambda: complained("node"))
    introductions = {node: found[f"node-{node}"] for node in nodes if f"node-{node}" in found}
    reports = {node: record["report"] for node, record in introductions.items()}
    gpus, one_kind = config.cluster.gpus_per_node, config.cluster.slow_node_factor > 0  # else several are meant
    problems = own_problems(reports, whole_nodes=config.slurm.exclusive and one_kind, gpus=gpus)
    for node in nodes:
        if node in desk.complaints:
            problems[node] = [desk.complaints[node]["problem"]]
        elif node not in introductions:
            problems[node] = [f"it has not come within {timeout_s:.0f} s"]
    unfit = {node: "; ".join(texts) for node, texts in problems.items() if texts}
    if num_nodes > 1:
        _compare(config, rendezvous, num_nodes, unfit, stop)
    names = {node: record["slurm_name"] for node, record in introductions.items()}
    names |= {node: said["slurm_name"] for node, said in desk.complaints.items()}
    if unfit.keys() - names.keys():
        names = dict(enumerate(_host_names(num_nodes))) | names
    for node, record in introductions.items():
        for orphan in record["report"].get("orphans", ()):
            print(f"node {node} ({names[node]}): ended {orphan}, left over by an earlier start", file=sys.stderr)
    for node, slow in late_sandboxes(reports).items():
        print(f"warning: node {node} ({names[node]}): {slow}; it is not left out for that", file=sys.stderr)
    fit = {node: reports[node] for node in nodes if node not in unfit}
    odd = odd_nodes(fit, gpus)
    if one_kind and 0 not in odd and len(odd) <= config.cluster.spare_nodes - len(unfit):
        unfit |= odd
        fit = {node: report for node, report in fit.items() if node not in odd}
    verdict = Verdict([*fit], unfit, {node: introductions[node] for node in fit}, names)
    return replace(verdict, remarks=tuple(remarks(fit, gpus, verdict.named)))


def fitting(config: Config, run_dir: RunDir, verdict: Verdict) -> Verdict:
    """The verdict of those that can hold the run; what it says where they cannot. Nodes that another run has left are
    asked nothing anew."""
    while verdict.ending(config.cluster.spare_nodes) is None:
        reports = {node: record["report"] for node, record in verdict.introductions.items()}
        fit = look_at_fit(config, run_dir, reports, len(verdict.unfit), verdict.named)
        verdict = verdict.without(fit.unfit)  # whose place others take
        if not fit.unfit:
            return replace(verdict, refused=fit.refused, remarks=(*verdict.remarks, *fit.remarks))
    return verdict


def _compare(
    config: Config, rendezvous: Rendezvous, num_nodes: int, unfit: dict[int, str], stop: Callable[[], None]
) -> None:
    """Add those to ``unfit`` that are slow or cut off, in at most ``GATE_S``."""
    until = time.monotonic() + GATE_S
    fit = [node for node in range(num_nodes) if node not in unfit]
    ports = rendezvous.gather([f"port-{node}" for node in fit], PRODUCT_S, stop)
    # Where those that have answered took long, all wait for the file server, or for a crowded machine.
    is_calm = bool(ports) and median(record["took_s"] for record in ports.values()) <= CALM_S
    if is_calm:
        late = f"it has not multiplied two matrices after {PRODUCT_S:.0f} s"
        unfit |= {node: late for node in fit if f"port-{node}" not in ports}
    products = {node: ports[f"port-{node}"]["product_s"] for node in fit if f"port-{node}" in ports}
    for node, why in slow_nodes(products, config.cluster.slow_node_factor).items():
        unfit.setdefault(node, why)
    if not is_calm:  # times and timeouts say nothing then; the product is the best of many
        return
    # Who is slow still adds up: a neighbour's link is no worse for it.
    pairs = [node for node in products if (node + 1) % num_nodes in products]
    links = rendezvous.gather([f"link-{node}" for node in pairs], max(0.0, until - time.monotonic()), stop)
    outcomes = {node: links.get(f"link-{node}", {"outcome": "no answer"})["outcome"] for node in pairs}
    for node, why in cut_off_nodes(outcomes, num_nodes).items():
        unfit.setdefault(node, why)


def _host_names(num_nodes: int) -> list[str]:
    """Slurm's names of the nodes in the order of its tasks; none where it does not tell."""
    listed = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    with contextlib.suppress(slurm.SlurmRefused):
        if listed and len(names := slurm.host_names(listed)) == num_nodes:
            return names
    return []
