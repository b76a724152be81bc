"""`distill plan --gpus`: what a run needs of given GPUs, how long it takes there, and how to launch it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli import start
from distill.cli.common import print_json, print_table
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say, say_error
from distill.core.space import human
from distill.core.text import short, suggest, whole_number
from distill.plans import device_kinds, facts
from distill.plans.costs import ASSUMED, HOUR, Assumptions, Machines, calibrated
from distill.spec import checks

if TYPE_CHECKING:
    import distill.spec.specfile
    from distill.execution.layouts import FittingLayout, TrainingJob
    from distill.execution.run_costs import RunCosts
    from distill.spec.model import LaunchSpec

MOST_NODES, SHOWN = 100_000, 6
DIGITS = 3  # of numbers that are shown
SHORTEST = 0.02  # seconds of a step, below which starting kernels takes longer than what they compute

GpusToPlan = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="NxKIND",
        help="GPUs of a node, like 8xh100, or 8x80GB: print what trainings need of them, and how long they take.",
    ),
]
NodesToPlan = Annotated[
    str | None, typer.Option("--nodes", metavar="N|A..B", help="With --gpus: the number of nodes; by default 1.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="With --gpus: take the network of this published model, without its weights and without data, in place of "
        f"the spec's teacher: {', '.join(facts.names())}.",
    ),
]
UtilisationOption = Annotated[
    float | None,
    typer.Option(
        "--utilisation",
        min=0.001,
        max=1,
        help=f"With --gpus: share of the peak speed that is reached; by default {ASSUMED.utilisation:g}.",
    ),
]
MeasuredOption = Annotated[
    str | None,
    typer.Option(
        "--measured",
        metavar="STAGE=SECONDS",
        help="With --gpus: the measured time of a step of a train stage, on such GPUs with the spec's section launch; "
        "replaces --utilisation.",
    ),
]


@dataclass(frozen=True)
class GpuOptions:
    """The options of a plan for GPUs, as they are given."""

    gpus: str | None
    nodes: str | None
    model: str | None
    utilisation: float | None
    measured: str | None

    def refuse_without_gpus(self) -> None:
        """InputError if an option is given that has no effect without --gpus."""
        if self.gpus is None and (given := [f"--{name}" for name, value in asdict(self).items() if value is not None]):
            raise InputError(f"{', '.join(given)}: no effect without --gpus; add --gpus, or leave it out")


@dataclass(frozen=True)
class PlannedRun:
    """A run on given machines."""

    machines: Machines
    layouts: "Sequence[FittingLayout]"
    """those that fit, the fastest first"""


def show(source: "distill.spec.specfile.SpecSource", options: GpuOptions, store: Path, *, json: bool) -> None:
    """Print the plan. RunError and InputError as the checks of a spec."""
    assert options.gpus is not None
    per_node, kind = device_kinds.gpus_of(options.gpus)
    counts = _dividing(source, node_counts(options.nodes or "1"), per_node)
    model = None if options.model is None else facts.facts_of(options.model)
    if options.utilisation is not None and options.measured is not None:
        raise InputError("--utilisation and --measured both say how fast the GPUs are; leave one out")
    stage, seconds = _measured(options.measured, source)
    with importing():
        from distill.execution import layouts
        from distill.execution.run_costs import RunCounter

    counter = RunCounter(say_error)
    if model is None:
        ready = start.checked(source, here=False, store=store, visit=counter)
        found = counter.with_sampling(ready.resolved, ready.teacher)
    else:
        found = counter.of_model(checks.check(source.spec, source.base), model)
    if not found.trainings:
        raise InputError("--gpus: no train stage of this spec can be counted before it runs")
    assumed = ASSUMED if options.utilisation is None else replace(ASSUMED, utilisation=options.utilisation)
    if stage is not None and stage not in found.trainings:
        raise InputError(f"--measured: what stage '{stage}' computes cannot be counted; use --utilisation")
    if stage is not None:
        launch, job = source.spec.launch, found.trainings[stage]
        try:
            assumed = calibrated(
                layouts.work_of(job, launch), Machines(kind, launch.nodes, launch.procs), job.precision, seconds
            )
        except ValueError as error:
            raise InputError(f"--measured: {error}; measure it on such GPUs") from None
    planned = [
        PlannedRun(each, layouts.fitting_layouts(found.trainings, each, assumed, _allowed(source)))
        for each in (Machines(kind, nodes, per_node) for nodes in counts)
    ]
    title = "the spec's teacher" if model is None else model.title
    if json:
        print_json(as_json(title, found, planned, assumed))
    else:
        _say(source.spec.name, title, found, planned, assumed)


def node_counts(text: str) -> list[int]:
    """The numbers of nodes that are given like 4 or 1..128: of a range its ends and the powers of two in between."""
    first, _, last = text.partition("..")
    ends = [whole_number(each) for each in (first, last or first)]
    low, high = ends
    if low is None or high is None or not 1 <= low <= high <= MOST_NODES or text.endswith(".."):
        raise InputError(f"--nodes {short(text)}: valid: a number from 1 to {MOST_NODES:,}, or a range like 1..128")
    return sorted({low, high, *(2**power for power in range(17) if low <= 2**power <= high)})


def _dividing(source: "distill.spec.specfile.SpecSource", counts: list[int], per_node: int) -> list[int]:
    """The numbers of nodes among whose GPUs all batches can be divided evenly. InputError if there is none."""
    from distill.spec.model import TrainStage

    batches = {name: each.batch_size for name, each in source.spec.stages.items() if isinstance(each, TrainStage)}
    if not batches:
        raise InputError("--gpus: no stage of this spec trains; leave it out")
    found = [count for count in counts if all(size % (count * per_node) == 0 for size in batches.values())]
    if not found:
        sizes = ", ".join(f"{size:,} of stage '{name}'" for name, size in batches.items())
        raise InputError(
            f"--gpus, --nodes: the batches ({sizes}) cannot be divided evenly among {counts[0] * per_node:,} GPUs or "
            "more; change batch_size, or the number of GPUs"
        )
    if left := [str(count) for count in counts if count not in found]:
        say_error(f"left out, as the batches cannot be divided evenly among their GPUs: {', '.join(left)} nodes")
    return found


def options_of(launch: "LaunchSpec") -> dict[str, Any]:
    """What a section `launch` sets, besides the number of processes."""
    return launch.model_dump(exclude_defaults=True, exclude={"nodes", "procs"})


def hours(found: "FittingLayout") -> float:
    """GPU-hours of all trainings."""
    return found.seconds * found.launch.world_size / HOUR


def as_json(title: str, found: "RunCosts", planned: Sequence[PlannedRun], assumed: Assumptions) -> dict[str, Any]:
    """The plan as JSON-serialisable data."""
    return {
        "model": title,
        "gpu": asdict(planned[0].machines.kind),
        "assumed": asdict(assumed),
        "trainings": {
            name: {
                "trained": sum(map(sum, job.costs.trained.values())),
                "frozen_bytes": job.costs.frozen,
                "operations": {_way(again): each.operations for again, each in job.costs.steps.items()},
                "activations": {_way(again): asdict(each.activations) for again, each in job.costs.steps.items()},
            }
            for name, job in found.trainings.items()
        },
        "sampling_hours": [_sampling_hours(found, each.machines, assumed) for each in planned],
        "plans": [
            {
                "nodes": each.machines.nodes,
                "gpus_per_node": each.machines.per_node,
                "layouts": [
                    {
                        "launch": options_of(layout.launch),
                        "gpu_hours": hours(layout),
                        "trainings": {
                            name: {
                                "memory": dict(one.memory),
                                "step": asdict(one.step),
                                "seconds": one.seconds,
                                "images_per_second": found.trainings[name].batch_size / one.step.total,
                            }
                            for name, one in layout.trainings.items()
                        },
                    }
                    for layout in each.layouts
                ],
            }
            for each in planned
        ],
    }


def _say(run: str, title: str, found: "RunCosts", planned: Sequence[PlannedRun], assumed: Assumptions) -> None:
    from distill.execution.layouts import RESERVE
    from distill.training.counting import ATTENTION

    kind = planned[0].machines.kind
    say(f"plan of run '{run}' with {title}, on {kind.title}")
    _say_costs(found.trainings)
    several, best = len(planned) > 1, [each.layouts[0] for each in planned if each.layouts]
    for each in planned:
        if not each.layouts:
            count = each.machines.nodes
            say(f"nothing fits on {count} node{'s' if count > 1 else ''} with {each.machines.per_node} GPUs each")
    if best:
        shown = best if several else planned[0].layouts[:SHOWN]
        _say_layouts(found.trainings, shown)
        chosen = min(best, key=lambda each: float(f"{hours(each):.2g}"))
        _say_memory(chosen)
        _say_sampling(found, next(each.machines for each in planned if each.layouts[:1] == [chosen]), assumed)
        say("the section launch of the " + ("cheapest of these:" if several else "first of these:"))
        say(f"launch:\n  nodes: {chosen.launch.nodes}\n  procs: {chosen.launch.procs}")
        for name, value in options_of(chosen.launch).items():
            say(f"  {name}: {str(value).lower()}")
    say(
        f"\nassumed: {assumed.utilisation:.1%} of the peak speed in computing, {assumed.bandwidth:.0%} of each "
        f"bandwidth, communication in {assumed.hidden:.0%} of the time of computing; {RESERVE:.0%} of the memory kept "
        f"free; attention as in the kernel '{ATTENTION}'; without autoencoder, text encoders, saving and loading"
    )
    say(f"speeds of the GPUs: {kind.source}")
    if any(one.step.total < SHORTEST for each in best for one in each.trainings.values()):
        say(
            f"steps below {SHORTEST:g} s take longer, because the CPU cannot start small kernels as fast as a "
            "GPU computes them; this is not predicted"
        )


def _say_costs(trainings: "Mapping[str, TrainingJob]") -> None:
    rows = []
    for name, job in trainings.items():
        costs = job.costs
        updates = ", ".join(f"{times} of {each}" for each, times in costs.updates.items())
        for again, step in costs.steps.items():
            kept = f"{human(step.activations.fixed)} + {human(step.activations.each)}"
            rows.append([name, _way(again), updates, f"{step.operations / 1e12:,.3g}", kept])
    columns = ["for each sample", "activations are", "updates", "10^12 operations", "activations, + each sample"]
    print_table(columns, rows, right=columns[3:])


def _way(again: bool) -> str:
    return "recomputed" if again else "kept"


def _say_layouts(trainings: "Mapping[str, TrainingJob]", shown: "Sequence[FittingLayout]") -> None:
    rows = []
    for layout in shown:
        options = ", ".join(f"{name}: {str(value).lower()}" for name, value in options_of(layout.launch).items())
        for name, one in layout.trainings.items():
            speed = trainings[name].batch_size / one.step.total
            rows.append(
                [
                    f"{layout.launch.world_size:,}", options or "defaults", name, human(one.needed),
                    _number(one.step.total), _number(speed), _number(one.seconds / HOUR),
                    _number(one.seconds * layout.launch.world_size / HOUR),
                ]
            )  # fmt: skip
    columns = ["GPUs", "launch", "stage", "memory", "s/step", "images/s", "hours", "GPU-hours"]
    print_table(columns, rows, right=[columns[0], *columns[3:]])


def _say_memory(layout: "FittingLayout") -> None:
    kinds = list(dict.fromkeys(kind for each in layout.trainings.values() for kind in each.memory))
    rows = [
        [name, *(human(each.memory[kind]) if kind in each.memory else "-" for kind in kinds)]
        for name, each in layout.trainings.items()
    ]
    print_table(["memory of a GPU", *kinds], rows, right=kinds)


def _sampling_hours(found: "RunCosts", machines: Machines, assumed: Assumptions) -> dict[str, float]:
    speed = machines.kind.peaks["bf16"] * assumed.utilisation * machines.procs
    return {name: operations / speed / HOUR for name, operations in found.sampling.items()}


def _say_sampling(found: "RunCosts", machines: Machines, assumed: Assumptions) -> None:
    taken = _sampling_hours(found, machines, assumed)
    rows = [[name, _number(each), _number(each * machines.procs)] for name, each in taken.items()]
    if rows:
        columns = ["pairs, evaluations", "hours in bf16", "GPU-hours"]
        print_table(columns, rows, right=columns[1:])


def _number(value: float) -> str:
    return f"{float(f'{value:.{DIGITS}g}'):,g}"


def _measured(text: str | None, source: "distill.spec.specfile.SpecSource") -> tuple[str | None, float]:
    """(stage, seconds) of --measured. InputError if it is malformed, or there is no such train stage."""
    from distill.spec.model import TrainStage

    if text is None:
        return None, 0.0
    name, _, number = text.partition("=")
    trained = [key for key, each in source.spec.stages.items() if isinstance(each, TrainStage)]
    try:
        seconds = float(number)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InputError(f"--measured {short(text)}: valid: a train stage and seconds, like {trained[0]}=1.5")
    if name not in trained:
        raise InputError(f"--measured {short(text)}: no train stage '{short(name)}'; {suggest(name, trained)}")
    return name, seconds


def _allowed(source: "distill.spec.specfile.SpecSource") -> "Callable[[LaunchSpec], bool]":
    """Whether the spec may have a section `launch`."""

    def allowed(launch: "LaunchSpec") -> bool:
        try:
            checks.check(source.spec.model_copy(update={"launch": launch}), source.base)
        except InputError:
            return False
        return True

    return allowed
