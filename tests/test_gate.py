"""The node gate: each look finds the real thing that it is for, and who is not fit is named and left out."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from disks import set_read_only, small_disk
from runs import PROJECT, wait_for
from sandboxes import needs_bubblewrap, without_bubblewrap

from forge_hpc.cluster import folders
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.config import Config, UserError, save_config
from forge_hpc.config.schema import HeldOutConfig, RewardConfig, RunSourceConfig, ServedConfig
from forge_hpc.gate import memory, own
from forge_hpc.gate.complaints import ComplaintsDesk, complain
from forge_hpc.gate.deadlines import OWN_S
from forge_hpc.gate.environment import differences, environment
from forge_hpc.gate.gpus import odd_nodes, remarks
from forge_hpc.gate.memory import available_memory, cgroup_rooms
from forge_hpc.gate.neighbours import Port, ask
from forge_hpc.gate.nvml import RETURN_S, GpuHealth
from forge_hpc.gate.orphans import end_orphans
from forge_hpc.gate.own import MIN_SCRATCH_BYTES, clock_offset_s, engine_share, full, look_at_node, short_of_memory
from forge_hpc.gate.sandboxes import look_at_sandboxes, sandboxes_of
from forge_hpc.gate.verdict import cut_off_nodes, own_problems, slow_nodes
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import first_node, gate
from forge_hpc.supervisor import node as node_module
from forge_hpc.supervisor.ending import Cause
from forge_hpc.supervisor.first_node import FirstNode
from forge_hpc.supervisor.gate import Verdict, open_gate
from forge_hpc.supervisor.node import Node

MIB = 1 << 20

# ---- what a node finds by itself


def test_a_disk_that_is_full_or_read_only_is_found_and_one_with_space_is_not(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2 * MIN_SCRATCH_BYTES) as disk:
        assert full(disk, "its disk", MIN_SCRATCH_BYTES) is None
        (disk / "file").write_bytes(bytes(MIN_SCRATCH_BYTES + MIB))
        why = f"its disk {disk} "
        assert full(disk, "its disk", MIN_SCRATCH_BYTES) == f"{why}is full: 63 MiB are free"
        (disk / "rest").write_bytes(bytes(63 * MIB))
        assert full(disk, "its disk", MIN_SCRATCH_BYTES) == f"{why}cannot be written: No space left on device"
        (disk / "rest").unlink()
        set_read_only(disk)
        assert full(disk, "its disk", MIN_SCRATCH_BYTES) == f"{why}cannot be written: Read-only file system"
        assert not list(disk.glob("forge-hpc-gate-*"))


def test_a_healthy_node_has_no_problem_and_its_report_takes_little_time(tmp_path: Path) -> None:
    cpu = time.process_time()
    report = look_at_node(tmp_path, tmp_path / "tls", "7.0.0", [], Config(), alone=False)
    assert time.process_time() - cpu < 1
    assert report["problems"] == [] and report["orphans"] == []
    assert report["environment"]["torch"] and report["environment"]["python"]
    assert abs(report["clock_s"]) < 5


def test_a_clock_before_the_file_servers_is_measured(tmp_path: Path) -> None:
    assert 899 < clock_offset_s(tmp_path, now=lambda: time.time() + 900) < 905


def test_a_node_with_next_to_no_memory_says_how_much_it_has() -> None:
    assert short_of_memory(100 * MIB) == "it is short of memory: 100 MiB are available"
    assert short_of_memory(8 << 30) is None


def cgroup(folder: Path, **files: object) -> None:
    """A made-up group; dots in names of files are written as ``__``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_limit_of_a_slurm_job_counts_less_what_it_uses_and_cannot_give_back(tmp_path: Path) -> None:
    scope = tmp_path / "system.slice/slurmstepd.scope"
    stat = {"memory__stat": f"anon 7\ninactive_file {2 << 30}\nactive_file {1 << 30}\nslab_reclaimable {MIB}"}
    cgroup(scope / "job_7", memory__max=16 << 30, memory__current=9 << 30, **stat)
    cgroup(scope / "job_7/step_0", memory__max="max", memory__current=8 << 30, **stat)
    cgroup(scope / "job_7/step_0/user/task_0", memory__max=32 << 30, memory__current=4 << 30, memory__stat="anon 7")
    own = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
    assert [*cgroup_rooms(own, tmp_path)] == [28 << 30, (10 << 30) + MIB], "the task's own, and the job's above it"
    cgroup(scope / "job_7", memory__current=20 << 30)
    assert min(cgroup_rooms(own, tmp_path)) == 0


def test_version_1_of_cgroups_has_other_names_and_in_a_container_the_top_alone(tmp_path: Path) -> None:
    own = "11:pids:/docker/5\n4:cpu,memory:/slurm/uid_1000/job_7\n1:name=systemd:/\n0::/\n"
    group = tmp_path / "memory/slurm/uid_1000/job_7"
    stat = {"memory__stat": f"total_inactive_file {2 << 30}\ninactive_file 7"}
    limits = {"memory__limit_in_bytes": 8 << 30, "memory__usage_in_bytes": 3 << 30, **stat}
    cgroup(group, **limits)
    cgroup(tmp_path / "memory", memory__limit_in_bytes=0x7FFFFFFFFFFFF000, memory__usage_in_bytes=0, **stat)
    assert min(cgroup_rooms(own, tmp_path)) == 7 << 30
    cgroup(tmp_path / "docker/memory", **limits)
    assert [*cgroup_rooms(own, tmp_path / "docker")] == [7 << 30]
    assert [*cgroup_rooms("0::/\n", tmp_path / "nothing")] == []


