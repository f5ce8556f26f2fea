"""A user's session with every command of ``forge-hpc``, on a real Slurm cluster of four hosts on this machine.

    python tests/user_session.py                          # prints commands and output (root, Debian's Slurm)
    python tests/user_session.py --write docs/session.md  # and writes them down, paths and names shortened

``make session`` is the latter; ``tests/slurm_release.sh 26.05 .venv/bin/python tests/user_session.py`` is the former
beside another release. It takes a quarter of an hour on two cores; a command that does not end with the exit code that
is expected of it ends the session.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disks import small_disk
from hub_server import HubServer
from slurm_cluster import SlurmCluster

PROJECT = Path(__file__).resolve().parents[1]
HEAD = """# A session

Every command of `forge-hpc`, as a user gives them on a cluster, with its output: `make session` runs them on a real
Slurm of four hosts on one machine (two cores, no GPU), of the release that a section names, and writes this page. The
configuration is that of the demo with a model from random weights and a reward for length, so that a run takes
seconds, or minutes where the machine is busy with something else.
"""
REWARD = """\
def length(prompt, response, target, **fields):
    return len(response) / 6
"""
CONFIG = """\
base: forge_hpc/configs/grpo/demo.yaml
name: short
model:
  path: builtin:qwen3-tiny
reward:
  - name: reward.py:length
rollout:
  prompts_per_step: 16
trainer:
  lr_scheduler:
    warmup_steps: 0
  training:
    steps: 4
checkpoint:
  interval: 2
evaluation:
  num_prompts: 20
generator:
  engine:
    kv_cache_memory_gib: 0.25
algorithm:
  max_steps_without_signal: 1000
"""
SFT = """\
base: forge_hpc/configs/sft/demo.yaml
name: short-sft
trainer:
  lr_scheduler:
    warmup_steps: 0
  training:
    steps: 20
    global_batch_size: 16
evaluation:
  num_prompts: 0
"""
FROM_THE_HUB = """\
base: short.yaml
name: tiny
model:
  path: ada/tiny
data:
  path: ada/sums
"""
CARD = """\
---
configs:
- config_name: default
  data_files: [{split: train, path: train.jsonl}, {split: test, path: test.jsonl}]
---
"""
NOTEBOOK = """\
import forge_hpc

