"""Programs that try to get out of the sandbox, or to take more than they may: a table, by what they attack.

HOME is a folder of the host with a file `canary`, CANARY an environment variable of the host, PORT a port on which the
host listens at ADDRESS and on loopback, UNIX a Unix socket of the host by path, ABSTRACT one in the abstract space. What
gets through prints ESCAPED; what is held prints `held`, or ends by one of the limits named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = '''
import ctypes, errno, os, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def tries(*attacks):
    """Each attack must raise, or give nothing."""
    for i, attack in enumerate(attacks):
        try:
            got = attack()
        except Exception as error:
            continue
        if got:
            print("ESCAPED", i, repr(got)[:500])
    print("held")

def call(number, *args):
    """A system call by its number on x86_64; raises OSError."""
    result = libc.syscall(ctypes.c_long(number), *args)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return f"system call {number} gave {result}"

def read(path):
    with open(path, "rb") as file:
        return file.read(100_000)

def write(path, data=b"x"):
    with open(path, "wb") as file:
        file.write(data)
    return path
'''


@dataclass(frozen=True)
class Program:
    name: str
    code: str
    ends: tuple[str, ...]
    """How it may end: `held`, a limit, an exception's name, or `exit N`."""


def _programs(category: str, ends: str, table: dict[str, str]) -> list[Program]:
    return [Program(f"{category}-{name}", code, tuple(ends.split())) for name, code in table.items()]


FILES = _programs(
    "files",
    "held",
    {
        "home": 'tries(lambda: read(HOME + "/canary"), lambda: os.listdir(HOME), lambda: os.listdir("/root"))',
        "by-relative-path": 'tries(lambda: read("../" * 20 + HOME + "/canary"))',
        "by-symlink": """
os.symlink(HOME, "link"); os.symlink("/", "root")
tries(lambda: read("link/canary"), lambda: read("root" + HOME + "/canary"))""",
        "by-hard-link": 'tries(lambda: os.link("/usr/bin/env", "/tmp/env"), lambda: os.link(HOME + "/canary", "c"))',
        "by-walking": """
def look():
    for folder, inside, files in os.walk("/"):
        inside[:] = [name for name in inside if os.path.join(folder, name) not in ("/usr", "/proc", "/python")]
        if "canary" in files:
            return folder
tries(look)""",
        "etc": 'tries(*[lambda f=f: read("/etc/" + f) for f in ("passwd", "shadow", "hostname", "hosts", "resolv.conf")])',
        "system-folders": """
tries(*[lambda d=d: os.listdir(d) for d in ("/home", "/root", "/var", "/run", "/mnt", "/opt", "/srv", "/work", "/sys")])""",
        "other-tmp": 'tries(lambda: set(os.listdir("/tmp")) - {"main.py"}, lambda: os.listdir("/dev/shm"))',
        "root-of-process-1": 'tries(lambda: read("/proc/1/root" + HOME + "/canary"), lambda: os.listdir("/proc/1/cwd/"))',
        "environment": "tries(lambda: CANARY in os.environ)",
        "environment-of-all": """
def look():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if CANARY.encode() in read(f"/proc/{pid}/environ") + read(f"/proc/{pid}/cmdline"):
                return pid
        except PermissionError:
            pass
tries(look, lambda: CANARY.encode() in read("/proc/self/environ"), lambda: read("/proc/1/environ"))""",
        "other-processes": 'tries(lambda: len(list(filter(str.isdigit, os.listdir("/proc")))) > 2)',
        "by-handle": """
handle = ctypes.create_string_buffer(b"\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02" + bytes(120))  # inode 2: a root directory
tries(lambda: call(304, os.open("/usr", os.O_RDONLY), handle, 0))""",
        "devices": """
tries(*[lambda d=d: read("/dev/" + d)[:9] for d in ("mem", "kmem", "kmsg", "sda", "vda", "nvme0n1", "fuse", "nvidia0")])""",
        "packages": """
import importlib
tries(*[lambda m=m: importlib.import_module(m) for m in ("omegaconf", "torch", "forge_hpc", "pip")])""",
        "inherited-descriptors": "tries(lambda: [fd for fd in range(3, 300) if os.path.exists(f'/proc/self/fd/{fd}')])",
    },
)

