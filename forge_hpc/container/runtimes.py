"""How a command gets into a container. What Apptainer (1.4.5) makes of its line is tested with the real one; that of
pyxis (0.24.0, with enroot 4.1.2) has been run by hand: docs/containers.md says what."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.container.mounts import PROJECT, Mount, all_mounts
from forge_hpc.container.relay import PARENT

BINARIES = ("apptainer", "singularity")
"""Of either name; Singularity is older, and takes the same options."""
_NVIDIA = Path("/dev/nvidiactl")
_NOT_FOR_INSIDE = ("PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD")
"""They name what is outside."""


def binary() -> str | None:
    """Apptainer's path; None where it is not installed."""
    return next((path for name in BINARIES if (path := shutil.which(name)) is not None), None)


def apptainer(cfg: Config, mounts: Sequence[Mount], command: Sequence[str]) -> list[str]:
    """``command`` in the image, in this working directory, with the GPUs of this node where it has any.

    The network, the processes, /dev/shm and the user are the node's: ports, TLS and Slurm's limits are as without.
    """
    options = ["--nv"] if _NVIDIA.exists() else []
    for mount in mounts:
        options += ["--mount", _mount_option(mount)]
    image = str(cfg.slurm.container.image)
    return [binary() or BINARIES[0], "exec", *options, "--pwd", str(Path.cwd()), image, *command]


def _mount_option(mount: Mount) -> str:
    fields = ["type=bind", f"source={mount.source}", f"destination={mount.target}", *["ro"] * mount.read_only]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(fields)  # paths may have commas
    return text.getvalue()


def environment(variables: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Apptainer is started with: all that is outside but what would mislead Python, and over it ``variables``.

    APPTAINERENV_ wins over what the image sets itself.
    """
    own = {"PYTHONPATH": str(PROJECT), "PYTHONNOUSERSITE": "1", **variables}
    found = {name: value for name, value in environ.items() if name not in _NOT_FOR_INSIDE}
    return found | own | {f"APPTAINERENV_{name}": value for name, value in own.items()}


def pyxis_options(cfg: Config, run_dir: Path) -> list[str]:
    """Options of srun that start its tasks in the image, as the user that they are outside.

    The home directory is mounted by us: where something is mounted in it, enroot's own way fails (EINVAL, seen).

    Raises:
        UserError: the path of a mount has what pyxis or enroot takes for the end of one.
    """
    mounts = all_mounts(cfg, run_dir)
    for place in dict.fromkeys((str(Path.home()), PARENT)):  # before what lies in them, which they would hide
        if place != "/" and Path(place).is_dir() and place not in [mount.target for mount in mounts]:
            mounts.insert(0, Mount(place, place))
    if bad := next((path for m in mounts for path in (m.source, m.target) if re.search(r"[\s,:]", path)), None):
        raise UserError(
            f"pyxis cannot show {bad} inside: it has a blank, a comma or a colon", "take another path, or a link"
        )
    bound = [f"{m.source}:{m.target}{':ro' * m.read_only}" for m in mounts]
    return [
        f"--container-image={cfg.slurm.container.image}",
        f"--container-mounts={','.join(bound)}",
        f"--container-workdir={Path.cwd()}",
        "--no-container-mount-home",
        "--no-container-remap-root",
    ]


def within_pyxis(command: Sequence[str]) -> list[str]:
    """``command`` as the task that pyxis starts in the image, whose own variables win over the shell's."""
    unset = [word for name in _NOT_FOR_INSIDE for word in ("-u", name)]
    return ["env", *unset, f"PYTHONPATH={PROJECT}", "PYTHONNOUSERSITE=1", *command]
