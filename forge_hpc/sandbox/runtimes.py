"""The command lines that make a sandbox and start process 1 (``guest.init``) in it.

Bubblewrap and Apptainer (1.4, folders and SIF files: ``make test-apptainer``) are tested. The lines for enroot (later
than 4.1.2: its ``start`` must know --pid, --net and --ipc) follow its documentation and source: only the arguments are
tested. Tried by hand, it was refused for a home directory that enroot's hooks fill. Whatever a runtime made of its
line, process 1 refuses to run anything where it finds a network, foreign processes, capabilities, a writable root or
too small a /tmp, and ``Sandbox.check`` looks for the user's files.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path

from forge_hpc.config.errors import UserError
from forge_hpc.config.schema import SandboxConfig, SandboxLimits
from forge_hpc.sandbox.interpreter import Interpreter, find_interpreter

_SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_START = "import sys; sys.path[0] = '/sandbox'; import guest.init; exec(guest.init.main())"
_PYTHON_OPTIONS = ("-s", "-S", "-B", "-c", _START)  # no site-packages, no .pyc; isolated but for the environment below
_ENVIRONMENT = {
    "HOME": "/tmp",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # a program does the same each time
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_EMPTY = "empty.py"
"""Of ``guest``: a file with nothing in it, to lay over others."""
_BINARIES = {"auto": "bwrap", "bubblewrap": "bwrap", "apptainer": "apptainer", "enroot": "enroot"}
_PACKAGES = {"bwrap": "bubblewrap"}


def command(config: SandboxConfig, limits: SandboxLimits, guest: Path) -> list[str]:
    """What starts a sandbox. `guest` is the folder of ``guest``, readable by the user who runs it.

    Raises UserError where the runtime is not installed.
    """
    binary = _BINARIES[config.runtime]
    path = shutil.which(binary)
    if path is None:
        name = _PACKAGES.get(binary, binary)
        raise UserError(
            f"sandbox: {name} is not installed here, and model-written code is not run without a sandbox",
            f"install {name} (Debian, Ubuntu, Fedora and Enterprise Linux have bubblewrap), or set sandbox.runtime and "
            "sandbox.image to apptainer or enroot and an image with Python, best in the site profile",
        )
    if binary == "bwrap":
        options = bubblewrap_options(limits, find_interpreter(config.python), guest, known=_known_options(path))
        return [path, *options]
    if config.image is None:
        raise UserError(
            f"sandbox.runtime={config.runtime} needs an image", "set sandbox.image, best in the site profile"
        )
    python = config.python or "python3"
    arguments = apptainer_arguments if binary == "apptainer" else enroot_arguments
    if binary == "apptainer":
        _refuse_unpacking(path, Path(config.image))
    return [path, *arguments(limits, config.image, guest), python, *_PYTHON_OPTIONS]


def environment(config: SandboxConfig) -> dict[str, str]:
    """What the runtime's own process gets. Bubblewrap's would stay readable inside. Of the user's, the others get what
    they need to find their own files, and nothing that adds to their arguments: APPTAINER_BIND shows folders inside."""
    if _BINARIES[config.runtime] == "bwrap":
        return {}
    known = ("PATH", "HOME", "USER", "TMPDIR", "APPTAINER_TMPDIR", "APPTAINER_CACHEDIR")
    return {key: value for key, value in os.environ.items() if key in known or key.startswith(("ENROOT_", "XDG_"))}


def num_helpers(config: SandboxConfig) -> int:
    """Threads that the runtime may have in the user namespace of its programs, where the kernel counts them with the
    programs' (seen: a dozen of squashfuse, which serves a SIF file)."""
    return 64 if _BINARIES[config.runtime] == "apptainer" else 0