def test_a_node_has_the_memory_that_its_cgroup_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cgroup(tmp_path / "job", memory__max=100 * MIB, memory__current=MIB, memory__stat="")
    cgroup(tmp_path, own="0::/job")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    report = look_at_node(tmp_path, tmp_path / "tls", "7.0.0", [], Config(), alone=True)
    assert report["memory_bytes"] == 99 * MIB
    assert report["problems"] == ["it is short of memory: 99 MiB are available"]
    monkeypatch.setattr(memory, "OWN", tmp_path / "none")
    assert available_memory() > 512 * MIB


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Starts a process with the certificates of a start that is nobody's child of ours; its pid."""
    pids: list[int] = []

    def start(of: str) -> int:
        env = os.environ | {"HYPERACTOR_TLS_KEY": str(tmp_path / "tls" / of / "key.pem")}
        script = "sleep 600 >/dev/null 2>&1 & echo $!"  # the shell ends, and init has the rest
        pids.append(int(subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True).stdout))
        return pids[-1]

    yield start
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_an_orphan_of_an_earlier_start_of_this_run_is_ended_and_nobody_else(
    tmp_path: Path, orphan: Callable[[str], int]
) -> None:
    earlier, ours, others = orphan("7.0.0"), orphan("7.1.0"), orphan("../../other/tls/7.0.0")
    [ended] = end_orphans(tmp_path / "tls", "7.1.0")
    assert ended.startswith(f"pid {earlier} (")
    wait_for(lambda: not lives(earlier), "the end of the orphan", 60)
    assert lives(ours) and lives(others)


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_what_a_supervisor_of_an_earlier_start_still_owns_is_its_own(tmp_path: Path) -> None:
    key = str(tmp_path / "tls/7.0.0/key.pem")
    script = f"""
import os, subprocess
process = subprocess.Popen(["sleep", "600"], env=os.environ | {{"HYPERACTOR_TLS_KEY": {key!r}}})
print(process.pid, flush=True)
process.wait()
"""
    # Its command line is that of a supervisor: python -m forge_hpc.run --run-dir D
    command = [sys.executable, "-c", script, "forge_hpc.run", "--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        assert end_orphans(tmp_path / "tls", "7.1.0") == []
        assert process.poll() is None
    finally:
        os.kill(child, signal.SIGKILL)
        process.wait()


def test_a_folder_is_made_where_nothing_can_be_locked_or_modes_are_the_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    locked = folders.Folder()
    locked.path.chmod(0o770)  # as a server may have it
    locked._unlock()
    assert str(locked.path) not in folders.remove_left_over()

    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = folders.Folder()
    assert folder.path.parent == tmp_path
    assert str(folder.path) not in folders.remove_left_over() and folder.path.is_dir()
    folder.remove()
    assert not folder.path.exists()


@pytest.mark.parametrize("parent", [Path("/dev/shm"), None])
def test_the_folder_of_a_supervisor_that_was_killed_is_removed_and_nobody_elses(parent: Path | None) -> None:
    code = "import sys; from pathlib import Path; from forge_hpc.cluster.folders import Folder; "
    code += "f = Folder(*map(Path, sys.argv[1:])); print(f.path, flush=True); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    given = [] if parent is None else [str(parent)]
    process = subprocess.Popen([sys.executable, "-c", code, *given], env=env, **pipes)
    assert process.stdout is not None
    killed = Path(process.stdout.readline().strip())
    mine = folders.Folder(parent)
    assert killed.parent == mine.path.parent == (parent or Path(tempfile.gettempdir()))
    link, open_to_all = killed.with_name(f"{killed.name}-link"), killed.with_name(f"{killed.name}-open")
    try:
        (killed / "weights").write_bytes(b"1")
        link.symlink_to(mine.path)
        open_to_all.mkdir()
        open_to_all.chmod(0o755)
        assert not {str(killed), str(mine.path)} & {*folders.remove_left_over()}
        process.kill()
        process.communicate()
        assert str(killed) in folders.remove_left_over() and not killed.exists()
        assert mine.path.is_dir() and link.is_symlink() and open_to_all.is_dir()
    finally:
        process.kill()
        process.wait()
        link.unlink(missing_ok=True)
        mine.remove()
        for path in (killed, open_to_all):
            shutil.rmtree(path, ignore_errors=True)
    assert not mine.path.exists()


class FakeNvml:
    """The driver's library, with GPUs that are as they are told to be."""

    def __init__(self, *gpus: dict[str, Any], cuda: int | None = None, init: int = 0) -> None:
        self.gpus = gpus
        self.init = init
        self.cuda = cuda

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = self.cuda or 0
        return 13 if self.cuda is None else 0  # NVML_ERROR_FUNCTION_NOT_FOUND

    def nvmlInit_v2(self) -> int:
        return self.init

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *arguments: 0 if name == "nvmlShutdown" else 3

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        if index >= len(self.gpus) or self.gpus[index].get("lost"):
            return 15
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory[0], memory[2] = self._of(handle).get("total", 80 << 30), self._of(handle).get("used", 0)
        return 0

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p, name: Any, length: int) -> int:
        name.value = self._of(handle).get("name", "NVIDIA H100").encode()
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: ctypes.c_void_p, *numbers: Any) -> int:
        for number, value in zip(numbers, self._of(handle).get("capability", (9, 0)), strict=True):
            number._obj.value = value
        return 0

    def nvmlDeviceGetRemappedRows(self, handle: ctypes.c_void_p, *rows: Any) -> int:
        rows[2]._obj.value, rows[3]._obj.value = self._of(handle).get("pending", 0), self._of(handle).get("failed", 0)
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: ctypes.c_void_p, reasons: Any) -> int:
        reasons._obj.value = self._of(handle).get("reasons", 0x1)  # idle
        return 0

    def _of(self, handle: ctypes.c_void_p) -> dict[str, Any]:
        assert handle.value is not None
        return self.gpus[handle.value - 1]