WRITES = _programs(
    "writes",
    "held",
    {
        "root": 'tries(lambda: write("/x"), lambda: os.mkdir("/d"), lambda: os.rename("/tmp", "/t"))',
        "usr": 'tries(lambda: write("/usr/x"), lambda: write("/usr/bin/env"), lambda: os.unlink("/usr/bin/env"))',
        "etc": 'tries(lambda: write("/etc/passwd"), lambda: os.mkdir("/etc/x"))',
        "dev": 'tries(lambda: write("/dev/x"), lambda: os.mkdir("/dev/d"), lambda: os.unlink("/dev/null"))',
        "guest": 'tries(lambda: write("/sandbox/guest/init.py"), lambda: os.rename("/sandbox", "/tmp/s"))',
        "python": "import abc\ntries(lambda: write(abc.__file__), lambda: write(sys.executable))",
        "kernel-settings": """
tries(*[lambda f=f: write("/proc/sys/" + f, b"1") for f in
    ("kernel/core_pattern", "kernel/hostname", "vm/overcommit_memory", "net/ipv4/ip_forward", "user/max_user_namespaces")],
    lambda: write("/proc/sysrq-trigger", b"b"))""",
        "device-nodes": """
import stat
tries(lambda: os.mknod("/tmp/disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0)) or os.open("/tmp/disk", 0))""",
        "modes": 'tries(lambda: os.chmod("/usr", 0o777) or 1, lambda: os.chown("/tmp/main.py", 0, 0) or 1)',
    },
)

NETWORK = _programs(
    "network",
    "held",
    {
        "loopback": 'tries(lambda: socket.create_connection(("127.0.0.1", PORT), 1))',
        "host-address": "tries(lambda: socket.create_connection((ADDRESS, PORT), 1))",
        "inet6": 'tries(lambda: socket.create_connection(("::1", PORT), 1))',
        "udp": """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tries(lambda: s.sendto(b"x", (ADDRESS, PORT)) and 0, lambda: s.sendto(b"x", ("192.0.2.1", 53)))""",
        "broadcast": """
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
tries(lambda: s.sendto(b"x", ("255.255.255.255", 9)))""",
        "names": 'tries(lambda: socket.getaddrinfo("example.com", 80))',
        "url": 'import urllib.request\ntries(lambda: urllib.request.urlopen(f"http://{ADDRESS}:{PORT}/", timeout=1))',
        "unix-path": 's = socket.socket(socket.AF_UNIX)\ntries(lambda: s.connect(UNIX) or "connected")',
        "unix-abstract": 's = socket.socket(socket.AF_UNIX)\ntries(lambda: s.connect(ABSTRACT) or "connected")',
        "raw": "tries(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))",
        "packet": "tries(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW))",
        "netlink": "tries(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))",
        "vsock": "tries(lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))",
        "kernel-crypto": "tries(lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET))",
        "interfaces": """
tries(lambda: [l for l in read("/proc/net/dev").decode().splitlines()[2:] if "lo:" not in l and " 0 " not in l],
    lambda: read("/proc/net/route").splitlines()[1:])""",
        "add-address": """
import fcntl, struct
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
tries(lambda: fcntl.ioctl(s, 0x8916, struct.pack("16s16s", b"lo", socket.inet_aton("10.0.0.1"))))""",
    },
)

