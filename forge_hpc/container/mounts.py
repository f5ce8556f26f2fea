"""What a run sees inside its container, besides what the runtime shows by itself: home, /tmp, /dev, /sys."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.config.recipes import named_paths
from forge_hpc.config.schema import ContainerConfig

PROJECT = Path(__file__).resolve().parents[2]
_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
_CACHES_OF_COMPILERS = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class Mount:
    """A file or folder of the node, and where it is seen inside."""

    source: str
    target: str
    read_only: bool = False


def site_mounts(container: ContainerConfig) -> list[Mount]:
    """Those of ``slurm.container.mounts``, in which ``~`` and ``$NAME`` stand for what they are here.

    Raises:
        UserError: one of them says something else than SOURCE[:TARGET[:ro]].
    """
    return [_parsed(text) for text in container.mounts]


def _parsed(text: str) -> Mount:
    source, *more = os.path.expandvars(text).split(":")
    source = os.path.expanduser(source)  # noqa: PTH111  a Path would drop a last slash, and we show what was written
    target, *flags = more or [source]
    if not source.startswith("/") or not target.startswith("/") or flags not in ([], ["ro"], ["rw"]):
        raise UserError(
            f"slurm.container.mounts: {text!r} is no mount", "write SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, absolute"
        )
    if "$" in source + target or "," in source + target:
        raise UserError(f"slurm.container.mounts: {text!r} has a comma, or a variable that is not set here")
    return Mount(source, target, flags == ["ro"])


def all_mounts(cfg: Config, run_dir: Path) -> list[Mount]:
    """The site's, then at the same places inside: the run, the project, the working directory, temporary files, the
    files that the configuration names, and caches that the environment names."""
    given = site_mounts(cfg.slurm.container)
    taken = {mount.target for mount in given}
    own = dict.fromkeys(str(path) for path in _own(cfg, run_dir) if str(path) != "/")
    folders = [path for path in own if not any(Path(path).is_relative_to(p) and path != p for p in own)]
    return [*given, *(Mount(path, path) for path in folders if path not in taken)]


def _own(cfg: Config, run_dir: Path) -> Iterator[Path]:
    for path in (run_dir, PROJECT, Path.cwd()):
        yield from dict.fromkeys((path, path.resolve()))
    for key, value, rule in named_paths(cfg):
        if rule.path and not key.startswith("slurm.") and (path := Path(value)).is_absolute() and path.exists():
            yield from dict.fromkeys((path, path.resolve()))
        if rule.code and (path := Path(value.rpartition(":")[0])).is_file():
            yield path.absolute().parent  # with what it imports
    named = (Path(os.environ[name]) for name in (*_CACHES, *_CACHES_OF_COMPILERS) if os.environ.get(name))
    yield from (path for path in (*named, Path(tempfile.gettempdir())) if path.is_absolute() and path.is_dir())
