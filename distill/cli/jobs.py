"""`distill submit` and `cancel`: submit a run as Slurm jobs, and stop it."""

import json
import os
import shutil
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import gpu_fit, start
from distill.cli.common import StoreOption, near, print_table, site_setting, store_path
from distill.cli.runs import RunArgument
from distill.cli.work import Changes, SpecArgument
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import expanded, suggest
from distill.runs.run_store import RunPaths, find_run

if TYPE_CHECKING:
    import distill.execution.preflight
    import distill.launch.script
    import distill.launch.sites
    import distill.spec.model
    import distill.spec.specfile

JOB = "The job"
SiteOption = Annotated[
    Path | None,
    typer.Option(
        "--site",
        help="YAML file that describes the cluster; by default $DISTILL_SITE, `site` of your config, or the example.",
    ),
]
CodeOption = Annotated[
    str,
    typer.Option(
        "--code",
        help="Which copy of the distill package the jobs use. run: a copy made now, in the run; current: the one that "
        "is installed when a job starts.",
    ),
]


NodesOption = Annotated[
    int | None,
    typer.Option("--nodes", min=1, help="Number of nodes to train on; sets launch.nodes.", rich_help_panel=JOB),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        min=0,
        help="GPUs per node, with one process per GPU; sets launch.slurm.gpus_per_node and launch.procs.",
        rich_help_panel=JOB,
    ),
]
PartitionOption = Annotated[
    str | None,
    typer.Option("--partition", help="Partition of the jobs; sets launch.slurm.partition.", rich_help_panel=JOB),
]
AccountOption = Annotated[
    str | None, typer.Option("--account", help="Account to charge; sets launch.slurm.account.", rich_help_panel=JOB)
]
QosOption = Annotated[
    str | None, typer.Option("--qos", help="Quality of service; sets launch.slurm.qos.", rich_help_panel=JOB)
]
TimeOption = Annotated[
    str | None,
    typer.Option(
        "--time", help="Time limit of a job, like 4:00:00 or 2-12; sets launch.slurm.time.", rich_help_panel=JOB
    ),
]
ContainerOption = Annotated[
    str | None, typer.Option("--container", help="Container image; sets launch.slurm.container.", rich_help_panel=JOB)
]
PairsJobsOption = Annotated[
    int | None,
    typer.Option(
        "--pairs-jobs",
        min=1,
        help="Size of the job arrays that make pairs and caches; sets launch.slurm.pairs_jobs.",
        rich_help_panel=JOB,
    ),
]
OneJobOption = Annotated[
    bool, typer.Option("--one-job", help="Run all stages in one job; sets launch.slurm.one_job.", rich_help_panel=JOB)
]


@dataclass(frozen=True)
class JobOptions:
    """The options of a submission, by their names. None and False mean: not given."""

    nodes: int | None
    gpus_per_node: int | None
    procs_per_node: int | None
    partition: str | None
    account: str | None
    qos: str | None
    time: str | None
    container: str | None
    pairs_jobs: int | None
    one_job: bool

    def changes(self) -> list[str]:
        """The options as overrides of a spec."""
        given = {
            "launch.nodes": self.nodes,
            "launch.slurm.gpus_per_node": self.gpus_per_node,
            "launch.procs": self.procs_per_node or self.gpus_per_node or None,
            "launch.slurm.partition": self.partition,
            "launch.slurm.account": self.account,
            "launch.slurm.qos": self.qos,
            "launch.slurm.time": self.time,
            "launch.slurm.container": self.container,
            "launch.slurm.pairs_jobs": self.pairs_jobs,
            "launch.slurm.one_job": True if self.one_job else None,
        }
        return [
            f"{field}={json.dumps(value, ensure_ascii=False)}"  # quoted, so that text is not parsed as another type
            for field, value in given.items()
            if value is not None
        ]