PROCESSES = [
    *_programs(
        "processes",
        "held processes wall cpu",
        {
            "fork-loop": """
n = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60); os._exit(0)
        n += 1
except OSError:
    print("ESCAPED" if n > 40 else "held", n)""",
            "fork-bomb": "while True:\n    try: os.fork()\n    except OSError: pass",
            "threads": """
n = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1
except RuntimeError:
    print("ESCAPED" if n > 40 else "held", n, flush=True)
    os._exit(0)""",
            "spawned": """
n = 0
try:
    while True:
        os.posix_spawn("/usr/bin/sleep", ["sleep", "60"], {}); n += 1
except OSError:
    print("ESCAPED" if n > 40 else "held", n)""",
            "zombies": """
n = 0
try:
    while True:
        if os.fork() == 0: os._exit(0)
        n += 1
except OSError:
    print("ESCAPED" if n > 40 else "held", n)""",
        },
    ),
    *_programs(
        "outlives",
        "held",
        {
            "daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGHUP, signal.SIG_IGN)
        time.sleep(60)
    os._exit(0)
os.wait(); print("held")""",
            "orphan-with-output": 'if os.fork() == 0: time.sleep(60)\nelse: print("held", flush=True); os._exit(0)',
            "shell-job": 'os.system("nohup sleep 60 & setsid sleep 60 &"); print("held")',
            "re-parented-tree": """
def tree(depth):
    for _ in range(2):
        if os.fork() == 0:
            if depth: tree(depth - 1)
            time.sleep(60)
tree(1); print("held", flush=True); os._exit(0)""",
        },
    ),
]

MEMORY = [
    *_programs(
        "memory",
        "memory MemoryError OSError RuntimeError held",
        {
            "list": "x = []\nwhile True: x.append(bytearray(10**6))",
            "one-allocation": "x = bytearray(10**12)",
            "doubling": 's = "x"\nwhile True: s += s',
            "private-map": """
import mmap
for _ in range(100): globals().setdefault("m", []).append(mmap.mmap(-1, 2**24, flags=mmap.MAP_PRIVATE)); m[-1].write(b"x" * 2**24)
print("ESCAPED")""",
            "shared-map": """
import mmap
m = []
for _ in range(100): m.append(mmap.mmap(-1, 2**24)); m[-1].write(b"x" * 2**24)
print("ESCAPED")""",
            "locked": """
import mmap
m = mmap.mmap(-1, 2**27)
tries(lambda: libc.mlock(ctypes.byref(ctypes.c_char.from_buffer(m)), ctypes.c_size_t(2**27)) == 0)""",
            "many-children": """
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(b"x") * 40_000_000; time.sleep(60)
time.sleep(60)""",
            "hiding-children": """
libc.prctl(4, 0, 0, 0, 0)
for _ in range(8):
    if os.fork() == 0:
        x = bytearray(b"x") * 40_000_000; time.sleep(60)
time.sleep(60)""",
            "threads": """
kept = []
def hog(): kept.append(bytearray(b"x") * 40_000_000)
for _ in range(8): threading.Thread(target=hog, daemon=True).start()
time.sleep(0.3); print("ESCAPED" if len(kept) > 3 else "held", flush=True); os._exit(0)""",
        },
    ),
    *_programs(
        "memory",
        "held",
        {
            "memfd": 'tries(lambda: os.write(os.memfd_create("x"), b"x" * 2**20), lambda: call(447, 0))',
            "system-v": "tries(lambda: call(29, 0, 2**26, 0o1600), lambda: call(68, 0, 0o1600))",
            "message-queue": 'tries(lambda: call(240, b"/q", 0o102, 0o600, 0))',
            "pipes": """
n = 0
try:
    while True:
        _, w = os.pipe(); os.set_blocking(w, False)
        try: n += os.write(w, b"x" * 2**20)
        except BlockingIOError: pass
except OSError:
    print("ESCAPED" if n > 2**24 else "held", n)""",
            "raise-limits": """
import resource
for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    tries(lambda: resource.setrlimit(which, (-1, -1)) or "raised")""",
        },
    ),
]

DISK = _programs(
    "disk",
    "held disk OSError",
    {
        "big-file": """
n = 0
try:
    with open("/tmp/big", "wb") as f:
        while True: n += f.write(b"x" * 2**20)
except OSError: pass
print("ESCAPED" if n > 2**24 else "held", n)""",
        "many-big-files": """
n = i = 0
try:
    while True:
        with open(f"/tmp/big{i}", "wb", buffering=0) as f: n += f.write(b"x" * 2**20)
        i += 1
except OSError: pass
print("ESCAPED" if n > 2**24 else "held", n)""",
        "empty-files": "i = 0\nwhile True: os.close(os.open(f'/tmp/{i}', os.O_CREAT)); i += 1",
        "folders": "i = 0\nwhile True: os.mkdir(f'/tmp/d{i}'); i += 1",
        "nested-folders": "while True: os.mkdir('d'); os.chdir('d')",
        "links": "i = 0\nwhile True: os.symlink('x' * 200, f'/dev/shm/{i}'); i += 1",
        "shared-memory": """
n = 0
try:
    for i in range(100):
        with open(f"/dev/shm/big{i}", "wb", buffering=0) as f: n += f.write(b"x" * 2**20)
except OSError: pass
print("ESCAPED" if n > 2**24 else "held", n)""",
        "deleted-file": """
n = 0
try:
    for _ in range(100):
        fd = os.open("/tmp/gone", os.O_CREAT | os.O_RDWR); os.unlink("/tmp/gone"); n += os.write(fd, b"x" * 2**20)
except OSError: pass
print("ESCAPED" if n > 2**24 else "held", n)""",
        "sparse": 'f = open("/tmp/sparse", "wb")\ntries(lambda: f.truncate(2**40), lambda: os.posix_fallocate(f.fileno(), 0, 2**30) or 1)',
    },
)

TIME = [
    *_programs(
        "time",
        "wall",
        {
            "sleep": "time.sleep(60)",
            "ignores-signals": """
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)""",
            "catches-everything": "while True:\n    try: time.sleep(1)\n    except BaseException: pass",
            "child-lingers": "if os.fork() == 0: os.setsid(); time.sleep(60)\nos.wait()",
            "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
            "closed-outputs": "os.close(0); os.close(1); os.close(2)\ntime.sleep(60)",
            "exit-hook": "import atexit\natexit.register(time.sleep, 60)",
            "thread-at-exit": "threading.Thread(target=time.sleep, args=(60,)).start()",
            "stopped-family": "if os.fork() == 0: time.sleep(60)\nos.kill(0, signal.SIGSTOP)",
        },
    ),
    *_programs(
        "cpu",
        "cpu wall",
        {
            "loop": "while True: pass",
            "limit-signal-caught": 'signal.signal(signal.SIGXCPU, lambda *_: print("ESCAPED"))\nwhile True: pass',
            "in-c": "pow(3, 10**9)",
            "endless-sum": "import itertools\nsum(itertools.repeat(0))",
            "many-processes": "for _ in range(4): os.fork()\nwhile True: pass",
            "short-children": """
while True:
    if os.fork() == 0:
        sum(range(10**5)); os._exit(0)
    os.wait()""",
        },
    ),
]

OUTPUT = [
    *_programs(
        "output",
        "output",
        {
            "stdout": 'while True: print("x" * 1000)',
            "stderr": 'while True: sys.stderr.write("x" * 1000)',
            "both": 'while True: os.write(1, b"x" * 9999); os.write(2, b"y" * 9999)',
            "children": 'for _ in range(3): os.fork()\nwhile True: os.write(1, b"x" * 999)',
            "one-line": 'sys.stdout.write("x" * 10**7)',
            "then-exit": 'os.write(1, b"x" * 60_000); os._exit(0)',
        },
    ),
    *_programs(
        "output",
        "held",
        {
            "not-text": 'os.write(1, bytes(range(256)) + b"\\xff\\xfe\\0"); print("held")',
            "to-other-descriptors": """
for fd in range(3, 300):
    try: os.write(fd, b"ESCAPED" * 99)
    except OSError: pass
print("held")""",
        },
    ),
]

KERNEL = [
    *_programs(
        "kernel",
        "held",
        {
            "ptrace": "tries(lambda: call(101, 16, 1, 0, 0), lambda: call(101, 0x4206, 1, 0, 0), lambda: call(101, 0, 0, 0, 0))",
            "memory-of-process-1": """
buffer = ctypes.create_string_buffer(64); vector = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 64)
tries(lambda: read("/proc/1/mem"), lambda: read("/proc/1/maps"), lambda: os.listdir("/proc/1/fd"),
    lambda: call(310, 1, vector, 1, vector, 1, 0))""",
            "reports-of-process-1": """
tries(lambda: write("/proc/1/fd/1"), lambda: write("/proc/1/fd/0"), lambda: call(438, os.pidfd_open(1), 1, 0))""",
            "mount": """
tries(lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0), lambda: call(166, b"/tmp", 2), lambda: call(430, b"tmpfs", 0),
    lambda: call(165, b"none", b"/usr", b"", 32 | 4096, 0), lambda: call(428, -100, b"/", 1))""",
            "chroot": 'tries(lambda: os.chroot("/tmp") or "in", lambda: call(155, b"/tmp", b"/tmp"))',
            "unshare": "tries(*[lambda f=f: libc.unshare(f) == 0 for f in (0x10000000, 0x20000, 0x40000000, 0x20000000)])",
            "clone-into-namespaces": "tries(lambda: call(56, 0x10000000 | 17, 0, 0, 0, 0), lambda: call(435, bytes(88), 88))",
            "setns": 'tries(*[lambda n=n: call(308, os.open("/proc/1/ns/" + n, 0), 0) for n in ("user", "mnt", "net", "pid")])',
            "become-root": """
