"""What `distill submit` says about memory and time before jobs are queued, and which trainings it refuses."""

from typing import TYPE_CHECKING

from distill.cli.common import print_table
from distill.core.errors import InputError
from distill.core.printing import say, say_error, warn
from distill.core.space import human
from distill.plans import device_kinds
from distill.plans.costs import HOUR, Machines

if TYPE_CHECKING:
    import distill.spec.specfile
    from distill.execution.preflight import Ready
    from distill.execution.run_costs import RunCounter
    from distill.launch.sites import SiteSource


def counter(source: "distill.spec.specfile.SpecSource", site: "SiteSource") -> "RunCounter | None":
    """What counts the trainings of a spec; None if the site does not state its GPUs, or the spec asks for none."""
    launch = source.spec.launch
    if site.site.gpus is None or not launch.slurm.gpus_per_node:
        return None
    from distill.execution.run_costs import RunCounter
    from distill.spec import checks

    return RunCounter(checks.check(source.spec, source.base), say_error, (launch.activation_checkpointing,))


def report(ready: "Ready", counted: "RunCounter | None", site: "SiteSource", *, force: bool) -> None:
    """Print the predicted memory of each training, and its time if the site states its GPUs.

    InputError if a training cannot fit into their memory, unless `force`.
    """
    if counted is None:
        _say_without_activations(ready)
        return
    if not counted.found.trainings:
        return
    from distill.execution.layouts import available, layout_of

    assert site.site.gpus is not None
    launch, kind = ready.resolved.spec.launch, device_kinds.kind_or_memory(site.site.gpus)
    machines = Machines(kind, launch.nodes, launch.procs)
    layout = layout_of(counted.found.trainings, machines, launch)
    rows = [
        [
            name, human(each.needed), human(each.memory["activations"]), f"{each.seconds / HOUR:.3g}",
            f"{each.seconds * machines.procs / HOUR:.3g}",
        ]
        for name, each in layout.trainings.items()
    ]  # fmt: skip
    columns = ["predicted", "memory of a GPU", "of it activations", "hours", "GPU-hours"]
    print_table(columns, rows, right=columns[1:])
    say(f"for {machines.procs} x {kind.title}, as {site.path} states; `distill plan --gpus` says what is assumed")
    for name, each in layout.trainings.items():
        what = f"stage '{name}' needs about {human(each.needed)} on each GPU"
        if each.needed > kind.memory and not force:
            raise InputError(
                f"{what}, which has {human(kind.memory)} (gpus: {site.site.gpus} in {site.path}); `distill plan SPEC "
                f"--gpus {machines.per_node}x{site.site.gpus}` finds settings of launch that fit, and `distill submit "
                "--force` submits it anyway"
            )
        if each.needed > available(machines):
            warn(f"{what}, which has {human(kind.memory)}: it may not fit")


def _say_without_activations(ready: "Ready") -> None:
    """Print the predicted memory of each training; activations are not included."""
    from distill.execution.estimate import estimate

    found = estimate(ready)
    kinds = list(dict.fromkeys(kind for each in found.values() for kind in each))
    rows = [
        [name, *(human(each[kind]) if kind in each else "-" for kind in kinds), human(sum(each.values()))]
        for name, each in found.items()
    ]
    if rows:
        columns = ["memory per process", *kinds, "total"]
        print_table(columns, rows, right=columns[1:])
        say(
            "activations are not included; `distill plan SPEC --measure` measures them in two real steps; they are "
            "predicted if the site file states its gpus"
        )
