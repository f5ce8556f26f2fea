"""The user's own files that a configuration names, kept in ``RUN_DIR/code`` as they were when the run began.

A run goes on with the files where they are, and only while they are what they were: a reward that was edited between
two starts would change what is learned without a word. Kept are the files that rewards, losses, environments and
recipes are in, those beside them that they import, and those that the lines of ``slurm.setup`` name.

    code/reward-1a2b3c4d.py    a copy of each, by name and hash; those of earlier starts stay
    code/files.json            which file is which
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from forge_hpc.config import Config, UserError
from forge_hpc.config.fields import walk
from forge_hpc.files import (
    atomic_write_json,
    atomic_write_text,
    is_there,
    make_private_dir,
    open_private,
    read_text,
    refuse_newer,
    replace,
    temporary_for,
)
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.starts import newest_step

FORMAT = 1
MAX_FILES = 200
"""Of one that is named, with those that it imports: more is no reward's neighbourhood."""
MAX_SETUP_BYTES = 1_000_000
_OURS = ("forge_hpc", "launchers")
_INSTALLED = ("site-packages", "dist-packages")
_SETUP = "slurm.setup"


@dataclass(frozen=True)
class UserFile:
    """One of the user's files."""

    key: str
    """What names it, or the file that imports it: ``reward.0.name``."""
    place: str
    """What stands there: ``/home/me/reward.py``, ``package.module``."""
    name: str
    """Its path from the directory that it is imported from."""
    path: str
    sha256: str

    @property
    def copy(self) -> str:
        """Its name in ``RUN_DIR/code``."""
        path = Path(self.path)
        return f"{path.stem}-{self.sha256[:8]}{path.suffix}"


def keep_files(cfg: Config, run_dir: RunDir) -> None:
    """Copy the files that `cfg` names, and write down which they are. Those that were kept before stay."""
    directory, files = run_dir.path / "code", list(named_files(cfg))
    if not files and not is_there(directory):
        return
    make_private_dir(directory)
    for file in files:
        if not is_there(copy := directory / file.copy):
            temporary = temporary_for(copy)
            with os.fdopen(open_private(temporary, os.O_WRONLY | os.O_EXCL), "wb") as target:
                target.write(Path(file.path).read_bytes())
            replace(temporary, copy)
    atomic_write_json(directory / "files.json", {"format": FORMAT, "files": [asdict(file) for file in files]})


def check_files(cfg: Config, run_dir: RunDir, *, accept: bool = False) -> list[str]:
    """Compare the files that `cfg` names with those that the run has kept.

    Args:
        accept: go on with other ones, whatever they change.

    Returns:
        What has changed, a line a file. Empty where nothing has, or where nothing was kept (a new run).

    Raises:
        UserError: one is gone, or another one would change what a run learns that has learned something already.
            Comments, formatting and ``slurm.setup`` do not.
    """
    kept = _kept(run_dir)
    if kept is None:
        return []
    now = {(file.key, file.name): file for file in named_files(cfg)}
    asked_for = _places(cfg)
    lines, matters = [], []
    for place, old in kept.items():
        copy, new = run_dir.path / "code" / old.copy, now.get(place)
        if new is None:
            if accept or is_there(Path(old.path)) or asked_for.get(old.key) != old.place:
                continue  # nothing asks for it any more: what used to is another one, and told of
            raise UserError(
                f"{old.path}, which {old.key} needs, is gone",
                f"put it back: cp {shlex.quote(str(copy))} {shlex.quote(old.path)}",
            )
        if new.sha256 != old.sha256:
            lines.append(f"{new.key}: {new.path} {old.sha256[:8]} -> {new.sha256[:8]}")
            if new.key != _SETUP and not _is_same_code(Path(new.path), copy):
                matters.append((new.path, copy))
    for place, new in now.items():
        if place not in kept:
            lines.append(f"{new.key}: {new.path} none -> {new.sha256[:8]}")
    if matters and not accept and newest_step(run_dir) > 0:
        path, copy = matters[0]
        more = f", and {len(matters) - 1} more" if len(matters) > 1 else ""
        raise UserError(
            f"{path} is not what it was when the run began ({copy} is){more}",
            f"put it back, or learn on with what is there now: forge-hpc resume {shlex.quote(str(run_dir))} "
            "--accept-changes",
        )
    return lines


def named_files(cfg: Config) -> Iterator[UserFile]:
    """The user's files that `cfg` names and that are there. Nothing is run."""
    for key, place in _places(cfg).items():
        if (found := _find(place)) is not None:
            yield from (_describe(key, place, path, found[1]) for path in _with_imports(*found))
    for path in _setup_files(cfg.slurm.setup):
        yield _describe(_SETUP, str(path), path, path.parent)