run = forge_hpc.Run("runs/a")
print(run.state, run.job_id)
print(run.metrics()[["reward/mean", "entropy/mean", "time/step_s"]].tail(3))
"""
ANSWERS = """\
{"prompt": "1+1=", "response": "2", "target": "2"}
{"prompt": "2+2=", "response": "5", "target": "4"}
"""
MAX_LINES = 50
"""Of the output of one command."""


class Session:
    """Gives commands in a user's home, and keeps what was printed."""

    def __init__(self, home: Path, cluster: SlurmCluster) -> None:
        self.home, self.cluster = home, cluster
        self.page: list[str] = []
        (home / "forge_hpc").symlink_to(PROJECT)
        for name, text in (
            ("short.yaml", CONFIG),
            ("reward.py", REWARD),
            ("answers.jsonl", ANSWERS),
            ("sft.yaml", SFT),
        ):
            (home / name).write_text(text)
        tool = home / "bin/forge-hpc"  # works before the project is installed, too
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m forge_hpc.cli "$@"\n')
        tool.chmod(0o755)
        path = f"{tool.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env = {**cluster.env, "PATH": path, "PYTHONPATH": str(PROJECT), "HOME": str(home), "OMP_NUM_THREADS": "1"}
        self.env |= {"COLUMNS": "120", "USER": "ada", "LOGNAME": "ada", "SHELL": "/bin/bash", "PS1": "$ "}
        for name in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "FORGE_HPC_SITE", "VIRTUAL_ENV"):
            self.env.pop(name, None)

    def say(self, text: str) -> None:
        """A paragraph."""
        self._add(f"\n{text}\n")

    def file(self, name: str, text: str) -> None:
        """A file that the user writes."""
        (self.home / name).write_text(text)
        kind = {".py": "python", ".jsonl": "json"}.get(Path(name).suffix, "yaml")
        self._add(f"\n`{name}`:\n\n```{kind}\n{text}```\n")

    def __call__(self, line: str, code: int = 0, timeout_s: float = 1800) -> str:
        """A command, as it is typed."""
        done = subprocess.run(
            ["bash", "-c", line],
            env=self.env,
            cwd=self.home,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
        )
        self._show(line, done.stdout)
        assert done.returncode == code, f"{line} ended with {done.returncode}, not {code}:\n{done.stdout}"
        return done.stdout

    def at_a_terminal(self, line: str, *typed: str, timeout_s: float = 600) -> str:
        """A command in a terminal of its own, in which something is typed each time that a prompt is there."""
        pid, fd = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            os.execvpe("bash", ["bash", "-c", line], {**self.env, "TERM": "dumb"})
        said, waiting, until = "", list(typed), time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # the other end is closed
            while time.monotonic() < until:
                ready, _, _ = select.select([fd], [], [], 2.0)
                if ready:
                    data = os.read(fd, 4096)
                    if not data:
                        break
                    said += data.decode(errors="replace")
                elif waiting:
                    os.write(fd, waiting.pop(0).encode() + b"\n")
        _, status = os.waitpid(pid, 0)
        self._show(line, said.replace("\r", ""))
        assert os.waitstatus_to_exitcode(status) == 0, said
        return said

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 1800) -> None:
        """Nothing is typed until then."""
        until = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until, "it did not happen"
            time.sleep(0.2)

    def steps(self, run: str) -> int:
        """Steps that a run has written."""
        path = self.home / "runs" / run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def status(self, run: str) -> dict[str, Any]:
        """Of a run; empty before it begins."""
        path = self.home / "runs" / run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def has_ended(self, run: str) -> bool:
        """Whether nothing more will come of it."""
        return self.status(run).get("state") in ("completed", "failed")

    def _show(self, line: str, output: str) -> None:
        lines = [text.rstrip() for text in output.splitlines()]
        if len(lines) > MAX_LINES:
            lines = [*lines[: MAX_LINES - 8], f"[{len(lines) - MAX_LINES + 1} more lines]", *lines[-7:]]
        self._add("\n```console\n$ " + "\n".join([line, *lines]).rstrip() + "\n```\n")

    def _add(self, text: str) -> None:
        text = text.replace(f"{Path(sys.executable).parent}/", "")
        text = text.replace(str(self.home), "~").replace(str(PROJECT), "~/forge_hpc")
        text = text.replace(f"Cluster {self.cluster.bridge}", "Cluster lab")
        text = text.replace(f"{self.cluster.bridge}n", "node")
        text = re.sub(r"\broot(?=[@_])|(?<=/tmp/)root\b", "ada", text)
        text = text.replace(os.uname().nodename, "login")
        self.page.append(text)
        print(text, end="", flush=True)


def before_the_first_run(s: Session) -> None:
    """What is here, and what would be queued."""
    s("forge-hpc --help")
    s("forge-hpc doctor")
    s("forge-hpc site init lab --partition main && cat .config/forge_hpc/sites/lab.yaml")
    s.file("short.yaml", CONFIG)
    s.file("reward.py", REWARD)
    s.file("answers.jsonl", ANSWERS)
    s("forge-hpc reward answers.jsonl --config short.yaml")
    s("printf '3\\n8\\n' | forge-hpc env environment.name=guessing")
    s("forge-hpc plan --config forge_hpc/configs/grpo/qwen3_8b.yaml --nodes 2 --gpu h100 cluster.gpus_per_node=8")
    s("forge-hpc submit --config short.yaml --site lab --nodes 4 --dry-run")
    s.say("Where many nodes would import from one file server, each unpacks the environment on its own disk first:")
    s("forge-hpc submit --config short.yaml --nodes 4 --dry-run slurm.stage_environment=/tmp 2>&1 | grep staging")


