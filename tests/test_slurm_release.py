"""Root folders with other releases of Slurm (slurm_release.sh): what keeps one from being made is said in a line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from runs import PROJECT

# Makes a folder that holds what dpkg knows of the release $VERSION, or says why not.
DEBOOTSTRAP = """#!/bin/sh
if [ -z "$VERSION" ]; then echo "E: Failed getting release file"; exit 1; fi
for last; do case $last in /*trixie.*) root=$last ;; esac; done
mkdir -p "$root/var/lib/dpkg"
cat > "$root/var/lib/dpkg/status" <<END
Package: slurm-wlm
Status: install ok installed
Maintainer: somebody
Architecture: all
Version: $VERSION
Description: Slurm
END
"""


def beside(tmp_path: Path, release: str, *command: str, version: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command beside this release, of which the mirror has ``version``."""
    program = tmp_path / "bin" / "debootstrap"
    program.parent.mkdir(exist_ok=True)
    program.write_text(DEBOOTSTRAP)
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_ROOTS": str(tmp_path / "roots")}
    env |= {"SLURM_MIRROR": "http://mirror.invalid/debian", "VERSION": version}
    script = [str(PROJECT / "tests/slurm_release.sh"), release, *command]
    return subprocess.run(script, env=env, text=True, capture_output=True, timeout=120, check=False)


def test_a_release_that_no_debian_carries_is_refused(tmp_path: Path) -> None:
    done = beside(tmp_path, "23.02")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "error: no Slurm 23.02: there are 22.05, 24.11 and 26.05"


@pytest.mark.skipif(os.geteuid() != 0, reason="root folders need root")
def test_a_root_that_could_not_be_made_leaves_nothing_and_is_made_the_next_time(tmp_path: Path) -> None:
    (tmp_path / "roots/trixie.gigpNd").mkdir(parents=True)  # of one that was killed
    done = beside(tmp_path, "24.11")
    assert done.returncode == 2
    assert "error: debootstrap failed: E: Failed getting release file" in done.stderr.splitlines()
    assert {path.name for path in (tmp_path / "roots").iterdir()} == {"trixie.lock", "trixie.log"}
    assert beside(tmp_path, "24.11", version="24.11.5-4").returncode == 0
    assert (tmp_path / "roots/trixie").is_dir()
    assert beside(tmp_path, "24.11").returncode == 0  # it is there


@pytest.mark.skipif(os.geteuid() != 0, reason="root folders need root")
def test_a_debian_that_has_moved_on_is_named(tmp_path: Path) -> None:
    done = beside(tmp_path, "24.11", version="25.05.1-1")
    assert done.returncode == 2
    assert "error: Debian trixie carries Slurm 25.05.1-1, not 24.11" in done.stderr.splitlines()
