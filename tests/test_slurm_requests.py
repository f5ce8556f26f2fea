"""What is asked of Slurm: partitions of several kinds of nodes, a part of each node, options as they were written."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from slurm_cluster import SlurmCluster

from forge_hpc.cluster.allocation import host_address
from forge_hpc.config import Config, UserError, config_text, load_config, read_config
from forge_hpc.slurm import partitions
from forge_hpc.slurm.partitions import Kind, Partition
from forge_hpc.slurm.site import site_overrides
from launchers.slurm import RunExecutor, check_array, check_share

MIXED = Partition(
    "mixed",
    True,
    True,
    float("inf"),
    (Kind(6, 0, frozenset({"cpu"})), Kind(3, 4, frozenset({"a100", "ib"})), Kind(2, 8, frozenset({"h100", "ib"}))),
)


def job(nodes: int, gpus: int | None = None, constraint: str | None = None) -> Config:
    cfg = Config()
    cfg.cluster.nodes, cfg.cluster.gpus_per_node, cfg.slurm.constraint = nodes, gpus, constraint
    return cfg


@pytest.mark.parametrize(
    ("nodes", "gpus", "constraint"),
    [(2, 8, None), (5, 4, None), (11, 0, None), (3, 4, "a100"), (5, 4, "ib"), (2, 8, "h100&ib"), (5, 4, "a100|h100")],
)
def test_a_job_that_enough_nodes_of_a_mixed_partition_can_run_is_taken(nodes, gpus, constraint) -> None:
    partitions.check_job(job(nodes, gpus, constraint), [MIXED])


@pytest.mark.parametrize(
    ("cfg", "message", "hint"),
    [
        (job(3, 8), "3 nodes with 8 GPUs asked for, partition mixed has 2", "cluster.gpus_per_node=4 or --nodes 2"),
        (job(6, 4), "6 nodes with 4 GPUs asked for, partition mixed has 5", "--nodes 5 or another slurm.partition"),
        (job(4, 4, "a100"), "with 4 GPUs and a100 asked for, partition mixed has 3", "--nodes 3"),
        (job(7, None, "cpu"), "7 nodes with slurm.constraint=cpu asked for, partition mixed has 6", "--nodes 6"),
        (job(1, 1, "b200"), "partition mixed has 0", "another slurm.partition"),
    ],
)
def test_a_job_that_too_few_nodes_can_run_is_refused_with_what_would_fit(cfg: Config, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        partitions.check_job(cfg, [MIXED])
    assert hint in (error.value.hint or "")


def test_where_nothing_is_said_of_gpus_a_run_takes_those_that_enough_nodes_have() -> None:
    taken = {nodes: partitions.gpus_per_node(job(nodes), [MIXED]) for nodes in (1, 2, 3, 5, 6)}
    assert taken == {1: 8, 2: 8, 3: 4, 5: 4, 6: None}
    assert partitions.gpus_per_node(job(1, constraint="a100"), [MIXED]) == 4


@pytest.mark.slurm
def test_slurm_says_what_kinds_of_nodes_a_partition_has(
    gpu_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in gpu_cluster.env.items():
        monkeypatch.setenv(key, value)
    [main] = [partition for partition in partitions.partitions() if partition.name == "main"]
    assert (main.kinds, main.nodes, main.gpus_on(4)) == ((Kind(4, 4, gpu="h100"),), 4, 4)


def test_part_of_a_node_is_not_asked_for_without_saying_how_much() -> None:
    cfg = Config()
    check_share(cfg)
    cfg.slurm.exclusive = False
    with pytest.raises(UserError, match="does not say how much") as error:
        check_share(cfg)
    assert "slurm.cpus_per_task=16 slurm.mem=128G" in (error.value.hint or "")
    cfg.slurm.cpus_per_task = 8
    with pytest.raises(UserError) as error:
        check_share(cfg)
    assert "such as slurm.mem=128G," in (error.value.hint or "")
    cfg.slurm.mem = "64G"
    check_share(cfg)
    cfg = load_config(None, ["slurm.exclusive=false", "slurm.extra={cpus-per-gpu: 8, mem_per_gpu: 64G}"])
    check_share(cfg)


@pytest.mark.parametrize("array", ["1-3", "1,2", "1-4%2", "0-9:3"])
def test_an_array_whose_tasks_would_all_be_one_run_is_refused(array: str) -> None:
    with pytest.raises(UserError, match="all be this one run") as error:
        check_array(load_config(None, [f"slurm.extra={{array: '{array}'}}"]))
    assert f"{array.partition('%')[0]}%1" in (error.value.hint or "")


@pytest.mark.parametrize("extra", ["{}", "{array: '3'}", "{array: '1-3%1'}", "{--array: '1,5%1'}"])
def test_one_run_in_jobs_after_one_another_may_be_an_array(extra: str) -> None:
    check_array(load_config(None, [f"slurm.extra={extra}"]))


def test_memory_in_a_raw_option_takes_the_place_of_the_whole_nodes(tmp_path: Path) -> None:
    cfg = load_config(None, ["slurm.extra.mem-per-gpu=64G"])
    script = RunExecutor(cfg, tmp_path).script()
    assert "#SBATCH --mem-per-gpu=64G" in script and "--mem=0" not in script


def test_raw_options_keep_their_text_through_every_door(tmp_path: Path) -> None:
    written = (
        "{nice: 010, licenses: 1.10, comment: 0123, wckey: 1e3, begin: 12:00:00, overcommit: true, requeue: false}"
    )
    site = tmp_path / "site.yaml"
    site.write_text(f"slurm: {{extra: {written}}}\n")
    (tmp_path / "run.yaml").write_text(f"slurm:\n  extra: {written}\n  setup: [0123, echo]\n")
    doors = [
        load_config(tmp_path / "run.yaml"),
        load_config(None, [f"slurm.extra={written}", "slurm.setup=[0123, echo]"]),
        load_config(None, [*site_overrides(str(site)), "slurm.setup=[0123, echo]"]),
    ]
    (tmp_path / "saved.yaml").write_text(config_text(doors[0]))
    for cfg in [*doors, read_config(tmp_path / "saved.yaml")]:
        assert cfg.slurm.extra == {
            "nice": "010",
            "licenses": "1.10",
            "comment": "0123",
            "wckey": "1e3",
            "begin": "12:00:00",
            "overcommit": True,
            "requeue": False,
        }
        assert cfg.slurm.setup == ["0123", "echo"]
    script = RunExecutor(doors[0], tmp_path / "run").script()
    flags = {shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")}
    assert {"--nice=010", "--licenses=1.10", "--comment=0123", "--overcommit"} <= flags


def test_a_host_without_a_route_gives_the_address_of_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: socket.socket, address: tuple[str, int]) -> None:
        raise OSError(101, "Network is unreachable")

    def entry(address: str) -> SimpleNamespace:
        return SimpleNamespace(family=socket.AF_INET, address=address)

    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"connect": unreachable}))
    interfaces = {"lo": [entry("127.0.0.1")], "eth1": [entry("10.9.9.9")], "ib0": [entry("10.1.2.3")]}
    state = {name: SimpleNamespace(isup=name != "eth1") for name in interfaces}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: state)
    assert host_address(2, {}) == "10.1.2.3"
    assert host_address(2, {"SLURM_LAUNCH_NODE_IPADDR": "10.1.2.1"}) == "10.1.2.3"
    del interfaces["ib0"]
    with pytest.raises(OSError, match="no address by which other nodes reach it"):
        host_address(2, {})


@pytest.mark.slurm
def test_a_host_whose_name_is_loopback_is_found_in_a_network_without_a_default_route(
    slurm_cluster: SlurmCluster,
) -> None:
    code = (
        "import socket; socket.gethostbyname = lambda name: '127.0.1.1'; "
        "from forge_hpc.cluster.allocation import host_address; print(host_address(2, {}))"
    )
    host = slurm_cluster.hosts[1]
    done = slurm_cluster.run(*slurm_cluster.on_host(host, sys.executable, "-c", code))
    assert done.stdout.strip() == host.address
