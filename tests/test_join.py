"""Nodes that other jobs lend to a run: who is let in, what is known of them, and what is said before a job is queued.

test_slurm_join.py does it with a run and a job.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runs import PROJECT, wait_for

from forge_hpc.cluster.identity import Authority, keep_identity, make_job_identity, new_request
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, load_config, save_config
from forge_hpc.config.lending import lent_replicas, takes_lent
from forge_hpc.controller import lent as lending
from forge_hpc.controller.lent import MAX_LOSSES, LentGenerators
from forge_hpc.controller.service import Service
from forge_hpc.gate.environment import environment
from forge_hpc.joining import door
from forge_hpc.joining.command import JoinRequest, check_join
from forge_hpc.joining.desk import Desk
from forge_hpc.joining.door import Answer, Ask, Door, Lent, Over
from forge_hpc.joining.jobs import is_lending_job, lending_jobs
from forge_hpc.joining.lifeline import Lifelines, hold
from forge_hpc.run_dir import RunDir
from forge_hpc.sizing.host import plan_lent
from forge_hpc.slurm import partitions
from forge_hpc.slurm.partitions import Kind, Partition
from forge_hpc.wire.tls import Certificates

DEMO = PROJECT / "configs/grpo/demo.yaml"
ASYNC = "rollout.max_staleness=2"


def certificates(folder: Path) -> Certificates:
    return Certificates(*(folder / f"{kind}.pem" for kind in ("ca", "cert", "key")))


# ---- before the queue


def a_run(tmp_path: Path, *overrides: str, config: Path = DEMO, state: str = "running", job: str = "7") -> RunDir:
    run_dir = RunDir(tmp_path / "run").create()
    cfg = load_config(config, ["model.path=builtin:qwen3-tiny", *overrides])
    save_config(cfg, run_dir.config)
    run_dir.write_status(state=state, job_id=job)
    return run_dir


def with_door(run_dir: RunDir, gpus: int = 0, **versions: str) -> RunDir:
    rendezvous = Rendezvous(run_dir.rendezvous / "7.0.0")
    rendezvous.publish(door.DOOR, Door(str(run_dir.logs), gpus, environment() | versions).as_record())
    return run_dir


@pytest.mark.parametrize(
    ("config", "overrides", "why"),
    [
        ("grpo/demo.yaml", [], "the run is synchronous (rollout.max_staleness=0)"),
        ("sft/demo.yaml", [], "recipe=sft does not generate beside its training"),
        ("eval/demo.yaml", [], "recipe=eval does not generate beside its training"),
    ],
)
def test_a_run_that_can_have_no_other_generators_is_not_joined(
    tmp_path: Path, config: str, overrides: list[str], why: str
) -> None:
    run_dir = a_run(tmp_path, *overrides, config=PROJECT / "configs" / config)
    with pytest.raises(UserError) as error:
        check_join(JoinRequest(run_dir))
    assert why in error.value.message


@pytest.mark.parametrize(
    ("state", "job", "why"),
    [
        ("completed", "7", "has ended: it is completed"),
        ("failed", "7", "has ended: it is failed"),
        ("cancelled", "7", "has ended: it is cancelled"),
        ("pending", "7", "is queued: it is pending"),
        ("preempted", "7", "is queued: it is preempted"),
        ("running", "", "is a process of one machine"),
        ("running", "7", "takes no nodes: it is one of an older forge_hpc"),
    ],
)
def test_a_run_is_joined_while_it_runs_as_a_job(tmp_path: Path, state: str, job: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check_join(JoinRequest(a_run(tmp_path, ASYNC, state=state, job=job)))


def test_what_a_job_that_lends_cannot_be_is_said_before_it_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = Partition("gpus", True, True, float("inf"), (Kind(8, 4),))
    monkeypatch.setattr(partitions, "slurm_is_here", lambda: True)
    monkeypatch.setattr(partitions, "partitions", lambda: [four])
    tp = ["generator.engine.tensor_parallel_size=8", "cluster.gpus_per_node=8"]
    run_dir = with_door(a_run(tmp_path, ASYNC, *tp), gpus=8)

    def refusal(**request: Any) -> str:
        with pytest.raises(UserError) as error:
            check_join(JoinRequest(run_dir, **request))
        return f"{error.value.message} ({error.value.hint})"

    assert "no partition absent (there are: gpus)" in refusal(partition="absent")
    assert "tensor_parallel_size=8 does not divide the 4 GPUs" in refusal(partition="gpus")
    assert "9 nodes asked for, partition gpus has 8" in refusal(
        partition="gpus", nodes=9, overrides=("cluster.gpus_per_node=8",)
    )
    assert "--nodes 0" in refusal(nodes=0)
    assert "--at-once is for the jobs of an --array" in refusal(at_once=2)
    assert "a job that lends nodes has the run's configuration" in refusal(overrides=("rollout.group_size=2",))
    with_door(run_dir, gpus=8, torch="0.1", python="2.7")
    assert "this is another environment than the run's: python" in refusal()
    with_door(run_dir, gpus=8)
    os.chown(run_dir.path, 1, -1)
    assert "is another user's" in refusal()


def test_a_job_that_lends_is_the_runs_but_for_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launchers.slurm import LentExecutor

    known = [Partition(name, name == "main", True, float("inf"), (Kind(8, 0),)) for name in ("main", "spot")]
    monkeypatch.setattr(partitions, "slurm_is_here", lambda: True)
    monkeypatch.setattr(partitions, "partitions", lambda: known)
    extra = "slurm.extra={comment: mine, dependency: 'afterok:1', array: '0-3'}"
    run_dir = with_door(a_run(tmp_path, ASYNC, "cluster.nodes=4", "slurm.time=08:00:00", extra))
    request = JoinRequest(run_dir, 2, "spot", 8, 4, ("slurm.time=01:00:00",))
    cfg, _, generators = check_join(request)
    assert generators == 2
    script = LentExecutor(cfg, run_dir.path, request.tasks).script()
    for line in ("--nodes=2", "--partition=spot", "--array=0-7%4", "--comment=mine", "--no-kill", "--requeue"):
        assert f"#SBATCH {line}\n" in script
    assert "--time=01:00:00" in script and "--signal=USR2@60" in script and "dependency" not in script
    assert f"-m forge_hpc.join --run-dir {run_dir}" in script and "--kill-on-bad-exit=0" in script


def test_a_lent_node_holds_as_many_generators_as_fit() -> None:
    cfg = Config()
    cfg.generator.engine.tensor_parallel_size = 2
    assert lent_replicas(cfg, 8, 4) == ((0, 1), (2, 3))
    assert lent_replicas(cfg, 0, 4) == ((),), "a run on the CPU has one a node, whatever it has"
    for gpus in (0, 3):
        with pytest.raises(UserError):
            lent_replicas(cfg, 8, gpus)
    assert not takes_lent(cfg)


# ---- who is let in


def test_a_certificate_is_signed_for_whoever_has_the_key_and_for_nobody_else(tmp_path: Path) -> None:
    authority = make_job_identity(tmp_path / "run", ["127.0.0.1"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"ca.pem", "cert.pem", "key.pem"}
    key, request = new_request()
    keep_identity(tmp_path / "lent", ca=authority.ca, cert=authority.certify(request, ["127.0.0.1"]), key=key)
    other = Authority()
    key, request = new_request()
    keep_identity(tmp_path / "other", ca=authority.ca, cert=other.certify(request, ["127.0.0.1"]), key=key)
    signed = bytearray(ssl.PEM_cert_to_DER_cert(request.decode().replace("CERTIFICATE REQUEST", "CERTIFICATE")))
    signed[-1] ^= 1
    forged = ssl.DER_cert_to_PEM_cert(bytes(signed)).replace("CERTIFICATE", "CERTIFICATE REQUEST").encode()
    with pytest.raises(ValueError, match="not signed with its key"):
        authority.certify(forged, ["127.0.0.1"])
    cut: list[int] = []

    async def connect() -> None:
        lines = Lifelines("127.0.0.1", certificates(tmp_path / "run"), cut.append)
        record = await lines.open()
        held = await asyncio.to_thread(hold, record, 5, certificates(tmp_path / "lent"))
        await asyncio.sleep(0.2)
        assert cut == []
        refused = await asyncio.to_thread(hold, record, 6, certificates(tmp_path / "other"))  # TLS 1.3 tells later
        with pytest.raises(OSError):
            await asyncio.to_thread(lambda: [refused.recv(1), refused.sendall(b"x")])
        held.close()
        async with asyncio.timeout(10):
            while not cut:
                await asyncio.sleep(0.01)

    asyncio.run(connect())
    assert cut == [5]


def report(**more: Any) -> dict[str, Any]:
    found = {"problems": [], "orphans": [], "gpus": 0, "working_gpus": None, "memory_bytes": 1 << 34, "clock_s": 0.0}
    return found | {"environment": {"python": "3.11", "forge_hpc": "abc", "torch": "2.13"}} | more


def ask(name: str, rendezvous: Rendezvous, **more: Any) -> None:
    _, request = new_request()
    asked = Ask("12", "n5", "10.0.0.5", ["10.0.0.5"], request.decode(), 0, report(**more))
    rendezvous.publish(door.ask_name(name), asked.as_record())


def test_the_desk_lets_in_what_is_like_the_run_and_numbers_it_after_the_runs_own_nodes(tmp_path: Path) -> None:
    rendezvous, config = Rendezvous(tmp_path / "7.0.0"), load_config(DEMO, [ASYNC])
    desk = Desk(config, rendezvous, Authority(), report(), 3, tmp_path)
    ask("a", rendezvous)
    ask("b", rendezvous, environment={"python": "3.11", "forge_hpc": "xyz", "torch": "2.13"})
    ask("c", rendezvous, problems=["its temporary directory /tmp is full: 3 MiB are free"])
    rendezvous.publish(door.ask_name("d"), {"of": "a later version"})
    ask("e", rendezvous)
    desk.look()
    answers = {name: Answer.of(rendezvous.look(door.answer_name(name))) for name in "abcde"}
    assert {name: answer.node for name, answer in answers.items() if not answer.refused} == {"a": 3, "e": 4}
    assert answers["b"].refused == "its environment is another: forge_hpc xyz, elsewhere abc"
    assert "is full" in answers["c"].refused and "does not understand" in answers["d"].refused
    assert rendezvous.names("lent-") == ["lent-3", "lent-4"] and rendezvous.names("ask-") == []


def test_a_node_with_too_little_memory_for_its_generators_is_not_taken(tmp_path: Path) -> None:
    rendezvous = Rendezvous(tmp_path / "7.0.0")
    config = load_config(DEMO, [ASYNC, "model.dtype=bfloat16", "generator.engine.kv_cache_memory_gib=4"])
    eight_b: Any = SimpleNamespace(num_params=8 * 2**30)
    desk = Desk(config, rendezvous, Authority(), report(), 3, tmp_path, lambda path: eight_b)
    for name, gib in (("a", 64), ("b", 32)):
        ask(name, rendezvous, memory_limit={"num_bytes": gib << 30, "is_cgroups": True})
    ask("c", rendezvous)  # of an earlier version
    desk.look()
    answers = {name: Answer.of(rendezvous.look(door.answer_name(name))) for name in "abc"}
    assert not answers["a"].refused and not answers["c"].refused
    assert answers["b"].refused.startswith(
        "it is to keep 36.0 GiB in its memory (engines 16.0, weights received 16.0, KV cache 4.0) and may have 32.0 "
        "(the limit of its cgroup); raise slurm.mem"
    )


@pytest.mark.parametrize(("options", "gib"), [((), 16), (("generator.weight_transport=nccl",), 0)])
def test_generators_on_lent_gpus_keep_the_weights_that_come_once(options: tuple[str, ...], gib: int) -> None:
    config = load_config(DEMO, [ASYNC, "model.dtype=bfloat16", *options])
    size: Any = SimpleNamespace(num_params=8 * 2**30)
    host = plan_lent(config, 4, on_gpus=True, size_of=lambda path: size)
    assert host is not None
    (needs,) = host.nodes
    kept = {need.what: need.num_bytes >> 30 for need in needs}
    assert kept == {"processes": 4} | ({"weights received": gib} if gib else {})


# ---- a lent node's supervisor, with a Monarch worker, against a run that the test plays


class PlayedRun:
    """What a run's first node and controller do for lent nodes, without a run."""

    def __init__(self, run_dir: RunDir, start: str) -> None:
        self.rendezvous = Rendezvous(run_dir.rendezvous / start)
        logs = run_dir.create_log_dir("7", 0)
        own = report(environment=environment(), memory_bytes=1 << 20)
        self.desk = Desk(load_config(run_dir.config), self.rendezvous, Authority(), own, 1, logs)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(run_dir,))
        self._thread.start()

    def _serve(self, run_dir: RunDir) -> None:
        while not self._ended.wait(0.1):
            self.desk.look()
            for name in self.rendezvous.names("lent-"):
                number, _, what = name.removeprefix("lent-").partition("-")
                if what == "leaving":
                    self.rendezvous.publish(door.over_name(int(number)), Over("its job takes it back").as_record())

    def end(self, **outcome: Any) -> None:
        self._ended.set()
        self._thread.join()
        if outcome:
            self.rendezvous.publish("outcome", outcome)


