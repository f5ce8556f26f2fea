"""From a command line to a run: resolve the configuration, make its run directory, and hand it to a launcher.

`sbatch/grpo.sh` goes through `prepare_in_allocation`, and from
there on both ways are the same: the run directory holds the configuration, and ``forge_hpc.run --run-dir D`` starts on
every node. No torch here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from forge_hpc.config import Config, UserError, load_config, plan, read_config, safe_changes, save_config, validate
from forge_hpc.config.adapters import total_steps
from forge_hpc.config.hub_cache import nodes_environ
from forge_hpc.config.recipes import resolve_recipe_args
from forge_hpc.config.schema import WarmstartConfig
from forge_hpc.config.split import working_nodes
from forge_hpc.files import is_there
from forge_hpc.hub.pins import pin_cached
from forge_hpc.queueing import AT_ONCE, Queueing
from forge_hpc.run_dir import RunDir, Status
from forge_hpc.supervisor.starts import StartLog
from forge_hpc.user_files import check_files, keep_files, kept_files, restore_kept

if TYPE_CHECKING:
    from forge_hpc.before_queue import Outlook
    from forge_hpc.fork import Fork
    from forge_hpc.kept.directory import EnginesDir
    from forge_hpc.slurm import JobFacts
    from forge_hpc.slurm.partitions import Partition
    from launchers.command import Start

PROJECT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = PROJECT / "configs" / "grpo" / "demo.yaml"


@dataclass(frozen=True)
class Request:
    """What a command line asks for. ``run_dir`` alone, of a run that exists, means that run's own configuration."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    nodes: int | None = None
    cluster: str = "auto"
    site: str | None = None
    name: str | None = None
    default_config: Path = DEFAULT_CONFIG
    accept_changes: bool = False
    """Go on with other files of the user's than those that the run began with."""
    keep_s: float | None = None
    """Keep the engines for so many seconds after the run, and take those that are kept."""
    source: Path | None = None
    """The run that a new one begins from, with its configuration and a checkpoint of it."""
    source_step: int | None = None
    keep_optimizer: bool = True
    queueing: Queueing = AT_ONCE


@dataclass(frozen=True)
class Checked:
    """A run that can be made, and of which nothing is written yet."""

    cfg: Config
    run_dir: RunDir
    warm: Config | None
    """Of its warm start, where it has one that it has not saved yet."""
    changes: tuple[str, ...]
    """What differs from its earlier configuration."""
    outlook: Outlook
    fork: Fork | None = None

    @property
    def is_complete(self) -> bool:
        return _is_complete(self.cfg, self.run_dir.read_status())

    def make(self) -> None:
        """Create its directory, or renew what a new start needs."""
        prepare(self.cfg, self.run_dir, None, self.warm, self.fork)
        _record(self.changes, self.run_dir)

    def queue(self, options: Sequence[str]) -> str:
        """Make it and queue its job, with these options of sbatch besides its own; the job's id.

        Raises:
            UserError: Slurm refuses it, and the directory is as it was.
        """
        from launchers.slurm import RunExecutor

        run_dir = self.run_dir
        is_new, before = not run_dir.exists, read_config(run_dir.config) if run_dir.has_config else None
        ended, files = run_dir.read_status(), kept_files(run_dir)
        prepare(self.cfg, run_dir, None, self.warm, self.fork)
        try:
            job_id = RunExecutor(self.cfg, run_dir.path, options).submit_run()
        except UserError:
            _undo(run_dir, is_new, before, ended, files)
            raise
        _record(self.changes, run_dir)
        self.is_job(job_id)
        return job_id

    def is_job(self, job_id: str) -> None:
        """It waits as this job."""
        status = self.run_dir.read_status()
        if status and status.state == "pending":  # a job that has begun already wrote its id itself
            self.run_dir.write_status(job_id=job_id)