def look_at_gpus(*gpus: dict[str, Any], share: float = 0.85) -> GpuHealth:
    return GpuHealth([str(index) for index in range(len(gpus))], share, load=lambda name: FakeNvml(*gpus), return_s=0.2)


def test_a_gpu_is_found_that_is_lost_or_faulty_or_hot_or_used_by_somebody() -> None:
    gpus = [{}, {"lost": True}, {"failed": 1}, {"pending": 1}, {"reasons": 0x40}, {"used": 60 << 30}]
    health = look_at_gpus(*gpus)
    assert health.working == 5
    assert health.problems == [
        "GPU 2: a faulty row of its memory could not be remapped",
        "GPU 3: a faulty row of its memory waits for a reset to be remapped",
        "GPU 4: thermal slowdown",
        "GPU 5: 60.0 of 80.0 GiB are in use by other processes, with gpu_memory_utilization=0.85 at most 12.0 may be",
    ]


def test_a_gpu_of_which_others_have_more_than_the_engines_leave_is_full() -> None:
    third = {"used": 27 << 30}
    [problem] = look_at_gpus({}, third, {"used": 11 << 30}).problems
    assert problem.startswith("GPU 1: 27.0 of 80.0 GiB are in use by other processes")
    assert look_at_gpus(third, share=0.6).problems == [], "who asks for less may share"
    [problem] = look_at_gpus({"used": 41 << 30}, share=0.3).problems
    assert problem.endswith("with gpu_memory_utilization=0.3 at most 40.0 may be")
    assert look_at_gpus({"used": 1 << 30}, share=0.99).problems == [], "the driver's own"


def test_a_driver_that_does_not_answer_makes_its_node_unfit_also_where_it_is_the_only_one() -> None:
    health = GpuHealth(["0", "1"], 0.85, load=lambda name: FakeNvml({}, {}, init=9))
    assert health.problems == ["the driver of its GPUs does not answer (NVML error 9)"] and health.working is None
    assert not GpuHealth([], 0.85, load=lambda name: FakeNvml(init=9)).problems


def test_of_the_engines_of_a_run_the_largest_share_counts() -> None:
    config = Config()
    assert engine_share(config) == 0.85
    config.served = [ServedConfig()]
    config.served[0].engine.gpu_memory_utilization = 0.95
    config.generator.engine.gpu_memory_utilization = 0.4
    assert engine_share(config) == 0.95
    config.recipe, config.served = "sft", []
    assert engine_share(config) == 0.0
    [problem] = look_at_gpus({"used": 41 << 30}, share=0.0).problems
    assert problem.endswith("41.0 of 80.0 GiB are in use by other processes, at most 40.0 may be")


def test_a_node_tells_name_capability_and_memory_of_its_gpus() -> None:
    small = {"name": "NVIDIA A100-SXM4-40GB", "total": 40 << 30, "capability": (8, 0)}
    kinds = look_at_gpus({}, {"lost": True}, small).kinds
    assert [kind.pop("capability") for kind in kinds] == [[9, 0], [8, 0]]
    assert kinds == [*h100(1), *a100(1)]


@pytest.mark.parametrize("cuda", [None, 12080])
def test_a_node_tells_which_cuda_its_driver_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: int | None
) -> None:
    monkeypatch.setattr(own, "GpuHealth", partial(GpuHealth, load=lambda name: FakeNvml({}, cuda=cuda)))
    found = look_at_node(tmp_path, tmp_path / "tls", "7.0.0", ["0"], Config(), alone=True)
    assert found["cuda_driver"] == cuda and found["working_gpus"] == 1


@pytest.mark.parametrize(("used", "looked_at"), [(None, 8), (4, 4), (0, 0)])
def test_gpus_that_the_run_does_not_use_are_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: int | None, looked_at: int
) -> None:
    nvml = FakeNvml(*[{}] * 4, *[{"failed": 1}] * 4)
    monkeypatch.setattr(own, "GpuHealth", partial(GpuHealth, load=lambda name: nvml))
    config, gpus = Config(), [str(index) for index in range(8)]
    config.cluster.gpus_per_node = used
    found = look_at_node(tmp_path, tmp_path / "tls", "7.0.0", gpus, config, alone=True)
    assert (found["gpus"], found["working_gpus"]) == (8, looked_at or None)
    assert len(found["problems"]) == (4 if looked_at == 8 else 0)


def test_the_memory_of_processes_that_have_just_been_killed_is_waited_for() -> None:
    class Returning(FakeNvml):
        """Of each GPU 60 GiB are in use the first three times that somebody looks."""

        def __init__(self, *gpus: dict[str, Any]) -> None:
            super().__init__(*gpus)
            self.left = [3] * len(gpus)

        def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
            assert handle.value is not None
            self.left[handle.value - 1] -= 1
            self.gpus[handle.value - 1]["used"] = (60 << 30) * (self.left[handle.value - 1] >= 0)
            return super().nvmlDeviceGetMemoryInfo(handle, memory)

    nvml = Returning({}, {})
    health = GpuHealth(["0", "1"], 0.85, load=lambda name: nvml)
    assert health.working == 2 and health.problems == [] and nvml.left == [-1, -1]
    assert RETURN_S < OWN_S / 1.5, "a look has time for the rest"


