"""What `distill submit` says about memory and time before jobs are queued, and which trainings it refuses."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distill.cli import start
from distill.cli.common import print_table
from distill.core.errors import InputError
from distill.core.printing import say, say_error, warn
from distill.core.space import human
from distill.plans import device_kinds
from distill.plans.costs import HOUR

if TYPE_CHECKING:
    import distill.spec.specfile
    from distill.execution.layouts import TrainingJob
    from distill.execution.preflight import Ready
    from distill.launch.sites import SiteSource
    from distill.spec.model import LaunchSpec


def checked(
    source: "distill.spec.specfile.SpecSource", site: "SiteSource", store: Path, *, new: bool, force: bool
) -> "Ready":
    """Check a spec that will run on a cluster. If a run will be created (`new`), print the predicted memory of each
    training, and its time if the site states its GPUs.

    InputError if a check fails, or if a training cannot fit into the memory of these GPUs, unless `force`. store, new:
    see `start.checked`.
    """
    launch = source.spec.launch
    counter = None
    if site.site.gpus is not None and launch.slurm.gpus_per_node:
        from distill.execution.run_costs import RunCounter

        counter = RunCounter(say_error, (launch.activation_checkpointing,))
    ready = start.checked(source, here=False, store=store, new=new, visit=counter)
    if counter is None and new:
        _say_without_activations(ready)
    elif counter is not None and counter.found.trainings:
        _report(counter.found.trainings, launch, site, shown=new, force=force)
    return ready


def _report(
    trainings: "Mapping[str, TrainingJob]", launch: "LaunchSpec", site: "SiteSource", *, shown: bool, force: bool
) -> None:
    from distill.execution.layouts import available, layout_of

    assert site.site.gpus is not None
    kind, procs = device_kinds.kind_or_memory(site.site.gpus), launch.world_size
    layout = layout_of(trainings, kind, launch)
    rows = [
        [
            name, human(each.needed), human(each.memory["activations"]), f"{each.seconds / HOUR:.3g}",
            f"{each.seconds * procs / HOUR:.3g}",
        ]
        for name, each in layout.trainings.items()
    ]  # fmt: skip
    columns = ["predicted", "memory of a GPU", "of it activations", "hours", "GPU-hours"]
    if shown:
        print_table(columns, rows, right=columns[1:])
        say(f"for {procs} x {kind.title}, as {site.path} states; `distill plan --gpus` says what is assumed")
    for name, each in layout.trainings.items():
        what = f"stage '{name}' needs about {human(each.needed)} on each GPU"
        if each.needed > kind.memory and not force:
            raise InputError(
                f"{what}, which has {human(kind.memory)} (gpus: {site.site.gpus} in {site.path}); `distill plan SPEC "
                f"--gpus {launch.procs}x{site.site.gpus}` finds settings of launch that fit, and `distill submit "
                "--force` submits it anyway"
            )
        if each.needed > available(kind):
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