def resolve_config(request: Request) -> Config:
    """The whole configuration: file, then site profile, then overrides; not yet validated.

    Raises:
        UserError: as `load_config`, or a broken site profile.
    """
    from forge_hpc.slurm.site import site_overrides

    overrides = [*site_overrides(request.site), *request.overrides]
    if request.name is not None:
        overrides.append(f"name={request.name}")
    directory = request.source or request.run_dir
    existing = RunDir(directory) if directory else None
    if request.config is not None:
        cfg = load_config(request.config, overrides)
    elif existing and existing.has_config:
        cfg = read_config(existing.config, overrides)
    else:
        _say(f"No --config: taking {_shown(request.default_config)}. For real models: {_real_models(request)}")
        cfg = load_config(request.default_config, overrides)
    resolve_recipe_args(cfg, request.config)
    if request.nodes is not None:
        _set_nodes(cfg, request.nodes, request.overrides)
    return cfg


def submit(request: Request, *, dry_run: bool = False, fresh: bool = False, follow: bool = False) -> int:
    """Queue the run on Slurm, or run it here; the exit code for the shell.

    Args:
        dry_run: print the job script and the node split, queue and create nothing.
        fresh: move a completed run away from ``request.run_dir`` first.
        follow: show the job's output until the run ends.

    Raises:
        UserError: anything that would keep the run from starting, before anything is queued.
    """
    if fresh and not dry_run and request.run_dir:
        _move_completed_run_aside(RunDir(request.run_dir))
    place = find_place(request, dry_run=dry_run)
    cfg = place.configuration(request)
    run_dir = RunDir(request.run_dir or default_run_dir(cfg.name))
    with _fork(request, cfg, run_dir) as fork:
        run = check_run(request, place, cfg, run_dir, fork)
        if dry_run:
            return _show(request, place, run)
        return _begin(request, place, run, follow=follow)


@dataclass(frozen=True)
class Place:
    """Where runs are started: as jobs of Slurm, in the allocation that this shell is in, or on this machine."""

    as_jobs: bool
    """A dry run shows jobs where there is no Slurm, too."""
    on_slurm: bool
    allocation: JobFacts | None = None
    partitions: tuple[Partition, ...] = ()

    @property
    def is_here(self) -> bool:
        """On this machine, whose GPUs they then have."""
        return not self.as_jobs and self.allocation is None

    def configuration(self, request: Request) -> Config:
        """`resolve_config`, with what the place adds to it.

        Raises:
            UserError: as `resolve_config`, or the place cannot run it.
        """
        from forge_hpc.slurm import partitions
        from launchers import slurm

        if self.allocation is not None:
            request = replace(request, nodes=request.nodes or self.allocation.num_nodes)
        cfg = resolve_config(request)
        self._check_nodes(request, cfg.cluster.nodes)
        if self.on_slurm and (ignored := slurm.adopt_shell(cfg)):
            _say(f"not passed on to sbatch: {', '.join(ignored)} (see slurm.extra)")
        if self.on_slurm and cfg.cluster.gpus_per_node is None:
            cfg.cluster.gpus_per_node = partitions.gpus_per_node(cfg, list(self.partitions))
        return cfg

    def _check_nodes(self, request: Request, nodes: int) -> None:
        if self.allocation is not None and nodes > (there := self.allocation.num_nodes):
            raise UserError(
                f"{nodes} nodes are asked for, and this shell's allocation (job {self.allocation.job_id}) has {there}",
                f"--nodes {there} or fewer, or --cluster slurm for a job of its own",
            )
        if request.cluster == "local" and nodes > 1:
            raise UserError(f"--cluster local has 1 node, {nodes} are asked for", "--nodes 1, or --cluster slurm")
        if not self.as_jobs and self.allocation is None and (request.cluster == "slurm" or nodes > 1):
            raise UserError(
                f"{nodes} nodes need Slurm, and there is none here" if nodes > 1 else "there is no Slurm here",
                "submit from a login node of a cluster, or use --cluster local; --dry-run shows the script anywhere",
            )

    def start(self, cfg: Config, run_dir: RunDir, keep_s: float | None = None) -> Start:
        """What starts a run from here, where it is no job of its own; with ``keep_s`` on engines that are kept for so
        many seconds after it."""
        from forge_hpc.slurm import corrections
        from launchers.command import keeper_command, start_here, start_in_allocation, start_on_kept_engines

        engines = self.engines() if keep_s is not None else None
        keeper = None if engines is None else keeper_command(engines.path)
        if self.allocation is None:
            start = start_here(cfg, run_dir.path, keeper)
        else:
            start = start_in_allocation(cfg, run_dir.path, corrections(self.allocation), keeper)
        if engines is None or keep_s is None:
            return start
        return start_on_kept_engines(start, engines.path, run_dir.path, keep_s)

    def engines(self) -> EnginesDir:
        """Where engines of runs from here are kept.

        Raises:
            UserError: runs are jobs of their own, and their engines end with them.
        """
        from forge_hpc.kept.directory import EnginesDir

        if self.as_jobs:
            raise UserError(
                "--keep-engines is for runs on this machine or within salloc, and this one would be a job of its own",
                "salloc first, or --cluster local",
            )
        return EnginesDir.here(self.allocation.job_id if self.allocation is not None else None)


