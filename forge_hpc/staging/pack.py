"""An archive of the environment that this Python runs in, made once a version of it.

    NAME.tar.zst     base/   the Python that the environment was made with, unless it is the system's
                     venv/   the environment; pyvenv.cfg is finished where it is unpacked
                     SIZE    files and bytes (without compiled ones), by which a node sees that all of it is there

A version is told by the names and times of what is installed, which takes no walk through all files: packages that were
installed, removed or updated make another one, a file that was edited by hand does not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
UNUSED_S = 30 * 86400.0
"""An archive that no job has used for so long is deleted when another is made."""
_WAIT_S = 900.0
_NOT_RUN = frozenset({"test", "idlelib", "lib2to3", "turtledemo", "ensurepip"})
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Part:
    """A folder, and where it lies in the archive."""

    folder: Path
    place: str
    skipped: frozenset[str] = frozenset()
    """Names directly in it that are left out."""


@dataclass(frozen=True)
class Archive:
    """An archive, made or not."""

    name: str
    path: Path
    parts: tuple[Part, ...]
    is_environment: bool = True


def environment_archive() -> Archive:
    """That of the environment of this process."""
    prefix, base = Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()
    folder, zstd = archives_folder(prefix), shutil.which("zstd") is not None
    parts: list[Part] = []
    is_venv, is_system = prefix != base, base in (Path("/usr"), Path("/usr/local"))
    if not is_system or not is_venv:
        inherits = is_venv and "include-system-site-packages = true" in (prefix / "pyvenv.cfg").read_text()
        library = base / "lib" / _VERSION
        own = frozenset() if inherits or not is_venv else frozenset({"site-packages"})
        configs = frozenset(path.name for path in library.glob("config-*"))
        parts.append(Part(library, f"base/lib/{_VERSION}", _NOT_RUN | own | configs))
        for path in sorted((base / "lib").glob("*.so*")):
            # Found by LD_LIBRARY_PATH, in a folder without others, which would come before those of the system.
            parts.append(Part(path, f"base/{'libpython' if path.name.startswith('libpython') else 'lib'}/{path.name}"))
    if is_venv:
        parts.append(Part(prefix / "lib" / _VERSION, f"venv/lib/{_VERSION}"))
    digest = hashlib.blake2b(f"{FORMAT} {sys.version} {prefix} {base} {zstd}".encode(), digest_size=8)
    for part in parts:
        _add_state(digest, part)
    name = f"env-{digest.hexdigest()}"
    return Archive(name, folder / f"{name}.tar{'.zst' if zstd else ''}", tuple(parts))


def project_archive() -> Archive | None:
    """That of this project's own code; None where it is installed in the environment."""
    import forge_hpc

    root = Path(forge_hpc.__file__).resolve().parents[1]
    if root.is_relative_to(Path(sys.prefix).resolve()):
        return None
    parts = tuple(Part(root / room, room) for room in ("forge_hpc", "launchers") if (root / room).is_dir())
    digest = hashlib.blake2b(digest_size=8)
    for path, place in sorted(_files(parts), key=lambda pair: pair[1]):
        if not path.is_dir() and path.suffix != ".pyc":
            digest.update(f"{place}\0".encode() + path.read_bytes())
    name = f"code-{digest.hexdigest()}"
    return Archive(name, archives_folder(Path(sys.prefix).resolve()) / f"{name}.tar", parts, is_environment=False)


def archives_folder(prefix: Path) -> Path:
    """Where archives lie: in the environment itself, so that who may change it may change them; where it is another's,
    in this user's home."""
    if os.access(prefix, os.W_OK):
        return prefix / ".staged"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "forge_hpc" / "staged"


def _add_state(digest: hashlib.blake2b, part: Part) -> None:
    """Names and times of what is directly in a folder, and in its site-packages."""
    for folder in (part.folder, part.folder / "site-packages"):
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry) for entry in entries if entry.name not in part.skipped)
        for name, entry in found:
            if name == "__pycache__":
                continue
            seen = entry.stat(follow_symlinks=False)
            size = seen.st_size if entry.is_file() else 0
            digest.update(f"{part.place} {name} {seen.st_mtime_ns} {size}\0".encode())


# --- making it


