"""GPUs are given and torch can use none of them: the run says so and ends, and does not train on the CPU."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monarch.actor import Actor, ActorError, endpoint, this_host
from runs import PROJECT, read, run_local, status

from forge_hpc.actors.frozen import Frozen
from forge_hpc.actors.generator import Generator
from forge_hpc.actors.trainer import Trainer
from forge_hpc.cluster.allocation import Allocation
from forge_hpc.cluster.faults import Faults
from forge_hpc.cluster.given_gpus import UnusableGpus, cpu_build, cuda_build, unusable
from forge_hpc.cluster.meshes import bootstrap_command
from forge_hpc.cluster.rendezvous import Rendezvous
from forge_hpc.cluster.worker import ORDER, gpu_order, other_order
from forge_hpc.config import UserError, load_config
from forge_hpc.controller.outcome import outcome_of
from forge_hpc.controller.ranks import Ranks
from forge_hpc.controller.recovery import Leave
from forge_hpc.controller.service import cause_of
from forge_hpc.models.device import check_gpus, device_type
from forge_hpc.run_dir import RunDir
from forge_hpc.supervisor import node as node_module
from forge_hpc.supervisor.ending import Exit
from forge_hpc.supervisor.fit import Fit, look_at_fit
from forge_hpc.supervisor.node import Node

NOWHERE = "98,99"
"""GPUs that no machine has."""
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver.\n"
    "Alternatively, install another PyTorch."
)


class FakeTorch:
    """The state of a torch that is built for GPUs, in the place of this one's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.is_of(cuda="13.0")
        self.finds(0)

    def is_of(self, cuda: str | None = None, hip: str | None = None) -> None:
        self._monkeypatch.setattr(torch.version, "cuda", cuda)
        self._monkeypatch.setattr(torch.version, "hip", hip)

    def finds(self, number: int, error: Exception | None = None) -> None:
        def init() -> None:
            if error is not None:
                raise error

        self._monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        self._monkeypatch.setattr(torch.cuda, "init", init)


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> FakeTorch:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    return FakeTorch(monkeypatch)


def said(role: str = "trainer-3") -> UserError:
    with pytest.raises(UnusableGpus) as raised:
        check_gpus(role)
    return raised.value


def test_a_driver_that_is_too_old_is_told_in_torch_s_own_words_and_in_one_line(fake_torch: FakeTorch) -> None:
    fake_torch.finds(0, RuntimeError(TOO_OLD))
    error = said()
    assert error.message == (
        f"trainer-3 on {socket.gethostname()} is given 2 GPUs (0,1), and torch {torch.__version__} can use none: "
        "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."
    )
    assert error.hint is not None and "cluster.gpus_per_node=0" in error.hint