def test_where_there_is_no_driver_nothing_is_said_of_gpus() -> None:
    assert GpuHealth(["0"], 0.85, load=lambda name: ctypes.CDLL("no-such-library.so")).working is None


def test_the_sandboxes_of_a_run_are_those_of_its_rewards_and_environments_on_the_nodes_that_have_them() -> None:
    config = Config()
    assert sandboxes_of(config, 0) == [] and look_at_sandboxes(config, 0) is None
    own = {"runtime": "apptainer", "image": "/images/python.sif"}
    config.reward = [RewardConfig("math"), RewardConfig("code", workers=2), RewardConfig("code", args={"sandbox": own})]
    assert [options["runtime"] for options in sandboxes_of(config, 1)] == ["auto", "apptainer"]
    assert sandboxes_of(config, 2) == [own], "two workers are on two nodes"
    source = RunSourceConfig(name="programs", reward=[RewardConfig("math")])
    source.environment.name = "code"
    config.sources = [source]
    assert [options["runtime"] for options in sandboxes_of(config, 7)] == ["auto"]


def test_a_node_that_will_run_no_program_needs_no_sandbox() -> None:
    config = Config()
    config.reward = [RewardConfig("code")]
    config.cluster.workers_on = "first"
    assert len(sandboxes_of(config, 0)) == 1 and sandboxes_of(config, 1) == []
    config.cluster.workers_on = "all"
    config.recipe, config.evaluation.num_prompts = "dpo", 0
    assert sandboxes_of(config, 0) == [], "nobody computes the reward"
    config.evaluation.num_prompts = 8
    assert len(sandboxes_of(config, 0)) == 1, "answers to held-out prompts are judged by it"
    config.environment.name = "code"
    config.reward = [RewardConfig("math")]
    assert sandboxes_of(config, 0) == [], "nobody plays the environment"
    config.recipe = "no_such_recipe"
    assert look_at_sandboxes(config, 0) is None, "which is no fault of the node's sandbox"


def test_a_reward_of_one_evaluation_set_needs_its_sandbox() -> None:
    config = Config()
    config.reward = [RewardConfig("math")]
    config.evaluation.num_prompts = 8
    config.evaluation.sets = [HeldOutConfig(label="programs", path="p", reward=[RewardConfig("code")])]
    assert len(sandboxes_of(config, 1)) == 1


def test_a_node_that_may_take_the_place_of_another_needs_the_sandbox_of_that_one() -> None:
    config = Config()
    config.reward = [RewardConfig("code", workers=2)]
    config.cluster.spare_nodes = 1
    assert [len(sandboxes_of(config, node)) for node in range(4)] == [1, 1, 1, 0]


def test_a_sandbox_that_does_not_start_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs_bubblewrap()
    config = Config()
    config.reward = [RewardConfig("code")]
    assert look_at_sandboxes(config, 0) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    found = look_at_sandboxes(config, 0)
    assert found is not None and found["message"].startswith("bubblewrap is not installed here"), found
    assert found["hint"].startswith("install bubblewrap")


# ---- beside the others


def report(**more: Any) -> dict[str, Any]:
    healthy = {"problems": [], "gpus": 0, "working_gpus": None, "memory_bytes": 64 << 30, "clock_s": 0.0}
    return healthy | {"environment": {"python": "3.12.3", "torch": "2.9.0"}} | more


@pytest.mark.parametrize(
    ("odd", "problem"),
    [
        ({"memory_bytes": 16 << 30}, "16.0 GiB of memory are available, elsewhere 64.0"),
        ({"clock_s": -400.0}, "its clock is 400 s slow"),
        (
            {"environment": {"python": "3.12.3", "torch": "2.8.0"}},
            "its environment is another: torch 2.8.0, elsewhere 2.9.0",
        ),
        ({"problems": ["its disk is full"]}, "its disk is full"),
    ],
)
def test_the_odd_one_of_four_nodes_is_named(odd: dict[str, Any], problem: str) -> None:
    found = own_problems({0: report(), 1: report(), 2: report(**odd), 3: report()})
    assert found == {0: [], 1: [], 2: [problem], 3: []}


def test_gpus_that_do_not_answer_are_the_nodes_fault_and_too_many_asked_for_are_not() -> None:
    four = {"gpus": 4, "working_gpus": 4}
    assert own_problems({0: report(**four), 1: report(gpus=4, working_gpus=3)})[1] == ["3 of its 4 GPUs answer"]
    partly = {0: report(gpus=8, working_gpus=4), 1: report(gpus=8, working_gpus=3)}
    assert own_problems(partly, gpus=4) == {0: [], 1: ["3 of its first 4 GPUs answer"]}
    assert own_problems({0: report(**four), 1: report(gpus=4)})[1] == ["its GPUs' driver does not answer"]
    assert own_problems({0: report(**four), 1: report(**four)}, gpus=8) == {0: [], 1: []}
    [problem] = own_problems({0: report(**four), 1: report(gpus=8, working_gpus=8)}, gpus=8)[0]
    assert problem.startswith("it has 4 of 8 GPUs")