@pytest.fixture
def lend(tmp_path: Path) -> Iterator[Callable[[RunDir], subprocess.Popen[str]]]:
    started = []

    def start(run_dir: RunDir) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "forge_hpc.join", "--run-dir", str(run_dir)]
        environ = {**os.environ, "PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, env=environ)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_lent_node_serves_one_start_after_the_other_and_gives_its_requests_back(
    tmp_path: Path, lend: Callable[[RunDir], subprocess.Popen[str]]
) -> None:
    run_dir = a_run(tmp_path, ASYNC)
    first = PlayedRun(run_dir, "7.0.0")
    process = lend(run_dir)
    wait_for(lambda: first.rendezvous.look("worker-1"), "its worker", 60)
    assert Lent.of(first.rendezvous.look(door.lent_name(1))).job_id == "local"
    run_dir.write_status(state="preempted", message="preempted by another job")
    first.end(code=4, message="preempted by another job")
    wait_for(lambda: not first.rendezvous.names("worker-"), "the end of its worker", 30)
    run_dir.write_status(state="running")
    second = PlayedRun(run_dir, "7.1.0")
    wait_for(lambda: second.rendezvous.look("worker-1"), "its worker for the next start", 60)
    assert not list(run_dir.path.rglob("key.pem")), "a lent node's key is on the node alone"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    wait_for(lambda: not second.rendezvous.names("lent-"), "nothing to be left of it", 60)
    second.end()
    assert process.returncode == 0, said
    assert "preempted by another job; waiting for the run to take it again" in said and "leaving: SIGTERM" in said


