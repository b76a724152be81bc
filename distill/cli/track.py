"""`distill track`: passes what happens in a run on to TensorBoard, W&B or another tracker, while it trains or later."""

import shlex
import time
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import StoreOption, near, store_path
from distill.cli.runs import RunArgument
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.runs.run_store import RunPaths, find_run

if TYPE_CHECKING:
    import distill.reports.tracking

POLL = 2.0  # seconds between two reads of the events
MAX_SAMPLES = 256


def track(
    run: RunArgument,
    to: Annotated[
        str, typer.Option("--to", help="tensorboard, wandb, or the name of an installed tracker.")
    ] = "tensorboard",
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until all stages are done, or until Ctrl-C.")
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_SAMPLES,
            help="Also draw so many samples of each checkpoint that exists, always from the same noise.",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to draw samples: auto, cpu or cuda; by default cpu.")
    ] = None,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
    store: StoreOption = None,
) -> None:
    """Show a run's losses, results and samples in TensorBoard or W&B, while it trains or when it is done.

    It reads the run in a process of its own, so that it cannot disturb the training. It always begins with the first
    event, and replaces what it wrote before to RUN/tracking.
    """
    from distill.core.stop import StopRequest
    from distill.launch import local
    from distill.reports import tracking
    from distill.trackers import find_tracker

    if device is not None and samples is None:
        raise InputError(f"--device {device}: no effect without --samples; remove it")
    paths = find_run(store_path(store), run)
    view = find_tracker(to).view
    draw = None if samples is None else _draw(paths, samples, device or "cpu")
    with StopRequest() as stop:
        if lifeline is not None:
            local.watch(lifeline)
        with tracking.opened(paths, to, draw) as feed:
            count = feed.more()
            while follow and stop.signal is None and not _is_done(paths):
                time.sleep(POLL)
                count += feed.more()
            count += feed.more() if follow else 0
    folder = shlex.quote(near(paths.tracking(to)))
    say(f"passed {count:,} event{'' if count == 1 else 's'} of run '{paths.name}' on to {to}")
    say(f"to look at it: {view.replace('{folder}', folder)}")


def _draw(paths: RunPaths, count: int, device: str) -> "distill.reports.tracking.DrawSamples":
    from distill.cli import arguments
    from distill.runs import todo

    with importing():
        from distill.execution import checkpoint_samples

    spec = todo.load_spec(paths)
    return partial(checkpoint_samples.draw, paths, spec, count=count, device=arguments.device(device))


def _is_done(paths: RunPaths) -> bool:
    """Whether all stages of a run are done, and no process executes it."""
    from distill.reports import run_status

    return run_status.read(paths, brief=True).state == "done"