def test_one_node_with_fewer_gpus_than_the_run_asks_for_is_refused_with_what_to_do(
    tmp_path: Path, config: Config
) -> None:
    config.cluster.nodes, config.cluster.gpus_per_node = 1, 8
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    rendezvous.publish("node-0", {"slurm_name": "n0", "report": with_gpus(*h100(7))})
    with ComplaintsDesk("127.0.0.1") as desk:
        ending = gate._judge(config, rendezvous, 1, desk, lambda: None).ending(0)
    assert ending is not None and (ending.cause, ending.lost_nodes) == (Cause.GATE, ("n0",))
    assert ending.message == (
        "node 0 (n0) is not fit: it has 7 of 8 GPUs (set cluster.gpus_per_node=7, or leave the node out: "
        "slurm.extra.exclude=NODE)"
    )


def h100(number: int) -> list[dict[str, Any]]:
    return [{"name": "NVIDIA H100", "memory_bytes": 80 << 30}] * number


def a100(number: int) -> list[dict[str, Any]]:
    return [{"name": "NVIDIA A100-SXM4-40GB", "memory_bytes": 40 << 30}] * number


def with_gpus(*kinds: dict[str, Any]) -> dict[str, Any]:
    return report(gpus=len(kinds), working_gpus=len(kinds), gpu_kinds=[*kinds])


def named(node: int) -> str:
    return f"node {node} (n{node})"


SLOWEST = (
    "trainers plan with the smallest memory among theirs, and a step waits for the slowest GPU. slurm.constraint, or a "
    "type in slurm.gres (gpu:TYPE:NUMBER), asks for one kind"
)


def test_nodes_with_gpus_of_another_kind_are_named_with_what_follows() -> None:
    eight = with_gpus(*h100(8))
    assert remarks({0: eight, 1: eight}, None, named) == [] and odd_nodes({0: eight, 1: eight}, None) == {}
    nodes = {0: eight, 1: with_gpus(*a100(8)), 2: eight}
    has = "node 1 (n1) has NVIDIA A100-SXM4-40GB (40 GiB), the other 2 nodes have NVIDIA H100 (80 GiB)"
    assert remarks(nodes, None, named) == remarks(nodes, 8, named) == [f"{has}: {SLOWEST}"]
    assert odd_nodes(nodes, None) == {1: "its GPUs are NVIDIA A100-SXM4-40GB (40 GiB), elsewhere NVIDIA H100 (80 GiB)"}
    assert own_problems(nodes) == {0: [], 1: [], 2: []}, "two kinds may be meant"
    less = [{"name": "NVIDIA H100", "memory_bytes": 64 << 30}] * 8
    assert [*odd_nodes({0: eight, 1: with_gpus(*less)}, None)] == [1], "the same name, with other memory"
    assert remarks({0: report(), 1: report()}, None, named) == [], "there is no driver"


def test_gpus_of_several_kinds_on_one_node_are_named() -> None:
    mixed = with_gpus(*h100(3), *a100(1))
    has = "1 x NVIDIA A100-SXM4-40GB (40 GiB) and 3 x NVIDIA H100 (80 GiB)"
    assert remarks({0: mixed}, None, named) == [f"node 0 (n0) has {has}: {SLOWEST}"]
    assert remarks({0: mixed, 1: mixed}, None, named) == [f"node 0 (n0), node 1 (n1) have {has}: {SLOWEST}"]
    assert odd_nodes({0: mixed, 1: mixed}, None) == {}


def test_an_order_of_gpus_that_is_not_the_drivers_is_told() -> None:
    other = with_gpus(*h100(2)) | {"gpu_order": "FASTEST_FIRST"}
    [said] = remarks({0: with_gpus(*h100(2)) | {"gpu_order": ""}, 1: other}, None, named)
    assert said.startswith("node 1 (n1) has CUDA_DEVICE_ORDER=FASTEST_FIRST: CUDA counts GPUs in another order than")
    assert said.endswith("Unset it, or name GPUs by UUID in CUDA_VISIBLE_DEVICES")


def test_a_node_with_fewer_gpus_than_the_others_is_named_with_what_stays_idle() -> None:
    nodes = {0: with_gpus(*h100(8)), 1: with_gpus(*h100(8)), 2: with_gpus(*h100(7)), 3: with_gpus(*h100(8))}
    assert remarks(nodes, None, named) == [
        "node 2 (n2) has 7 GPUs, the other 3 nodes have 8 GPUs: each node uses 7, and 3 of the run's GPUs are idle. "
        "cluster.gpus_per_node=8 keeps out nodes that have fewer, 7 says that this is meant"
    ]
    assert odd_nodes(nodes, None) == {2: "it has 7 GPUs, elsewhere 8"}
    assert remarks(nodes, 7, named) == []
    assert odd_nodes({0: nodes[2], 1: nodes[2], 2: nodes[0]}, None) == {}, "one with more takes nothing from others"
    many = {node: with_gpus(*h100(7 if node % 2 else 8)) for node in range(13)}
    shown = "node 1 (n1), node 3 (n3), node 5 (n5), node 7 (n7) and 2 more have 7 GPUs, the other 7 nodes have 8 GPUs: "
    assert remarks(many, None, named)[0].startswith(shown)


