"""Fixtures and rules that hold for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing_requirement
from slurm_gpus import GpuCluster

# Where continuous integration runs, a Slurm test that cannot run is a failure.
REQUIRE_SLURM = os.environ.get("CI") == "true" or os.environ.get("FORGE_HPC_REQUIRE_SLURM") == "1"


UMASK = os.umask(0o022)
os.umask(UMASK)


@pytest.fixture(autouse=True)
def ordinary_umask() -> None:
    """A test may have called what makes this process private (``setup_logging``): the next one begins as the first."""
    os.umask(UMASK)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This process is the only rank of the trainers."""
    import torch.distributed as dist

    from forge_hpc.training.distributed import init_distributed

    init_distributed(tmp_path_factory.mktemp("store") / "store", rank=0, world_size=1, local_rank=0, timeout_s=60)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 of random weights, its embeddings tied."""
    from tiny_models import write_model

    directory = tmp_path_factory.mktemp("model")
    write_model(directory, "qwen3", tied=True)
    return directory


def pytest_configure(config: pytest.Config) -> None:
    # SIGTERM, like Ctrl-C, takes fixtures down: a killed test run leaves no cluster behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if REQUIRE_SLURM and report.skipped and item.get_closest_marker("slurm"):
        report.outcome = "failed"
        report.longrepr = f"a Slurm test was skipped where none may be: {call.excinfo and call.excinfo.value}"
    return report


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A real Slurm cluster of 4 hosts, partitions `main` (default), `short` (10 minutes at most),
    `spot`, and `urgent`, which takes the nodes of the others' jobs.

    Slurm's commands need the environment `slurm_cluster.env`.
    """
    if reason := missing_requirement():
        pytest.skip(reason)
    with SlurmCluster(nodes=4) as cluster:
        print(f"Slurm cluster of 4 hosts up in {cluster.startup_s:.1f} s")
        yield cluster


@pytest.fixture(scope="session")
def gpu_cluster() -> Iterator[SlurmCluster]:
    """The same with four GPUs on each of the hosts."""
    if reason := missing_requirement():
        pytest.skip(reason)
    with GpuCluster() as cluster:
        yield cluster
