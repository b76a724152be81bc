"""`distill reflow`: runs rounds of reflow from a spec of one round, and estimates their cost."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import jobs, start, work
from distill.cli.common import StoreOption, near, print_table, store_path
from distill.cli.work import Changes, SpecArgument
from distill.core import space
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human
from distill.runs.progress import duration
from distill.runs.run_store import RunPaths

if TYPE_CHECKING:
    import distill.launch.sites
    import distill.plans.rounds
    import distill.spec.specfile

ROUNDS, DRIFT = "Rounds", "Options that limit error accumulation"


def reflow(
    spec: SpecArgument,
    changes: Changes = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", max=100, help="Number of rounds; by default 1.", rich_help_panel=ROUNDS)
    ] = None,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="After the last round, generate pairs with its flow and run SPEC's one-step distillation on them.",
            rich_help_panel=ROUNDS,
        ),
    ] = False,
    forward: Annotated[
        float | None,
        typer.Option(
            "--forward",
            metavar="FRACTION",
            help="Fraction of each batch, like 0.2, that consists of real data and the noise that the teacher's ODE "
            "maps it to.",
            rich_help_panel=DRIFT,
        ),
    ] = None,
    data_weight: Annotated[
        float | None,
        typer.Option(
            "--data-weight",
            metavar="WEIGHT",
            help="Weight of a flow-matching loss on real data, like 0.1; sets the recipe's option data_weight.",
            rich_help_panel=DRIFT,
        ),
    ] = None,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="Submit to Slurm, as `distill submit` does, with the spec's launch.slurm.",
            rich_help_panel=jobs.JOB,
        ),
    ] = False,
    nodes: jobs.NodesOption = None,
    gpus_per_node: jobs.GpusOption = None,
    partition: jobs.PartitionOption = None,
    account: jobs.AccountOption = None,
    qos: jobs.QosOption = None,
    time: jobs.TimeOption = None,
    container: jobs.ContainerOption = None,
    pairs_jobs: jobs.PairsJobsOption = None,
    one_job: jobs.OneJobOption = False,
    site: jobs.SiteOption = None,
    code: jobs.CodeOption = "run",
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; by default the spec's.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume an existing run. SPEC can be the run's name or folder, or the spec it was started from.",
        ),
    ] = False,
    procs: Annotated[
        int | None,
        typer.Option("--procs", min=1, help="Processes per node that train together; sets launch.procs."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and an estimate of their cost; write nothing.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Straighten a flow in rounds: generate pairs, train on them, and use the student as the teacher of the next round;
    with --distill, end with one-step distillation.

    SPEC describes one round: a pairs stage, a train stage on its pairs, and optionally a one-step distillation and an
    evaluation, like the preset digits. Stage X becomes X-1, X-2, ... in rounds 1, 2, ... A change of stages.X applies
    to all rounds, a change of stages.X-2 to round 2.
    """
    jobs.check_code(code)
    asked = jobs.JobOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        procs_per_node=procs,
        partition=partition,
        account=account,
        qos=qos,
        time=time,
        container=container,
        pairs_jobs=pairs_jobs,
        one_job=one_job,
    )
    if not slurm:
        _refuse_without_slurm(asked, site, code)
    if dry_run and resume:
        raise InputError("--dry-run describes a new run and cannot be combined with --resume; remove --resume")
    from distill.plans.rounds import RoundsPlan

    folder, changes = store_path(store), [*asked.changes(), *(changes or [])]
    given = {"--rounds": rounds, "--distill": distill or None, "--forward": forward, "--data-weight": data_weight}
    shaping = [option for option, value in given.items() if value is not None]
    find = _Find(RoundsPlan(1 if rounds is None else rounds, distill, forward, data_weight))
    if dry_run:
        _dry_run(folder, find(spec, changes, name), jobs.found_site(site) if slurm else None)
    elif resume:
        is_run = start.is_run(folder, spec)
        if is_run and shaping and not start.is_spec(spec):
            raise InputError(f"{shaping[0]} has no effect when run '{spec}' is resumed; leave it out")
        if is_run and not shaping:
            run, source = start.find_again(folder, spec, changes, name)
        else:
            run, source = start.again(folder, find(spec, changes, name))
        if slurm:
            jobs.submit_again(folder, run, source, jobs.found_site(site), code)
        else:
            work.execute(*start.resume(run, source))
    else:
        source = find(spec, changes, name)
        if slurm:
            jobs.submit_new(folder, source, jobs.found_site(site), code, force=False)
        else:
            work.execute(start.begin(folder, source), source.spec, fresh=True)


def _refuse_without_slurm(asked: jobs.JobOptions, site: Path | None, code: str) -> None:
    fields = {**asdict(asked), "procs_per_node": None, "site": site, "code": None if code == "run" else code}
    for field, value in fields.items():
        if value is not None and value is not False:
            raise InputError(f"--{field.replace('_', '-')} has no effect without --slurm; leave it out, or add --slurm")


@dataclass(frozen=True)
class _Find:
    """Finds the spec of one round, and expands it to all rounds."""

    plan: "distill.plans.rounds.RoundsPlan"

    def __call__(self, given: str, changes: Sequence[str], name: str | None) -> "distill.spec.specfile.SpecSource":
        from distill.core import yamltext
        from distill.plans import rounds
        from distill.spec import checks, specfile

        path, label = start.locate(given)
        content = yamltext.parse(yamltext.read(path), label)
        stages = content.get("stages") if isinstance(content, dict) else None
        own = [str(stage) for stage in stages] if isinstance(stages, dict) else []
        early, late = rounds.split(changes, own)
        source = specfile.load(path, early, name=name, source=label)
        spec = rounds.expand(checks.check(source.spec, source.base), self.plan)
        return replace(source, spec=rounds.changed(spec, late, own, label))


def _dry_run(
    folder: Path, source: "distill.spec.specfile.SpecSource", site: "distill.launch.sites.SiteSource | None"
) -> None:
    """Print the stages of the run with an estimate of their time and disk use, and its jobs if on a cluster."""
    from distill.execution import forecast
    from distill.launch import queue
    from distill.plans import planning

    if site is not None:
        queue.check_container(source.spec, site)
    ready = start.checked(source, here=site is None)
    spec = ready.resolved.spec
    run = RunPaths(folder.absolute() / spec.name)
    costs = forecast.forecast(ready, here=site is None)
    rows = []
    for step in planning.steps(ready.resolved):
        cost = costs.get(step.name)  # None: its networks are not known yet
        about = ["-", "-"] if cost is None else [f"about {duration(cost.seconds)}", human(cost.bytes)]
        rows.append([step.name, step.what, step.work, ", ".join(step.needs), *about])
    taken = (
        "  (a run with this name already exists; use --name OTHER for a new one, or --resume)"
        if run.root.exists()
        else ""
    )
    say(f"run {spec.name}, seed {spec.seed}, spec {spec.digest()[:12]}\n")
    columns = ["stage", "what", "work", "needs", "time", "disk"]
    print_table(columns, rows, right=columns[-2:])
    total, size = sum(cost.seconds for cost in costs.values()), sum(cost.bytes for cost in costs.values())
    say(f"total time if the stages run one after the other: about {duration(total)}, estimated from the speed here")
    say(f"writes {human(size)} to {near(run.root)}{taken}; {human(space.free(folder))} free")
    if site is not None:
        planned = queue.plans(run, spec, list(spec.stages))
        rows = [plan.described(spec.launch) for plan in planned]
        print_table(["job", "stages", "nodes x processes", "waits for"], rows)
