"""``forge-hpc fetch`` against a hub on this machine: real huggingface_hub and datasets, a tiny model and data set."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from disks import small_disk
from hub_server import HubServer
from runs import PROJECT, read, small_run, status

from forge_hpc.config import Config, UserError
from forge_hpc.config.hub_cache import cached_commit, nodes_environ, split_name
from forge_hpc.data.builtin import addition_examples
from forge_hpc.hub.assets import assets_of, is_hub_name
from forge_hpc.hub.offline import offline_environ
from forge_hpc.hub.pins import Pins

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""
NEEDS = ("model.path=org/tiny", "data.path=org/sums", "data.name=main", "warmstart.config=null")


def rows(split: str, num: int) -> bytes:
    examples = addition_examples(split, 1)
    lines = [json.dumps({"question": examples[i]["question"], "answer": examples[i]["answer"]}) for i in range(num)]
    return "\n".join(lines).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from forge_hpc.data.builtin import write_tiny_qwen3

    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_qwen3(directory, 1)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def hub(tiny: dict[str, bytes]) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("model", "org/tiny", tiny | {"original/weights.pth": b"0" * 100_000})
        data = {"main/train.jsonl": rows("train", 200), "main/test.jsonl": rows("test", 20)}
        data |= {"README.md": CARD.encode(), "other/train.jsonl": b"{}", "notes.pdf": b"0" * 100_000}
        server.add("dataset", "org/sums", data)
        yield server


@pytest.fixture
def env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    outer = ("SLURM_", "SBATCH_", "FORGE_", "HF_", "HUGGINGFACE_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    return kept | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
    }


def cli(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_hpc.cli", *arguments]
    return subprocess.run(command, env=env, cwd=PROJECT, text=True, capture_output=True, timeout=250, check=False)


def fetch(env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return cli(env, "fetch", "--config", "configs/grpo/demo.yaml", *NEEDS, *more)


def files_sent(hub: HubServer) -> list[str]:
    return [line.split("/")[-1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]


def python(env: dict[str, str], code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOAD = """
from forge_hpc.config.schema import DataConfig
from forge_hpc.data.source import load_eval_examples, load_examples
data = DataConfig(path="org/sums", name="main")
print(list(load_examples(data, "train", 0)), list(load_eval_examples(data, 0)))
"""


def test_models_and_data_come_once_and_are_then_read_without_the_hub(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    online = python(env | {"HF_HOME": str(tmp_path / "other")}, LOAD)
    first = fetch(env)
    assert first.returncode == 0, first.stderr
    assert re.search(r"model org/tiny +\| +model.path \| +\w{12} \| +2.5 MB \| fetched 2.5 MB", first.stdout)
    assert re.search(r"data set org/sums \(main\) \| +data.path \| +\w{12} \|", first.stdout)
    assert not {"weights.pth", "notes.pdf"} & {path.name for path in (tmp_path / "hf").rglob("*")}
    hub.requests.clear()
    again = fetch(env)
    assert again.returncode == 0 and again.stdout.count("was there") == 2
    assert files_sent(hub) == []
    hub.requests.clear()
    offline = env | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    assert python(offline, LOAD) == online
    assert hub.requests == []
    away = fetch(env | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert away.returncode == 0 and away.stdout.count("was there; the hub does not answer") == 2


def test_each_failure_is_one_line_that_says_what_to_do_and_keeps_nothing_else_back(
    hub: HubServer, env: dict[str, str], tiny: dict[str, bytes]
) -> None:
    hub.add("model", "org/secret", tiny, gated=True)
    wanted = ["org/tinny", "org/secret", "org/tiny@v9", "org/tiny"]
    done = cli(env, "fetch", *(f"--model={name}" for name in wanted), "--dataset=org/sumz")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "fetching the model org/tiny: 2.5 MB",
        "error: the hub has no model org/tinny [--model]",
        "hint: did you mean org/tiny?",
        "error: the model org/secret is gated [--model]",
        f"hint: accept its terms at {hub.url}/org/secret; then `hf auth login`, or HF_TOKEN, with a token of an "
        "account that may read it",
        "error: the model org/tiny@v9 has no such revision [--model]",
        "hint: it has main, or a commit",
        "error: the hub has no data set org/sumz [--dataset]",
        "hint: did you mean org/sums?",
    ]
    assert "fetched 2.5 MB" in done.stdout and done.stdout.count("FAILED") == 4
    silent = fetch(env | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert silent.returncode == 2
    error, hint = silent.stderr.splitlines()[-2:]
    assert error.startswith("error: cannot reach http://127.0.0.1:9 for the data set org/sums (main) [data.path]")
    assert hint == "hint: run it where there is a network; HTTPS_PROXY names a proxy, HF_ENDPOINT a mirror"
    split = fetch(env, "data.eval_split=tset", "data.name=other")
    assert "error: the data set org/sums (other) has no split tset [data.path]\nhint: it has train" in split.stderr


def test_what_was_interrupted_goes_on_and_half_a_model_is_none(hub: HubServer, env: dict[str, str]) -> None:
    hub.break_after = 1_000_000
    broken = cli(env | {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}, "fetch", "--model=org/tiny")
    assert broken.returncode == 2 and "error: " in broken.stderr
    assert offline_environ(config("model.path=org/tiny"), Path("/nowhere"), env) == {}
    hub.break_after = None
    hub.requests.clear()
    done = cli(env, "fetch", "--model=org/tiny")
    assert done.returncode == 0, done.stderr
    assert files_sent(hub) == ["model.safetensors"]
    assert offline_environ(config("model.path=org/tiny"), Path("/nowhere"), env) != {}


def test_two_at_once_fetch_into_one_cache(hub: HubServer, env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "forge_hpc.cli", "fetch", "--model=org/tiny", "--dataset=org/sums"]
    both = [
        subprocess.Popen(command, env=env, cwd=PROJECT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in both:
        output, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert output.count("FAILED") == 0
    assert files_sent(hub).count("model.safetensors") == 1


def test_a_cache_without_room_is_said_before_anything_comes(
    hub: HubServer, env: dict[str, str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "small", 1_000_000) as small:
        done = cli(env | {"HF_HOME": str(small)}, "fetch", "--model=org/tiny")
    assert done.returncode == 2
    assert re.fullmatch(
        rf"error: no room in the cache {small}/hub: 2.5 MB are to come, and \S+ [kM]B are free\n"
        "hint: make room there, or set HF_HOME; then fetch again\n",
        done.stderr,
    )
    assert files_sent(hub) == []


def test_a_cache_lets_others_read_what_may_read_it_and_its_group_write_where_it_is_shared(tmp_path: Path) -> None:
    from forge_hpc.hub.download import cache_umask

    for mode, umask in ((0o700, 0o077), (0o755, 0o022), (0o2775, 0o002), (0o2770, 0o007), (0o750, 0o027)):
        tmp_path.chmod(mode)
        assert cache_umask(tmp_path) == umask, oct(mode)
    tmp_path.chmod(0o755)
    assert cache_umask(tmp_path / "not" / "yet") == 0o022


def config(*overrides: str) -> Config:
    from forge_hpc.config import load_config

    return load_config(PROJECT / "configs/grpo/demo.yaml", ["warmstart.config=null", *overrides])


def test_names_of_the_hub_may_have_a_revision_and_paths_are_none(tmp_path: Path) -> None:
    assert split_name("org/tiny@refs/pr/1") == ("org/tiny", "refs/pr/1")
    assert [is_hub_name(name) for name in ("gpt2", "org/tiny", "org/tiny@main", "a/b/c", "x.jsonl", str(tmp_path))] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    names = {str(asset) for asset in assets_of(config(*NEEDS[:3], "data.eval_path=org/held@v1"))}
    assert names == {"model org/tiny", "data set org/sums (main)", "data set org/held@v1 (main)"}


def test_the_caches_place_is_that_of_the_site_profile() -> None:
    setup = ["module load cuda", "export HF_HOME=$SCRATCH/hf # ours", 'HF_DATASETS_CACHE="/a b"']
    found = nodes_environ(setup, {"SCRATCH": "/scratch/me", "HF_HOME": "/home/me"})
    assert (found["HF_HOME"], found["HF_DATASETS_CACHE"]) == ("/scratch/me/hf", "/a b")


def test_submit_says_what_the_cache_lacks_and_the_command_that_brings_it(hub: HubServer, env: dict[str, str]) -> None:
    submit = ["submit", "--dry-run", "--config", "configs/grpo/demo.yaml", *NEEDS]
    warned = cli(env, *submit)
    assert warned.returncode == 0
    lacks = "the cache lacks the model org/tiny [model.path], the data set org/sums (main) [data.path]"
    command = f"fetch --config configs/grpo/demo.yaml {' '.join(NEEDS)}"
    assert f"warning: {lacks}: the job would fetch it while its nodes wait. Before: " in warned.stderr
    assert command in warned.stderr
    refused = cli(env, *submit, "cluster.offline=true")
    assert refused.returncode == 2
    error, hint = refused.stderr.splitlines()[-2:]
    assert error == f"error: {lacks}, and nodes have no network (cluster.offline)"
    assert hint.endswith(f"{command} cluster.offline=true")
    assert fetch(env).returncode == 0
    assert "lacks" not in cli(env, *submit, "cluster.offline=true").stderr


def test_a_run_asks_no_hub_and_keeps_the_commits_that_it_began_with(
    hub: HubServer, env: dict[str, str], tiny: dict[str, bytes], tmp_path: Path
) -> None:
    assert fetch(env).returncode == 0
    commit = hub.repos["model", "org/tiny"].branches["main"]
    run_dir = tmp_path / "run"
    arguments = [*small_run(tmp_path, 2), *NEEDS, "checkpoint.interval=1"]
    hub.requests.clear()
    done = cli(env, "submit", "--cluster", "local", "--run-dir", str(run_dir), *arguments)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    pins = json.loads((run_dir / "hub.json").read_text())
    assert pins["models"] == {"org/tiny": commit}
    data = hub.repos["dataset", "org/sums"].branches["main"]
    assert pins["datasets"] == {"org/sums": data}
    hub.add("model", "org/tiny", tiny | {"README.md": b"a new commit"})  # somebody fetches the model as it is now
    assert cli(env, "fetch", "--model=org/tiny").returncode == 0
    assert cached_commit("org/tiny", environ=env) != commit
    assert Pins(run_dir).named("org/tiny") == f"org/tiny@{commit}"
    hub.requests.clear()
    longer = cli(env, "resume", "--cluster", "local", str(run_dir), "trainer.training.steps=3")
    assert longer.returncode == 0, longer.stderr
    assert (status(run_dir)["step"], len(read(run_dir)), hub.requests) == (3, 3, [])
    shutil.rmtree(tmp_path / "hf")
    lacking = cli(env, "fetch", "--run-dir", str(run_dir))
    assert lacking.returncode == 0, lacking.stderr
    assert f"model org/tiny@{commit}" in lacking.stdout


def test_a_run_with_code_of_its_own_may_ask_the_hub_unless_nodes_have_no_network(env: dict[str, str]) -> None:
    own = config("reward=[{name: 'mine.py:score'}]")
    assert offline_environ(own, Path("/nowhere"), env) == {}
    own.cluster.offline = True
    assert offline_environ(own, Path("/nowhere"), env) == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    assert offline_environ(config(), Path("/nowhere"), env | {"HF_HUB_OFFLINE": "0"}) == {"HF_DATASETS_OFFLINE": "1"}


def test_a_revision_of_a_model_that_is_none_is_refused() -> None:
    from forge_hpc.config import validate

    with pytest.raises(UserError, match="neither a directory nor a hub name"):
        validate(config("model.path=org/tiny@"))
