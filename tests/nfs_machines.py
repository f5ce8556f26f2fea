"""Three virtual machines of this distribution: an NFS server and two clients, for ``make nfs``. No KVM is needed.

    server  10.9.0.1   exports /export (knfsd: v4.2 and v3)
    one     10.9.0.2   mounts it as /mnt/v4, /mnt/v3 and /mnt/nolock (v3 whose locks stay on the client)
    two     10.9.0.3   the same

Each has a network for orders and one for NFS, which ``cut`` takes away; ``kill`` is a host that dies. The image is made
once, from the distribution's packages, in ``$XDG_CACHE_HOME/forge-hpc/nfs`` (some 700 MB); the machines write to
copies that go with them.
"""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "forge-hpc" / "nfs"
NAMES = ("server", "one", "two")
PACKAGES = (
    *("systemd-sysv", "udev", "kmod", "linux-image-cloud-amd64", "nfs-kernel-server", "nfs-common"),
    *("python3", "python3-yaml", "procps", "iproute2"),
)
TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "debootstrap": "debootstrap", "mkfs.ext4": "e2fsprogs"}
LIBRARIES = ("omegaconf", "antlr4")
BOOT_S = 600.0
"""On a busy machine without KVM; it is some ten seconds on an idle one with it."""
SERVER_MIB, CLIENT_MIB = 448, 384
MOUNTS = {"v4": "vers=4.2", "v3": "vers=3", "nolock": "vers=3,nolock"}


def missing_requirement() -> str | None:
    """Why the machines cannot be made here; None where they can."""
    lacking = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if lacking:
        return f"the machines need Debian's {', '.join(lacking)}"
    if os.geteuid() != 0 and not (CACHE / "root.img").exists():
        return "root is needed to make the image, once"
    return None


def build_image() -> None:
    """Make kernel, initrd and root.img where they are missing: two or three minutes, some 200 MB of packages."""
    if (CACHE / "root.img").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        root = Path(folder) / "root"
        _bootstrap(root)
        seal_image(root, CACHE)


