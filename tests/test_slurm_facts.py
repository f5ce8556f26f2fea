"""What Slurm says of a job is read past what its user wrote, and a successor asks for what its job asked for."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster

from forge_hpc.slurm import JobFacts, SlurmRefused, cause_of, job_facts, submit_successor
from forge_hpc.slurm.job import job_state
from forge_hpc.slurm.successor import _submit_line, successor_options
from forge_hpc.supervisor.ending import Cause

RELEASES = ("22.05", "24.11", "26.05")
ARRAY = {"22.05": "102", "24.11": "103", "26.05": "105"}
"""As each release prints an array of three tasks, one at a time of which was cancelled; its user has given every text
that he may give the look of Slurm's own words. The last task has the array's id."""


def captured(release: str) -> str:
    return (Path(__file__).parent / "scontrol" / f"{release}.txt").read_text()


@pytest.mark.parametrize("release", RELEASES)
def test_what_the_user_wrote_is_not_read_as_what_slurm_says(release: str) -> None:
    facts = JobFacts.parse(captured(release), ARRAY[release])
    assert (facts.state, facts.reason, facts.restarts, facts.account) == ("RUNNING", "None", 0, None)
    assert not facts.preempted and facts.end_time is not None and facts.eligible_time is not None
    assert facts.said["JobName"] == "my run JobState=CANCELLED Reason=TimeLimit"
    assert cause_of(facts, 15, own_restarts=0) == Cause.UNKNOWN


@pytest.mark.parametrize("release", RELEASES)
def test_a_name_and_a_comment_of_several_lines_change_nothing(release: str) -> None:
    text = captured(release)
    text = text.replace("JobName=my run", "JobName=my\n   JobState=TIMEOUT Reason=TimeLimit\nRestarts=4 run")
    text = text.replace("   Comment=Account=bio", "   Comment=a\n   PreemptTime=5 JobState=X\n   Requeue=0 Restarts=9")
    facts = JobFacts.parse(text, ARRAY[release])
    assert (facts.state, facts.restarts, facts.can_requeue, facts.preempted) == ("RUNNING", 0, True, False)


@pytest.mark.parametrize("release", RELEASES)
def test_of_an_array_the_record_of_the_own_task_is_read(release: str) -> None:
    array, text = ARRAY[release], captured(release)
    states = {}
    for raw in re.findall(r"^JobId=(\d+)", text, re.MULTILINE):
        facts = JobFacts.parse(text, raw)
        states[facts.job_id] = facts.state
    assert states == {f"{array}_1": "CANCELLED", f"{array}_2": "RUNNING", f"{array}_3": "RUNNING"}
    assert JobFacts.parse(text, array).job_id == f"{array}_3"


@pytest.mark.parametrize("release", RELEASES)
def test_a_successor_of_each_release_asks_for_the_job_s_gpus_memory_cores_and_task(release: str) -> None:
    facts = JobFacts.parse(captured(release), ARRAY[release])
    options = successor_options(facts, "#!/bin/bash\n#SBATCH --array=1-3%2\n")
    assert set(options) >= {
        "--gpus-per-node=2",
        "--mem-per-gpu=1024M",
        "--cpus-per-task=4",
        "--exclusive=mcs",
        "--array=3",
        "--mail-user=me PreemptTime=1",
        "--mail-type=END",
        "--comment=Account=bio Restarts=3",
        "--output=/tmp/j-%j.out",
    }
    assert not [o for o in options if o.startswith(("--gpus-per-task", "--tres-per-task", "--mem=", "--error"))]


@pytest.mark.parametrize(
    ("command", "line", "arguments"),
    [
        ("{script} a x=1", "", ["a", "x=1"]),  # as in 22.05
        ("{script}", "sbatch -N 2 --comment Restarts=3 {script} a x=1", ["a", "x=1"]),  # as in 26.05
        ("{script}", "sbatch -N 2 my.sh a x=1", ["a", "x=1"]),
        ("{script}", "", []),
    ],
)
def test_arguments_are_found_where_each_release_keeps_them(
    tmp_path: Path, command: str, line: str, arguments: list[str]
) -> None:
    (tmp_path / "my.sh").touch()
    text = captured("26.05").replace("Command=/tmp/job.sh\n", f"Command={command.format(script=tmp_path / 'my.sh')}\n")
    text = re.sub(r"SubmitLine=.*", f"SubmitLine={line.format(script=tmp_path / 'my.sh')}" if line else "Power=", text)
    assert _submit_line(JobFacts.parse(text, "105").said)[1] == arguments


OPTIONS = """
--cpus-per-task=4
--cpus-per-task=2 --ntasks=3
--mem=1G
--mem-per-cpu=500M
--mem-per-gpu=1G --gpus-per-node=2
--gpus-per-node=h100:2
--gres=gpu:2
--gres=gpu:h100:2,shard:0
--gres=shard:3
--gpus=4 --nodes=2
--gpus-per-task=1 --ntasks=2
--gpus-per-task=h100:1 --ntasks=2 --cpus-per-task=2
--gpus-per-socket=2 --sockets-per-node=1
--gpus-per-node=2 --cpus-per-gpu=2
--gpus=2 --ntasks-per-gpu=1
--exclusive
--exclusive=user
--exclusive=mcs
--exclusive --mem=0
--oversubscribe
--nodes=2 --ntasks-per-node=2
--ntasks=4
--hint=nomultithread
--cores-per-socket=1
--mincpus=4
--tmp=10
--contiguous
--nice=5
--time=10 --time-min=5
--comment=Account=bio
--mail-type=END --mail-user=me
--array=4
--partition=main
--no-requeue
""".strip().splitlines()
NOT_ASKED_FOR = re.compile(
    r"JobId|Array.*|.*Time|Priority|LastSchedEval|JobState|Reason|Dependency|Command|SubmitLine|Std.*|Power|NumNodes"
    r"|(Alloc|Req)?TRES|AllocNode:Sid"
)


@pytest.fixture(autouse=True)
def outside_jobs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Slurm's commands, in this process too, belong to the cluster of the test."""
    for key in [key for key in os.environ if key.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(key)
    if "gpu_cluster" in request.fixturenames:
        monkeypatch.setenv("SLURM_CONF", str(request.getfixturevalue("gpu_cluster").conf))


@pytest.mark.slurm
def test_a_successor_asks_for_all_that_its_job_asked_for(gpu_cluster: SlurmCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --output={tmp_path}/%j.out\ntrue\n")
    (tmp_path / "run" / "logs").mkdir(parents=True)
    lost = {}
    for options in OPTIONS:
        command = ["sbatch", "--parsable", "--hold", "--time-min=1", *options.split(), str(script), "x=1"]
        job = gpu_cluster.run(*command).stdout.strip()
        job += options.replace("--array=", "_") if options.startswith("--array") else ""
        before = job_facts(job)
        assert before is not None
        try:
            after = job_facts(submit_successor(before, tmp_path / "run"))
        except SlurmRefused as refused:
            lost[options] = {"refused": (str(refused), None)}
            continue
        assert after is not None
        keys = [key for key in {**before.said, **after.said} if not NOT_ASKED_FOR.fullmatch(key)]
        differs = {key: (before.said.get(key), after.said.get(key)) for key in keys}
        lost[options] = {key: pair for key, pair in differs.items() if pair[0] != pair[1]}
        assert (before.num_nodes, before.time_limit) == (after.num_nodes, after.time_limit)
        assert after.job_id.partition("_")[2] == before.job_id.partition("_")[2]
        gpu_cluster.run("scancel", job.partition("_")[0], after.job_id.partition("_")[0])
    assert not {options: keys for options, keys in lost.items() if keys}


@pytest.mark.slurm
def test_a_successor_has_its_job_s_arguments_word_by_word(gpu_cluster: SlurmCluster, tmp_path: Path) -> None:
    script, arguments = tmp_path / "job.sh", ["two words", "x=1", ""]
    script.write_text(f'#!/bin/bash\n#SBATCH --output={tmp_path}/%j.out\necho "$# $1"\n[[ $AGAIN ]] || sleep 60\n')
    (tmp_path / "run" / "logs").mkdir(parents=True)
    job = gpu_cluster.run("sbatch", "--parsable", "--mem=1", str(script), *arguments).stdout.strip()
    gpu_cluster.wait_for(lambda: (tmp_path / f"{job}.out").exists() and (tmp_path / f"{job}.out").read_text() != "")
    facts = job_facts(job)
    assert facts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGAIN", "yes")
        successor = submit_successor(facts, tmp_path / "run")
    gpu_cluster.run("scancel", job)
    gpu_cluster.wait_for_job(successor)
    assert (tmp_path / f"{successor}.out").read_text() == "3 two words\n"


@pytest.mark.slurm
def test_a_job_name_that_speaks_of_a_state_does_not_change_the_job_s_state(gpu_cluster: SlurmCluster) -> None:
    name = "x JobState=COMPLETED Reason=TimeLimit"
    wrap = shlex.join(["echo", "JobState=FAILED"])
    command = ["sbatch", "--parsable", "--hold", f"--job-name={name}", "--output=/dev/null", "--wrap", wrap]
    job = gpu_cluster.run(*command).stdout.strip()
    assert job_state(job) == ("PENDING", "JobHeldUser")
    gpu_cluster.run("scancel", job)
