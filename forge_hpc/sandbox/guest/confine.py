"""What a process of the sandbox does to itself before it runs anything foreign, and what process 1 checks first.

Namespaces (made by bubblewrap, Apptainer or enroot) take away the files, the network and the other processes. Here
follows what they leave open: memory that no resident size shows, kernel interfaces that no namespace bounds, and the
ways in which one process of a user may touch another one of the same user (process 1 and the tester are such).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import struct

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 4, 22, 38
_SECCOMP_MODE_FILTER = 2
_MAX_FDS = 256
_MAX_OWN_FDS = 1024  # far more than process 1 opens

# --- system calls, by (x86_64, aarch64) number
_DENIED = {
    # Memory that counts for no process: it would pass by the watch.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # Other processes of the same user: process 1 and the tester.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    # Keyrings of the user on the host.
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Further namespaces and mounts; corners of the kernel that no program needs.
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "syslog": (103, 116),
}
_OWN_ONLY = {  # the first argument is a process, 0 being the caller
    "prlimit64": (302, 261),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
}
_CLONE, _CLONE3, _SOCKET = (56, 220), (435, 435), (41, 198)
_NAMESPACE_FLAGS = 0x7E020000
_SOCKET_FAMILIES = (1, 2, 10)  # unix, inet, inet6: all within the sandbox's own network of nothing
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH

_libc = ctypes.CDLL(None, use_errno=True)


def hide() -> None:
    """No other process of this user may read this one's memory, environment or open files.

    Also the first to go, with all that it starts, where the node runs out of memory.
    """
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    _prctl(_PR_SET_DUMPABLE, 0)


def not_isolated() -> str | None:
    """What is missing for a sandbox, whatever the runtime was told; None where all is well."""
    if os.getpid() != 1 or os.readlink("/proc/self") != "1":
        return "it has no process tree of its own"
    routes = _lines("/proc/net/route")[1:]
    routes += [line for line in _lines("/proc/net/ipv6_route") if not line.endswith(" lo")]
    if routes:
        return "it has a network"
    if any(line.startswith("CapEff") and int(line.split()[1], 16) for line in _lines("/proc/self/status")):
        return "it has capabilities"
    if os.access("/", os.W_OK):
        return "its root directory can be written"
    if os.uname().machine not in _MACHINES:
        return f"the system calls of {os.uname().machine} are not known to it"
    return None


def too_small(disk_mb: float) -> str | None:
    """What is wrong with a /tmp that cannot hold what a program may write; None where it can."""
    info = os.statvfs("/tmp")
    num_mb = info.f_blocks * info.f_frsize / 2**20
    if num_mb < disk_mb:
        return f"its /tmp has {num_mb:.0f} MiB, sandbox.limits.disk_mb is {disk_mb:g}"
    return None


def enter(limits: dict[str, float], streams: tuple[int, int, int], keep: int | None, hidden: bool) -> None:
    """Take `streams` for 0, 1 and 2 and `keep` for 3, close all others, and put on limits and system call filter.

    Args:
        limits: the fields of ``Limits``, and ``helpers``: threads of the runtime that the kernel counts with them.
        hidden: stay out of reach of the other processes of this user.

    Raises OSError where the kernel refuses any of it: then nothing foreign may run.
    """
    kept = [*streams] if keep is None else [*streams, keep]
    # First out of the way of 0 to 3, so that none overwrites another.
    for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in kept]):
        os.dup2(fd, target)
    os.closerange(len(kept), _MAX_OWN_FDS)
    memory = int(limits["memory_mb"] * 2**20)
    _limit(resource.RLIMIT_DATA, memory)
    _limit(resource.RLIMIT_AS, 4 * memory)  # threads and allocators reserve more than they use
    _limit(resource.RLIMIT_CPU, int(limits["cpu_s"]) + 2)  # the watch is exact, this is behind it
    _limit(resource.RLIMIT_FSIZE, int(limits["disk_mb"] * 2**20))
    _limit(resource.RLIMIT_NOFILE, _MAX_FDS)
    _limit(resource.RLIMIT_CORE, 0)
    if _counts_by_namespace():
        # Process 1 and a tester are not the program's, nor what its runtime has in the namespace; the watch is exact.
        _limit(resource.RLIMIT_NPROC, int(limits["processes"] + 2 + limits["helpers"]))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _filter_system_calls()
    if not hidden:
        _prctl(_PR_SET_DUMPABLE, 1)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _counts_by_namespace() -> bool:
    """Before Linux 5.14 RLIMIT_NPROC counted all processes of the user on the host; there only the watch counts."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (5, 14)


def _prctl(option: int, value: int, pointer: object = None) -> None:
    nothing = ctypes.c_ulong(0)
    if _libc.prctl(option, ctypes.c_ulong(value), pointer or nothing, nothing, nothing) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        return []


# --- the filter: classic BPF over (nr, arch, instruction pointer, args)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH, _ARG0 = 0, 4, 16


def _program(column: int, arch: int) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value); jumps count the instructions that are skipped."""

    def refuse(error: int) -> tuple[int, int, int, int]:
        return _RETURN, 0, 0, _ERRNO | error

    allow = (_RETURN, 0, 0, _ALLOW)
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NR)]
    code += [(_AT_LEAST, 0, 1, 0x40000000), refuse(errno.ENOSYS)]  # the x32 way into the same calls
    for numbers in _DENIED.values():
        code += [(_EQUAL, 0, 1, numbers[column]), refuse(errno.EPERM)]
    for numbers in _OWN_ONLY.values():
        code += [(_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _ARG0), (_EQUAL, 0, 1, 0), allow, refuse(errno.EPERM)]
    # clone3 hides its flags behind a pointer; without it libc takes clone.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), refuse(errno.ENOSYS)]
    code += [(_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _ARG0)]
    code += [(_ANY_BIT, 0, 1, _NAMESPACE_FLAGS), refuse(errno.EPERM), allow]
    families = len(_SOCKET_FAMILIES)
    code += [(_EQUAL, 0, families + 3, _SOCKET[column]), (_LOAD, 0, 0, _ARG0)]
    code += [(_EQUAL, families - i, 0, family) for i, family in enumerate(_SOCKET_FAMILIES)]
    code += [refuse(errno.EAFNOSUPPORT), allow]
    return [*code, allow]


def _filter_system_calls() -> None:
    code = b"".join(struct.pack("=HBBI", *line) for line in _program(*_MACHINES[os.uname().machine]))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program, len(program)))