def refused(s: Session) -> None:
    """Mistakes."""
    container = "slurm.container.runtime=apptainer slurm.container.image=images/lab.sif"
    mistakes = ("trainer.optimizer.lrr=1e-3", "--sweep seed=1,x", "slurm.partition=absent", "--nodes 8", container)
    for mistake in mistakes:
        s(f"forge-hpc submit --config short.yaml {mistake}", code=2)
    s("forge-hpc status runs/absent", code=2)


def nodes_without_a_network(s: Session) -> None:
    """A model and data of a hub, which is a small one of this process."""
    s.file("hub.yaml", FROM_THE_HUB)
    with HubServer() as hub, tempfile.TemporaryDirectory() as model:
        s.env["HF_ENDPOINT"] = hub.url
        write = "import sys; from forge_hpc.data.builtin import write_tiny_qwen3; write_tiny_qwen3(sys.argv[1], 1)"
        subprocess.run([sys.executable, "-c", write, model], env=s.env, check=True)
        hub.add("model", "ada/tiny", Path(model))
        sums = "".join(f'{{"question": "{a}+{a}=", "answer": "{2 * a}"}}\n' for a in range(10, 99)).encode()
        hub.add("dataset", "ada/sums", {"README.md": CARD.encode(), "train.jsonl": sums, "test.jsonl": sums})
        s("forge-hpc submit --config hub.yaml --dry-run cluster.offline=true > /dev/null", code=2)
        s("forge-hpc fetch --config hub.yaml")
        s("forge-hpc submit --config hub.yaml --dry-run cluster.offline=true > /dev/null")
    del s.env["HF_ENDPOINT"]


def one_run(s: Session) -> None:
    """On two nodes of three, since one of them is not fit."""
    s.say(
        "Each node has a folder of its own for temporary files here. That of node2 is full: the gate finds it, and a\n"
        "spare node takes its place. The nodes that the run goes on with are numbered anew."
    )
    for number in range(4):
        (s.home / f"tmp{number}").mkdir()
    with small_disk(s.home / "tmp1", 8 << 20):
        _one_run(s)


def _one_run(s: Session) -> None:
    scratch = "'slurm.setup=[export TMPDIR=$HOME/tmp$SLURM_NODEID]'"
    options = f"cluster.spare_nodes=1 rollout.max_staleness=1 trainer.training.steps=2000 {scratch}"
    s(f"forge-hpc submit --config short.yaml --nodes 3 --run-dir runs/a {options}")
    s.wait_for(lambda: s.steps("a") >= 3)
    s("forge-hpc status runs/a")
    s("timeout --signal=INT 6 forge-hpc watch runs/a", code=124)
    s("forge-hpc logs runs/a -n 8")
    s("forge-hpc stacks runs/a")
    s("forge-hpc attach runs/a --node 1 -- hostname")
    s.at_a_terminal("forge-hpc attach runs/a", "hostname; echo $SLURM_JOB_ID", "exit")
    said = s("forge-hpc join runs/a slurm.time=01:00:00")
    job = said.split("job", 1)[1].split()[0]
    s.wait_for(lambda: s.status("a")["lent"] == 1)
    s("forge-hpc status runs/a")
    s(f"forge-hpc cancel {job}")
    s.wait_for(lambda: s.status("a")["lent"] == 0)
    s("forge-hpc cancel runs/a")
    s("forge-hpc join runs/a", code=2)
    steps = s.steps("a") + 2
    s(f"forge-hpc resume runs/a trainer.training.steps={steps}")
    s.wait_for(lambda: s.has_ended("a"))
    s("forge-hpc status runs/a")
    s("forge-hpc report runs/a")
    s("forge-hpc plan --config short.yaml --nodes 4 --from runs/a")
    s("forge-hpc export runs/a")
    s.file("notebook.py", NOTEBOOK)
    s("python notebook.py")


