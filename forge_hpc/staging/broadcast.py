"""In the job script: ``python -m forge_hpc.staging.broadcast FOLDER srun OPTIONS...``

Packs the environment if its version is not packed yet, asks the nodes who lacks it, sends it to all of them where one
does, and prints what starts Python on a node, in words without spaces:

    bash .../start.sh run ROOT ARCHIVES SUFFIX ENV CODE

Where anything of it fails that is a warning, and nothing is printed: the run then uses the environment where it is.
Where only the broadcast fails each node reads the archive itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from forge_hpc.staging.pack import Archive, environment_archive, make, project_archive

START = Path(__file__).with_name("start.sh")
_LOOK_S, _SEND_S = 120.0, 900.0


def main(argv: Sequence[str]) -> int:
    """Door of the module."""
    folder, srun = os.path.expandvars(argv[0]), list(argv[1:])
    try:
        words = stage(folder, srun)
    except OSError as error:
        _say(f"warning: the environment is not staged: {error}")
        return 0
    print(" ".join(words))
    return 0


def stage(folder: str, srun: Sequence[str]) -> list[str]:
    """Bring the environment to the nodes; what starts Python there.

    Raises:
        OSError: it cannot be packed, or a name has a space.
    """
    if "$" in folder or not folder.startswith("/"):
        raise OSError(f"slurm.stage_environment={folder} names a variable that the job does not have")
    root = f"{folder.rstrip('/')}/forge-hpc-env-{os.getuid()}"
    archives = [environment_archive()]
    if (code := project_archive()) is not None:
        archives.append(code)
    for archive in archives:
        make(archive, _say)
    names = [archive.name for archive in archives]
    if _lacking([*srun, "bash", str(START), "look", root, *names]):
        for archive in archives:
            _send(archive, root)
    environment = archives[0].path
    suffix = environment.name.removeprefix(f"{names[0]}.")
    words = ["bash", str(START), "run", root, str(environment.parent), suffix, *names, *["-"] * (code is None)]
    if any(" " in word for word in words):
        raise OSError(f"a path has a space: {' '.join(words)}")
    return words


def _lacking(look: Sequence[str]) -> bool:
    """Whether a node lacks something. Where they cannot be asked, it is sent."""
    try:
        done = subprocess.run(look, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=_LOOK_S)
        return done.returncode != 0 or "lacks" in done.stdout
    except (OSError, subprocess.TimeoutExpired):
        return True


def _send(archive: Archive, root: str) -> None:
    """To a file of this job's own on all nodes: sbcast takes no folder, and what it finds there it does not replace."""
    target = f"{root}/.{archive.name}.{os.environ.get('SLURM_JOB_ID', '0')}{''.join(archive.path.suffixes)}"
    begin = time.monotonic()
    try:
        done = subprocess.run(
            ["sbcast", "--force", str(archive.path), target],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SEND_S,
        )
        why = "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1:] or [f"code {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        why = [str(error)]
    if why:
        _say(f"warning: sbcast of {archive.path} failed ({why[0]}): each node reads it from the shared disk")
    elif archive.is_environment:
        _say(f"sent {archive.path.stat().st_size / 1e9:.2f} GB to the nodes in {time.monotonic() - begin:.1f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