def find_place(request: Request, *, dry_run: bool = False) -> Place:
    """Where the runs that are asked for are to start.

    Raises:
        UserError: an allocation is asked for, and there is none here; Slurm does not answer.
    """
    from forge_hpc.slurm import partitions
    from forge_hpc.slurm.interactive import own_allocation

    if request.cluster in ("auto", "allocation"):
        allocation = own_allocation(of_batch_jobs=request.cluster == "allocation")
        if allocation is not None:
            return Place(as_jobs=False, on_slurm=False, allocation=allocation)
        if request.cluster == "allocation":
            raise UserError("this shell is in no allocation of Slurm", "salloc, or --cluster slurm for a job")
    on_slurm = request.cluster != "local" and partitions.slurm_is_here()
    as_jobs = on_slurm or (dry_run and request.cluster != "local")
    return Place(as_jobs, on_slurm, partitions=tuple(partitions.partitions()) if on_slurm else ())


def check_run(request: Request, place: Place, cfg: Config, run_dir: RunDir, fork: Fork | None = None) -> Checked:
    """Check what can be checked of a run before anything is written.

    Raises:
        UserError: it cannot run.
    """
    from forge_hpc.before_queue import look_ahead
    from launchers import slurm

    if request.keep_s is not None:
        place.engines()
        if cfg.slurm.container.runtime is not None:
            raise UserError(
                f"--keep-engines keeps none in a container (slurm.container.runtime={cfg.slurm.container.runtime})",
                "leave one of the two out",
            )
    file_changes = check_files(cfg, run_dir, accept=request.accept_changes)
    warm = _check(cfg, run_dir if fork is None else fork.source)
    _fix_date(cfg, run_dir)
    changes = _changes(cfg, run_dir) + file_changes
    if place.as_jobs:
        slurm.check_share(cfg)
        slurm.check_array(cfg)
    if request.cluster != "local":
        _warn_of_shared_nodes(cfg)
    where = {"for_slurm": place.as_jobs, "here": place.is_here}
    outlook = look_ahead(cfg, run_dir, place.partitions, **where, model=None if warm is None else warm.model.path)
    if place.as_jobs or place.allocation is not None:
        outlook = replace(outlook, warnings=(*outlook.warnings, *_missing(request, cfg, run_dir)))
    return Checked(cfg, run_dir, warm, tuple(changes), outlook, fork)


def _missing(request: Request, cfg: Config, run_dir: RunDir) -> list[str]:
    """Lines of warning of what the nodes' cache lacks. Raises UserError where they could not fetch it."""
    from forge_hpc.hub.offline import check_cache

    given = ["--config", str(request.config)] if request.config else ["--run-dir", str(request.source or run_dir)]
    site = ["--site", request.site] if request.site else []
    command = f"{tool()} fetch {shlex.join([*given, *site, *request.overrides])}"
    return [f"warning: {text}" for text in check_cache(cfg, run_dir.path, command)]


