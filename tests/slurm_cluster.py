"""A real Slurm cluster of several hosts on one machine, for tests and for trying things out.

Each node is a host of its own: a network namespace with an address on one bridge, a hostname in a UTS namespace, and a
slurmd. slurmctld and munged run in the root namespace, where `sbatch` is called. Root and Debian's packages slurm-wlm,
munge and iproute2 are needed; no service of the machine is touched, except for a marked block in /etc/hosts.

    python tests/slurm_cluster.py up --nodes 4 --state /tmp/cluster    # prints: export SLURM_CONF=...
    python tests/slurm_cluster.py down --state /tmp/cluster
    python tests/slurm_cluster.py clean                                # what killed test runs left behind

In tests: the fixture `slurm_cluster` (conftest.py), or for a cluster of another shape

    with SlurmCluster(nodes=2, partitions=["PartitionName=low Nodes={nodes} PreemptMode=REQUEUE"]) as cluster:
        cluster.run("srun", "--nodes=2", "hostname")
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import ipaddress
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "fhpc"  # every namespace, link, hostname and hosts block begins with it
REGISTRY = Path("/run/forge-hpc-slurm")  # one JSON file for each cluster that is up
HOSTS_FILE = Path("/etc/hosts")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "nsenter", "unshare")

DEFAULT_PARTITIONS = (
    "PartitionName=main Nodes={nodes} Default=YES MaxTime=UNLIMITED DefaultTime=60 State=UP",
    "PartitionName=short Nodes={nodes} MaxTime=10 State=UP",
    "PartitionName=spot Nodes={nodes} PreemptMode=REQUEUE GraceTime=40 State=UP",  # urgent takes its nodes
    "PartitionName=urgent Nodes={nodes} PriorityTier=10 PreemptMode=OFF State=UP",
)

# Short timers, no accounting, no cgroups. Nodes claim more than the machine has (config_overrides), so that jobs of
# whole nodes fit. cred_expire is how long a requeued job is held back.
DEFAULT_OPTIONS = {
    "AccountingStorageType": "accounting_storage/none",
    "CompleteWait": "0",
    "InactiveLimit": "0",
    "JobAcctGatherType": "jobacct_gather/none",
    "JobCompType": "jobcomp/none",
    "JobRequeue": "1",
    "KillWait": "20",
    "MessageTimeout": "30",
    "MinJobAge": "3600",
    "MpiDefault": "none",
    "PreemptMode": "REQUEUE",
    "PreemptType": "preempt/partition_prio",
    "ProctrackType": "proctrack/linuxproc",
    "ReturnToService": "2",
    "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
    "SchedulerType": "sched/backfill",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "SlurmctldTimeout": "30",
    "SlurmdParameters": "config_overrides",
    "SlurmdTimeout": "60",
    "SwitchType": "switch/none",
    "TaskPlugin": "task/none",
    "TreeWidth": "64",
}
DAEMON_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ClusterError(RuntimeError):
    """The cluster could not be started, or a command in it failed."""


@dataclass(frozen=True)
class Host:
    """One node: ``netns`` and ``link`` (the bridge's end of its cable) are what `ip` calls them."""

    name: str
    address: str
    netns: str
    link: str


def missing_requirement() -> str | None:
    """Why no cluster can run here, or None."""
    path = os.environ.get("PATH", "") + ":" + DAEMON_PATH
    absent = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    return None


class SlurmCluster:
    """A cluster that runs between `start` and `stop`, or for the length of a `with` block.

    Args:
        nodes: hosts, at most 100.
        state: directory for keys, logs and spools; a new one under /tmp, removed on stop, where it is None.
        cpus, memory_mb: what each node claims to have.
        partitions: lines of slurm.conf; ``{nodes}`` becomes the list of all nodes.
        options: further options of slurm.conf, or others in place of `DEFAULT_OPTIONS`.
        detached: outlive this process; only `down` or `stop` ends it.
        own_disks: `disk` is another folder on each host.

    Raises:
        ClusterError: a daemon did not come up; the tail of its log is in the message.
    """

    def __init__(
        self,
        nodes: int = 4,
        state: Path | None = None,
        cpus: int = 8,
        memory_mb: int = 16384,
        partitions: Sequence[str] = DEFAULT_PARTITIONS,
        options: dict[str, str] | None = None,
        detached: bool = False,
        own_disks: bool = False,
    ) -> None:
        if not 1 <= nodes <= 100:
            raise ValueError(f"nodes must be 1 to 100, not {nodes}")
        self.id = secrets.token_hex(2)
        self.num_nodes, self.cpus, self.memory_mb = nodes, cpus, memory_mb
        self.partitions, self.options, self.detached = (
            tuple(partitions),
            {**DEFAULT_OPTIONS, **(options or {})},
            detached,
        )
        self._own_state, self.own_disks = state is None, own_disks
        self.state = (
            Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{self.id}-", dir="/tmp")) if state is None else state.resolve()
        )
        self.bridge = f"{PREFIX}{self.id}"
        self.hosts: list[Host] = []
        self.controller_address = ""
        self.startup_s = 0.0

    # -- use

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def disk(self) -> Path:
        """A folder that each host has of its own, with ``own_disks``."""
        return self.state / "disk"

    def disk_of(self, host: Host) -> Path:
        """The same as seen from here."""
        return self.state / "disks" / host.name

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with Slurm's commands pointed at the cluster, and no trace of an outer job, nor of
        a process group that tests have joined in this process."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "GLOO_", "LOCAL_RANK")
        env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        return {**env, "SLURM_CONF": str(self.conf)}

    def run(
        self, *command: str, timeout_s: float = 60, check: bool = True, **kwargs
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host (the root namespace); its output is captured as text."""
        kwargs.setdefault("env", self.env)
        done = subprocess.run(command, text=True, capture_output=True, timeout=timeout_s, check=False, **kwargs)
        if check and done.returncode != 0:
            raise ClusterError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def on_host(self, host: Host, *command: str) -> list[str]:
        """The command line that runs `command` with the host's network and hostname."""
        rename = f"echo {host.name} > /proc/sys/kernel/hostname; exec {shlex.join(command)}"
        own = ["--uts"]
        if self.own_disks:
            for folder in (self.disk, self.disk_of(host)):
                folder.mkdir(parents=True, exist_ok=True)
            rename = f"mount --bind {self.disk_of(host)} {self.disk}; {rename}"
            own.append("--mount")
        return ["nsenter", f"--net=/run/netns/{host.netns}", "unshare", *own, "sh", "-c", rename]

    def job(self, job_id: int | str) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(job_id)).stdout
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def wait_for_job(
        self, job_id: int | str, states: Sequence[str] = ("COMPLETED",), timeout_s: float = 120
    ) -> dict[str, str]:
        """Poll until the job is in one of `states`; ClusterError on the deadline or on another final state."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            if job["JobState"] in final or time.monotonic() > deadline:
                raise ClusterError(f"job {job_id} is {job['JobState']} ({job['Reason']}), not {' or '.join(states)}")
            time.sleep(0.2)

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 120) -> None:
        """Poll until `ready()`; raises ClusterError on the deadline."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                raise ClusterError(f"nothing came within {timeout_s:.0f} s:\n{self._log_tail('slurmctld')}")
            time.sleep(0.2)

    # -- life

    def __enter__(self) -> SlurmCluster:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up and wait until all nodes are idle."""
        begin = time.monotonic()
        if reason := missing_requirement():
            raise ClusterError(reason)
        clean_leftovers()
        if not self._own_state and self.state.exists() and any(self.state.iterdir()):
            raise ClusterError(f"{self.state} is not empty: `down --state {self.state}`, or another directory")
        try:
            for folder in ("", "ctld", "log", "spool"):
                (self.state / folder).mkdir(parents=True, exist_ok=True)
            self.state.chmod(0o755)
            with _registry_lock():
                self._choose_network()
                self._register()
            self._make_network()
            _edit_hosts(self.id, {self._names[h.name]: h.name for h in self.hosts})
            self._start_daemons()
        except BaseException:
            self.stop()
            raise
        self.startup_s = time.monotonic() - begin

    def stop(self) -> None:
        """End every process of the cluster and of its jobs, and remove its links, names and files."""
        _tear_down(self.id, self.state)
        if self._own_state:
            shutil.rmtree(self.state, ignore_errors=True)

    # -- parts

    @property
    def _names(self) -> dict[str, str]:
        return {host.name: host.address for host in self.hosts}

    def _choose_network(self) -> None:
        routes = subprocess.run(["ip", "-4", "-o", "addr"], text=True, capture_output=True, check=True).stdout
        taken = [ipaddress.ip_interface(line.split()[3]).network for line in routes.splitlines()]
        taken += [ipaddress.ip_network(record["network"]) for record in _records().values()]
        free = (
            n for n in ipaddress.ip_network("10.213.0.0/16").subnets(new_prefix=24) if not any(map(n.overlaps, taken))
        )
        self.network = next(free)
        addresses = [str(address) for address in self.network.hosts()]
        self.controller_address = addresses[-1]
        self.hosts = [
            Host(f"{PREFIX}{self.id}n{i}", addresses[i - 1], f"{PREFIX}{self.id}n{i}", f"{PREFIX}{self.id}v{i}")
            for i in range(1, self.num_nodes + 1)
        ]

    def _register(self) -> None:
        pid = None if self.detached else os.getpid()
        record = {
            "state": str(self.state),
            "network": str(self.network),
            "own_state": self._own_state,
            "pid": pid,
            "started": None if pid is None else _start_time(pid),
        }
        (REGISTRY / f"{self.id}.json").write_text(json.dumps(record))

    def _make_network(self) -> None:
        _ip(f"link add {self.bridge} type bridge")
        _ip(f"addr add {self.controller_address}/{self.network.prefixlen} dev {self.bridge}")
        _ip(f"link set {self.bridge} up")
        for host in self.hosts:
            _ip(f"netns add {host.netns}")
            _ip(f"link add {host.link} type veth peer name eth0 netns {host.netns}")
            _ip(f"link set {host.link} master {self.bridge} up")
            _ip(f"-n {host.netns} addr add {host.address}/{self.network.prefixlen} dev eth0")
            _ip(f"-n {host.netns} link set eth0 up")
            _ip(f"-n {host.netns} link set lo up")

    def _start_daemons(self) -> None:
        key = self.state / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        munge_socket = self.state / "munge.socket"
        self._daemon(
            "munged",
            [
                "munged",
                "--foreground",
                "--force",  # the machine's umask and /tmp are not what munged likes
                "--num-threads=2",
                f"--key-file={key}",
                f"--socket={munge_socket}",
                f"--pid-file={self.state}/munged.pid",
                f"--seed-file={self.state}/munged.seed",
                f"--log-file={self.state}/log/munged.log",
            ],
        )
        self._wait("munged", munge_socket.exists)

        for _ in range(3):  # slurmctld wants a number: another process may take it before slurmctld does
            self._write_conf(munge_socket, _free_port())
            controller = self._daemon("slurmctld", ["slurmctld", "-D", "-c", "-f", str(self.conf)])
            self._wait("slurmctld", lambda c=controller: c.poll() is not None or self._controller_answers())
            if controller.poll() is None:
                break
        else:
            raise ClusterError(f"slurmctld does not start:\n{self._log_tail('slurmctld')}")

        for host in self.hosts:
            slurmd = ["slurmd", "-D", "-N", host.name, "-f", str(self.conf)]
            self._daemon(f"slurmd-{host.name}", self.on_host(host, *slurmd))
        self._wait(f"slurmd-{self.hosts[0].name}", self._all_idle)

    def _controller_answers(self) -> bool:
        return self.run("scontrol", "ping", check=False, timeout_s=30).returncode == 0

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False).stdout.splitlines()
        return set(states) == {f"{host.name} idle" for host in self.hosts}

    def _write_conf(self, munge_socket: Path, port: int) -> None:
        names = f"{PREFIX}{self.id}n[1-{self.num_nodes}]"
        head, _, last = self.hosts[0].address.rpartition(".")
        addresses = f"{head}.[{last}-{int(last) + self.num_nodes - 1}]"
        lines = {
            "ClusterName": f"{PREFIX}{self.id}",
            "SlurmctldHost": f"{socket.gethostname().split('.')[0]}({self.controller_address})",
            "SlurmctldPort": port,
            "SlurmUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge_socket},cred_expire=10",
            "StateSaveLocation": self.state / "ctld",
            "SlurmdSpoolDir": self.state / "spool" / "%n",
            "SlurmctldPidFile": self.state / "slurmctld.pid",
            "SlurmdPidFile": self.state / "slurmd-%n.pid",
            **self.options,
        }
        text = [f"{key}={value}" for key, value in lines.items()]
        text.append(f"NodeName={names} NodeAddr={addresses} CPUs={self.cpus} RealMemory={self.memory_mb} State=UNKNOWN")
        text += [line.format(nodes=names) for line in self.partitions]
        self.conf.write_text("\n".join(text) + "\n")

    def _daemon(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        # A session of its own, so that a Ctrl-C reaches the tests and not the cluster; no environment of a user.
        with (self.state / "log" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"PATH": DAEMON_PATH, "SLURM_CONF": str(self.conf), "LANG": "C.UTF-8"},
                cwd="/",
                start_new_session=True,
            )
        with (self.state / "pids").open("a") as pids:
            pids.write(f"{process.pid} {_start_time(process.pid)}\n")
        return process

    def _log_tail(self, daemon: str) -> str:
        lines = (self.state / "log" / f"{daemon}.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def _wait(self, daemon: str, ready: Callable[[], bool], timeout_s: float = 60) -> bool:
        deadline = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > deadline:
                raise ClusterError(f"{daemon} was not ready in {timeout_s:.0f} s:\n{self._log_tail(daemon)}")
            time.sleep(0.05)
        return True


# -- leftovers: everything can be found again by the cluster's id, also when the process that made it was killed


def clean_leftovers(everything: bool = False) -> list[str]:
    """Tear down clusters whose process is gone, with `everything` also those that run; returns their ids."""
    REGISTRY.mkdir(mode=0o755, exist_ok=True)
    removed = []
    for cluster_id, record in _records().items():
        alive = record["pid"] is None or _start_time(record["pid"]) == record["started"]
        if everything or not alive:
            _tear_down(cluster_id, Path(record["state"]))
            if record["own_state"]:
                shutil.rmtree(record["state"], ignore_errors=True)
            removed.append(cluster_id)
    return removed


def _tear_down(cluster_id: str, state: Path) -> None:
    name = f"{PREFIX}{cluster_id}"
    spaces = [ns for ns in _ip_names("netns") if ns.startswith(f"{name}n")]
    # Jobs and slurmds live in the namespaces; the controller and munged are known by pid and start time.
    _kill_all(lambda: [*_recorded_pids(state), *(pid for ns in spaces for pid in pids_in(ns))])
    for ns in spaces:
        subprocess.run(["ip", "netns", "del", ns], capture_output=True, check=False)  # another cleaner may be first
    for link in _ip_names("link"):
        if link == name or link.startswith(f"{name}v"):
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)  # may go with its namespace
    _edit_hosts(cluster_id, {})
    (state / "pids").unlink(missing_ok=True)
    (REGISTRY / f"{cluster_id}.json").unlink(missing_ok=True)


def _kill_all(find: Callable[[], list[int]], grace_s: float = 3, timeout_s: float = 20) -> None:
    begin = time.monotonic()
    signalled: set[int] = set()
    while pids := find():
        elapsed = time.monotonic() - begin
        if elapsed > timeout_s:
            raise ClusterError(f"processes {pids} do not end")
        for pid in pids:
            if elapsed > grace_s or pid not in signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if elapsed > grace_s else signal.SIGTERM)
                signalled.add(pid)
        time.sleep(0.05)


def _recorded_pids(state: Path) -> list[int]:
    if not (state / "pids").exists():
        return []
    pairs = [line.split() for line in (state / "pids").read_text().splitlines()]
    return [int(pid) for pid, started in pairs if _start_time(int(pid)) == started]


def pids_in(netns: str) -> list[int]:
    """Living processes in a network namespace."""
    listed = subprocess.run(["ip", "netns", "pids", netns], text=True, capture_output=True, check=False).stdout
    return [pid for pid in map(int, listed.split()) if _start_time(pid) is not None]


def _start_time(pid: int) -> str | None:
    """The kernel's start time of a process, which with the pid names it for good; None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _records() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(REGISTRY.glob("*.json"))}


@contextlib.contextmanager
def _registry_lock() -> Iterator[None]:
    REGISTRY.mkdir(mode=0o755, exist_ok=True)
    with (REGISTRY / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _edit_hosts(cluster_id: str, names: dict[str, str]) -> None:
    """Put the cluster's block into /etc/hosts, or take it out where there are no names.

    Written in place: in containers the file is a mount and cannot be replaced.
    """
    mark = f"# {PREFIX}{cluster_id}"
    with _registry_lock(), HOSTS_FILE.open("r+") as hosts:
        old = hosts.read()
        lines = [line for line in old.splitlines(keepends=True) if not line.rstrip().endswith(mark)]
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        new = "".join(lines) + "".join(f"{address} {name} {mark}\n" for address, name in names.items())
        if new != old:
            hosts.seek(0)
            hosts.write(new)
            hosts.truncate()


def _ip(arguments: str) -> str:
    done = subprocess.run(["ip", *arguments.split()], text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"ip {arguments}: {done.stderr.strip()}")
    return done.stdout


def _ip_names(kind: str) -> list[str]:
    listed = _ip("netns list" if kind == "netns" else "-o link")
    column = 0 if kind == "netns" else 1
    return [line.split()[column].rstrip(":").split("@")[0] for line in listed.splitlines() if line]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster that stays until `down`")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--cpus", type=int, default=8, help="CPUs that each node claims to have")
    up.add_argument("--memory-mb", type=int, default=16384, help="memory that each node claims to have")
    up.add_argument("--state", type=Path, required=True, help="directory for keys, logs and spools")
    down = commands.add_parser("down", help="end the cluster in a state directory")
    down.add_argument("--state", type=Path, required=True)
    clean = commands.add_parser("clean", help="end clusters whose test run is gone")
    clean.add_argument("--all", action="store_true", help="all clusters of this machine, running ones too")
    arguments = parser.parse_args()

    if arguments.command == "up":
        state, size = arguments.state, (arguments.cpus, arguments.memory_mb)
        cluster = SlurmCluster(arguments.nodes, state, *size, detached=True)
        try:
            cluster.start()
        except ClusterError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"# {arguments.nodes} nodes in {cluster.startup_s:.1f} s; logs in {cluster.state}/log", file=sys.stderr)
        print(f"export SLURM_CONF={shlex.quote(str(cluster.conf))}")
    elif arguments.command == "down":
        state = str(arguments.state.resolve())
        for cluster_id in [i for i, record in _records().items() if record["state"] == state]:
            _tear_down(cluster_id, arguments.state)
            shutil.rmtree(state, ignore_errors=True)
    else:
        if missing_requirement() is None:
            clean_leftovers(everything=arguments.all)
    return 0


if __name__ == "__main__":
    sys.exit(main())