def submit(
    spec: SpecArgument,
    changes: Changes = None,
    nodes: NodesOption = None,
    gpus_per_node: GpusOption = None,
    procs_per_node: Annotated[
        int | None,
        typer.Option(min=1, help="Processes per node, for nodes without GPUs; sets launch.procs.", rich_help_panel=JOB),
    ] = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    qos: QosOption = None,
    time: TimeOption = None,
    container: ContainerOption = None,
    pairs_jobs: PairsJobsOption = None,
    one_job: OneJobOption = False,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; by default the spec's.")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume an existing run: submit the stages that are neither done nor queued."),
    ] = False,
    site: SiteOption = None,
    code: CodeOption = "run",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the job scripts and write nothing. Works without Slurm.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Submit even if a training cannot fit into the GPUs of the site file.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Submit a spec to Slurm: check it, create the run, and submit its stages as jobs with dependencies."""
    check_code(code)
    if force and resume:
        raise InputError("--force has no effect with --resume; leave it out")
    asked = JobOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        procs_per_node=procs_per_node,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        container=container,
        pairs_jobs=pairs_jobs,
        one_job=one_job,
    )
    changes = [*asked.changes(), *(changes or [])]
    where, folder = found_site(site), store_path(store)
    if dry_run:
        _dry_run(folder, spec, changes, name, where, resume, code, force=force)
    elif resume:
        submit_again(folder, *start.find_again(folder, spec, changes, name), where, code)
    else:
        submit_new(folder, start.find(spec, changes, name), where, code, force=force)


def check_code(code: str) -> None:
    """Raise InputError unless it is a valid value of --code."""
    if code not in ("run", "current"):
        raise InputError(f"--code {code}: {suggest(code, ['run', 'current'])}")


def found_site(option: Path | None) -> "distill.launch.sites.SiteSource":
    """The site to use, from the option or the user's settings."""
    from distill.launch import sites

    return sites.load(expanded(site_setting(option).value))


def submit_new(
    folder: Path,
    source: "distill.spec.specfile.SpecSource",
    site: "distill.launch.sites.SiteSource",
    code: str,
    *,
    force: bool,
) -> None:
    """Create the run of a spec, and submit all its stages. force: even if its trainings cannot fit into the GPUs."""
    from distill.execution import prefetch
    from distill.launch import queue, snapshot
    from distill.runs import claims

    queue.check(source.spec, site)
    ready = gpu_fit.checked(source, site, folder, new=True, force=force)
    source = replace(source, spec=ready.resolved.spec)
    del ready  # frees its networks
    found = prefetch.resolve(source.spec, folder)
    more = {f"code/{path}": content for path, content in snapshot.files().items()} if code == "run" else {}
    run = start.create(folder, source, {**more, **prefetch.record(found)})
    prefetch.link(run)
    try:
        with claims.claim(run, "submit"):
            where = _where(run, {each.what for each in found}, site, code)
            start.say_stream(source.spec, run)
            _say_queued(run, source.spec.launch, queue.submit(run, source.spec, list(source.spec.stages), where))
    except InputError:
        shutil.rmtree(run.root)
        raise


def submit_again(
    folder: Path,
    run: RunPaths,
    source: "distill.spec.specfile.SpecSource",
    site: "distill.launch.sites.SiteSource",
    code: str,
) -> None:
    """Submit the stages that are neither done nor queued. InputError if the spec differs in more than `launch`."""
    from distill.execution import prefetch
    from distill.launch import queue
    from distill.runs import claims, jobs, todo

    queue.check(source.spec, site)
    with claims.claim(run, "submit"):
        live = queue.live_jobs(run)
        lead = round(jobs.lead_needed(run))
        slurm = source.spec.launch.slurm
        if lead > slurm.lead_seconds and not live:
            say(
                f"two saves of this run can take {lead - jobs.SPARE:.0f} s, so launch.slurm.lead_seconds is raised "
                f"from {slurm.lead_seconds} to {lead}"
            )
            longer = source.spec.launch.model_copy(update={"slurm": slurm.model_copy(update={"lead_seconds": lead})})
            source = replace(source, spec=source.spec.model_copy(update={"launch": longer}))
        trains = code != "run" or not run.code.exists()  # else the jobs use the copy of the package in the run
        content = start.go_on(run, source, here=False, live=[job.id for job in live], trains=trains)
        parted = queue.parted(run, content, live)
        under_way = {name for job in live for name in job.stages}.difference(parted)
        left = [name for name in todo.pending(run, content) if name not in under_way]
        for name in todo.lost_pairs(run, content):
            say(f"the pairs of stage '{name}' are missing or damaged, and still needed: they are made again")
            run.stage(name).done.unlink()
        for job in live:
            say(f"job {job.id} is running or queued: {', '.join(job.stages)}")
        if not left:
            reason = "its unfinished stages are already queued or running" if live else "all stages are done"
            say(f"nothing to submit for run '{run.name}': {reason}")
            return
        _keep_code(run, code)
        found = prefetch.resolve(content, folder, prefetch.read(run))
        prefetch.keep(run, found)
        where = _where(run, {each.what for each in found}, site, code)
        start.say_stream(content, run)
        _say_queued(run, content.launch, queue.submit(run, content, left, where, parted))