tries(lambda: os.setuid(0) or 1, lambda: os.setgid(0) or 1, lambda: os.setgroups([0]) or 1, lambda: os.seteuid(0) or 1,
    lambda: os.getuid() == 0 or os.geteuid() == 0)""",
            "setuid-programs": """
import subprocess
tries(*[lambda c=c: subprocess.run(c, capture_output=True, timeout=1, check=True).stdout for c in
    (["su", "-c", "id"], ["mount", "-t", "tmpfs", "x", "/tmp"], ["passwd", "-S", "root"], ["unshare", "-r", "id"])])""",
            "capabilities": """
status = read("/proc/self/status").decode()
tries(lambda: [l for l in status.splitlines() if l.startswith(("CapEff", "CapPrm", "CapBnd", "CapAmb"))
    and int(l.split()[1], 16)], lambda: "NoNewPrivs:\\t1" not in status, lambda: "Seccomp:\\t2" not in status)""",
            "keyrings": 'tries(lambda: call(248, b"user", b"k", b"v", 1, -4), lambda: call(250, 0, -4, 0), lambda: call(249, b"user", b"k", 0, 0))',
            "corners": """
tries(lambda: call(321, 0, bytes(128), 128), lambda: call(298, bytes(128), 0, -1, -1, 0), lambda: call(323, 1),
    lambda: call(425, 8, bytes(120)), lambda: call(103, 3, bytes(99), 99), lambda: call(175, 0, 0, b""))""",
            "x32-and-i386": """