def _places(cfg: Config) -> dict[str, str]:
    """Where the user's own code is, by the key that names it."""
    named = ((key, value) for key, value, rule in walk(cfg) if rule.code and isinstance(value, str) and ":" in value)
    return {key: value.rpartition(":")[0] for key, value in named}


def kept_files(run_dir: RunDir) -> str | None:
    """Which files the run has kept, as text for ``restore_kept``; None if it has kept none."""
    file = run_dir.path / "code" / "files.json"
    return read_text(file) if is_there(file) else None


def restore_kept(run_dir: RunDir, text: str | None) -> None:
    """Undo a ``keep_files``: the copies may stay, for they are told apart by their hashes."""
    file = run_dir.path / "code" / "files.json"
    if text is None:
        file.unlink(missing_ok=True)
    else:
        atomic_write_text(file, text)


def _kept(run_dir: RunDir) -> dict[tuple[str, str], UserFile] | None:
    file, text = run_dir.path / "code" / "files.json", kept_files(run_dir)
    if text is None:
        return None
    try:
        content = json.loads(text)
        refuse_newer(file, content.get("format"), FORMAT)
        files = [UserFile(**item) for item in content["files"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: {error}", "remove it; the next start writes it anew") from None
    return {(item.key, item.name): item for item in files}


def _describe(key: str, place: str, path: Path, root: Path) -> UserFile:
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return UserFile(key, place, str(path.relative_to(root)), str(path), sha256)


def _find(place: str) -> tuple[Path, Path] | None:
    """The file of ``file.py`` or ``package.module``, and the directory that its neighbours are imported from."""
    if place.endswith(".py"):
        path = Path(place).expanduser().absolute()
        return (path, path.parent) if is_there(path) else None
    if place.partition(".")[0] in _OURS:
        return None
    for root in map(Path, [*filter(None, sys.path), str(Path.cwd())]):  # in the order in which it is imported
        if (found := _module(root.absolute(), place.split("."))) is not None:
            return found, root.absolute()
    return None


def _module(root: Path, parts: list[str]) -> Path | None:
    base = root.joinpath(*parts)
    candidates = (base.with_suffix(".py"), base / "__init__.py") if parts else (base / "__init__.py",)
    return next((path for path in candidates if path.is_file()), None)


def _with_imports(path: Path, root: Path) -> list[Path]:
    """The file, and what it imports from below `root`, directly or not. Of an installed package the file alone."""
    if any(part in _INSTALLED for part in path.parts):
        return [path]
    packages = [parent / "__init__.py" for parent in path.parents if parent.is_relative_to(root) and parent != root]
    waiting = [path, *filter(Path.is_file, packages)]
    found = dict.fromkeys(waiting)
    while waiting and len(found) < MAX_FILES:
        for other in _imports(waiting.pop(0), root):
            if other not in found and not any(part in _INSTALLED for part in other.parts):
                found[other] = None
                waiting.append(other)
    return list(found)


def _imports(path: Path, root: Path) -> Iterator[Path]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # told by who loads it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names: Iterable[list[str]] = [alias.name.split(".") for alias in node.names]
            base = root
        elif isinstance(node, ast.ImportFrom):
            base = path.parents[node.level - 1] if node.level else root
            module = node.module.split(".") if node.module else []
            names = [module, *([*module, alias.name] for alias in node.names)]
        else:
            continue
        for parts in names:
            if (parts and parts[0] in _OURS) or not base.is_relative_to(root):
                continue
            for end in range(1, len(parts) + 1):  # importing a module runs the packages that it is in
                if (other := _module(base, parts[:end])) is not None:
                    yield other


def _setup_files(lines: Iterable[str]) -> Iterator[Path]:
    """Files that shell lines name, as far as that can be seen: words that are paths, and what is sourced."""
    seen = set()
    for line in lines:
        with suppress(ValueError):
            words = shlex.split(line, comments=True)
            for before, word in zip(["", *words], words, strict=False):
                if "/" not in word and before not in ("source", "."):
                    continue
                path = Path(os.path.expandvars(word.strip(";&|"))).expanduser().absolute()
                if path not in seen and path.is_file() and path.stat().st_size <= MAX_SETUP_BYTES:
                    seen.add(path)
                    yield path


def _is_same_code(new: Path, old: Path) -> bool:
    """Whether two files differ in nothing that Python sees: comments, blank lines, formatting."""
    try:
        return ast.dump(ast.parse(new.read_bytes())) == ast.dump(ast.parse(old.read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return False