def _show(request: Request, place: Place, run: Checked) -> int:
    """The dry run."""
    from launchers import slurm

    if place.as_jobs:
        print(slurm.RunExecutor(run.cfg, run.run_dir.path).script())
        if options := request.queueing.options():
            print(f"# sbatch {shlex.join(options)}")
    else:
        print(shlex.join(place.start(run.cfg, run.run_dir, request.keep_s).command))
    print(run.outlook.table("# "))
    _say_all([*run.changes, *run.outlook.warnings])
    look_at_queue(request, place, run)
    _say("Dry run: nothing was created or queued.")
    return 0


def look_at_queue(request: Request, place: Place, run: Checked, *, waits: bool = False) -> None:
    """What a dry run says of the queue.

    Args:
        waits: it is for another job, so that Slurm is not asked when it begins.

    Raises:
        UserError: no partition can run it, its account may not, or Slurm would refuse it.
    """
    from forge_hpc.before_queue import check_queue, starts

    if place.on_slurm:
        check_queue(run.cfg, place.partitions)
        if not waits:
            _say(starts(run.cfg, run.run_dir, request.queueing.options()))
    elif place.as_jobs:
        _say("There is no Slurm here: the site's checks (partition, nodes, time limit) are left out.")


def check_start(request: Request, place: Place, run: Checked) -> list[str]:
    """Check that a run may be started now, and return options of sbatch for its job.

    Raises:
        UserError: no partition can run it, its account may not, another start has its directory, or it can never begin.
    """
    from forge_hpc.before_queue import check_queue

    if place.on_slurm:
        check_queue(run.cfg, place.partitions)
    else:
        request.queueing.check_here()
    if not place.on_slurm:
        _look_at_kept_engines(request, place)
    own = place.allocation.job_id if place.allocation is not None else None
    _refuse_busy(run.run_dir, own)
    if own is not None and run.run_dir.is_locked():
        raise UserError(f"a step of this allocation works on {run.run_dir} already", "wait for it")
    return request.queueing.options() if place.on_slurm else []


def _look_at_kept_engines(request: Request, place: Place) -> None:
    """Refuse those that are at work; say that there are some where they are not asked for, since they hold memory.

    Raises:
        UserError: they are at work for another run.
    """
    from forge_hpc.kept.ending import is_alive, refuse_busy

    if request.keep_s is not None:
        refuse_busy(place.engines())
    elif place.engines().state() is not None and is_alive(place.engines()):
        _say(f"engines of an earlier run are kept here, and hold memory: {tool()} engines --end")


def _begin(request: Request, place: Place, run: Checked, *, follow: bool) -> int:
    from forge_hpc.before_queue import starts, starts_later
    from launchers import local

    cfg, run_dir = run.cfg, run.run_dir
    options = check_start(request, place, run)
    if run.is_complete:
        print(f"{run_dir} is complete: nothing to do (another --run-dir begins a new run)")
        return 0
    _say_all([*run.changes, *run.outlook.warnings])
    if not place.on_slurm:
        run.make()
        print(f"run directory  {run_dir}\n{run.outlook.table()}", flush=True)
        return local.run_here(cfg, run_dir.path, place.start(cfg, run_dir, request.keep_s))
    begins = starts(cfg, run_dir, options)
    job_id = run.queue(options)
    where = shlex.quote(str(run_dir))
    print(f"job            {job_id}")
    print(f"run directory  {run_dir}")
    print(run.outlook.table())
    print(starts_later(options, job_id) or begins)
    print(f"next           {tool()} watch {where}\n               {tool()} logs --follow {where}")
    print(f"               {tool()} cancel {where}", flush=True)
    if follow:
        from forge_hpc.control import follow_run

        return follow_run(run_dir, job_id)
    return 0