def _say_queued(
    run: RunPaths, launch: "distill.spec.model.LaunchSpec", sent: "Mapping[str, distill.launch.script.JobPlan]"
) -> None:
    say(f"run '{run.name}' in {near(run.root)}")
    rows = [[job, *plan.described(launch)] for job, plan in sent.items()]
    print_table(["job", "name", "stages", "nodes x processes", "waits for"], rows)
    say(f"follow it: distill status {run.name}    distill logs {run.name} -f")


def _where(
    run: RunPaths, from_hub: Collection[str], site: "distill.launch.sites.SiteSource", code: str
) -> "distill.launch.script.Where":
    """The settings that the jobs share. from_hub: the inputs of the run that come from the hub."""
    from distill.execution import prefetch
    from distill.launch import environment
    from distill.launch.script import Where

    return Where(site, run.code if code == "run" else environment.ROOT, prefetch.environment(from_hub, run.root))


def _keep_code(run: RunPaths, code: str) -> None:
    """Add the copy of the package to a run that has none, if --code is "run"."""
    from distill.launch import snapshot

    if code != "run" or run.code.exists():
        return
    snapshot.write(run.code)


def _dry_run(
    folder: Path,
    spec: str,
    changes: list[str],
    name: str | None,
    site: "distill.launch.sites.SiteSource",
    resume: bool,
    code: str,
    *,
    force: bool,
) -> None:
    from distill.launch import queue, script
    from distill.runs import todo

    if resume:
        run, source = start.find_again(folder, spec, changes, name)
    else:
        source = start.find(spec, changes, name)
        start.refuse_taken(folder, source)
        run = RunPaths(folder.absolute() / source.spec.name)
    queue.check_container(source.spec, site)
    checked = gpu_fit.checked(source, site, folder, new=False, force=force).resolved.spec
    left = todo.pending(run, checked)
    where = _where(run, checked.hub_inputs, site, code)
    plans = queue.plans(run, checked, left)
    scripts = [script.job(run, checked.launch, plan, where) for plan in plans]
    for plan, text in zip(plans, scripts, strict=True):
        waits = f"  (after {', '.join(plan.after)})" if plan.after else ""
        say(f"# --- {plan.name}.sbatch{waits} ---")
        say(text)


def cancel(
    run: RunArgument,
    now: Annotated[bool, typer.Option("--now", help="Kill immediately; unsaved progress is lost.")] = False,
    store: StoreOption = None,
) -> None:
    """Stop a run, on the cluster or on this machine: running processes save first, queued jobs are cancelled."""
    from distill.launch import queue, slurm
    from distill.runs import claims

    paths = find_run(store_path(store), run)
    told = False
    for place, owner in claims.held(paths).items():
        if place == paths.running and owner.is_here and owner.is_alive():
            os.kill(owner.pid, signal.SIGKILL if now else signal.SIGTERM)
            say(f"process {owner.pid}: {'killed' if now else 'asked to save and exit'}")
            told = True
    live = queue.live_jobs(paths) if paths.jobs.is_dir() else []
    states = slurm.states([member for job in live for member in job.members])
    states = {name: state for name, state in states.items() if state.is_live}
    for name in states:
        (paths.jobs / f"{name}.cancel").touch()  # so that it is not queued again
    waiting = [name for name, state in states.items() if state.state != "RUNNING" or now]
    slurm.cancel(waiting)
    for name, state in states.items():
        if name in waiting:
            say(f"job {name}: cancelled")
        else:
            lost = f"could not be signalled (state {state.state}); run the command again, or use --now"
            say(f"job {name}: {'asked to save and exit' if slurm.ask(name) else lost}")
        told = True
    other = claims.executing(paths)
    if not told and other is not None and not other.is_here:
        where = f"process {other.pid} on {other.host}"
        say(f"run '{paths.name}' is being executed by {where}; stop it there: kill {other.pid}")
    elif not told:
        say(f"no process or job of run '{paths.name}' is running or queued")