def several_runs(s: Session) -> None:
    """A sweep, a pipeline, and jobs that wait."""
    s.file("sft.yaml", SFT)
    sweep = "--sweep trainer.optimizer.lr=1e-3,1e-2 seed=0,1 --at-once 2"
    s(f"forge-hpc submit --config sft.yaml --run-dir runs/lr {sweep}")
    s.wait_for(lambda: all(s.has_ended(f"lr/{number}") for number in range(4)))
    s("forge-hpc compare runs/lr")
    s("forge-hpc status runs/lr/0 --json")
    s("forge-hpc submit --config sft.yaml --run-dir runs/chain --then short.yaml --hold")
    s("forge-hpc submit --config short.yaml --run-dir runs/after --after runs/chain/2-short")
    s("forge-hpc submit --config short.yaml --run-dir runs/later --begin now+2hours")
    s("timeout --signal=INT 6 forge-hpc watch runs/after", code=124)
    s("forge-hpc status --all")
    s("COLUMNS=60 forge-hpc status --all")
    s("forge-hpc cancel runs/later runs/after runs/chain/2-short runs/chain/1-short-sft")


def allocation(s: Session) -> None:
    """Two runs in one."""
    shell = "forge-hpc submit --config short.yaml --keep-engines 10m trainer.training.steps=2 --run-dir runs"
    lines = [f"{shell}/one", f"{shell}/two trainer.optimizer.lr=1e-2", "forge-hpc engines", "forge-hpc engines --end"]
    (s.home / "lines.sh").write_text("\n".join(f"echo '$ {line}'\n{line}" for line in lines) + "\n")
    s("salloc --nodes=1 --exclusive bash lines.sh 2>&1 | grep -v '^|'")


def the_shell(s: Session) -> None:
    """What it completes."""
    s("source <(forge-hpc completion bash); complete -p forge-hpc")


PARTS: dict[str, Callable[[Session], None]] = {
    "Before the first run": before_the_first_run,
    "What would not work, before anything is queued": refused,
    "What comes from the hub is fetched before, for nodes without a network": nodes_without_a_network,
    "A run that is looked at, lent a node, cancelled, and goes on": one_run,
    "Several runs": several_runs,
    "In an allocation, where engines are kept": allocation,
    "The shell": the_shell,
}
"""The page's sections. None needs what another has left."""


def sections(text: str) -> dict[str, str]:
    """Of a page, by title."""
    _, *found = re.split(rf"^## ({'|'.join(map(re.escape, PARTS))})$", text, flags=re.MULTILINE)  # a report has such
    return dict(zip(found[::2], found[1::2], strict=True))


def write(page: Path, parts: dict[str, str]) -> None:
    """The page, with the sections that were not run as they are there."""
    there = sections(page.read_text(encoding="utf-8")) if page.exists() else {}
    texts = [f"\n## {title}\n\n{(there | parts)[title].strip()}\n" for title in PARTS if title in there | parts]
    page.write_text(HEAD + "".join(texts), encoding="utf-8")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="A user's session, with output.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the page")
    parser.add_argument("--only", default="", metavar="WORDS", help="sections whose title has them")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it leaves no cluster behind
    # Not under /tmp, of which a user would be warned: on a cluster that is each node's own.
    with tempfile.TemporaryDirectory(prefix="s-", dir="/home") as folder, SlurmCluster(nodes=4) as cluster:
        s = Session(Path(folder), cluster)
        release = cluster.run("sinfo", "--version").stdout.split()[-1]
        for title, part in PARTS.items():
            if args.only in title:
                print(f"\n## {title}")
                s.say(f"On Slurm {release}:")
                part(s)
                if args.write is not None:
                    write(args.write, {title: "".join(s.page)})
                s.page.clear()
    return 0


if __name__ == "__main__":
    sys.exit(main())