def test_a_build_for_the_cpu_is_told_and_amd_s_build_is_none(
    fake_torch: FakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    fake_torch.is_of()
    assert "is given GPU 0, and torch" in said().message and said().message.endswith("it is a build for the CPU")
    fake_torch.is_of(hip="6.4")
    fake_torch.finds(0, RuntimeError("No HIP GPUs are available"))
    assert said("generator-0").message.endswith("can use none: No HIP GPUs are available")
    fake_torch.finds(1)
    check_gpus("generator-0")


@pytest.mark.parametrize("error", [None, AssertionError()])
def test_a_reason_is_given_where_torch_gives_none(fake_torch: FakeTorch, error: Exception | None) -> None:
    fake_torch.finds(0, error)
    assert said().message.endswith("it finds no such GPU" if error is None else "AssertionError")


@pytest.mark.parametrize("names", ["", "-1", "NoDevFiles"])
def test_a_process_without_gpus_stays_on_the_cpu(
    fake_torch: FakeTorch, monkeypatch: pytest.MonkeyPatch, names: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    fake_torch.finds(0, RuntimeError(TOO_OLD))
    check_gpus("trainer-0")
    assert device_type() == "cpu"


@pytest.mark.parametrize(
    ("cuda", "hip", "is_for_the_cpu"), [(None, None, True), ("'13.0'", None, False), (None, "'6.4'", False)]
)
def test_a_node_knows_torch_s_build_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, hip: str | None, is_for_the_cpu: bool
) -> None:
    file = tmp_path / "torch" / "__init__.py"
    file.parent.mkdir()
    file.write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    assert cpu_build() is None, "it says nothing"
    text = f"from typing import Optional\n__version__ = '2.13.0'\ncuda: Optional[str] = {cuda}\nhip = {hip}\n"
    (file.parent / "version.py").write_text(text)
    assert cpu_build() == ("2.13.0" if is_for_the_cpu else None)
    assert cuda_build() == (("2.13.0", "13.0") if cuda else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cpu_build() is None and cuda_build() is None


def test_the_torch_that_is_installed_is_read_as_it_is() -> None:
    assert cpu_build() == (torch.__version__ if torch.version.cuda is None and torch.version.hip is None else None)


def test_the_node_is_named_before_any_process_is_started_on_it(tmp_path: Path) -> None:
    def refused(*builds: str | None, gpus: str = "null") -> UserError | None:
        cfg = load_config(PROJECT / "configs/sft/demo.yaml", [f"cluster.gpus_per_node={gpus}"])
        limit = {"num_bytes": 1 << 40, "is_cgroups": False}
        has = {"gpus": 3, "gpu_names": ["4", "5", "6"], "memory_bytes": 1 << 40, "memory_limit": limit}
        reports = {node: has | {"cpu_build": build} for node, build in enumerate(builds)}
        return look_at_fit(cfg, RunDir(tmp_path), reports, 0, lambda node: f"node {node} (n{node})").refused

    second = refused(None, "2.13.0+cpu")
    assert isinstance(second, UnusableGpus)
    assert second.message.startswith("node 1 (n1) is given 3 GPUs (4,5,6), and torch 2.13.0+cpu can use none")
    assert "given 2 GPUs (4,5)" in str(refused("2.13.0+cpu", gpus="2"))
    assert refused(None, None) is None
    assert refused("2.13.0+cpu", gpus="0") is None


@pytest.mark.parametrize(
    ("driver", "build", "fits"),
    [(12080, "13.0", False), (13000, "13.0", True), (13020, "13.0", True), (12020, "12.8", True), (None, "13.0", True)],
)
def test_a_driver_for_an_older_cuda_is_told_before_anything_starts(
    tmp_path: Path, driver: int | None, build: str, fits: bool
) -> None:
    cfg = load_config(PROJECT / "configs/sft/demo.yaml", ["cluster.gpus_per_node=2"])
    limit = {"num_bytes": 1 << 40, "is_cgroups": False}
    has = {"gpus": 2, "gpu_names": ["0", "1"], "memory_bytes": 1 << 40, "memory_limit": limit, "cpu_build": None}
    has |= {"cuda_build": ["2.13.0+cu130", build]}  # as JSON has it

    def look(*drivers: int | None) -> Fit:
        reports = {node: has | {"cuda_driver": each} for node, each in enumerate(drivers)}
        return look_at_fit(cfg, RunDir(tmp_path), reports, 0, lambda node: f"node {node} (n{node})")

    why = f"their driver is for CUDA 12.8, and it is built for {build}"
    all_of_them, some = look(driver, driver), look(13000, driver)
    if fits:
        assert all_of_them.refused is None is some.refused and not all_of_them.unfit and not some.unfit
    else:
        assert isinstance(all_of_them.refused, UnusableGpus)
        given = "node 0 (n0) is given 2 GPUs (0,1), and torch 2.13.0+cu130 can use none"
        assert all_of_them.refused.message == f"{given}: {why}"
        assert some.refused is None and some.unfit == {1: f"torch cannot use its GPUs: {why}"}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="NVML names the GPUs that are not there before torch does")
def test_trainers_frozen_models_and_generators_refuse_alike_as_the_controller_is_told(tmp_path: Path) -> None:
    cfg = load_config(PROJECT / "configs/grpo/demo.yaml", [])

    async def scenario() -> list[UserError]:
        faults = Faults(Rendezvous(tmp_path))
        command = bootstrap_command(1, NOWHERE.split(","))
        lost = asyncio.get_running_loop().create_future()

        def spawn(role: str, actor: Any, *args: Any) -> Any:
            """In a process of its own, as they are: two would import torch at once."""
            options: dict[str, Any] = {"per_host": {"procs": 1}, "name": role, "bootstrap_command": command}
            return faults.enders.beside(role, this_host().spawn_procs(**options)).spawn(role, actor, *args)

        errors = []
        for role, actor, *args in (
            ("trainer", Trainer, {}, tmp_path / "store", None, False),
            ("frozen", Frozen, {}, tmp_path / "store"),
            ("generator", Generator, tmp_path),
        ):
            with pytest.raises(ActorError) as raised:
                if actor is Generator:
                    await spawn(role, actor, cfg, 0, tmp_path).start.call_one(*args)
                else:
                    await Ranks(spawn(role, actor, cfg, tmp_path), role, lost).ask("start", *args, timeout_s=120)
            errors.append(cause_of(raised.value))
            faults.forget(role)
            faults.enders.end_at_once(role)
        return errors

    for role, error in zip(("trainer-0", "frozen-0", "generator-0"), asyncio.run(scenario()), strict=True):
        assert type(error) is UnusableGpus and error.hint
        assert error.message.startswith(f"{role} on {socket.gethostname()} is given 2 GPUs (98,99), and torch")


# ---- how the run ends

WRONG = unusable("node 0 (n0)", ["0"], "2.13.0+cpu", "a reason")


def test_the_error_keeps_its_kind_between_processes() -> None:
    there = pickle.loads(pickle.dumps(WRONG))
    assert type(there) is UnusableGpus and (there.message, there.hint) == (WRONG.message, WRONG.hint)


@pytest.mark.parametrize(("error", "code"), [(WRONG, Exit.USAGE), (UserError("another"), None)])
def test_such_a_run_is_wrong_usage(error: UserError, code: Exit | None) -> None:
    async def control() -> bool:
        raise ExceptionGroup("tasks", [ActorError(error)])

    outcome = asyncio.run(outcome_of(control(), Leave()))
    assert (outcome["message"], outcome["hint"], outcome.get("exit")) == (error.message, error.hint, code)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch can use no GPU")
@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("sft", []),
        ("grpo", ["warmstart.overrides=[cluster.gpus_per_node=2]"]),
        ("grpo", []),  # the warm start is for the CPU, and would be made in vain
    ],
)
def test_a_run_that_is_given_gpus_which_torch_cannot_use_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run = tmp_path / "run"
    result = run_local(run, ["cluster.gpus_per_node=2", *overrides], config=PROJECT / f"configs/{recipe}/demo.yaml")
    line = f"node 0 ({socket.gethostname()}) is given 2 GPUs (0,1), and torch {torch.__version__} can use none: "
    assert result.returncode == Exit.USAGE, result.stdout + result.stderr
    assert line in result.stderr and "hint: install a torch that fits the GPUs and their driver" in result.stderr
    assert status(run)["state"] == "failed" and line in status(run)["message"]
    assert read(run) == read(run / "warmstart") == [] and status(run / "warmstart") == {}


