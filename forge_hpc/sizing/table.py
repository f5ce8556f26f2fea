"""The split of a run as a table, a line a role: where it runs, and what it holds of each GPU."""

from __future__ import annotations

from collections.abc import Sequence

from forge_hpc.config.split import Placement
from forge_hpc.observability.tables import table
from forge_hpc.sizing.host import COLUMNS as HOST_COLUMNS
from forge_hpc.sizing.host import HostPlan
from forge_hpc.sizing.memory import COLUMNS, GIB, MemoryPlan


def split_table(placement: Placement, memory: MemoryPlan | None) -> list[str]:
    """Lines of a Markdown table under a line that says how many nodes there are."""
    size = {None: "GPUs not known yet", 0: "no GPU"}.get(
        placement.gpus_per_node, f"{placement.gpus_per_node} GPUs each"
    )
    number = placement.nodes
    head = f"{number} node{'s' * (number != 1)}, {size}"
    if memory is not None:
        head += f" of {memory.gpu_gib:g} GiB; estimated GiB of each"
    columns = [c for c in COLUMNS if memory is not None and any(c in role.gib for role in memory.roles.values())]
    header = ["role", "where", "processes", "on", *columns, *(["total"] if columns else []), ""]
    rows = []
    for role, nodes, processes, on, remark in _roles(placement):
        held = memory.roles.get(role) if memory is not None else None
        cells = [f"{held.gib[c]:.1f}" if held is not None and c in held.gib else "" for c in columns]
        total = [f"{held.total_gib:.1f}" if held is not None else ""] if columns else []
        remarks = [remark, held.remark if held is not None else ""]
        rows.append([role, nodes, processes, on, *cells, *total, "; ".join(filter(None, remarks))])
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return [head, *table(header, rows)]


def host_table(host: HostPlan | None) -> list[str]:
    """Lines of a table of the nodes' own memory, after an empty one; none where nothing is known of it, or nothing but
    processes takes any."""
    kept = {} if host is None else host.alike()
    columns = [c for c in HOST_COLUMNS if any(need.what == c for needs in kept for need in needs)]
    if len(columns) < 2:
        return []
    rows = []
    for needs, nodes in kept.items():
        gib = {need.what: need.num_bytes / GIB for need in needs}
        cells = [f"{gib[c]:.1f}" if c in gib else "" for c in columns]
        rows.append([_listed(nodes), *cells, f"{sum(gib.values()):.1f}"])
    return ["", "memory of each node itself, estimated GiB", *table(["where", *columns, "total"], rows)]


def _roles(p: Placement) -> list[tuple[str, str, str, str, str]]:
    found = []
    if p.trainer_nodes:
        found.append(("trainers", p.trainer_nodes, p.trainer_gpus, ""))
    if p.rollout_nodes:
        remark = "after training, for the evaluation" if p.generate_after_training else ""
        if p.takes_turns:
            remark = "in turns with the trainers"
        elif p.shared_gpus:
            remark = p.sharing
        elif p.tensor_parallel_size > 1:
            remark = f"{p.tensor_parallel_size} GPUs each"
        found.append(("generators", p.rollout_nodes, p.replica_gpus, remark))
    if p.frozen_nodes:
        found.append(("frozen", p.frozen_nodes, p.frozen_gpus, ""))
    for place in p.served:
        gpus = max((len(unit) for unit in place.gpus), default=0)
        found.append((f"served {place.name}", place.nodes, place.gpus, f"{gpus} GPUs each" if gpus > 1 else ""))
    if p.spare_nodes:
        found.append(("spares", p.spare_nodes, (), "replace lost nodes"))
    return [
        (role, _nodes(nodes), str(len(nodes) * len(units)) if units else "", _on(units), remark)
        for role, nodes, units, remark in found
    ]


def _nodes(nodes: range) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {nodes[0]}-{nodes[-1]}"


def _listed(nodes: Sequence[int]) -> str:
    """Nodes that need not stand side by side."""
    row = range(nodes[0], nodes[-1] + 1)
    return _nodes(row) if len(row) == len(nodes) else f"nodes {', '.join(map(str, nodes))}"


def _on(units: tuple[tuple[int, ...], ...]) -> str:
    gpus = [gpu for unit in units for gpu in unit]
    if not units:
        return ""
    return "CPU" if not gpus else f"GPU {gpus[0]}" if len(gpus) == 1 else f"GPUs {gpus[0]}-{gpus[-1]}"
