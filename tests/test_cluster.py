"""Nodes find each other, trust nobody else, and leave nothing behind."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge_hpc.cluster.allocation import Allocation, host_address
from forge_hpc.cluster.identity import make_job_identity, tls_environment
from forge_hpc.cluster.processes import MAX_OPEN_FILES
from forge_hpc.cluster.rendezvous import Rendezvous, RendezvousTimeout

ATTACH = """
    import asyncio, sys
    from forge_hpc.cluster.meshes import attach
    from monarch.actor import Actor, endpoint

    class Echo(Actor):
        @endpoint
        async def pid(self):
            import os
            return os.getpid()

        @endpoint
        async def may_open(self):
            import resource
            return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    async def main():
        hosts = await attach(sys.argv[1:], "127.0.0.1", 60)
        print("attached", flush=True)
        procs = hosts.spawn_procs(per_host={"procs": 1})
        print("answered", len([pid for _, pid in await procs.spawn("echo", Echo).pid.call()]), flush=True)
        await hosts.shutdown()

    asyncio.run(main())
"""


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    make_job_identity(tmp_path / "tls", ["127.0.0.1", "localhost"])
    return tmp_path / "tls"


@pytest.fixture
def worker(tmp_path: Path, identity: Path) -> Iterator[str]:
    """Address of a running Monarch worker, begun as from a shell that may open 256 files."""
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    command = [sys.executable, "-m", "forge_hpc.cluster.worker", "--rendezvous", str(rendezvous.directory)]
    command += ["--node", "0", "--address", "127.0.0.1", "--parent", str(os.getpid())]
    command = ["bash", "-c", 'ulimit -Sn 256 && exec "$@"', "bash", *command]
    process = subprocess.Popen(command, env={**os.environ, **tls_environment(identity)}, start_new_session=True)
    try:
        yield rendezvous.wait(["worker-0"], 60)[0]["address"]
    finally:
        process.kill()
        process.wait()


def run_script(script: str, *args: str, tls: Path | None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HYPERACTOR_")}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        env={**env, **(tls_environment(tls) if tls else {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_the_identity_is_readable_by_its_owner_alone(identity: Path) -> None:
    assert stat.S_IMODE(identity.stat().st_mode) == 0o700
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in identity.iterdir()} == {
        "ca.pem": 0o600,
        "cert.pem": 0o600,
        "key.pem": 0o600,
    }


def test_the_controller_attaches_with_the_certificate_of_the_job(worker: str, identity: Path) -> None:
    result = run_script(ATTACH, worker, tls=identity)
    assert "answered 1" in result.stdout, result.stderr


def test_what_runs_on_a_node_may_open_as_many_files_as_the_system_lets_it(worker: str, identity: Path) -> None:
    script = ATTACH.replace("pid.call()", "may_open.call()").replace("len([", "min([")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    result = run_script(script, worker, tls=identity)
    assert f"answered {most}\n" in result.stdout, result.stderr


def test_a_client_with_a_certificate_of_another_job_is_refused(worker: str, tmp_path: Path) -> None:
    make_job_identity(tmp_path / "foreign", ["127.0.0.1", "localhost"])
    result = run_script(ATTACH.replace("60)", "8)"), worker, tls=tmp_path / "foreign")
    assert "attached" not in result.stdout
    assert result.returncode != 0


def test_a_client_without_a_certificate_is_refused(worker: str, identity: Path) -> None:
    port = int(worker.rsplit(":", 1)[1])

    def greet(with_certificate: bool) -> bytes:
        context = ssl.create_default_context(cafile=str(identity / "ca.pem"))
        if with_certificate:
            context.load_cert_chain(identity / "cert.pem", identity / "key.pem")
        raw = socket.create_connection(("127.0.0.1", port), timeout=10)
        with raw, context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
            tls.settimeout(2)
            return tls.recv(1)  # TLS 1.3 tells the client of its refusal with the first read

    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        greet(with_certificate=False)
    with pytest.raises(TimeoutError):  # admitted: the server waits for us to speak
        greet(with_certificate=True)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:  # no TLS at all
        plain.settimeout(10)
        plain.sendall(b"\0" * 64)
        try:
            answer = plain.recv(64)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer[0] == 21  # closed, or a TLS alert


def test_64_hosts_attach_split_and_answer(tmp_path: Path) -> None:
    count = 64
    make_job_identity(tmp_path / "tls", ["127.0.0.1", *(f"127.0.1.{n + 1}" for n in range(count))])
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    env = {**os.environ, **tls_environment(tmp_path / "tls"), "MONARCH_TOKIO_WORKER_THREADS": "1"}
    command = [sys.executable, "-m", "forge_hpc.cluster.worker", "--rendezvous", str(rendezvous.directory)]
    workers = [
        subprocess.Popen(
            [*command, "--node", str(n), "--address", f"127.0.1.{n + 1}", "--parent", str(os.getpid())],
            env=env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for n in range(count)
    ]
    try:
        started = time.monotonic()
        addresses = [r["address"] for r in rendezvous.wait([f"worker-{n}" for n in range(count)], 240)]
        listening_s = time.monotonic() - started
        script = ATTACH.replace(
            'procs = hosts.spawn_procs(per_host={"procs": 1})',
            'trainers = hosts.slice(hosts=slice(0, 32)).spawn_procs(per_host={"procs": 1}, name="trainer")\n'
            '        procs = hosts.slice(hosts=slice(32, 64)).spawn_procs(per_host={"procs": 1}, name="generator")\n'
            '        answers = [pid for _, pid in await trainers.spawn("echo", Echo).pid.call()]\n'
            '        print("trainers", len(answers), flush=True)',
        )
        started = time.monotonic()
        result = run_script(script, *addresses, tls=tmp_path / "tls", timeout=400)
        assert "trainers 32" in result.stdout and "answered 32" in result.stdout, result.stdout + result.stderr
        print(
            f"\n64 hosts listen after {listening_s:.1f} s; attach, split, spawn, answer: "
            f"{time.monotonic() - started:.1f} s"
        )
    finally:
        for worker in workers:  # their processes die with them
            worker.kill()
        for worker in workers:
            worker.wait()


def test_a_rendezvous_that_is_not_kept_names_who_is_missing(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    rendezvous.publish("node-0", {"address": "a"})
    with pytest.raises(RendezvousTimeout, match="node-1, node-2"):
        rendezvous.wait(["node-0", "node-1", "node-2"], 0.1)
    assert rendezvous.wait(["node-0"], 0.1) == [{"address": "a"}]


def test_a_process_outside_slurm_is_one_node_on_loopback() -> None:
    assert Allocation.from_environment({}) == Allocation("local", 0, 1, 0)
    assert host_address(1) == "127.0.0.1"


def test_a_task_of_a_slurm_step_knows_its_place() -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": "2"}
    assert Allocation.from_environment(environ) == Allocation("7", 3, 4, 2)


def test_all_descendants_end_even_those_that_detached_and_ignore_signals() -> None:
    script = """
        import subprocess, sys, psutil
        from forge_hpc.cluster.processes import become_subreaper, end_descendants

        become_subreaper()
        stubborn = "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.setsid(); " \\
                   "os.fork(); print('up', flush=True); time.sleep(600)"
        parent = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], " \\
                 "stdout=subprocess.PIPE); p.stdout.readline(); p.stdout.readline()"
        subprocess.run([sys.executable, "-c", parent, stubborn])  # it ends, its children go on
        print("before", len(psutil.Process().children(recursive=True)))
        end_descendants(grace_s=0.2)
        print("after", len([p for p in psutil.Process().children(recursive=True) if p.status() != "zombie"]))
    """
    result = run_script(script, tls=None)
    assert result.stdout.split() == ["before", "2", "after", "0"], result.stdout + result.stderr


def test_what_killed_processes_share_does_not_stay_in_memory() -> None:
    script = """
        import subprocess, sys, psutil
        from pathlib import Path
        from forge_hpc.cluster.processes import become_subreaper, end_descendants

        become_subreaper()
        shares = "import multiprocessing, time; from multiprocessing.shared_memory import SharedMemory; " \\
                 "lock = multiprocessing.get_context('spawn').Lock(); memory = SharedMemory(create=True, size=8); " \\
                 "print(lock._semlock.name, memory.name, flush=True); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", shares], stdout=subprocess.PIPE, text=True)
        lock, memory = child.stdout.readline().split()
        files = [Path("/dev/shm") / ("sem." + lock.strip("/")), Path("/dev/shm") / memory.strip("/")]
        print("before", *[file.exists() for file in files], len(psutil.Process().children(recursive=True)))
        end_descendants(grace_s=0)
        print("after", *[file.exists() for file in files], len(psutil.Process().children(recursive=True)))
    """
    result = run_script(script, tls=None)
    expected = ["before", "True", "True", "2", "after", "False", "False", "0"]
    assert result.stdout.split() == expected, result.stdout + result.stderr
