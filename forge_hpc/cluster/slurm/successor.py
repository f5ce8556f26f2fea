"""A new job in place of one that Slurm does not requeue."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from forge_hpc.cluster.slurm.job import ANSWER_S, JobFacts, ask, exclusion
from forge_hpc.files import atomic_write_text

CONTINUE = "FORGE_HPC_CONTINUE"
"""In the environment of a successor's job script: the run directory that it goes on with."""
PROJECT = "FORGE_HPC_PROJECT"
"""There too: where the project lies, since the script is no longer at its place."""


def submit_successor(
    facts: JobFacts, run_dir: Path, exclude_nodes: Iterable[str] = (), *, no_kill: bool = False
) -> str:
    """Queue a job that goes on with the run once this job has ended, for a job that may not be requeued; its id.

    It runs the same script with the same arguments in the same environment as a requeued job would. Options come from
    the script's #SBATCH lines, and over them, since the command line of sbatch is not kept, from what Slurm says of
    the job. Not to be found there, and lost if they were on the command line only: --signal, and partitions other than
    the one that the job runs in.

    Args:
        run_dir: the run; the script is kept there, as ``logs/JOBID_successor.sh``, unless that cannot be written. The
            script that made the run directory is told to take this one (`CONTINUE`).
        no_kill: the job is to outlive its nodes (--no-kill), which Slurm does not say of a job.

    Raises:
        SlurmRefused: no job was queued; SlurmSilent where Slurm does not answer.
    """
    run_dir = run_dir.absolute()
    text = ask("scontrol", "write", "batch_script", facts.job_id, "-")
    options = successor_options(facts, text)
    if excluded := exclusion(facts, tuple(exclude_nodes)) or facts.excluded:
        options.append(f"--exclude={excluded}")
    if no_kill:
        options.append("--no-kill")
    variables = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")  # sbatch would take them for options
    env = {key: value for key, value in os.environ.items() if not key.startswith(variables) or key == "SLURM_CONF"}
    env |= {CONTINUE: str(run_dir), PROJECT: str(Path(__file__).resolve().parents[3])}
    submit_dir = os.environ.get("SLURM_SUBMIT_DIR", "")
    with _written(text, run_dir / "logs" / f"{facts.job_id}_successor.sh") as script:
        answer = ask(
            *("sbatch", "--parsable", f"--dependency=afterany:{facts.job_id}", *options, str(script)),
            *_arguments(facts.said.get("Command", "")),
            env=env,
            cwd=submit_dir if submit_dir and Path(submit_dir).is_dir() else facts.said["WorkDir"],
            timeout_s=2 * ANSWER_S,
        )
    return answer.strip().partition(";")[0]


@contextmanager
def _written(text: str, path: Path) -> Iterator[Path]:
    """A file with ``text``: ``path``, or where that cannot be written, one for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as elsewhere:
        try:
            atomic_write_text(path, text)
        except OSError:
            path = Path(elsewhere) / path.name
            atomic_write_text(path, text)
        yield path


_OPTIONS = {
    "JobName": "job-name",
    "WorkDir": "chdir",
    "Account": "account",
    "QOS": "qos",
    "TimeLimit": "time",
    "Features": "constraint",
    "Reservation": "reservation",
    "Licenses": "licenses",
    "Switches": "switches",
    "MailUser": "mail-user",
    "MailType": "mail-type",
    "MinMemoryNode": "mem",  # 0 is all of it, and also what a job without --mem gets where it is shown
    "MinMemoryCPU": "mem-per-cpu",
    "ReqNodeList": "nodelist",
}
_GPUS = {
    "TresPerNode": "gpus-per-node",
    "TresPerJob": "gpus",
    "TresPerTask": "gpus-per-task",
    "TresPerSocket": "gpus-per-socket",
}


def successor_options(facts: JobFacts, script: str) -> list[str]:
    """Options of sbatch that give a job with this script what the job of ``facts`` has."""
    said, job_id = facts.said, facts.job_id
    directives = "\n".join(re.findall(r"^#SBATCH\s+(.*)", script, re.MULTILINE))
    found = {option: said[key] for key, option in _OPTIONS.items() if key in said}
    if "MemPerTres" in said:  # --mem-per-gpu, of which the others follow
        found = {option: value for option, value in found.items() if option not in ("mem", "mem-per-cpu")}
    for key, option in _GPUS.items():
        if key in said:
            tres = re.sub(r"\bgres[:/]", "", said[key])  # gres:gpu:4, since Slurm 23.02 gres/gpu:4
            # sbatch adds --gres to --gpus-per-node: 4 and 4 are 8. Only the option that the script has replaces it.
            if option == "gpus-per-node" and (re.search(r"--gres[= ]", directives) or "gpu" not in tres):
                found["gres"] = tres
            else:
                found[option] = re.sub(r"\bgpu:", "", tres)
    asked = re.search(r"(?:^|\s)(?:--partition[= ]|-p ?)(\S+)", directives)
    if asked is None or facts.partition not in asked[1].split(","):  # else all that the script asks for
        found["partition"] = facts.partition
    found["nodes"] = str(facts.num_nodes)
    tasks_per_node = next((value for key, value in said.items() if key.startswith("NtasksPerN")), "0").partition(":")[0]
    if tasks_per_node not in ("0", "*"):
        found["ntasks-per-node"] = tasks_per_node
    if said.get("CPUs/Task", "1") != "1":
        found["cpus-per-task"] = said["CPUs/Task"]
    # The same files again: %j where the job's id was, and nothing of this job's output is lost.
    for key, option in (("StdOut", "output"), ("StdErr", "error")):
        if key in said and (key == "StdOut" or said[key] != said.get("StdOut")):
            path = Path(said[key])
            found[option] = str(path.with_name(re.sub(rf"(?<!\d){job_id}(?!\d)", "%j", path.name)))
    found |= {"open-mode": "append", "export": "ALL"}
    flags = {"NO": ["--exclusive"], "USER": ["--exclusive=user"], "YES": ["--oversubscribe"]}
    requeue = "--requeue" if facts.can_requeue else "--no-requeue"
    return [f"--{k}={v}" for k, v in found.items()] + flags.get(said.get("OverSubscribe", ""), []) + [requeue]


def _arguments(command: str) -> list[str]:
    """The words after the script. Slurm keeps no quotes: an argument with blanks comes back as several."""
    words = command.split(" ")
    counts = range(1, len(words) + 1)
    return words[next((n for n in counts if Path(" ".join(words[:n])).is_file()), 1) :]