@pytest.mark.parametrize(
    ("spares", "factor", "members"),
    [
        (0, 3.0, [0, 1, 2, 3]),
        (1, 3.0, [0, 1, 2, 3]),  # both would have to go
        (2, 3.0, [0, 3]),
        (2, 0.0, [0, 1, 2, 3]),  # nodes of several kinds are meant
    ],
)
def test_nodes_with_other_gpus_are_left_out_where_there_are_spare_nodes_for_all_of_them(
    tmp_path: Path, config: Config, spares: int, factor: float, members: list[int]
) -> None:
    config.cluster.spare_nodes, config.cluster.slow_node_factor = spares, factor
    rendezvous, eight = Rendezvous(tmp_path / "rendezvous"), with_gpus(*h100(8))
    older = with_gpus(*a100(8)) | {"memory_bytes": (64 if factor else 16) << 30}
    for node, found in enumerate([eight, older, with_gpus(*h100(7)), eight]):
        rendezvous.publish(f"node-{node}", {"slurm_name": f"n{node}", "report": found})
        rendezvous.publish(f"port-{node}", {"product_s": 1e-3, "took_s": 0.1})
        rendezvous.publish(f"link-{node}", {"outcome": 1e9})
    with ComplaintsDesk("127.0.0.1") as desk:
        verdict = gate._judge(config, rendezvous, 4, desk, lambda: None)
    assert verdict.members == members and verdict.ending(spares) is None
    assert sorted(verdict.unfit) == [node for node in range(4) if node not in members]
    assert len(verdict.remarks) == (0 if members == [0, 3] else 2), verdict.remarks


BAD = {"message": "bubblewrap is not installed here", "hint": "install it"}
BAD_NODE = "its sandbox does not work: bubblewrap is not installed here (install it)"


def test_a_sandbox_that_works_on_none_of_several_nodes_is_no_nodes_fault_and_ends_the_run() -> None:
    nodes = {0: report(sandbox={}), 1: report(sandbox=BAD), 2: report(sandbox=None)}
    assert own_problems(nodes)[1] == [BAD_NODE]
    with pytest.raises(UserError, match="none works on any of its nodes: bubblewrap is not installed here") as error:
        own_problems({0: report(sandbox=BAD), 1: report(sandbox=BAD), 2: report()})
    assert error.value.hint == "install it"


def test_where_one_node_alone_has_tried_a_sandbox_or_something_else_is_wrong_the_run_is_not_ended() -> None:
    assert own_problems({0: report(sandbox=BAD)}) == {0: [BAD_NODE]}
    assert own_problems({0: report(sandbox=BAD), 1: report()}) == {0: [BAD_NODE], 1: []}
    ill = {0: report(sandbox=BAD, problems=["its disk is full"]), 1: report(sandbox=BAD)}
    assert own_problems(ill) == {0: ["its disk is full", BAD_NODE], 1: [BAD_NODE]}
    late = {0: report(sandbox=BAD), 1: report(sandbox={"late": "not within 14 s"})}
    assert own_problems(late) == {0: [BAD_NODE], 1: []}


def test_a_node_whose_sandbox_is_late_takes_part_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = report(sandbox={"late": "it has not started and ended within 14 s"})
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    rendezvous.publish("node-0", {"slurm_name": "n0", "report": late})
    with ComplaintsDesk("127.0.0.1") as desk:
        verdict = gate._judge(Config(), rendezvous, 1, desk, lambda: None)
    assert (verdict.members, verdict.unfit) == ([0], {})
    said = "node 0 (n0): its sandbox is slow: it has not started and ended within 14 s; it is not left out for that"
    assert said in capsys.readouterr().err
    assert own_problems({0: report(sandbox={}), 1: late, 2: report(sandbox={})}) == {0: [], 1: [], 2: []}


def test_memory_that_other_jobs_have_is_no_fault() -> None:
    assert own_problems({0: report(), 1: report(memory_bytes=2 << 30)}, whole_nodes=False) == {0: [], 1: []}


def test_a_slow_node_is_slow_beside_the_median_and_of_two_the_slower_one() -> None:
    assert slow_nodes({0: 1.0, 1: 1.1, 2: 4.4, 3: 0.9}, 3.0) == {
        2: "it is slow: a matrix product takes 4.4 times as long as elsewhere"
    }
    assert slow_nodes({0: 4.0, 1: 1.0}, 3.0).keys() == {0}
    assert slow_nodes({0: 4.0, 1: 1.0}, 0.0) == {}
    assert slow_nodes({0: 1.0}, 3.0) == {}


def test_who_has_more_broken_links_is_cut_off_and_of_two_alike_not_the_first() -> None:
    fine = 1e9
    assert cut_off_nodes({0: fine, 1: "reset", 2: "refused", 3: fine}, 4) == {
        2: "numbers cannot be added up with node 1: reset"
    }
    assert cut_off_nodes({0: "refused", 1: "refused"}, 2).keys() == {1}
    assert cut_off_nodes({0: fine, 1: 1.2e7, 2: fine, 3: fine}, 4).keys() == {2}
    assert cut_off_nodes({0: fine, 1: fine / 9, 2: fine}, 3) == {}


def test_the_environment_of_most_is_the_right_one() -> None:
    ours = environment()
    assert differences({0: ours, 1: ours}) == {}
    assert differences({0: ours | {"forge_hpc": "edited"}, 1: ours, 2: ours})[0].startswith(
        f"its environment is another: forge_hpc edited, elsewhere {ours['forge_hpc']}"
    )