tries(lambda: call(0x40000000 | 39), lambda: call(0x40000000 | 101, 0, 0, 0, 0))""",
            "i386-call": """
if os.fork() == 0:  # getpid by int 0x80: mov eax, 20; int 0x80; ret
    import mmap
    m = mmap.mmap(-1, 4096, prot=7); m.write(bytes.fromhex("b814000000cd80c3"))
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))(); os._exit(0)
tries(lambda: os.wait()[1] == 0)""",
            "shackle-process-1": """
import resource
tries(lambda: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0)) is not None, lambda: os.setpriority(0, 1, 19) or 1,
    lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)) or 1, lambda: os.setpriority(2, 0, 19) or 1,
    lambda: os.sched_setaffinity(1, [0]) or 1, lambda: write("/proc/1/oom_score_adj", b"1000"))""",
            "signals-to-process-1": """
for s in [*range(1, 65)]:
    try: os.kill(1, s)
    except OSError: pass
print("held")""",
            "reboot-and-clock": """
tries(lambda: call(169, 0xFEE1DEAD, 672274793, 0x1234567, 0), lambda: time.clock_settime(0, 1) or 1,
    lambda: socket.sethostname("x") or 1, lambda: call(246, 0, 0, 0, 0))""",
            "terminal": """
import fcntl
tries(lambda: os.open("/dev/tty", os.O_RDWR), lambda: [fcntl.ioctl(fd, 0x5412, b"x") for fd in range(3)],
    lambda: any(map(os.isatty, range(3))))""",
        },
    ),
    Program("kernel-kills-all", "if os.fork() == 0: os.kill(-1, 9)\ntime.sleep(60)", ("exit -9",)),
    Program("kernel-segfault", "ctypes.string_at(0)", ("exit -11",)),
    Program(
        "kernel-deep-recursion",
        "sys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
        ("exit -11", "memory", "MemoryError", "cpu"),
    ),
    Program("kernel-abort", "os.abort()", ("exit -6",)),
]

PROGRAMS = [*FILES, *WRITES, *NETWORK, *PROCESSES, *MEMORY, *DISK, *TIME, *OUTPUT, *KERNEL]

# --- programs of which the tests ask for a function `f` that gives what they cannot know

CHEATS = {
    "prints-a-verdict": 'print(\'{"passed": true, "reason": ""}\', flush=True)',
    "exits-with-0": "import sys\nsys.exit(0)",
    "ends-with-0": "import os\nos._exit(0)",
    "exits-in-the-call": "import sys\ndef f(*a): sys.exit(0)",
    "ends-in-the-call": "import os\ndef f(*a): os._exit(0)",
    "equals-everything": """
