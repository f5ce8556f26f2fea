"""A new job in place of one that Slurm does not requeue."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from forge_hpc.files import atomic_write_text
from forge_hpc.slurm.client import ANSWER_S, SlurmRefused, ask
from forge_hpc.slurm.facts import JobFacts
from forge_hpc.slurm.job import exclusion

CONTINUE = "FORGE_HPC_CONTINUE"
"""In the environment of a successor's job script: the run directory that it goes on with."""
PROJECT = "FORGE_HPC_PROJECT"
"""There too: where the project lies, since the script is no longer at its place."""


def submit_successor(
    facts: JobFacts,
    run_dir: Path,
    exclude_nodes: Iterable[str] = (),
    *,
    no_kill: bool = False,
    arguments: Sequence[str] | None = None,
) -> str:
    """Queue a job that goes on with the run once this job has ended, for a job that may not be requeued; its id.

    It runs the same script with the same arguments in the same environment as a requeued job would. Options come from
    the script's #SBATCH lines, and over them, since the command line of sbatch is not kept, from what Slurm says of
    the job. Not to be found there, and lost if they were on the command line only: --signal, and before Slurm
    26.05 partitions other than the one that the job runs in. The successor of an array's task is an array of that task.

    Args:
        run_dir: the run; the script is kept there, as ``logs/JOBID_successor.sh``, unless that cannot be written. The
            script that made the run directory is told to take this one (`CONTINUE`).
        no_kill: the job is to outlive its nodes (--no-kill), which Slurm does not say of a job.
        arguments: of the script, by `script_arguments`; None where they are not known.

    Raises:
        SlurmRefused: no job was queued; SlurmSilent where Slurm does not answer.
    """
    run_dir = run_dir.absolute()
    if arguments is None:
        arguments = script_arguments(facts.said["JobId"])
    text = ask("scontrol", "write", "batch_script", facts.job_id, "-")
    options = successor_options(facts, text)
    if excluded := exclusion(facts, tuple(exclude_nodes)) or facts.excluded:
        options.append(f"--exclude={excluded}")
    if no_kill:
        options.append("--no-kill")
    variables = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")  # sbatch would take them for options
    env = {key: value for key, value in os.environ.items() if not key.startswith(variables) or key == "SLURM_CONF"}
    env |= {CONTINUE: str(run_dir), PROJECT: str(Path(__file__).resolve().parents[2])}
    submit_dir = os.environ.get("SLURM_SUBMIT_DIR", "")
    with _written(text, run_dir / "logs" / f"{facts.job_id}_successor.sh") as script:
        answer = ask(
            *("sbatch", "--parsable", f"--dependency=afterany:{facts.job_id}", *options, str(script)),
            *(_submit_line(facts.said)[1] if arguments is None else arguments),
            env=env,
            cwd=submit_dir if submit_dir and Path(submit_dir).is_dir() else facts.said["WorkDir"],
            timeout_s=2 * ANSWER_S,
        )
    successor = answer.strip().partition(";")[0]
    _, of_array, task = facts.job_id.partition("_")
    successor = f"{successor}{of_array}{task}"
    with contextlib.suppress(SlurmRefused):  # the run itself goes on all the same
        move_dependents(facts.job_id, successor)
    return successor


def move_dependents(job_id: str, successor: str) -> list[str]:
    """Have the user's jobs that wait for this job to end well (``afterok``) wait for its successor; their ids.

    Raises:
        SlurmRefused: one of them was not moved; SlurmSilent where Slurm does not answer.
    """
    moved = []
    for line in ask("squeue", "--noheader", "--me", "--states=PENDING", "--format=%i|%E").splitlines():
        dependent, _, waits_for = line.partition("|")
        waiting = [item.partition("(")[0] for item in waits_for.split(",") if item.endswith("(unfulfilled)")]
        if f"afterok:{job_id}" in waiting:
            new = ",".join(f"afterok:{successor}" if item == f"afterok:{job_id}" else item for item in waiting)
            ask("scontrol", "update", f"JobId={dependent}", f"Dependency={new}")
            moved.append(dependent)
    return moved