def prepare_in_allocation(request: Request) -> str:
    """Inside a job that sbatch started: make or find the run directory, and return the shell lines that start the run.

    For a run that is complete they do nothing, and succeed. A requeued job, or its successor, takes the
    configuration that was saved, whatever has become of the files that it came from.

    Raises:
        UserError: as `submit`, or outside a Slurm job.
    """
    from forge_hpc.slurm import CONTINUE, corrections, job_facts, own_job_id
    from launchers.command import job_command, with_variables

    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("this is not a Slurm job", "sbatch sbatch/grpo.sh, or forge-hpc submit --cluster local")
    facts = job_facts(os.environ["SLURM_JOB_ID"])
    variables = corrections(facts)
    environ = {key: value for key, value in (os.environ | variables).items() if value is not None}
    job_id = own_job_id(environ) or ""
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    continued = os.environ.get(CONTINUE)  # the job follows one that could not be requeued
    requeued = int(environ.get("SLURM_RESTART_COUNT", "0")) > 0 or continued is not None
    given = Path(continued) if continued else request.run_dir
    run_dir = RunDir(given) if given else None
    if requeued and run_dir is None:
        run_dir = next((d for d in map(RunDir, Path("runs").glob(f"*-{job_id}")) if d.has_config), None)
    if requeued and run_dir and run_dir.has_config:
        cfg = read_config(run_dir.config)
    else:
        cfg = resolve_config(replace(request, nodes=nodes))
        _adopt_job(cfg, job_id, facts)
        run_dir = run_dir or RunDir(Path("runs") / f"{cfg.name}-{job_id}")
        file_changes = check_files(cfg, run_dir)
        warm = _check(cfg, run_dir)
        _fix_date(cfg, run_dir)
        changes = _changes(cfg, run_dir) + file_changes
        _warn_of_shared_nodes(cfg)
        _refuse_busy(run_dir, job_id)
        if not _is_complete(cfg, run_dir.read_status()):
            _say_all([*changes, *_missing(request, cfg, run_dir)])
            prepare(cfg, run_dir, job_id, warm)
            _record(changes, run_dir)
    if _is_complete(cfg, run_dir.read_status()):
        _say(f"{run_dir} is complete: nothing to do")
        return "true"
    _say(f"run directory  {run_dir}\n{_split(cfg)}")
    return with_variables(variables, job_command(cfg, run_dir.path))


def _adopt_job(cfg: Config, job_id: str, facts: JobFacts | None) -> None:
    """Options of sbatch win over the configuration; kept in it, so that ``forge-hpc resume`` asks for the same.

    The job scripts ask for --requeue: that it is in the job does not mean that somebody wants it.
    """
    from forge_hpc.slurm import SlurmRefused, forbid_requeue

    if facts is not None and facts.can_requeue and cfg.slurm.requeue != "auto":
        try:
            forbid_requeue(job_id)
        except SlurmRefused as refused:
            _say(f"warning: slurm.requeue={cfg.slurm.requeue}, but Slurm may start this job again itself: {refused}")
    if facts is not None:
        if not facts.can_requeue and cfg.slurm.requeue == "auto":
            cfg.slurm.requeue = "successor"
        cfg.slurm.partition = facts.partition
        cfg.slurm.account = facts.account or cfg.slurm.account
        cfg.slurm.qos = facts.qos or cfg.slurm.qos
        cfg.slurm.time = facts.time_limit or cfg.slurm.time


def prepare(
    cfg: Config, run_dir: RunDir, job_id: str | None, warm: Config | None = None, fork: Fork | None = None
) -> None:
    """Create the run directory (0700) with config.yaml and a pending status.json (0600), or renew those of a restart.

    The warm start's configuration is saved too: a resume must not depend on the file that it came from; and the user's
    own files that the configuration names, so that it shows when they have changed.

    Raises:
        UserError: the directory cannot be written.
    """
    run_dir.create()
    if fork is not None:
        from forge_hpc.fork import begin_with

        begin_with(fork, cfg, run_dir)
        StartLog(run_dir).forked(str(fork.source), fork.step, fork.keeps_optimizer, fork.changes(cfg))
    save_config(cfg, run_dir.config)
    keep_files(cfg, run_dir)
    environ = nodes_environ(cfg.slurm.setup)
    pin_cached(cfg, run_dir.path, environ)
    if warm is not None:
        warm.data.template_date = warm.data.template_date or cfg.data.template_date
        save_config(warm, RunDir(run_dir.warmstart).create().config)
        pin_cached(warm, run_dir.warmstart, environ)
    # An earlier job is no longer this run's: who watches must not take its end for ours.
    step = None if fork is None else fork.step
    run_dir.write_status(
        state="pending", step=step, policy_version=step, job_id=job_id or "", total_steps=total_steps(cfg), message=""
    )