def test_what_a_process_has_imported_is_not_its_environment() -> None:
    code = (
        "from forge_hpc.gate.environment import environment as e; before = e(); import setuptools; print(before == e())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


def test_two_neighbours_add_up_their_numbers_and_a_stranger_is_sent_away() -> None:
    import socket
    import threading

    port = Port("127.0.0.1")
    answering = threading.Thread(target=port.answer, args=(1, 30.0), daemon=True)
    answering.start()
    with socket.create_connection(("127.0.0.1", port.where["port"])) as stranger:
        stranger.sendall(b"x" * len(port.token))
        assert stranger.recv(1) == b""
    assert ask(port.where, 0, 30.0) > 0
    answering.join(30)
    assert not answering.is_alive()


def test_complaints_come_by_tcp_and_only_from_who_has_read_the_token() -> None:
    with ComplaintsDesk("127.0.0.1") as desk:
        complain(desk.where | {"token": "guessed"}, {"node": 1, "slurm_name": "n1", "problem": "none"})
        complain(desk.where, {"node": 2, "slurm_name": "n2", "problem": "cannot write"})
        deadline = time.monotonic() + 30
        while not desk.complaints and time.monotonic() < deadline:
            time.sleep(0.01)
        assert {node: said["problem"] for node, said in desk.complaints.items()} == {2: "cannot write"}
    with pytest.raises(OSError):
        complain(desk.where, {"node": 1})


@pytest.mark.parametrize(("took_s", "blamed"), [(0.5, [2]), (30.0, [])])
def test_a_node_that_says_nothing_is_not_fit_unless_the_others_took_long_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, took_s: float, blamed: list[int]
) -> None:
    monkeypatch.setattr(gate, "PRODUCT_S", 0.1)
    rendezvous = Rendezvous(tmp_path / "rendezvous")
    for node in (0, 1):
        rendezvous.publish(f"port-{node}", {"product_s": 1e-3, "took_s": took_s})
    rendezvous.publish("link-0", {"outcome": 1e9})
    unfit: dict[int, str] = {}
    gate._compare(Config(), rendezvous, 3, unfit, lambda: None)
    assert list(unfit) == blamed


def test_a_look_that_hangs_is_a_problem_of_its_node_and_says_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(node_module, "OWN_S", 3.0)
    recipe = tmp_path / "mine.py"
    recipe.write_text("import time\n\n\ndef forever():\n    time.sleep(600)\n\n\nforever()\nclass Mine:\n    pass\n")
    node = Node(RunDir(tmp_path).create(), Allocation("7", 0, 1, 0))
    assert node.report(node.rendezvous(), Config(recipe=f"{recipe}:Mine"))["problems"] == [
        "its disks, its GPUs' driver or the recipe's module have not answered for 3 s: "
        f"it stands in forever ({recipe}:5)"
    ]
    said = capsys.readouterr().err
    assert "a look at this node hangs:\n" in said and f'File "{recipe}", line 8, in <module>\n' in said


def test_a_recipe_whose_module_hangs_holds_up_nobody_who_asks_whether_nodes_may_be_lent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_node, "OWN_S", 1.0)
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(600)\nclass Mine:\n    pass\n")
    assert not first_node._takes_lent(Config(recipe=f"{tmp_path}/mine.py:Mine"))
    config = Config()
    config.rollout.max_staleness = 1
    assert first_node._takes_lent(config)


# ---- the verdict


def verdict(*unfit: int, nodes: int = 4) -> Verdict:
    members = [node for node in range(nodes) if node not in unfit]
    return Verdict(members, dict.fromkeys(unfit, "its disk is full"), {}, {node: f"n{node}" for node in range(nodes)})


def test_spare_nodes_take_the_place_of_unfit_ones_else_the_job_comes_back_without_them() -> None:
    assert verdict().ending(0) is None
    assert verdict(2).ending(1) is None
    ending = verdict(2).ending(0)
    assert ending is not None and (ending.cause, ending.lost_nodes) == (Cause.GATE, ("n2",))
    assert ending.message == "node 2 (n2) is not fit: its disk is full"
    first = verdict(0).ending(1)  # it holds the run, and cannot be left out
    assert first is not None and first.lost_nodes == ("n0",)


def test_where_no_node_is_fit_none_is_shut_out() -> None:
    ending = verdict(0, 1, 2, 3).ending(0)
    assert ending is not None and ending.lost_nodes == ()
    alone = verdict(0, nodes=1).ending(0)
    assert alone is not None and alone.lost_nodes == ("n0",)


REMARK = "node 1 (n1) has 7 GPUs, the other node has 8 GPUs"


def test_what_is_said_of_nodes_that_take_part_stands_on_the_terminal_and_is_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Verdict([0], {}, {0: {"names": ["localhost"], "slurm_name": "n0", "report": {}}}, {0: "n0"}, (REMARK,))
    monkeypatch.setattr(first_node, "open_gate", lambda *arguments: ("127.0.0.1", said))
    node = Node(RunDir(tmp_path / "run").create(), Allocation("7", 0, 1, 0))
    monkeypatch.setattr(node, "start_worker", lambda *arguments: None)
    requests, phases = SimpleNamespace(check=lambda: None), SimpleNamespace(end=lambda phase: None)
    first, rendezvous = FirstNode(node, None, requests, summary=False), node.rendezvous()
    first._bring_together(node, Config(), rendezvous, tmp_path / "tls", tmp_path, phases)
    assert f"warning: {REMARK}\n" in capsys.readouterr().err
    assert rendezvous.look("start")["remarks"] == [REMARK]