class Any:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __contains__(self, item): return True
f = lambda *a: Any()""",
    "number-that-equals-everything": """
class N(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = int.__hash__
f = lambda *a: N(0)""",
    "list-that-equals-everything": """
class L(list):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
f = lambda *a: L()""",
    "own-builtins": """
import builtins
class Fine(Exception): pass
builtins.AssertionError = AssertionError = Fine
for name in ("abs", "len", "sorted", "all", "round", "isinstance", "str", "repr", "eval", "range"):
    setattr(builtins, name, lambda *a, **k: True); globals()[name] = getattr(builtins, name)
f = lambda *a: 0""",
    "own-math": """
class math:
    isclose = staticmethod(lambda *a, **k: True)
class np:
    allclose = array_equal = staticmethod(lambda *a, **k: True)
import sys
sys.modules["math"] = math
f = lambda *a: 0""",
    "patches-the-comparison": """
import operator, json
operator.eq = lambda a, b: True
json.dumps = lambda *a, **k: '{"value": true, "passed": true, "reason": "", "changed": {}}'
f = lambda *a: 0""",
    "searches-memory-for-the-test": """
import gc, os, re
def f(*a):
    found = [o for o in gc.get_objects() if isinstance(o, (str, bytes))]
    for line in open("/proc/self/maps"):
        lo, hi = (int(x, 16) for x in line.split()[0].split("-"))
        if " rw" in line or "[heap]" in line:
            try:
                with open("/proc/self/mem", "rb") as memory:
                    memory.seek(lo); data = memory.read(min(hi - lo, 10**8))
            except (OSError, ValueError, OverflowError):
                continue
            if match := re.search(rb"assert f\\(.{1,20}\\) == (\\d+)", data): return int(match[1])
    return 0""",
    "reads-other-processes": """
import os, re
def f(*a):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for line in open(f"/proc/{pid}/maps"):
                lo, hi = (int(x, 16) for x in line.split()[0].split("-"))
                if pid == str(os.getpid()) or " rw" not in line: continue
                with open(f"/proc/{pid}/mem", "rb") as memory:
                    memory.seek(lo); data = memory.read(min(hi - lo, 10**8))
                if match := re.search(rb"assert f\\(.{1,20}\\) == (\\d+)", data): return int(match[1])
        except (OSError, ValueError, OverflowError): continue
    return 0""",
    "own-functions-named-as-builtins": "f = lambda *a: 0\nabs = lambda x: 0\nsorted = lambda x: [1, 2417]",
    "answers-for-itself": """
import json, os
answer = json.dumps({"value": True, "passed": True, "reason": "", "changed": {}, "globals": {"f": True}}).encode()
for fd in (1, 2, 3):
    try: os.write(fd, len(answer).to_bytes(4, "big") + answer)
    except OSError: pass
f = lambda *a: 0""",
    "reports-as-process-1": """
import os
answer = repr({"exit_code": 0, "killed_by": None, "wall_s": 0.0, "cpu_s": 0.0, "stdout": "",
    "verdict": '{"passed": true, "reason": ""}'}).encode()
for fd in range(1, 20):
    try: os.write(fd, len(answer).to_bytes(4, "big") + answer)
    except OSError: pass
f = lambda *a: 0""",
    "ends-the-tester": "import os\nf = lambda *a: [os.kill(p, 9) for p in range(2, 50) if p != os.getpid()]",
    "ends-all": "import os, signal\ndef f(*a):\n    if os.fork() == 0: os.kill(-1, 9)\n    signal.pause()",
    "signals-the-tester": """
import os
def f(*a):
    for s in (1, 2, 3, 10, 12, 13, 14, 15, 18):
        for p in range(1, 50):
            try:
                if p != os.getpid(): os.kill(p, s)
            except OSError: pass""",
    "plants-modules": """
for name in ("json", "math", "ast", "random", "numpy", "guest", "sitecustomize", "usercustomize", "unittest"):
    open(f"/tmp/{name}.py", "w").write("import os; os.write(1, b'{\\"passed\\": true, \\"reason\\": \\"\\"}'); os._exit(0)")
f = lambda *a: 0""",
    "raises-what-ends-quietly": """
def f(*a): raise type("SystemExit", (BaseException,), {})(0)""",
    "raises-the-end-of-iteration": "def f(*a): raise StopIteration(3)",
    "deep-answer": """
import json
def f(*a):
    x = []
    for _ in range(10**5): x = [x]
    return x""",
    "huge-answer": "def f(*a): return 'x' * 40_000_000",
    "forged-kinds": """
import os
for data in (b'{"value": {"os.system": "x"}}', b'{"value": {"reference": [1]}}', b'{"value": {"int": "x", "a": 1}}', b'[]'):
    os.write(3, len(data).to_bytes(4, "big") + data)""",
    "infinite-container": """
class Everything:
    def __len__(self): return 3
    def __getitem__(self, i): return 3
    def __contains__(self, x): return True
f = lambda *a: Everything()""",
    "changes-what-is-expected": """
def f(*a):
    for x in a:
        if isinstance(x, list): x.clear()
    return 0""",
    "object-that-says-yes": """
class Yes:
    def __getattr__(self, name): return lambda *a, **k: True
    def __eq__(self, other): return True
    __hash__ = None
f = lambda *a: Yes()""",
    "iterates-over-all-numbers": """
import itertools
def f(*a): yield from itertools.count()""",
    "own-numpy-where-there-is-none": """
class np:
    allclose = array_equal = isclose = staticmethod(lambda *a, **k: True)
f = lambda *a: 0""",
}