def seal_image(root: Path, into: Path) -> None:
    """The files that QEMU starts from, of the tree that debootstrap made."""
    for name, target in (("init.sh", "init.sh"), ("agent.py", "agent.py")):
        shutil.copy(HERE / "nfs" / name, root / target)
        (root / target).chmod(0o755)
    for kind, name in (("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")):
        shutil.copy(next((root / "boot").glob(f"{kind}-*")), into / name)
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    unfinished = into / "root.img.part"
    with unfinished.open("wb") as file:
        file.truncate(3 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", str(root), str(unfinished)], check=True)
    unfinished.replace(into / "root.img")


def _bootstrap(root: Path) -> None:
    """Debian as this machine has it, from where this machine has it."""
    shown = subprocess.check_output(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"], text=True)
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    codename = release["VERSION_CODENAME"].strip('"')
    mirror = next(line.split()[0] for line in shown.splitlines() if line.split()[1:] == [codename])
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", codename, str(root), mirror]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Machine:
    """One of them. ``run`` gives it an order over the network that is never cut."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._folder = folder
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Boot it, from the clean image; returns at once, see ``wait_until_up``."""
        index = NAMES.index(self.name) + 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        (self._folder / f"{self.name}.monitor").unlink(missing_ok=True)
        memory = SERVER_MIB if self.name == "server" else CLIENT_MIB
        cmdline = f"console=ttyS0 root=/dev/vda rw init=/init.sh vm.name={self.name} vm.ip=10.9.0.{index}"
        cmdline += " net.ifnames=0 mitigations=off nokaslr panic=-1"
        options = ["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", str(memory), "-smp", "1"]
        options += ["-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(CACHE / "vmlinuz")]
        options += ["-initrd", str(CACHE / "initrd"), "-append", cmdline]
        options += ["-drive", f"file={CACHE / 'root.img'},if=virtio,format=raw,snapshot=on"]
        options += ["-netdev", f"user,id=orders,restrict=on,hostfwd=tcp:127.0.0.1:{self._port}-10.0.2.15:2222"]
        options += ["-device", f"virtio-net-pci,netdev=orders,mac=52:54:00:00:01:0{index},romfile="]
        options += self._nfs_network(index)
        options += ["-serial", f"file:{self._folder / self.name}.console"]
        options += ["-monitor", f"unix:{self._folder / self.name}.monitor,server=on,wait=off"]
        with (self._folder / f"{self.name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "5", "qemu-system-x86_64", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"TMPDIR": str(self._folder)},
            )

    def _nfs_network(self, index: int) -> list[str]:
        """A cable from each client to a hub within the server's QEMU: no port, no address of this host is used."""
        nic = f"virtio-net-pci,netdev=nfs,id=cable,mac=52:54:00:00:02:0{index},romfile="
        if self.name != "server":
            path = self._folder / f"{self.name}.cable"
            return ["-netdev", f"stream,id=nfs,server=off,addr.type=unix,addr.path={path}", "-device", nic]
        disk = self._folder / "export.img"
        if not disk.exists():
            with disk.open("wb") as file:
                file.truncate(2 << 30)
        options = ["-drive", f"file={disk},if=virtio,format=raw,cache=writeback"]
        options += ["-netdev", "hubport,id=nfs,hubid=0", "-device", nic]
        for client in NAMES[1:]:
            path = self._folder / f"{client}.cable"
            options += ["-netdev", f"stream,id=to-{client},server=on,addr.type=unix,addr.path={path}"]
            options += ["-netdev", f"hubport,id=plug-{client},hubid=0,netdev=to-{client}"]
        return options

    def wait_until_up(self) -> None:
        deadline, console = time.monotonic() + BOOT_S, self._folder / f"{self.name}.console"
        while not console.exists() or f"READY {self.name}" not in console.read_text(errors="replace"):
            said = (self._folder / f"{self.name}.log").read_text(errors="replace")
            assert self._process is not None and self._process.poll() is None, f"{self.name} has ended: {said}"
            assert time.monotonic() < deadline, (
                f"{self.name} did not boot: {console.read_text(errors='replace')[-2000:]}"
            )
            time.sleep(0.5)
        while self._does_not_answer():
            assert time.monotonic() < deadline, f"{self.name} takes no orders"
            time.sleep(0.5)

    def _does_not_answer(self) -> bool:
        try:
            return self.order("true").wait(30) != 0
        except (OSError, AssertionError):
            return True

    def order(self, command: str) -> Order:
        """Begin a shell command there."""
        return Order(self._port, command)

    def run(self, command: str, timeout_s: float = 300.0, data: bytes = b"") -> str:
        """The output of a shell command there, which must succeed. It finds ``data`` on its standard input."""
        order = Order(self._port, command, data)
        code = order.wait(timeout_s)
        assert code == 0, f"{self.name}: {command}: {code}: {order.text()}"
        return order.text()

    def cut(self) -> None:
        """Take the network for NFS away."""
        self._monitor("set_link cable off")

    def join(self) -> None:
        """Give it back."""
        self._monitor("set_link cable on")

    def freeze(self) -> None:
        self._monitor("stop")

    def thaw(self) -> None:
        self._monitor("cont")

    def kill(self) -> None:
        """The host dies."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _monitor(self, command: str) -> None:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(self._folder / f"{self.name}.monitor"))
            monitor.settimeout(2)
            monitor.recv(4096)
            monitor.sendall(command.encode() + b"\n")
            with suppress(TimeoutError):
                while b"(qemu)" not in monitor.recv(4096):
                    pass


class Order:
    """A command on a machine: its output so far, and its exit code once it has one."""

    def __init__(self, port: int, command: str, data: bytes = b"") -> None:
        self._data = b""
        self._began = time.monotonic()
        self.ended = threading.Event()
        self.code: int | None = None
        self._connection = socket.create_connection(("127.0.0.1", port))
        encoded = command.encode()
        self._connection.sendall(b"%d %d\n%b%b" % (len(encoded), len(data), encoded, data))
        threading.Thread(target=self._read, daemon=True).start()

    def text(self) -> str:
        """What it has printed."""
        return self._data.rpartition(b"\0")[0 if self.ended.is_set() else 2].decode(errors="replace")

    def wait(self, timeout_s: float = 300.0) -> int | None:
        assert self.ended.wait(timeout_s), f"no end within {timeout_s} s: {self.text()}"
        return self.code

    def wait_for(self, words: str, timeout_s: float = 300.0) -> float:
        """Seconds since it began after which it has printed ``words``."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text():
            assert time.monotonic() < deadline and not self.ended.is_set(), f"no {words!r}: {self.text()}"
            time.sleep(0.1)
        return time.monotonic() - self._began

    def _read(self) -> None:
        with suppress(OSError):
            while data := self._connection.recv(1 << 16):
                self._data += data
        tail = self._data.rpartition(b"\0")[2].strip()
        if tail.isdigit():
            self.code = int(tail)
        else:  # the machine died
            self._data += b"\0"
        self.ended.set()


class Machines:
    """All three, up; a context manager that ends them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forge-hpc-nfs-"))
        self.server, self.one, self.two = (Machine(name, self.folder) for name in NAMES)

    def __enter__(self) -> Self:
        build_image()
        try:
            self.server.start()
            _wait_for_path(self.folder / "two.cable")
            for client in (self.one, self.two):
                client.start()
            for machine in (self.server, self.one, self.two):
                machine.wait_until_up()
            for client in (self.one, self.two):
                self.furnish(client)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        for machine in (self.one, self.two, self.server):
            machine.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def revive(self, client: Machine) -> None:
        """A client that was killed boots again, with an empty memory."""
        client.start()
        client.wait_until_up()
        self.furnish(client)

    def furnish(self, client: Machine) -> None:
        """Mount the export in three ways, and bring the project's code."""
        for name, options in MOUNTS.items():
            # The nolock mount would share its cache, and its locks, with the other of the same version.
            options += ",nosharecache"
            client.run(f"mkdir -p /mnt/{name} && mount -t nfs -o {options} server:/export /mnt/{name}")
        self.put(client, _code(), "/src")
        client.run("cd /src && python3 -c 'import forge_hpc.control'", timeout_s=BOOT_S)  # compiled once

    def put(self, client: Machine, archive: bytes, folder: str) -> None:
        """Unpack a tar archive there."""
        client.run(f"mkdir -p {folder} && tar -xz -C {folder}", data=archive)


def _code() -> bytes:
    """The package, what it needs of others that is pure Python, and the trials."""
    import importlib.util

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz", compresslevel=1) as archive:

        def add(path: Path, name: str) -> None:
            archive.add(path, name, filter=lambda info: None if "__pycache__" in info.name else info)

        add(HERE.parent / "forge_hpc", "forge_hpc")
        add(HERE.parent / "launchers", "launchers")
        add(HERE / "nfs", "nfs")
        for library in LIBRARIES:
            spec = importlib.util.find_spec(library)
            assert spec is not None and spec.origin is not None
            add(Path(spec.origin).parent, library)
    return data.getvalue()


def _wait_for_path(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