def make(archive: Archive, say: Callable[[str], None]) -> None:
    """Write the archive, unless it is there. Several at once wait for the first.

    Raises:
        OSError: it cannot be written; nothing of it stays.
    """
    folder = archive.path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(folder / f"{archive.name}.lock"):
        if archive.path.is_file():
            with contextlib.suppress(OSError):  # another's, that may be read
                os.utime(archive.path)
            return
        _remove_unused(folder)
        start = time.monotonic()
        if archive.is_environment:
            say(f"packing the environment into {archive.path}, once a version of it")
        temporary = archive.path.with_name(f".{archive.path.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            with temporary.open("xb") as file:
                _write(archive, file.fileno())
                os.fsync(file.fileno())
            temporary.replace(archive.path)
        finally:
            temporary.unlink(missing_ok=True)
        if archive.is_environment:
            num_bytes = archive.path.stat().st_size
            say(f"packed {num_bytes / 1e9:.2f} GB in {time.monotonic() - start:.0f} s")


def _write(archive: Archive, fd: int) -> None:
    if archive.path.suffix != ".zst":
        with os.fdopen(os.dup(fd), "wb") as out:
            _fill(archive, out)
        return
    # -3 unpacks as fast as any; all cores, since others wait for it.
    command = ["zstd", "-q", "-c", "-3", "-T0", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=fd) as compressor:
        assert compressor.stdin is not None
        try:
            _fill(archive, compressor.stdin)
        except BrokenPipeError:
            pass  # it says why
        finally:
            with contextlib.suppress(BrokenPipeError):
                compressor.stdin.close()
        if compressor.wait():
            raise OSError(f"zstd ended with {compressor.returncode}: the disk may be full")


def _fill(archive: Archive, out: io.BufferedIOBase | object) -> None:
    count = num_bytes = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:  # type: ignore[call-overload]
        for path, place in _files(archive.parts):
            info = tar.gettarinfo(path, place)
            if info is None:
                continue  # a socket
            info.mode |= 0o700 if info.isdir() else 0o600
            if info.islnk():  # the same file twice: no link within the archive
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
            if info.isreg():
                if not place.endswith(".pyc"):
                    count, num_bytes = count + 1, num_bytes + info.size
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
        for place, text, target in _made(archive):
            info = tarfile.TarInfo(place)
            info.mtime, info.mode = int(time.time()), 0o600
            if target:
                info.type, info.linkname = tarfile.SYMTYPE, target
                tar.addfile(info)
            else:
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
        if archive.is_environment:
            executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
            if any(part.place.startswith("base/") for part in archive.parts):
                info = tar.gettarinfo(executable, f"base/bin/{executable.name}")
                count, num_bytes = count + 1, num_bytes + info.size
                with executable.open("rb") as file:
                    tar.addfile(info, file)
        size = f"{count} {num_bytes}\n".encode()
        info = tarfile.TarInfo("SIZE")
        info.size, info.mode = len(size), 0o600
        tar.addfile(info, io.BytesIO(size))


def _made(archive: Archive) -> Iterator[tuple[str, bytes, str]]:
    """What is not in a folder: place, content, target of a link."""
    if not archive.is_environment:
        return
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    has_base = any(part.place.startswith("base/") for part in archive.parts)
    if any(part.place.startswith("venv/") for part in archive.parts):
        # start.sh puts the place where it lies for @HERE@: home must be absolute.
        home = "@HERE@/base/bin" if has_base else str(executable.parent)
        text = (Path(sys.prefix) / "pyvenv.cfg").read_text().splitlines()
        kept = [line for line in text if not line.startswith(("home", "executable", "command"))]
        yield "venv/pyvenv.cfg.in", "\n".join([f"home = {home}", *kept, ""]).encode(), ""
        yield "venv/bin/python", b"", f"../../base/bin/{executable.name}" if has_base else str(executable)
    elif has_base and executable.name != "python":
        yield "base/bin/python", b"", executable.name


def _files(parts: tuple[Part, ...]) -> Iterator[tuple[Path, str]]:
    for part in parts:
        if not part.folder.is_dir():
            yield part.folder, part.place
            continue
        for root, folders, files in os.walk(part.folder):
            within = Path(root).relative_to(part.folder)
            top = within == Path()
            folders[:] = sorted(name for name in folders if not (top and name in part.skipped))
            for name in [*files, *(name for name in folders if (Path(root) / name).is_symlink())]:
                if name.endswith(".a") or (top and name in part.skipped):
                    continue
                yield Path(root) / name, f"{part.place}/{within / name}"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one at a time, where the file system has locks; else two do the same work, and the last one's stays."""
    with path.open("a") as file:
        until = time.monotonic() + _WAIT_S
        while time.monotonic() < until:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.5)
            except OSError:
                break
        yield


def _remove_unused(folder: Path) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()