# ---- a number is the same GPU to CUDA as to the driver


class Teller(Actor):
    """Says what its process has in the environment."""

    @endpoint
    async def variable(self, name: str) -> str | None:
        return os.environ.get(name)


def test_all_that_a_node_starts_numbers_gpus_as_the_driver_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ORDER, raising=False)
    monkeypatch.setattr(node_module, "end_descendants", lambda grace_s: 0)  # those of this process are other tests'
    node = Node(RunDir(tmp_path / "run").create(), Allocation("7", 0, 1, 0))
    try:
        environ = node.environment(tmp_path / "tls")
    finally:
        node.close()
    code = (
        "import asyncio; from monarch.actor import this_host; from forge_hpc.cluster.meshes import bootstrap_command\n"
        "from test_given_gpus import Teller\n"
        "procs = this_host().spawn_procs(per_host={'procs': 1}, bootstrap_command=bootstrap_command(1, ['1']))\n"
        "teller = procs.spawn('teller', Teller)\n"
        "print(*(teller.variable.call_one(name).get() for name in ('CUDA_DEVICE_ORDER', 'CUDA_VISIBLE_DEVICES')))"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests")]), "TMPDIR": str(tmp_path)}
    kept = {name: value for name, value in environ.items() if not name.startswith("HYPERACTOR_")}  # of no such job
    done = subprocess.run([sys.executable, "-c", code], env=kept | path, text=True, capture_output=True, timeout=120)
    assert done.stdout.split() == ["PCI_BUS_ID", "1"], done.stderr


def test_an_order_of_the_users_own_stays_and_is_told_where_gpus_have_numbers() -> None:
    assert gpu_order({}) == gpu_order({ORDER: ""}) == {ORDER: "PCI_BUS_ID"}
    own = {ORDER: "FASTEST_FIRST"}
    assert gpu_order(own) == own
    assert other_order(["0", "1"], own) == "FASTEST_FIRST"
    assert other_order(["0", "1"], {}) == other_order(["GPU-1f", "GPU-2e"], own) == other_order([], own) == ""