def _check(cfg: Config, run_dir: RunDir) -> Config | None:
    """Validate the configuration and that of its warm start, which is returned if `run_dir` does not have it yet."""
    saved = RunDir(run_dir.warmstart)
    if cfg.model.path != "warmstart" or not saved.has_config:
        validate(cfg)
    else:  # the file that it came from may be gone
        validate(replace(cfg, warmstart=replace(cfg.warmstart, config=str(saved.config))))
        return None
    if cfg.model.path != "warmstart":
        return None
    file = cfg.warmstart.config
    try:
        warm = load_config(file, cfg.warmstart.overrides)
        validate(warm)
    except UserError as error:
        raise UserError(f"the warm start (warmstart.config={file}): {error.message}", error.hint) from None
    if warm.model.path == "warmstart":
        raise UserError(f"the warm start (warmstart.config={file}) begins with a warm start itself", "name its model")
    # What is trained after it is the same model.
    validate(replace(cfg, model=replace(cfg.model, path=warm.model.path), warmstart=WarmstartConfig()))
    return warm


def _is_complete(cfg: Config, status: Status | None) -> bool:
    return status is not None and status.state == "completed" and status.step >= total_steps(cfg)


def _warn_of_shared_nodes(cfg: Config) -> None:
    if not cfg.slurm.exclusive:
        _say(
            "warning: slurm.exclusive=false: other users of a node can reach this run's Monarch sockets (abstract Unix "
            "sockets) and the ports of gloo and vLLM; see Security in the README"
        )


def _set_nodes(cfg: Config, nodes: int, overrides: Sequence[str]) -> None:
    """``--nodes`` wins over the file; its split is kept as a ratio where its numbers do not fit any more."""
    cluster = cfg.cluster
    if nodes < 1:
        raise UserError(f"--nodes {nodes}", "give 1 or more")
    cluster.nodes = nodes
    working = working_nodes(cfg)
    given = [n for n in (cluster.trainer_nodes, cluster.rollout_nodes) if n is not None]
    by_hand = any(o.partition("=")[0] in ("cluster.trainer_nodes", "cluster.rollout_nodes") for o in overrides)
    if by_hand or not given or (len(given) == 1 and given[0] < working) or (len(given) == 2 and sum(given) == working):
        return
    if cluster.trainer_nodes is not None and cluster.rollout_nodes is not None:
        cluster.rollout_ratio = cluster.rollout_nodes / (cluster.trainer_nodes + cluster.rollout_nodes)
    _say(
        f"The configuration's trainer_nodes={cluster.trainer_nodes} and rollout_nodes={cluster.rollout_nodes} "
        f"do not fit {working} nodes: splitting by rollout_ratio={cluster.rollout_ratio:g}"
    )
    cluster.trainer_nodes = cluster.rollout_nodes = None


def _fix_date(cfg: Config, run_dir: RunDir) -> None:
    """A chat template that writes today's date writes one and the same in all starts of the run: that of the first."""
    if cfg.data.template_date is None:
        saved = read_config(run_dir.config).data.template_date if run_dir.has_config else None
        cfg.data.template_date = saved or date.today().isoformat()


def _changes(cfg: Config, run_dir: RunDir) -> list[str]:
    """What differs from the run's earlier configuration, one line a key.

    Raises:
        UserError: something differs that may not, or the run has done more steps than are asked for now.
    """
    if not run_dir.has_config:
        return []
    status = run_dir.read_status()
    return safe_changes(
        read_config(run_dir.config),
        cfg,
        status.step if status is not None else 0,
        f"{run_dir} belongs to another configuration",
        f"choose another --run-dir, or go on with its own: {tool()} resume {shlex.quote(str(run_dir))}",
    )