@contextmanager
def _written(text: str, path: Path) -> Iterator[Path]:
    """A file with ``text``: ``path``, or where that cannot be written, one for as long as the context lasts."""
    try:
        atomic_write_text(path, text)
    except OSError:
        with tempfile.TemporaryDirectory() as elsewhere:
            path = Path(elsewhere) / path.name
            atomic_write_text(path, text)
            yield path
    else:
        yield path


_OPTIONS = {
    "JobName": "job-name",
    "WorkDir": "chdir",
    "Account": "account",
    "QOS": "qos",
    "WCKey": "wckey",
    "Comment": "comment",
    "TimeLimit": "time",
    "TimeMin": "time-min",
    "Features": "constraint",
    "Reservation": "reservation",
    "Licenses": "licenses",
    "Network": "network",
    "Switches": "switches",
    "MailUser": "mail-user",
    "Nice": "nice",
    "ReqNodeList": "nodelist",
    "MinTmpDiskNode": "tmp",
    "NtasksPerTRES": "ntasks-per-gpu",
    "Socks/Node": "sockets-per-node",
    "CoreSpec": "core-spec",
    "ThreadSpec": "thread-spec",
}
_NOT_ASKED = ("0", "*", "00:00:00")
_GPUS = {"TresPerJob": "gpus", "TresPerSocket": "gpus-per-socket"}


def successor_options(facts: JobFacts, script: str) -> list[str]:
    """Options of sbatch that give a job with this script what the job of ``facts`` has."""
    said = facts.said
    directives = "\n".join(re.findall(r"^#SBATCH\s+(.*)", script, re.MULTILINE))
    found = {option: said[key] for key, option in _OPTIONS.items() if said.get(key, "0") not in _NOT_ASKED}
    user, both, kind = found.get("mail-user", "").rpartition(" MailType=")
    if both:  # one line of two keys, below those on which Slurm alone speaks
        found |= {"mail-user": user, "mail-type": kind}
    submitted, _ = _submit_line(said)
    asked = _asked("partition", "p", submitted) or _asked("partition", "p", directives)
    if asked is None or facts.partition not in asked.split(","):
        found["partition"] = facts.partition
    elif submitted:
        found["partition"] = asked  # else all that the script asks for
    found |= _shape(facts) | _memory(said) | _generic_resources(said, directives) | _files(facts)
    if "_" in facts.job_id:  # the same task: else each would be followed by a whole array
        found["array"] = facts.job_id.partition("_")[2]
    found |= {"open-mode": "append", "export": "ALL"}
    flags = [f"--{k}={v}" for k, v in found.items()]
    # Slurm 26.05 has Exclusive= for it, and says OverSubscribe=NO of jobs that share their nodes, too.
    exclusive = said.get("Exclusive") or {"NO": "NODE", "YES": "NO", "OK": "NO"}.get(said.get("OverSubscribe", ""), "")
    exclusive = exclusive or said.get("OverSubscribe", "NO")
    if exclusive != "NO":
        flags.append("--exclusive" if exclusive == "NODE" else f"--exclusive={exclusive.lower()}")
    elif said.get("OverSubscribe") == "YES":
        flags.append("--oversubscribe")
    if said.get("Contiguous") == "1":
        flags.append("--contiguous")
    return [*flags, "--requeue" if facts.can_requeue else "--no-requeue"]


def _shape(facts: JobFacts) -> dict[str, str]:
    """Nodes, tasks and cores."""
    said = facts.said
    found = {"nodes": str(facts.num_nodes)}
    tasks_per_node = said.get("NtasksPerN:B:S:C", "0").partition(":")[0]
    if tasks_per_node not in _NOT_ASKED:
        found["ntasks-per-node"] = tasks_per_node
    elif "NtasksPerTRES" not in said and (
        int(said.get("NumTasks", "1")) > facts.num_nodes or "gpu" in said.get("TresPerTask", "")
    ):
        found["ntasks"] = said["NumTasks"]
    if "CpusPerTres" in said:
        found["cpus-per-gpu"] = said["CpusPerTres"].rpartition(":")[2]
    elif said.get("CPUs/Task", "1") != "1":
        found["cpus-per-task"] = said["CPUs/Task"]
    elif int(said.get("MinCPUsNode", "1")) > 1 and tasks_per_node in _NOT_ASKED:
        found["mincpus"] = said["MinCPUsNode"]
    *_, cores, threads = said.get("ReqB:S:C:T", "*:*").split(":")
    sizes = {"cores-per-socket": cores, "threads-per-core": threads}
    return found | {option: size for option, size in sizes.items() if size not in _NOT_ASKED}


