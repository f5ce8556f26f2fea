"""What the Hugging Face cache of this machine has, without its libraries, which take a second to import.

A name of the hub is ``OWNER/NAME``, or ``OWNER/NAME@REVISION`` with a branch, a tag or a commit; without one, ``main``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "merges.txt", "vocab.*")
"""Files of a model that a run reads, as patterns."""
VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT")
"""Of the environment: where the cache is, and whom it is filled from."""
_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SETS = re.compile(rf"\s*(?:export\s+)?(?P<name>{'|'.join(VARIABLES)})=(?P<value>\S.*)")


def split_name(name: str) -> tuple[str, str | None]:
    """``OWNER/NAME`` and the revision, None where it names none. Raises ValueError: it is no name of the hub."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is neither OWNER/NAME nor OWNER/NAME@REVISION")
    return found["name"], found["revision"]


def nodes_environ(setup: Iterable[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``environ`` as nodes will have it: with what the shell lines ``setup`` (``slurm.setup``) set of `VARIABLES`."""
    found = dict(environ)
    for line in setup:
        if said := _SETS.fullmatch(line):
            words = shlex.split(said["value"], comments=True)
            value = re.sub(r"\$\{?(\w+)\}?", lambda name: found.get(name[1], ""), words[0] if words else "")
            found[said["name"]] = value
    return found


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models and datasets of the hub are kept, by the variables that ``huggingface_hub`` reads."""
    if cache := environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environ.get("HF_HOME") or Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def repo_folder(name: str, kind: str = "model", environ: Mapping[str, str] = os.environ) -> Path:
    """All that the cache has of ``OWNER/NAME``. ``kind``: model, dataset."""
    return hub_cache(environ) / f"{kind}s--{name.replace('/', '--')}"


def cached_commit(name: str, kind: str = "model", environ: Mapping[str, str] = os.environ) -> str | None:
    """The commit that a name of the hub means in the cache; None where nothing of it was ever fetched."""
    try:
        repo, revision = split_name(name)
    except ValueError:
        return None
    folder = repo_folder(repo, kind, environ)
    try:
        commit = revision if revision and _COMMIT.fullmatch(revision) else None
        commit = commit or (folder / "refs" / (revision or "main")).read_text().strip()
        return commit if commit and (folder / "snapshots" / commit).is_dir() else None
    except OSError:
        return None


def cached_snapshot(name: str, kind: str = "model", environ: Mapping[str, str] = os.environ) -> Path | None:
    """The directory of a name of the hub, which may hold some of its files alone; None where it was never fetched."""
    commit = cached_commit(name, kind, environ)
    return None if commit is None else repo_folder(split_name(name)[0], kind, environ) / "snapshots" / commit


def listed_files(folder: Path, commit: str, patterns: Iterable[str] = ("*",)) -> dict[str, int] | None:
    """Files of a commit and their bytes, as ``huggingface_hub`` 1.x has noted them when it fetched some of them; None
    where there is no such note."""
    try:
        files = json.loads((folder / "trees" / f"{commit}.json").read_text(encoding="utf-8"))["files"]
        return {
            name: file.get("lfs_size") or file["size"]
            for name, file in files.items()
            if any(fnmatchcase(name, pattern) for pattern in patterns)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def are_there(snapshot: Path, files: Mapping[str, int]) -> bool:
    """Whether the snapshot holds these files, each as long as it should be."""
    try:
        return all((snapshot / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False
