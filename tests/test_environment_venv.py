"""An environment in another Python than the run's: what it imports, and what is said where it cannot."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from forge_hpc.config import Config, UserError, validate
from forge_hpc.config.schema import EnvironmentConfig
from forge_hpc.data.types import Prompt
from forge_hpc.environments import EnvironmentPool

OWN = """
import sys
from forge_hpc.environments import Step

class Where:
    async def reset(self, prompt):
        return " ".join([sys.prefix, *(name for name in ("torch", "vllm", "yaml") if name in sys.modules)])

    async def step(self, response):
        return Step(done=True)

    async def close(self):
        pass
"""


def config(tmp_path: Path, venv: str | None, name: str | None = None) -> Config:
    (tmp_path / "own.py").write_text(OWN)
    environment = EnvironmentConfig(name=name or f"{tmp_path}/own.py:Where", venv=venv)
    environment.args = {"env": "gsm8k"} if name else {}
    return Config(reward=[], environment=environment)


def opening(config: Config) -> str:
    async def play() -> str:
        pool = await EnvironmentPool(config, num_workers=1).start()
        try:
            async with pool.open() as environment:
                return await environment.reset(Prompt(0, "", [], ""))
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(play(), 240))


def make_venv(tmp_path: Path, *packages: str) -> str:
    """A virtual environment that has links to some packages of this one, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv/lib").glob("python*/site-packages")
    for package in packages:
        module = __import__(package)
        folder = Path(str(module.__file__)).parent
        (site / package).symlink_to(folder)
        libraries = folder.with_name(f"{package}.libs")
        if libraries.is_dir():
            (site / libraries.name).symlink_to(libraries)
    return str(tmp_path / "venv")


def test_it_runs_in_that_environment_with_this_package_and_nothing_else_of_the_runs(tmp_path: Path) -> None:
    own = config(tmp_path, make_venv(tmp_path, "numpy", "psutil"))
    validate(own)
    assert opening(own) == str(tmp_path / "venv")
    assert opening(config(tmp_path, None)) == sys.prefix


def test_a_python_without_what_is_needed_and_one_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ended") as refused:
        opening(config(tmp_path, make_venv(tmp_path, "numpy")))
    assert refused.value.hint and "numpy and psutil" in refused.value.hint
    with pytest.raises(UserError, match=r"environment\.venv: there is no /nowhere/bin/python"):
        validate(config(tmp_path, "/nowhere"))


def test_a_package_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="skyrl-gym cannot be imported") as refused:
        opening(config(tmp_path, None, "skyrl_gym"))
    assert refused.value.hint and "environment.venv" in refused.value.hint
