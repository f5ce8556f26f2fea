"""What keeps a container from starting, in a line: known on the login node, or on one node alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.config.schema import ContainerConfig
from forge_hpc.container.mounts import site_mounts
from forge_hpc.container.runtimes import binary


def is_file_of_image(container: ContainerConfig) -> bool:
    """Whether the image is a file or folder, and nothing with a scheme (``docker://…``, ``docker-archive:a.tar``) or of
    a registry (``nvcr.io#nvidia/pytorch``). To Apptainer all is a file that has no scheme, to pyxis what begins like a
    path."""
    image = container.image or ""
    if container.runtime == "apptainer":
        return bool(image) and re.match(r"[a-z][a-z0-9+-]*:", image) is None
    return re.match(r"[./~]", image) is not None


def problems_here(cfg: Config) -> list[str]:
    """Why this node cannot start the container."""
    return list(_problems_here(cfg.slurm.container))


def _problems_here(container: ContainerConfig) -> Iterator[str]:
    if container.runtime == "apptainer" and binary() is None:
        yield "apptainer is not installed here, or not on the PATH after slurm.setup"
    if is_file_of_image(container) and not Path(str(container.image)).exists():
        yield f"slurm.container.image={container.image} is not there"
    for mount in site_mounts(container):
        if not Path(mount.source).exists():
            yield f"slurm.container.mounts: {mount.source} is not there"


def check_container(cfg: Config) -> list[str]:
    """What a login node can say of the jobs' container: lines of warning.

    Raises:
        UserError: its image is a file that is not here, or a mount cannot be read.
    """
    container = cfg.slurm.container
    if container.runtime is None:
        return []
    mounts = site_mounts(container)
    if is_file_of_image(container) and not Path(str(container.image)).exists():
        raise UserError(
            f"slurm.container.image={container.image} is not there",
            "build it on a file system that all nodes share (docs/containers.md); slurm.container.runtime=null runs "
            "without",
        )
    missing = (mount.source for mount in mounts if not Path(mount.source).exists())
    return [f"slurm.container.mounts: {path} is not on this machine; nodes without it are left out" for path in missing]