def bubblewrap_options(limits: SandboxLimits, python: Interpreter, guest: Path, known: str) -> list[str]:
    """Bubblewrap's arguments, the command at their end.

    Args:
        known: its ``--help``: older versions lack --disable-userns and --size, and then the system call filter and
            process 1's watch do that work alone.
    """
    size = ["--size", str(int(limits.disk_mb * 2**20))] if "--size " in known else []
    options = ["--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]
    options += ["--disable-userns"] if "--disable-userns" in known else []
    options += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--as-pid-1"]
    options += ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in _SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), f"/{name}"]
        elif path.is_dir():
            options += ["--ro-bind", f"/{name}", f"/{name}"]
    options += ["--proc", "/proc", "--dev", "/dev", *size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    options += [*size, "--tmpfs", "/tmp", "--ro-bind", str(guest), "/sandbox/guest"]
    executable, inside, variables = python.executable, python.prefix, dict(_ENVIRONMENT)
    if not python.prefix.is_relative_to("/usr"):  # a Python of the user's: its library, and not its place
        executable, inside = Path("/python/bin/python3"), Path("/python")
        options += ["--ro-bind", str(python.executable), str(executable)]
        for library in ("lib", "lib64"):
            if (python.prefix / library).is_dir() and not (python.prefix / library).is_symlink():
                options += ["--ro-bind", str(python.prefix / library), f"/python/{library}"]
        variables["PATH"] = "/python/bin:" + variables["PATH"]
        variables["LD_LIBRARY_PATH"] = "/python/lib"
    for folder in python.hidden:
        place = str(inside / folder.relative_to(python.prefix))
        options += ["--tmpfs", place, "--remount-ro", place]
    for i, folder in enumerate(python.packages):
        options += ["--ro-bind", str(folder), f"/packages/{i}"]
    if python.packages:
        variables["PYTHONPATH"] = ":".join(f"/packages/{i}" for i in range(len(python.packages)))
    options += ["--remount-ro", "/", "--chdir", "/tmp"]
    for name, value in variables.items():
        options += ["--setenv", name, value]
    return [*options, "--", str(executable), *_PYTHON_OPTIONS]


def apptainer_arguments(limits: SandboxLimits, image: str, guest: Path) -> list[str]:
    """Arguments before the command. The size of /tmp is the site's (sessiondir max size): process 1 refuses one that is
    smaller than ``disk_mb``, and watches it.

    Apptainer sets no HOME by --env (and --home shows the host's folder), names the image in the environment, and writes
    the user into /etc/passwd: so ``env`` makes the environment, and empty files lie over what tells of the host.
    """
    options = ["--silent", "exec", "--userns", "--containall", "--cleanenv", "--no-home", "--no-init", "--no-privs"]
    options += ["--no-eval", "--net", "--network", "none", "--uts", "--hostname", "sandbox"]
    options += ["--no-mount", "sys,home,cwd,hostfs,bind-paths", "--bind", f"{guest}:/sandbox/guest:ro"]
    for name in ("passwd", "group", "resolv.conf"):
        options += ["--bind", f"{guest / _EMPTY}:/etc/{name}:ro"]
    variables = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
    return [*options, "--pwd", "/tmp", image, "/usr/bin/env", "-i", *variables]


def _refuse_unpacking(apptainer: str, image: Path) -> None:
    """Raise UserError where Apptainer would unpack the image, hundreds of MB, at the start of every program."""
    if not image.is_file() or _finds_squashfuse(apptainer):
        return
    raise UserError(
        f"sandbox.image={image} would be unpacked at the start of every program: squashfuse is not installed here",
        f"install squashfuse, or unpack it once: apptainer build --sandbox DIR {image}, and set sandbox.image to DIR",
    )


@functools.cache
def _finds_squashfuse(apptainer: str) -> bool:
    """In the PATH, or beside Apptainer's own programs."""
    asked = subprocess.run(
        [apptainer, "buildcfg", "LIBEXECDIR"], capture_output=True, text=True, timeout=60, check=False
    )
    libexec = Path(asked.stdout.strip() or "/usr/libexec") / "apptainer/bin"
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), str(libexec)])
    return any(shutil.which(name, path=places) for name in ("squashfuse_ll", "squashfuse"))


def enroot_arguments(limits: SandboxLimits, image: str, guest: Path) -> list[str]:
    """Arguments before the command."""
    size = f"size={int(limits.disk_mb)}m"
    options = ["start", "--pid", "--net", "--ipc", "--uts"]
    options += ["--mount", f"{guest}:/sandbox/guest:none:x-create=dir,bind,ro,nosuid,nodev,private"]
    for folder in ("/tmp", "/dev/shm"):
        options += ["--mount", f"tmpfs:{folder}:tmpfs:x-create=dir,rw,nosuid,nodev,mode=1777,{size}"]
    for name, value in _ENVIRONMENT.items():
        options += ["--env", f"{name}={value}"]
    return [*options, image]


@functools.cache
def _known_options(bwrap: str) -> str:
    return subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
