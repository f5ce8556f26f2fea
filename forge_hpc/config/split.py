"""Placement: which nodes and GPUs train, which generate. Pure arithmetic, used by the dry run and to build meshes.

Hosts stand in the order of the allocation: trainers first, then rollout nodes, those of frozen models, those of each
model of ``served``, then spares.
Every node of a role looks the same, so one list of GPUs per role says it all. On a single node the roles share the
node, and its GPUs are split; a single GPU is shared by trainer and generator.

The recipe says what it needs. Models beside generators split the nodes by ``cluster.trainer_nodes`` and
``cluster.rollout_nodes``, or by ``cluster.rollout_ratio`` where neither is given; with ``cluster.colocate`` both are on
every node and every GPU, and take turns (``takes_turns``) or compute at the same time. Models alone have every node; a
generator that is needed only once the trainers have gone starts on the last trainer node, on the first
``tensor_parallel_size`` of its GPUs. Generators alone have every node too.

Frozen models with processes of their own take ``cluster.frozen_nodes`` nodes, or the last ``cluster.frozen_processes``
GPUs of the only node. A model of ``served`` takes its own ``nodes``, or before those the last GPUs of the only node.

No node and no GPU is left idle silently: numbers that do not add up are a UserError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from forge_hpc.config.errors import UserError
from forge_hpc.config.needs import ModelNeed, Needs
from forge_hpc.config.recipes import needs_of
from forge_hpc.config.schema import Config, ServedConfig

_Gpus = tuple[tuple[int, ...], ...]
"""GPUs of each process of a node; () for a process on the CPU."""


@dataclass(frozen=True)
class ServedPlace:
    """Where the engines of a model of ``served`` are."""

    name: str
    nodes: range
    gpus: _Gpus = ()
    """GPUs of each engine of a node; () is one on the CPU."""


@dataclass(frozen=True)
class Placement:
    """Who runs where. Nodes are indices into the allocation's hosts, GPUs indices on a node."""

    trainer_nodes: range
    rollout_nodes: range
    """Nodes with generators; the trainers' own node where they share one."""
    spare_nodes: range
    gpus_per_node: int | None
    """0 is the CPU; None is not known yet, then nothing below the nodes is known either."""
    trainer_gpus: _Gpus = ()
    """GPUs of each trainer process of a trainer node, by local rank; () is a process on the CPU."""
    replica_gpus: _Gpus = ()
    """GPUs of each generator replica of a rollout node; () is a replica on the CPU."""
    generate_after_training: bool = False
    """The generator starts for the evaluation, when the trainers have ended."""
    takes_turns: bool = False
    """Trainers and generators are on the same nodes and GPUs, and compute one after the other."""
    frozen_nodes: range = range(0)
    """Nodes with frozen models in processes of their own; the trainers' node where they share it."""
    frozen_gpus: _Gpus = ()
    """GPUs of each of these processes of a node, by local rank; () is a process on the CPU."""
    served: tuple[ServedPlace, ...] = ()
    """The models of ``served``."""

    @property
    def nodes(self) -> int:
        """Nodes of the allocation."""
        served = (node for place in self.served for node in place.nodes)
        return len({*self.trainer_nodes, *self.rollout_nodes, *self.frozen_nodes, *served, *self.spare_nodes})

    @property
    def trainer_procs_per_node(self) -> int:
        return len(self.trainer_gpus)

    @property
    def trainer_procs(self) -> int:
        """World size of the trainers."""
        return len(self.trainer_nodes) * len(self.trainer_gpus)

    @property
    def replicas_per_node(self) -> int:
        return len(self.replica_gpus)

    @property
    def replicas(self) -> int:
        """Generator replicas of the whole run."""
        return len(self.rollout_nodes) * len(self.replica_gpus)

    @property
    def num_devices(self) -> int:
        """GPUs at work in the whole run, or without any its trainer processes and generator replicas."""
        if not self.gpus_per_node:
            return self.trainer_procs + (0 if self.generate_after_training else self.replicas)
        shared = len(self.shared_gpus) * len(set(self.trainer_nodes) & set(self.rollout_nodes))
        generators = 0 if self.generate_after_training else len(self.rollout_nodes) * len(_all(self.replica_gpus))
        return len(self.trainer_nodes) * len(_all(self.trainer_gpus)) + generators - shared

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs of one generator replica, 1 on the CPU."""
        return max((len(gpus) for gpus in self.replica_gpus), default=1) or 1

    @property
    def starts_after_generators(self) -> bool:
        """Whether trainers start when the generators have: vLLM plans with the memory of its GPU that is free while it
        starts."""
        return self.takes_turns or bool(self.shared_gpus)

    @property
    def shared_gpus(self) -> tuple[int, ...]:
        """GPUs that hold a trainer and a generator at the same time."""
        if self.generate_after_training or not set(self.trainer_nodes) & set(self.rollout_nodes):
            return ()
        return tuple(sorted(_all(self.trainer_gpus) & _all(self.replica_gpus)))

    @property
    def shares_at_once(self) -> bool:
        """Whether trainers and generators on the same GPUs compute, and hold memory, at the same time."""
        return bool(self.shared_gpus) and not self.takes_turns

    @property
    def sharing(self) -> str:
        """Of the generators, for a person: with whom they share which GPUs."""
        shared = self.shared_gpus
        return f"sharing {_gpus(shared)} with the trainer{'s' * (len(shared) > 1)}" if shared else ""

    def processes_on(self, node: int) -> int:
        """Processes of models and generator replicas that work on `node` at the same time."""
        trainers = self.trainer_procs_per_node * (node in self.trainer_nodes)
        generators = self.replicas_per_node * (node in self.rollout_nodes)
        others = len(self.frozen_gpus) * (node in self.frozen_nodes)
        others += sum(len(place.gpus) * (node in place.nodes) for place in self.served)
        return others + (max(trainers, generators) if self.generate_after_training else trainers + generators)

    def with_served(self, number: int) -> Placement:
        """The engines of a model of ``served`` in the place of the generators, and those in its place."""
        place, served = self.served[number], list(self.served)
        served[number] = replace(place, nodes=self.rollout_nodes, gpus=self.replica_gpus)
        return replace(
            self,
            rollout_nodes=place.nodes,
            replica_gpus=place.gpus,
            served=tuple(served),
            spare_nodes=range(0),
            takes_turns=False,
        )

    def threads_per_process(self, cpus: int, node: int, extra_processes: int = 0) -> int:
        """CPU threads for each process on `node`, at least 1.

        Args:
            cpus: CPU cores of the node.
            node: index of the node in the allocation.
            extra_processes: further busy processes there, such as a reference model.
        """
        return max(1, cpus // max(1, self.processes_on(node) + extra_processes))

    def describe(self) -> str:
        """The table of a dry run: a line a role, node ranges, what each node does."""
        size = {None: "GPUs not known yet", 0: "no GPU"}.get(self.gpus_per_node, f"{self.gpus_per_node} GPUs each")
        lines = [f"{_count(self.nodes, 'node')}, {size}"]
        if self.trainer_nodes:
            lines.append(_line(self.trainer_nodes, "trainers", self.trainer_gpus, "process", "processes"))
        if self.rollout_nodes:
            line = _line(self.rollout_nodes, "generators", self.replica_gpus, "replica", "replicas")
            if self.generate_after_training:
                line += ", after training, for the evaluation"
            if self.takes_turns:
                line += ", in turns with the trainers"
            elif self.shared_gpus:
                line += f", {self.sharing}"
            lines.append(line)
        if self.frozen_nodes:
            lines.append(_line(self.frozen_nodes, "frozen", self.frozen_gpus, "process", "processes"))
        for place in self.served:
            lines.append(_line(place.nodes, place.name, place.gpus, "replica", "replicas") + ", served")
        if self.spare_nodes:
            lines.append(f"  {_nodes(self.spare_nodes):<14} {'spares':<11} replace lost nodes")
        return "\n".join(lines)


def plan(cfg: Config, gpus_per_node: int | None) -> Placement:
    """Place the roles of `cfg` on ``cluster.nodes`` nodes.

    Args:
        cfg: the configuration.
        gpus_per_node: GPUs used on each node; 0 is the CPU; None where it is not known yet (nodes are placed only).

    Raises:
        UserError: the numbers do not add up, or would leave a node or a GPU without work.
    """
    needs = needs_of(cfg)
    trainer_nodes, rollout_nodes, spare_nodes = _split_nodes(cfg, needs)
    after = needs.generators == "after"
    served = _served_places(cfg, needs, spare_nodes.start, gpus_per_node)
    frozen_nodes = _frozen_nodes(cfg, needs, spare_nodes.start - served_nodes(cfg))
    if gpus_per_node is None:
        return Placement(
            trainer_nodes,
            rollout_nodes,
            spare_nodes,
            None,
            generate_after_training=after,
            takes_turns=takes_turns(cfg),
            frozen_nodes=frozen_nodes,
            served=served,
        )
    if gpus_per_node < 0:
        raise UserError(f"cluster.gpus_per_node is {gpus_per_node}", "0 is the CPU")
    node_gpus = gpus_per_node
    for place, one in zip(served, cfg.served, strict=True):
        if not one.nodes:  # theirs are those of this node
            gpus_per_node -= len(_all(place.gpus))
    frozen_gpus = _frozen_gpus(cfg, gpus_per_node) if frozen_nodes else ()
    if not cfg.cluster.frozen_nodes:  # theirs are those of this node
        gpus_per_node -= len(_all(frozen_gpus))
    trainer_gpus: _Gpus = ()
    if not needs.models:
        replica_gpus = _replicas(cfg, gpus_per_node, len(rollout_nodes))
    elif needs.generators != "beside":
        trainer_gpus, replica_gpus = _trainers_alone(cfg, gpus_per_node)
    elif cfg.cluster.colocate or gpus_per_node == 0:
        trainer_gpus, replica_gpus = _on_same(cfg, gpus_per_node, len(rollout_nodes))
    elif trainer_nodes == rollout_nodes:
        trainer_gpus, replica_gpus = _on_one_node(cfg, gpus_per_node)
    else:
        trainer_gpus, replica_gpus = _on_many_nodes(cfg, gpus_per_node, len(rollout_nodes))
    if not rollout_nodes:
        replica_gpus = ()
    placement = Placement(
        trainer_nodes,
        rollout_nodes,
        spare_nodes,
        node_gpus,
        trainer_gpus,
        replica_gpus,
        after,
        takes_turns(cfg),
        frozen_nodes,
        frozen_gpus,
        served,
    )
    if needs.models:
        _check_degrees(cfg, placement, needs)
    return placement


def place(cfg: Config, gpus: Sequence[int], num_left_out: int) -> Placement:
    """`plan` for the nodes that a start has, which may be others than were asked for; ``cluster`` says so from then on.

    Args:
        gpus: of each of them.
        num_left_out: nodes that were found not to be fit, in whose place are spare ones.

    Raises:
        UserError: it does not fit them.
    """
    cfg.cluster.nodes = len(gpus)  # a run may come back on another number of nodes
    cfg.cluster.spare_nodes = max(0, cfg.cluster.spare_nodes - num_left_out)
    asked, found = cfg.cluster.gpus_per_node, min(gpus)
    if asked is not None and asked > found:
        raise UserError(f"cluster.gpus_per_node is {asked}, a node has {found}", "lower it, or leave it out")
    return plan(cfg, found if asked is None else asked)


# --- nodes


def _split_nodes(cfg: Config, needs: Needs) -> tuple[range, range, range]:
    c = cfg.cluster
    working = working_nodes(cfg)
    if c.spare_nodes < 0 or working < 1:
        given = {"cluster.spare_nodes": c.spare_nodes, "cluster.frozen_nodes": c.frozen_nodes}
        given |= {f"served.{i}.nodes": one.nodes for i, one in enumerate(cfg.served)}
        others = [key for key, num in given.items() if num or key == "cluster.spare_nodes"]
        raise UserError(
            f"{_count(c.nodes, 'node')} with {' and '.join(f'{key}={given[key]}' for key in others)} leaves none to "
            "work",
            f"raise cluster.nodes (--nodes) or lower {' or '.join(others)}",
        )
    spares = range(c.nodes - c.spare_nodes, c.nodes)
    if c.colocate:
        _check_colocate(cfg, needs)
        return range(working), range(working), spares
    if needs.generators != "beside":
        if c.rollout_nodes:
            raise UserError(
                f"recipe={cfg.recipe} trains on every node, cluster.rollout_nodes is {c.rollout_nodes}",
                "leave cluster.rollout_nodes out",
            )
        if c.trainer_nodes not in (None, working):
            raise UserError(
                f"cluster.trainer_nodes={c.trainer_nodes} of {_count(working, 'node')} would leave nodes idle",
                f"recipe={cfg.recipe} trains on every node: leave cluster.trainer_nodes out",
            )
        last = range(working - 1, working) if needs.generators == "after" else range(working, working)
        return range(working), last, spares
    if not needs.models:
        if c.trainer_nodes or c.rollout_nodes not in (None, working):
            raise UserError(
                f"recipe={cfg.recipe} generates on every node: cluster.trainer_nodes={c.trainer_nodes} and "
                f"cluster.rollout_nodes={c.rollout_nodes} of {_count(working, 'node')} would leave nodes idle",
                "leave cluster.trainer_nodes and cluster.rollout_nodes out",
            )
        return range(0), range(working), spares
    for name, value in (("trainer_nodes", c.trainer_nodes), ("rollout_nodes", c.rollout_nodes)):
        if value is not None and not 1 <= value <= working:
            raise UserError(
                f"cluster.{name} is {value}, with {_count(working, 'working node')}",
                f"give 1 to {working}, or leave it out",
            )
    if working == 1:
        return range(1), range(1), spares
    if c.trainer_nodes is not None:
        trainers = c.trainer_nodes
    elif c.rollout_nodes is not None:
        trainers = working - c.rollout_nodes
    else:
        trainers = working - _share(working, c.rollout_ratio)
    rollout = working - trainers if c.rollout_nodes is None else c.rollout_nodes
    if rollout < 1 or trainers < 1 or trainers + rollout != working:
        raise UserError(
            f"{trainers} trainer nodes and {rollout} rollout nodes are not the {working} working nodes "
            f"(cluster.nodes={c.nodes}, cluster.spare_nodes={c.spare_nodes})",
            "give one of cluster.trainer_nodes and cluster.rollout_nodes: the other role takes the rest, 1 or more",
        )
    return range(trainers), range(trainers, working), spares


def takes_turns(cfg: Config) -> bool:
    """Whether generators sleep while the trainers on their GPUs compute (``cluster.colocate``): a run in which both
    compute at the same time, or whose generators may not sleep, has memory for both all the time."""
    return cfg.cluster.colocate and cfg.rollout.max_staleness == 0 and cfg.generator.engine.sleep_level > 0


def _check_colocate(cfg: Config, needs: Needs) -> None:
    """Whether there are both, and nothing that belongs to a split."""
    c = cfg.cluster
    if not needs.models or needs.generators != "beside":
        raise UserError(
            f"cluster.colocate has trainers and generators on the same GPUs, and recipe={cfg.recipe} does not have "
            "both at the same time",
            "leave cluster.colocate out",
        )
    for name, value in (("trainer_nodes", c.trainer_nodes), ("rollout_nodes", c.rollout_nodes)):
        if value is not None:
            raise UserError(
                f"cluster.colocate has trainers and generators on every node, and cluster.{name} is {value}",
                f"leave cluster.{name} out",
            )
    if c.spare_nodes:
        raise UserError(
            f"cluster.spare_nodes={c.spare_nodes} replace nodes that only generate, and with cluster.colocate there "
            "are none",
            "set cluster.spare_nodes=0: after the loss of a node the run comes back on the others",
        )


def working_nodes(cfg: Config) -> int:
    """Nodes for trainers and generators."""
    return cfg.cluster.nodes - cfg.cluster.spare_nodes - cfg.cluster.frozen_nodes - served_nodes(cfg)


def served_nodes(cfg: Config) -> int:
    """Nodes that hold nothing but models of ``served``."""
    return sum(one.nodes for one in cfg.served)


def frozen_apart(cfg: Config, needs: Needs) -> dict[str, ModelNeed]:
    """The models that have processes of their own: all frozen ones, where the cluster has a place for them. With LoRA
    not those that are the policy without its adapters."""
    if not (cfg.cluster.frozen_nodes or cfg.cluster.frozen_processes):
        return {}
    return {
        name: need
        for name, need in needs.models.items()
        if not need.trained and not (cfg.trainer.lora.enable and need.path in (None, cfg.model.path))
    }


def _frozen_nodes(cfg: Config, needs: Needs, end: int) -> range:
    c = cfg.cluster
    if not (c.frozen_nodes or c.frozen_processes):
        return range(0)
    if not frozen_apart(cfg, needs):
        given = f"cluster.frozen_nodes={c.frozen_nodes}" if c.frozen_nodes else "cluster.frozen_processes"
        raise UserError(
            f"{given}, and recipe={cfg.recipe} has no frozen model of weights of its own",
            f"leave {given.partition('=')[0]} out",
        )
    if c.frozen_nodes:
        return range(end - c.frozen_nodes, end)
    if end > 1:
        raise UserError(
            f"cluster.frozen_processes={c.frozen_processes} without nodes for them, on {_count(end, 'node')}",
            "set cluster.frozen_nodes, and leave cluster.frozen_processes out where nodes have GPUs",
        )
    return range(1)


def _served_places(cfg: Config, needs: Needs, end: int, gpus: int | None) -> tuple[ServedPlace, ...]:
    """Where the models of ``served`` are, their nodes before node ``end``; of the only node they take the last GPUs."""
    if cfg.served and needs.generators != "beside":
        raise UserError(
            f"served models are for the rewards, environments and agents of what a policy samples, and "
            f"recipe={cfg.recipe} samples nothing while it runs",
            "leave `served` out",
        )
    places, node, free = [], end - served_nodes(cfg), gpus or 0
    is_alone = node == 1
    for i, one in enumerate(cfg.served):
        if not one.nodes and not is_alone:
            raise UserError(
                f"served.{i}.nodes is 0, which is for runs on a single node, and this one has {_count(node, 'node')} "
                "for trainers and generators",
                f"set served.{i}.nodes to those that {one.name or 'it'} is to have, beside these",
            )
        nodes = range(node, node + one.nodes) if one.nodes else range(1)
        node += one.nodes
        engines: _Gpus = ()
        if gpus == 0:
            engines = ((),) * _engines_on_cpu(f"served.{i}", one)
        elif gpus and one.nodes:
            engines = _engines_of_nodes(f"served.{i}", one, gpus)
        elif gpus:
            tp = one.engine.tensor_parallel_size
            num = tp * (one.replicas or 1)
            if num >= free:
                raise UserError(
                    f"served.{i} takes {_count(num, 'GPU')} (replicas * engine.tensor_parallel_size) of {free} that "
                    "are left of the node, and leaves none to train",
                    "give it fewer, or nodes of its own",
                )
            engines, free = _grouped(range(free - num, free), tp), free - num
        places.append(ServedPlace(one.name, nodes, engines))
    return tuple(places)


def _engines_on_cpu(key: str, one: ServedConfig) -> int:
    """Engines of a node without GPUs."""
    nodes = one.nodes or 1
    if one.engine.tensor_parallel_size != 1:
        raise UserError(
            f"{key}.engine.tensor_parallel_size={one.engine.tensor_parallel_size} needs GPUs",
            f"on the CPU set it to 1, and give more {key}.replicas",
        )
    return _evenly(nodes if one.replicas is None else one.replicas, nodes, f"{key}.replicas")


def _engines_of_nodes(key: str, one: ServedConfig, gpus: int) -> _Gpus:
    """Engines of each of a model's own nodes, on all of its GPUs."""
    tp = one.engine.tensor_parallel_size
    if gpus % tp or one.replicas not in (None, one.nodes * gpus // tp):
        given = "" if one.replicas is None else f"{key}.replicas={one.replicas} of "
        raise UserError(
            f"{given}{key}.engine.tensor_parallel_size={tp} does not take all of the {_count(gpus, 'GPU')} of each of "
            f"its {_count(one.nodes, 'node')}",
            f"leave {key}.replicas out, and choose a tensor_parallel_size of {_divisors(gpus)}",
        )
    return _grouped(range(gpus), tp)


def _share(total: int, ratio: float) -> int:
    """The share of `total` that generates: the nearest whole number, at least 1, and 1 is left."""
    return min(max(int(total * ratio + 0.5), 1), total - 1)


# --- GPUs and processes of a node


def _on_same(cfg: Config, gpus: int, nodes: int) -> tuple[_Gpus, _Gpus]:
    """Both roles on all that a node has: its GPUs or its cores."""
    replica_gpus = _replicas(cfg, gpus, nodes)
    if gpus == 0:
        return ((),) * (cfg.trainer.processes_per_node or 1), replica_gpus
    _all_gpus_train(cfg, gpus)
    return _one_each(range(gpus)), replica_gpus


def _on_many_nodes(cfg: Config, gpus: int, rollout_nodes: int) -> tuple[_Gpus, _Gpus]:
    replica_gpus = _replicas(cfg, gpus, rollout_nodes)
    _all_gpus_train(cfg, gpus)
    return _one_each(range(gpus)), replica_gpus


def _replicas(cfg: Config, gpus: int, rollout_nodes: int) -> _Gpus:
    """The generators of a node that does nothing else, or of one without GPUs."""
    tp, replicas = cfg.generator.engine.tensor_parallel_size, cfg.generator.replicas
    if gpus == 0:
        _no_tensor_parallel_on_cpu(cfg)
        return ((),) * _evenly(rollout_nodes if replicas is None else replicas, rollout_nodes)
    if gpus % tp:
        raise UserError(
            f"generator.engine.tensor_parallel_size={tp} does not divide the {_count(gpus, 'GPU')} of a node",
            f"choose one of {_divisors(gpus)}",
        )
    if replicas is not None and _evenly(replicas, rollout_nodes) * tp != gpus:
        raise UserError(
            f"generator.replicas={replicas} with tensor_parallel_size={tp} need {replicas * tp} GPUs, "
            f"{_count(rollout_nodes, 'rollout node')} have {rollout_nodes * gpus}",
            f"leave generator.replicas out, or give {rollout_nodes * gpus // tp}",
        )
    return _grouped(range(gpus), tp)


def _on_one_node(cfg: Config, gpus: int) -> tuple[_Gpus, _Gpus]:
    """Split the GPUs of the only node: trainers take the first, generators the last. One GPU is shared."""
    tp, degrees = cfg.generator.engine.tensor_parallel_size, cfg.trainer.parallelism
    replicas, procs = cfg.generator.replicas, cfg.trainer.processes_per_node
    if gpus == 1:
        if (tp, replicas or 1, procs or 1) != (1, 1, 1):
            raise UserError(
                "one GPU holds one trainer process and one generator replica",
                "set tensor_parallel_size=1, leave generator.replicas and trainer.processes_per_node out",
            )
        return _one_each(range(1)), _grouped(range(1), 1)
    shard = degrees.data_parallel_shard_degree
    unit = _known_degrees(cfg)
    fits = [
        trainers
        for trainers in range(1, gpus)
        if (gpus - trainers) % tp == 0
        and (trainers == unit if shard > 0 else trainers % unit == 0)
        and replicas in (None, (gpus - trainers) // tp)
        and procs in (None, trainers)
    ]
    if not fits:
        given = [
            f"generator.engine.tensor_parallel_size={tp}",
            f"trainer.parallelism of {unit}" + (" or a multiple of it" if shard < 0 else ""),
        ]
        given += [f"generator.replicas={replicas}"] * (replicas is not None)
        given += [f"trainer.processes_per_node={procs}"] * (procs is not None)
        raise UserError(
            f"the {gpus} GPUs of the node cannot be split between trainers and generators with {', '.join(given)}",
            "every GPU must have work: replicas * tensor_parallel_size and the trainer processes add up to the GPUs",
        )
    wanted = gpus - _share(gpus, cfg.cluster.rollout_ratio)
    trainers = min(fits, key=lambda n: abs(n - wanted))
    return _one_each(range(trainers)), _grouped(range(trainers, gpus), tp)


def _trainers_alone(cfg: Config, gpus: int) -> tuple[_Gpus, _Gpus]:
    tp = cfg.generator.engine.tensor_parallel_size
    if cfg.generator.replicas not in (None, 1):
        raise UserError(
            f"recipe={cfg.recipe} evaluates with one generator, generator.replicas is {cfg.generator.replicas}",
            "leave it out",
        )
    if gpus == 0:
        _no_tensor_parallel_on_cpu(cfg)
        return ((),) * (cfg.trainer.processes_per_node or 1), ((),)
    if tp > gpus:
        raise UserError(
            f"generator.engine.tensor_parallel_size={tp}, a node has {_count(gpus, 'GPU')}", f"give at most {gpus}"
        )
    _all_gpus_train(cfg, gpus)
    return _one_each(range(gpus)), (tuple(range(tp)),)


def _check_degrees(cfg: Config, placement: Placement, needs: Needs) -> None:
    p = cfg.trainer.parallelism
    world, local = placement.trainer_procs, placement.trainer_procs_per_node
    tp, shard, replicate = p.tensor_parallel_degree, p.data_parallel_shard_degree, p.data_parallel_replicate_degree
    cp, ep = p.context_parallel_degree, p.expert_parallel_degree
    where = f"{_count(len(placement.trainer_nodes), 'trainer node')} of {_count(local, 'process', 'processes')}"
    more = "" if placement.gpus_per_node else ", or raise trainer.processes_per_node"
    if local % tp:
        raise UserError(
            f"trainer.parallelism.tensor_parallel_degree={tp} does not divide the "
            f"{_count(local, 'trainer process', 'trainer processes')} of a node",
            f"choose one of {_divisors(local)}{more}",
        )
    if cp > 1 and ep > 1:
        raise UserError(
            f"trainer.parallelism.context_parallel_degree={cp} does not go with expert_parallel_degree={ep}",
            "leave that one out: ranks that share rows share the weights too, as FSDP does",
        )
    known = _known_degrees(cfg)
    if known != world if shard > 0 else world % known:
        raise UserError(
            f"trainer.parallelism: replicate {replicate} * shard {shard if shard > 0 else 'rest'} * "
            f"{f'context {cp} * ' if cp > 1 else ''}tensor {tp} "
            f"does not make the {_count(world, 'trainer process', 'trainer processes')} ({where})",
            f"data_parallel_shard_degree=-1 takes all that the other degrees leave{more}",
        )
    frozen = len(placement.frozen_nodes) * len(placement.frozen_gpus)
    if frozen and cp > 1 and (known != frozen if shard > 0 else frozen % known):
        raise UserError(
            f"the {_count(frozen, 'process', 'processes')} of frozen models cannot share rows as the trainers do: "
            f"trainer.parallelism has {known} ranks at least, context_parallel_degree={cp} among them",
            f"give the frozen models {known} processes, or leave cluster.frozen_nodes and frozen_processes out",
        )
    if world // replicate % ep:
        raise UserError(
            f"trainer.parallelism.expert_parallel_degree={ep} does not divide the "
            f"{world // replicate} processes that share a copy of the model",
            f"choose one of {_divisors(world // replicate)}",
        )
    ranks = world // (tp * cp)
    if needs.learns_from == "examples":
        batch, what = cfg.trainer.training.global_batch_size, "trainer.training.global_batch_size"
    else:
        batch = cfg.rollout.prompts_per_step * cfg.rollout.group_size
        what = "rollout.prompts_per_step * rollout.group_size"
    if batch < ranks:
        raise UserError(
            f"{what} = {batch} is less than the {ranks} data-parallel ranks: some would never have work",
            "raise the batch, or use fewer trainer nodes or more tensor parallelism",
        )


def _known_degrees(cfg: Config) -> int:
    """The processes that ``trainer.parallelism`` names; where the shard degree is -1, their number is a multiple."""
    p = cfg.trainer.parallelism
    shard = max(p.data_parallel_shard_degree, 1)
    return p.data_parallel_replicate_degree * shard * p.context_parallel_degree * p.tensor_parallel_degree


def _frozen_gpus(cfg: Config, gpus: int) -> _Gpus:
    """The processes of frozen models of a node: all its GPUs, or the last ones of the only node."""
    num = cfg.cluster.frozen_processes
    if gpus == 0:
        return ((),) * (num or 1)
    if cfg.cluster.frozen_nodes:
        if num not in (None, gpus):
            raise UserError(
                f"cluster.frozen_processes={num}, a node of frozen models has {_count(gpus, 'GPU')}",
                "leave cluster.frozen_processes out: each GPU has one",
            )
        return _one_each(range(gpus))
    assert num is not None
    if num >= gpus:
        raise UserError(
            f"cluster.frozen_processes={num} of the {_count(gpus, 'GPU')} of the node leave none to train",
            "give fewer, or leave it out: the frozen models then stand beside the policy",
        )
    return _one_each(range(gpus - num, gpus))


def _all_gpus_train(cfg: Config, gpus: int) -> None:
    if cfg.trainer.processes_per_node not in (None, gpus):
        raise UserError(
            f"trainer.processes_per_node={cfg.trainer.processes_per_node}, a trainer node has {_count(gpus, 'GPU')}",
            "leave trainer.processes_per_node out: each GPU has one",
        )


def _no_tensor_parallel_on_cpu(cfg: Config) -> None:
    if cfg.generator.engine.tensor_parallel_size != 1:
        raise UserError(
            f"generator.engine.tensor_parallel_size={cfg.generator.engine.tensor_parallel_size} needs GPUs",
            "on the CPU give generator.engine.tensor_parallel_size=1 and more generator.replicas",
        )


def _evenly(replicas: int, nodes: int, key: str = "generator.replicas") -> int:
    if replicas < 1 or replicas % nodes:
        what = "rollout node" if key == "generator.replicas" else "node"
        raise UserError(
            f"{key}={replicas} do not spread evenly over {_count(nodes, what)}", f"give a multiple of {nodes}"
        )
    return replicas // nodes


# --- text


def _one_each(gpus: range) -> _Gpus:
    return tuple((gpu,) for gpu in gpus)


def _grouped(gpus: range, size: int) -> _Gpus:
    return tuple(tuple(gpus[i : i + size]) for i in range(0, len(gpus), size))


def _all(groups: _Gpus) -> set[int]:
    return {gpu for group in groups for gpu in group}


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _nodes(nodes: range) -> str:
    return f"node {nodes[0]}" if len(nodes) == 1 else f"nodes {nodes[0]}-{nodes[-1]}"


def _gpus(gpus: tuple[int, ...]) -> str:
    return f"GPU {gpus[0]}" if len(gpus) == 1 else f"GPUs {gpus[0]}-{gpus[-1]}"


def _line(nodes: range, role: str, units: _Gpus, one: str, many: str) -> str:
    line = f"  {_nodes(nodes):<14} {role:<11}"
    if not units:
        return line.rstrip()
    line += f" {_count(len(nodes) * len(units), one, many)}"
    if len(nodes) > 1:
        line += f", {len(units)} a node"
    if not units[0]:
        return line + ", CPU"
    used = tuple(gpu for unit in units for gpu in unit)
    return f"{line}, {_gpus(used)}" + (f", {len(units[0])} GPUs each" if len(units[0]) > 1 else "")
