"""`forge-hpc site init`, and what a site may bring: its own job script, options of srun, its notation of GPUs."""

from __future__ import annotations

import shlex
import stat
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster
from test_before_queue import cli

from forge_hpc import cli as command_line
from forge_hpc.config import Config, UserError, load_config
from forge_hpc.slurm.partitions import Kind, Partition
from forge_hpc.slurm.site import site_overrides
from forge_hpc.slurm.site_init import Findings, _choose, profile
from launchers.slurm import RunExecutor

CPU = Partition("cpu", True, True, 3600, (Kind(8, 0),))
GPU = Partition("gpu", False, True, 7200, (Kind(4, 8, frozenset({"ib", "h100"}), "h100"),))


def findings(**changes: object) -> Findings:
    found = {
        "cluster": "alps",
        "known": (CPU, GPU),
        "partition": GPU,
        "accounts": ("physics", "maths"),
        "takes_gpus_per_node": True,
        "local_disk": "/scratch/local",
        "interfaces": ("ib0", "ib1"),
        "modules": ("cuda/12.4", "gcc"),
    }
    return Findings(**{**found, **changes})  # type: ignore[arg-type]


def read(text: str, tmp_path: Path) -> Config:
    (tmp_path / "site.yaml").write_text(text)
    return load_config(None, site_overrides(str(tmp_path / "site.yaml")))


def test_a_profile_says_what_was_found_and_is_one(tmp_path: Path) -> None:
    cfg = read(profile(findings()), tmp_path)
    assert (cfg.slurm.partition, cfg.slurm.account, cfg.slurm.time) == ("gpu", "physics", "120")
    assert (cfg.cluster.gpus_per_node, cfg.cluster.gpu_memory_gib, cfg.slurm.gres) == (8, 79.1, None)
    assert cfg.slurm.setup == [
        "module load cuda/12.4 gcc",
        "export NCCL_SOCKET_IFNAME=ib0,ib1",
        "export TMPDIR=/scratch/local",
    ]
    assert "cpu: 8 nodes; gpu: 4 nodes of 8 h100" in profile(findings())


def test_a_profile_of_a_plain_cluster_leaves_the_defaults(tmp_path: Path) -> None:
    plain = findings(partition=CPU, accounts=(), local_disk="/tmp", interfaces=(), modules=())
    cfg = read(profile(plain), tmp_path)
    assert (cfg.slurm.account, cfg.slurm.setup, cfg.cluster.gpus_per_node) == (None, [], 0)
    old = read(profile(findings(takes_gpus_per_node=False)), tmp_path)
    assert old.slurm.gres == "gpu:h100:8"


def test_the_partition_is_the_default_one_unless_another_one_has_the_gpus() -> None:
    assert _choose([CPU, GPU], None) == GPU
    assert _choose([CPU], None) == CPU
    assert _choose([CPU, GPU], "cpu") == CPU
    with pytest.raises(UserError, match="no partition fast") as error:
        _choose([CPU, GPU], "fast")
    assert error.value.hint == "there are: cpu, gpu"


def test_without_slurm_there_is_no_profile_to_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line.main(["site", "init"]) == 2
    assert "call it on a login node of the cluster" in capsys.readouterr().err


def test_a_site_brings_its_own_job_script(tmp_path: Path) -> None:
    template = tmp_path / "job.sh"
    template.write_text("#!/bin/bash -l\n@OPTIONS@\n#SBATCH --comment=ours\necho begins\n@COMMAND@\n")
    cfg = Config()
    cfg.slurm.script, cfg.slurm.srun = str(template), ["--mpi=none", "--container-image=/images/a b.sqsh"]
    cfg.slurm.gres, cfg.cluster.gpus_per_node = "gpu:h100:8", 8
    lines = RunExecutor(cfg, tmp_path / "run").script().splitlines()
    assert lines[0] == "#!/bin/bash -l"
    assert lines.index("#SBATCH --gres=gpu:h100:8") < lines.index("#SBATCH --comment=ours")
    assert not [line for line in lines if "gpus-per-node" in line]
    assert lines[lines.index("echo begins") + 1] == "umask 077"
    words = shlex.split(lines[-1])
    assert words[0] == "srun" and {"--mpi=none", "--container-image=/images/a b.sqsh"} <= set(words)
    template.write_text("@OPTIONS@\n")
    with pytest.raises(UserError, match="has @COMMAND@ 0 times"):
        RunExecutor(cfg, tmp_path / "run").script()
    template.unlink()
    with pytest.raises(UserError, match="cannot read"):
        RunExecutor(cfg, tmp_path / "run").script()


@pytest.mark.slurm
def test_a_profile_that_was_written_here_submits_here(gpu_cluster: SlurmCluster, tmp_path: Path) -> None:
    variables = {"SLURM_CONF": gpu_cluster.env["SLURM_CONF"], "XDG_CONFIG_HOME": str(tmp_path / "xdg")}
    written = cli("site", "init", "here", cwd=tmp_path, **variables)
    assert written.returncode == 0, written.stderr
    file = tmp_path / "xdg" / "forge_hpc" / "sites" / "here.yaml"
    assert str(file) in written.stdout and "forge-hpc submit --site here --dry-run" in written.stdout
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = cli("site", "init", "here", cwd=tmp_path, **variables)
    assert again.returncode == 2 and "--force writes over it" in again.stderr
    small = ("--nodes", "2", "rollout.prompts_per_step=64", "slurm.time=5")
    done = cli("submit", "--site", "here", "--dry-run", *small, cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=main" in done.stdout and "#SBATCH --gpus-per-node=4" in done.stdout
    assert "4 GPUs each" in done.stdout