def test_a_lent_node_of_a_run_that_is_over_ends_well(
    tmp_path: Path, lend: Callable[[RunDir], subprocess.Popen[str]]
) -> None:
    process = lend(a_run(tmp_path, ASYNC, state="cancelled"))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "the run is over: cancelled" in said


def test_a_lent_node_that_is_not_let_in_says_why_and_fails(
    tmp_path: Path, lend: Callable[[RunDir], subprocess.Popen[str]]
) -> None:
    run_dir = a_run(tmp_path, ASYNC)
    run = PlayedRun(run_dir, "7.0.0")
    run.desk._report = report(environment=environment() | {"python": "2.7"})
    process = lend(run_dir)
    _, said = process.communicate(timeout=60)
    run.end()
    assert process.returncode == 1 and "the run does not take this node: its environment is another: python" in said


# ---- the controller's part


class Lenders:
    """Lent generators of a service, on nodes that start processes at once, or not at all."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rendezvous = Rendezvous(tmp_path / "7.0.0")
        self.service = Service("generator", 1, 60, self.on_loss)
        self.dead = False
        self.numbers: list[int] = []
        self.killed: list[str] = []
        pool: Any = SimpleNamespace(service=self.service, is_serving=True, model_dir=Path(), lent=None)
        pool.ask, pool.bring_up_to_date = self.answered, self.answered
        enders = SimpleNamespace(beside=lambda name, procs: procs)
        faults = SimpleNamespace(watch=lambda *args: None, forget=lambda *args: None, enders=enders)
        placement = SimpleNamespace(gpus_per_node=0)
        cluster: Any = SimpleNamespace(faults=faults, placement=placement, end_at_once=self.killed.append)
        self.lent = LentGenerators(
            load_config(DEMO, [ASYNC]), cluster, pool, self.rendezvous, "127.0.0.1", tmp_path, self.numbers.append
        )
        monkeypatch.setattr(lending, "attach_lent", lambda address, timeout_s: self.answered(self))
        monkeypatch.setattr(lending, "LOOK_S", 0.01)
        monkeypatch.setattr(lending, "END_S", 0.1)

    def on_loss(self, index: int, reason: str) -> None:
        self.lent.lose_generator(index, reason)

    def spawn_procs(self, **_: Any) -> Any:
        call = SimpleNamespace(call_one=lambda *args: None)
        actor = SimpleNamespace(start=call, generate=SimpleNamespace(call_one=self.generate))
        return SimpleNamespace(initialized=self.spawned(), stop=self.answered, spawn=lambda *args: actor)

    async def generate(self, *_: Any) -> str:
        await asyncio.sleep(0.05)
        return "lent"

    async def spawned(self) -> None:
        if self.dead:
            raise RuntimeError("unreachable")

    async def answered(self, what: Any = None, *_: Any) -> Any:
        return what

    async def come(self, number: int) -> None:
        self.rendezvous.publish(door.lent_name(number), Lent("12", "n5").as_record())
        self.rendezvous.publish(f"worker-{number}", {"address": "tls://10.0.0.5:1", "cpus": 2, "gpus": []})
        await until(lambda: self.service.num_lent)

    def over(self, number: int) -> Over | None:
        record = self.rendezvous.look(door.over_name(number))
        return None if record is None else Over.of(record)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def lenders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lenders:
    make_job_identity(tmp_path / "tls", ["127.0.0.1"])
    for name, value in certificates(tmp_path / "tls").environment().items():
        monkeypatch.setenv(name, value)
    return Lenders(tmp_path, monkeypatch)


def scenario(lenders: Lenders, play: Callable[[], Any]) -> None:
    async def run() -> None:
        looking = asyncio.create_task(lenders.lent.run())
        try:
            await play()
        finally:
            looking.cancel()

    asyncio.run(run())


def test_a_node_that_leaves_gives_its_calls_to_the_others(lenders: Lenders) -> None:
    async def play() -> None:
        await lenders.come(4)
        assert (lenders.service.num_lent, lenders.lent.num_devices) == (1, 1)
        call = asyncio.create_task(lenders.service.generate.route("prompt"))
        await asyncio.sleep(0.02)
        lenders.rendezvous.publish(door.leaving_name(4), {"why": "SIGTERM"})
        await until(lambda: lenders.over(4))
        own = SimpleNamespace(generate=SimpleNamespace(call_one=lambda *args: lenders.answered("own")))
        await lenders.service.admit(0, own)
        assert await asyncio.wait_for(call, 10) == "own"
        assert lenders.service.serving == [0] and lenders.numbers[-1] == 0
        over = lenders.over(4)
        assert over is not None and not over.failed
        await until(lambda: lenders.rendezvous.names("lent-") == ["lent-4-over"])  # its other records go after that

    scenario(lenders, play)


def test_a_lent_generator_that_dies_is_started_again_on_its_node_some_times(lenders: Lenders) -> None:
    async def play() -> None:
        await lenders.come(4)
        for _ in range(MAX_LOSSES):
            lenders.service.lose(1, "killed")
            assert lenders.service.num_lent == 0
            await until(lambda: lenders.service.num_lent)
        assert lenders.killed == [f"lent1r{start + 1}" for start in range(MAX_LOSSES)]  # if they only hang
        lenders.service.lose(1, "killed")
        await until(lambda: lenders.over(4))
        over = lenders.over(4)
        assert over is not None and over.failed and "killed (4 losses)" in over.message
        await lenders.come(5)
        assert lenders.service.serving == [1], "another node takes the place"

    scenario(lenders, play)


def test_a_node_that_vanishes_is_done_without(lenders: Lenders) -> None:
    async def play() -> None:
        await lenders.come(4)
        lenders.dead = True
        lenders.service.lose(1, "no status received")
        await until(lambda: lenders.over(4))
        lenders.dead = False
        await lenders.come(5)
        lenders.lent._on_cut(5)
        assert lenders.service.serving == []
        await lenders.come(6)
        lenders.rendezvous.withdraw(door.lent_name(6))
        await until(lambda: not lenders.service.num_lent)
        assert all(not over.failed for number in (4, 5, 6) if (over := lenders.over(number)))

    scenario(lenders, play)


def test_the_jobs_that_lend_are_known_by_what_was_queued(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, ASYNC)
    assert lending_jobs(run_dir) == []
    run_dir.lent.mkdir()
    for job in ("9", "12"):
        (run_dir.lent / f"{job}_submission.sh").touch()
    assert lending_jobs(run_dir) == ["12", "9"]
    assert is_lending_job(run_dir, "12_3") and not is_lending_job(run_dir, "7")
    assert json.loads(run_dir.status.read_text())["lent"] == 0