def _memory(said: Mapping[str, str]) -> dict[str, str]:
    if "MemPerTres" in said:  # Slurm 22.05 says MinMemoryNode=0 besides
        return {"mem-per-gpu": f"{said['MemPerTres'].rpartition(':')[2]}M"}
    if "MinMemoryCPU" in said:
        return {"mem-per-cpu": said["MinMemoryCPU"]}
    # 0 is all of it, and also what a job without --mem gets where it is shown.
    return {"mem": said["MinMemoryNode"]} if "MinMemoryNode" in said else {}


def _generic_resources(said: Mapping[str, str], directives: str) -> dict[str, str]:
    """GPUs, their shards and the like: ``gres:gpu:h100:4``, later ``gres/gpu:h100:4``, and by task
    ``cpu=2,gres/gpu=1``."""
    found = {option: re.sub(r"\bgres[:/]gpu[:=]", "", said[key]) for key, option in _GPUS.items() if key in said}
    if per_node := re.sub(r"\bgres[:/]", "", said.get("TresPerNode", "")):
        # sbatch adds --gres to --gpus-per-node: 4 and 4 are 8. Only the option that the script has replaces it.
        only_gpus = all(item.startswith("gpu:") for item in per_node.split(","))
        if only_gpus and not re.search(r"--gres[= ]", directives):
            found["gpus-per-node"] = re.sub(r"\bgpu:", "", per_node)
        else:
            found["gres"] = per_node
    # The cores stand in CPUs/Task as well.
    per_task = [item for item in said.get("TresPerTask", "").split(",") if item and not item.startswith("cpu=")]
    gpus = [re.fullmatch(r"gres[:/]gpu[:=](.*)", item) for item in per_task]
    if all(gpus) and gpus:
        found["gpus-per-task"] = ",".join(match[1] for match in gpus if match)
    elif per_task:
        found["tres-per-task"] = ",".join(per_task)
    return found


def _files(facts: JobFacts) -> dict[str, str]:
    """The same files again: %j where the job's id was, and nothing of this job's output is lost."""
    said, found = facts.said, {}
    for key, option in (("StdOut", "output"), ("StdErr", "error")):
        if key in said and (key == "StdOut" or said[key] != said.get("StdOut")):
            path = Path(said[key])
            name = path.name.replace(facts.job_id, "%A_%a") if "_" in facts.job_id else path.name
            found[option] = str(path.with_name(re.sub(rf"(?<!\d){said['JobId']}(?!\d)", "%j", name)))
    if said.get("StdIn", "/dev/null") != "/dev/null":
        found["input"] = said["StdIn"]
    return found


def _asked(option: str, letter: str, options: str) -> str | None:
    found = re.findall(rf"(?:^|\s)(?:--{option}[= ]|-{letter} ?)(\S+)", options)
    return found[-1] if found else None


def _submit_line(said: Mapping[str, str]) -> tuple[str, list[str]]:
    """What stood before the script in the command that submitted the job, and the words after it.

    Slurm 26.05 tells the command, 22.05 the words after the script, 24.11 neither. No quotes are kept: an argument
    with blanks comes back as several.
    """
    script = said.get("Command", "")
    words = said.get("SubmitLine", "").split(" ")
    for number, word in enumerate(words):
        if number and (word == script or script.endswith(f"/{word.removeprefix('./')}")) and Path(script).is_file():
            return " ".join(words[1:number]), words[number + 1 :]
    words = script.split(" ")
    counts = range(1, len(words) + 1)
    return "", words[next((n for n in counts if Path(" ".join(words[:n])).is_file()), 1) :]


def script_arguments(job_id: str) -> list[str] | None:
    """The words after the script of the job with this SLURM_JOB_ID, as its process has them; None where it does not run
    on this node. To be asked for early: a job that is preempted or cancelled loses its script first."""
    own = f"SLURM_JOB_ID={job_id}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            _, script, *words = (process / "cmdline").read_bytes().split(b"\0")
            if script.endswith(b"/slurm_script") and own in (process / "environ").read_bytes().split(b"\0"):
                return [os.fsdecode(word) for word in words[:-1]]
    return None