def test_the_controllers_log_has_what_the_gate_has_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from forge_hpc.controller.conduct import Nodes as Joined
    from forge_hpc.controller.conduct import arrange

    workers = [{"gpus": [str(gpu) for gpu in range(n)], "cpus": 8} for n in (8, 7)]
    cluster = arrange(Config(), Joined(None, workers, 0, "127.0.0.1", [REMARK]), tmp_path, None)
    assert cluster.placement.gpus_per_node == 7
    assert [(record.levelname, record.message) for record in caplog.records if record.levelname != "INFO"] == [
        ("WARNING", REMARK)
    ]


# ---- four emulated nodes: each a supervisor's process, one of them sick

NODE = """
import sys
from pathlib import Path
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor.node import Node
from forge_hpc.supervisor.other_node import serve_node
class Requests:
    has_signals = True  # look often
    def check_interrupt(self): pass
sys.exit(serve_node(Node(RunDir(Path(sys.argv[1])), Allocation("7", int(sys.argv[2]), 4, 0)), Requests()))
"""


class Nodes:
    """Nodes 1 to 3 of four; node 2 is sick."""

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, wrapper: Sequence[str] = (), **variables: str) -> None:
        for number in (1, 2, 3):
            sick = number == 2
            command = [*(wrapper if sick else ()), sys.executable, "-c", NODE, str(self.run_dir.path), str(number)]
            env = os.environ | {"PYTHONPATH": str(PROJECT), "SLURMD_NODENAME": f"n{number}"}
            self._processes.append(subprocess.Popen(command, env=env | (variables if sick else {}), text=True))

    def judged(self, config: Config) -> Verdict:
        node = Node(self.run_dir, Allocation("7", 0, 4, 0))
        _, verdict = open_gate(node, config, node.rendezvous(), lambda: None)
        node.join(verdict.members)
        return verdict

    def end(self) -> list[int]:
        """Tell the others that the start is over; their exit codes."""
        Rendezvous(self.run_dir.rendezvous / "7.0.0").publish("outcome", {"code": 0, "message": ""})
        return [process.wait(60) for process in self._processes]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


@pytest.fixture
def config() -> Config:
    config = Config()
    config.cluster.nodes = 4
    return config


@pytest.fixture
def nodes(tmp_path: Path, config: Config) -> Iterator[Nodes]:
    nodes = Nodes(RunDir(tmp_path / "run").create())
    save_config(config, nodes.run_dir.config)
    nodes.run_dir.status.write_text('{"state": "starting"}')
    try:
        yield nodes
    finally:
        nodes.kill()


def test_four_healthy_nodes_all_take_part(nodes: Nodes, config: Config) -> None:
    nodes.start()
    verdict = nodes.judged(config)
    assert (verdict.members, verdict.unfit) == ([0, 1, 2, 3], {})
    assert verdict.slurm_names[2] == "n2"
    assert nodes.end() == [0, 0, 0]


def test_a_node_whose_temporary_directory_is_full_is_named(nodes: Nodes, config: Config, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 8 * MIB) as disk:
        nodes.start(TMPDIR=str(disk))
        verdict = nodes.judged(config)
        assert verdict.unfit == {2: f"its temporary directory {disk} is full: 8 MiB are free"}
        assert verdict.members == [0, 1, 3]
        assert nodes.end() == [0, 0, 0]


def test_a_node_that_cannot_write_to_the_run_directory_is_named(nodes: Nodes, config: Config) -> None:
    run_dir = shlex.quote(str(nodes.run_dir.path))
    read_only = f'mount --bind {run_dir} {run_dir} && mount -o remount,bind,ro {run_dir} && exec "$@"'
    if subprocess.run(["unshare", "--mount", "sh", "-c", read_only, "sh", "true"], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    nodes.start(["unshare", "--mount", "sh", "-c", read_only, "sh"])
    verdict = nodes.judged(config)
    problem = f"it cannot write to the run directory {nodes.run_dir}: Read-only file system"
    assert (verdict.unfit, verdict.slurm_names[2]) == ({2: problem}, "n2")
    assert nodes.end() == [0, 0, 0]


def test_a_node_with_another_version_of_a_package_is_named(nodes: Nodes, config: Config, tmp_path: Path) -> None:
    (tmp_path / "site/torch-0.1.0.dist-info").mkdir(parents=True)
    nodes.start(PYTHONPATH=f"{tmp_path / 'site'}:{PROJECT}")
    [(node, problem)] = nodes.judged(config).unfit.items()
    assert node == 2
    assert problem == f"its environment is another: torch 0.1.0, elsewhere {environment()['torch']}"
    assert nodes.end() == [0, 0, 0]


def test_a_node_without_the_sandbox_that_the_run_needs_is_named(nodes: Nodes, config: Config, tmp_path: Path) -> None:
    needs_bubblewrap()
    config.reward = [RewardConfig("code")]
    save_config(config, nodes.run_dir.config)
    nodes.start(PATH=without_bubblewrap(tmp_path / "bin"))
    [(node, problem)] = nodes.judged(config).unfit.items()
    assert node == 2
    assert problem.startswith("its sandbox does not work: bubblewrap is not installed here"), problem
    assert nodes.end() == [0, 0, 0]


def test_a_node_that_computes_slowly_is_named(nodes: Nodes, config: Config) -> None:
    config.cluster.slow_node_factor = 1.7
    nodes.start(OPENBLAS_CORETYPE="Prescott")  # as a processor without vector instructions wider than 128 bits
    [(node, problem)] = nodes.judged(config).unfit.items()
    assert node == 2
    assert problem.startswith("it is slow: a matrix product takes ")
    assert nodes.end() == [0, 0, 0]