@contextmanager
def _fork(request: Request, cfg: Config, run_dir: RunDir) -> Iterator[Fork | None]:
    """What a new run begins with, where it is asked for; its checkpoint stays readable in the body."""
    if request.source is None:
        yield None
        return
    if run_dir.has_config:
        raise UserError(f"{run_dir} is a run already, and --from begins a new one", "choose another --run-dir")
    from forge_hpc.fork import open_fork

    source = RunDir(request.source)
    with open_fork(source, request.source_step, read_config(source.config), cfg, request.keep_optimizer) as fork:
        optimizer = "" if fork.keeps_optimizer else ", without its optimizer's state"
        _say(f"Beginning with step {fork.step} of {source}{optimizer}")
        _say_all(fork.changes(cfg))
        yield fork


def _record(changes: Sequence[str], run_dir: RunDir) -> None:
    if changes:
        StartLog(run_dir).changed(changes)


def _refuse_busy(run_dir: RunDir, own_job_id: str | None = None) -> None:
    """Refuse a directory that a queued or running job, or a live process, works on; of one of several adapters also
    where it works on all of them, and of all of them where it works on one."""
    if not run_dir.exists:
        return
    _refuse_busy_one(run_dir, own_job_id)
    if (one_base := run_dir.one_base) is not None:
        _refuse_busy_one(one_base, own_job_id)
    elif is_there(run_dir.adapters):
        for path in sorted(run_dir.adapters.iterdir()):
            if (adapter := RunDir(path)).has_config:
                _refuse_busy_one(adapter, own_job_id)


def _refuse_busy_one(run_dir: RunDir, own_job_id: str | None) -> None:
    from forge_hpc.slurm.job import is_active

    status, holder = run_dir.read_status(), run_dir.lock_holder()
    job_ids = {status.job_id if status else None, holder.get("job_id") if holder else None} - {None, "local"}
    if own_job_id in job_ids:
        return
    for job_id in sorted(filter(None, job_ids)):
        if is_active(job_id):
            where = shlex.quote(str(run_dir))
            raise UserError(f"job {job_id} works on {run_dir} already", f"wait for it, or {tool()} cancel {where}")
    if holder and not job_ids and run_dir.is_locked():
        raise UserError(f"process {holder['pid']} on {holder['host']} works on {run_dir} already", "wait for it")


def _move_completed_run_aside(run_dir: RunDir) -> None:
    status = run_dir.read_status()
    if status is None or status.state != "completed":
        return
    aside = _unused(Path(f"{run_dir.path}-{datetime.fromtimestamp(status.heartbeat):%Y%m%d-%H%M%S}"))
    run_dir.path.rename(aside)
    _say(f"The completed run in {run_dir} is now in {aside}")


def _undo(run_dir: RunDir, is_new: bool, config: Config | None, status: Status | None, files: str | None) -> None:
    """Slurm refused the job: leave the directory as it was found."""
    if is_new:
        shutil.rmtree(run_dir.path)
        return
    if config is None:
        run_dir.config.unlink()
    else:
        save_config(config, run_dir.config)
    restore_kept(run_dir, files)
    if status is None:
        run_dir.status.unlink()
    else:
        run_dir.write_status(state=status.state, message=status.message, job_id=status.job_id or "")


def _split(cfg: Config) -> str:
    return plan(cfg, cfg.cluster.gpus_per_node).describe()


def default_run_dir(name: str) -> Path:
    """``runs/NAME-TIMESTAMP``, where nothing is yet."""
    return _unused(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while is_there(candidate):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _real_models(request: Request) -> str:
    folder = request.default_config.parent
    names = sorted(
        p.stem for p in folder.glob("*.yaml") if p != request.default_config and not p.stem.startswith("demo")
    )
    return f"--config {_shown(folder)}/NAME.yaml, NAME being {', '.join(names)}" if names else "--config FILE"


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def tool() -> str:
    """How to call `forge-hpc` from this shell."""
    ours, found = Path(sys.executable).with_name("forge-hpc"), shutil.which("forge-hpc")
    if found and Path(found).absolute() == ours:
        return "forge-hpc"
    return shlex.quote(_shown(ours)) if ours.exists() else f"{shlex.quote(sys.executable)} -m forge_hpc.cli"


def _say_all(lines: Sequence[str]) -> None:
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    """To stderr: stdout carries what a script may want to read."""
    print(text, file=sys.stderr, flush=True)
