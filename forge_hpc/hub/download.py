"""From the hub to the cache: models with their tokenizers, and the files of data sets, each at one commit.

``huggingface_hub`` does the work: it locks each file, so that several may fetch into one cache at once, writes it
beside its place and moves it there, and takes no file twice. What was interrupted goes on with the file that it was at.
"""

from __future__ import annotations

import ctypes
import difflib
import errno
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_hpc.config import UserError
from forge_hpc.config.hub_cache import MODEL_FILES, hub_cache, listed_files, repo_folder
from forge_hpc.config.models import check_tokenizer, check_weights, read_model_config
from forge_hpc.files import atomic_write_text
from forge_hpc.hub.assets import NOTE, Asset, find_cached, read_note

_CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
_ALL = ("*",)
_STALE_S = 86400.0
_FALLOC_FL_KEEP_SIZE = 1
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Plan:
    """What there is to do for an asset."""

    asset: Asset
    commit: str
    patterns: tuple[str, ...]
    """Its files."""
    num_bytes: int
    left_bytes: int
    """Those of files that are not in the cache yet."""
    left_files: int


class HubSilent(UserError):
    """The hub does not answer."""


class Hub:
    """The hub that ``HF_ENDPOINT`` names, and the cache of this machine.

    Example:
        hub = Hub()
        plans = [hub.plan(asset) for asset in assets_of(cfg)]
        hub.check_room(plans)
        for plan in plans: hub.fetch(plan)
    """

    def __init__(self) -> None:
        from huggingface_hub import HfApi, constants

        self.cache = hub_cache()
        self.endpoint: str = constants.ENDPOINT
        self._api = HfApi()
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set, and fetching needs the hub", "unset HF_HUB_OFFLINE")

    # ---- what there is to do

    def plan(self, asset: Asset) -> Plan:
        """Ask the hub for the commit that a name means now, its files and their sizes.

        Raises:
            UserError: there is no such thing, it is not given to this user, or the hub does not answer.
        """
        with self._naming(asset):
            commit = self._commit(asset)
            patterns = MODEL_FILES if asset.kind == "model" else self._data_files(asset, commit)
            with quiet():
                files = self._snapshot(asset, commit, patterns, dry_run=True)
        left = [file for file in files if file.will_download]
        sizes = sum(file.file_size or 0 for file in files), sum(file.file_size or 0 for file in left)
        return Plan(asset, commit, patterns, *sizes, len(left))

    def _commit(self, asset: Asset) -> str:

        found = self._api.repo_info(asset.repo, repo_type=asset.kind, revision=asset.revision, timeout=30.0)
        assert found.sha is not None
        return found.sha

    def _data_files(self, asset: Asset, commit: str) -> tuple[str, ...]:
        """The files of the data set's configuration, by what ``datasets`` finds; and those of the first one, without
        which it does not load another from a directory."""
        import datasets

        if not asset.splits:
            return _ALL
        found: set[str] = set()
        for config in dict.fromkeys((asset.config, None)):
            try:
                builder = datasets.load_dataset_builder(asset.repo, config, revision=commit)
            except ValueError:
                if config is not None or asset.config is None:
                    raise
                break  # it has no configuration of its own choice
            if config == asset.config and (unknown := set(asset.splits) - set(builder.config.data_files or {})):
                raise UserError(
                    f"the {asset} has no split {sorted(unknown)[0]} [{', '.join(asset.keys)}]",
                    f"it has {', '.join(map(str, builder.config.data_files))}",
                )
            for urls in (builder.config.data_files or {}).values():
                found |= {_within(url, commit) for url in urls}
        return (*_CARDS, *(_literal(name) for name in sorted(found)))

    # ---- room

    def check_room(self, plans: Sequence[Plan]) -> None:
        """Raise a UserError unless the cache has room for what is to come: it is reserved for a moment, which a quota
        refuses, too, where the file system can do so."""
        needed = sum(plan.left_bytes for plan in plans)
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if free < needed:
            raise _full(self.cache, f"{size(needed)} are to come, and {size(free)} are free")
        if needed:
            with tempfile.TemporaryFile(dir=self.cache) as file:
                code = _reserve(file.fileno(), needed)
            if code in _FULL:
                raise _full(self.cache, f"{size(needed)} are to come, and {os.strerror(code)}")

    # ---- the work

    def fetch(self, plan: Plan) -> Path:
        """Bring what is missing; the directory of the snapshot.

        Raises:
            UserError: it is not to be had, or there is no room. What has come stays, and is not fetched again.
        """
        asset = plan.asset
        folder = repo_folder(asset.repo, asset.kind)
        with self._naming(asset):
            self._remove_leftovers(folder)
            snapshot = Path(self._snapshot(asset, plan.commit, plan.patterns))
            if asset.kind == "model":
                read_model_config(snapshot)
                check_weights(snapshot)
                check_tokenizer(snapshot)
            elif plan.patterns != _ALL:
                snapshot = self._whole_data_set(plan, snapshot)
            self._note_branch(folder, asset.revision or "main", plan.commit)
        if find_cached(asset) is None:
            raise UserError(f"the {asset} was fetched, and is not whole in {snapshot}", "fetch it again")
        return snapshot

    def _whole_data_set(self, plan: Plan, snapshot: Path) -> Path:
        """See that ``datasets`` makes the same of the directory as of the hub; else all of it is fetched."""
        import datasets

        asset = plan.asset
        try:
            builder = datasets.load_dataset_builder(str(snapshot), asset.config)
        except (FileNotFoundError, ValueError):
            snapshot = Path(self._snapshot(asset, plan.commit, _ALL))
            builder = datasets.load_dataset_builder(str(snapshot), asset.config)
        folder, used = snapshot.parents[1], set(plan.patterns)
        for paths in (builder.config.data_files or {}).values():
            used |= {_literal(os.path.relpath(path, snapshot)) for path in paths}
        files = listed_files(folder, plan.commit, used) or {}
        notes = read_note(folder, plan.commit) | {asset.config or "": files}
        (folder / NOTE).mkdir(exist_ok=True)
        _write(folder / NOTE / f"{plan.commit}.json", json.dumps(notes))
        return snapshot

    def _snapshot(self, asset: Asset, commit: str, patterns: Sequence[str], *, dry_run: bool = False) -> Any:
        from huggingface_hub import snapshot_download

        return snapshot_download(
            asset.repo,
            repo_type=asset.kind,
            revision=commit,
            allow_patterns=list(patterns),
            cache_dir=self.cache,
            dry_run=dry_run,
        )

    def _note_branch(self, folder: Path, revision: str, commit: str) -> None:
        if revision != commit:
            place = folder / "refs" / revision
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, commit)

    def _remove_leftovers(self, folder: Path) -> None:
        """Parts of files that a killed process has left: nobody goes on with them."""
        for path in (folder / "blobs").glob("*.incomplete"):
            try:
                found = path.stat()
                if found.st_uid == os.getuid() and time.time() - found.st_mtime > _STALE_S:
                    path.unlink()
            except OSError:
                continue

    # ---- what goes wrong

    @contextmanager
    def _naming(self, asset: Asset) -> Iterator[None]:
        """One line for what the libraries raise."""
        import datasets
        import httpx
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        place = f"[{', '.join(asset.keys)}]"
        log_in = "`hf auth login`, or HF_TOKEN, with a token of an account that may read it"
        try:
            yield
        except GatedRepoError:
            url = f"{self.endpoint}/{'datasets/' if asset.kind == 'dataset' else ''}{asset.repo}"
            raise UserError(f"the {asset} is gated {place}", f"accept its terms at {url}; then {log_in}") from None
        except RevisionNotFoundError:
            raise UserError(f"the {asset} has no such revision {place}", self._revisions(asset)) from None
        except (RepositoryNotFoundError, HFValidationError, datasets.exceptions.DatasetNotFoundError):
            near = self._nearest(asset)
            hint = f"did you mean {near}?" if near else f"check the name; where it is private: {log_in}"
            raise UserError(f"the hub has no {asset} {place}", hint) from None
        except HfHubHTTPError as error:
            raise UserError(f"{self.endpoint} refuses the {asset} {place}: {error}", "try again later") from None
        except (httpx.TransportError, ConnectionError) as error:
            raise HubSilent(
                f"cannot reach {self.endpoint} for the {asset} {place}: {error or type(error).__name__}",
                "run it where there is a network; HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror",
            ) from None
        except OSError as error:
            if error.errno in _FULL:
                raise _full(self.cache, f"{os.strerror(error.errno)}; what has come stays") from None
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(
                    f"cannot write to the cache {self.cache}: {error}", "make it writable for you, or set HF_HOME"
                ) from None
            raise UserError(f"cannot fetch the {asset} {place}: {error}", "try it again") from None
        except ValueError as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot load the {asset} {place}: {first}", "check data.name and its split") from None

    def _nearest(self, asset: Asset) -> str | None:
        """A name that the hub has."""
        owner, _, name = asset.repo.rpartition("/")
        listed = self._api.list_models if asset.kind == "model" else self._api.list_datasets
        try:
            names = [repo.id for repo in listed(author=owner, limit=500)] if owner else []
            names = names or [repo.id for repo in listed(search=name, limit=20)]
        except Exception:  # it is for a hint alone
            return None
        lower = {name.lower(): name for name in names}
        close = difflib.get_close_matches(asset.repo.lower(), lower, n=1)
        return lower[close[0]] if close else None

    def _revisions(self, asset: Asset) -> str:
        try:
            refs = self._api.list_repo_refs(asset.repo, repo_type=asset.kind)
            return f"it has {', '.join([ref.name for ref in [*refs.branches, *refs.tags]][:10])}, or a commit"
        except Exception:  # it is for a hint alone
            return "take a branch, a tag, or a commit of 40 digits"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the libraries."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def cache_umask(cache: Path) -> int:
    """The umask with which others may read, and members of a shared cache's group write, what is put into it: as they
    may with the folder itself, or where there is none yet with the one that it is made in."""
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    mode = there.stat().st_mode
    allowed = 0o700 | (mode & 0o055)
    if mode & stat.S_ISGID or (there == cache and mode & 0o020):
        allowed |= mode & 0o020
    return 0o777 & ~allowed


def _within(url: str, commit: str) -> str:
    """The path of a file in its repository, of ``hf://datasets/OWNER/NAME@COMMIT/PATH``."""
    return url.partition(f"@{commit}/")[2]


def _literal(name: str) -> str:
    """A pattern that is this name alone."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _write(path: Path, text: str) -> None:
    """As `atomic_write_text`, for all who may read the cache."""
    atomic_write_text(path, text)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _reserve(fd: int, num_bytes: int) -> int:
    """0, or the error with which the file system refuses the room; nothing is written."""
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.fallocate64(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes))
    return ctypes.get_errno() if done else 0


def _full(cache: Path, why: str) -> UserError:
    return UserError(f"no room in the cache {cache}: {why}", "make room there, or set HF_HOME; then fetch again")
