"""The hidden commands `distill stage` and `distill job`, which launchers start on this machine or on cluster nodes."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.common import near, read_share
from distill.core.collection import importing
from distill.core.errors import EXIT_INPUT, InputError, Stopped
from distill.runs.run_store import RunPaths, append_event, find_run

if TYPE_CHECKING:
    import distill.core.stop
    import distill.spec.model

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
StageNames = Annotated[list[str], typer.Argument(metavar="STAGE...")]
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # together with WORLD_SIZE
LAUNCHERS = "`distill run`, torchrun or `accelerate launch --multi_gpu`"
PartOption = Annotated[
    str | None, typer.Option("--part", metavar="I/N", help="Pairs or cache: only shards I, I + N, ...")
]


def stage(
    run: RunFolder,
    names: StageNames,
    lifeline: Annotated[int | None, typer.Option(help="A pipe whose other end is held by the parent process.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Record the memory that training uses.")] = False,
    part: PartOption = None,
) -> None:
    """Compute stages of a run in this process; with RANK and WORLD_SIZE set, as one of several that work together.

    torchrun and `accelerate launch --multi_gpu` set these variables too. slurm/README.md says how they treat signals.
    """
    compute(run, names, None if part is None else read_share("--part", part, 0), lifeline, measure)


def compute(
    run: Path,
    names: list[str],
    part: tuple[int, int] | None = None,
    lifeline: int | None = None,
    measure: bool = False,
) -> None:
    """Compute stages of a run in this process; see `stage`.

    part: (i, n): of a pairs or cache stage, only the shards i, i + n, ...
    """
    from distill.core import versions
    from distill.core.owners import Owner
    from distill.core.stop import StopRequest
    from distill.launch import environment, local, tasks
    from distill.runs import claims, machine
    from distill.spec.model import TrainStage

    paths, spec = _found(run, names)
    if part is None:
        _refuse_other_world(spec, names)
    if any(isinstance(spec.stages[name], TrainStage) for name in names):
        versions.require_same_draws(machine.load(paths).draws, f"run '{paths.name}'")
    for name, value in environment.thread_variables(spec.launch.threads or environment.threads()).items():
        os.environ.setdefault(name, value)
    with _saying_how_to_resume(paths), StopRequest() as stop:
        if lifeline is not None:
            local.watch(lifeline)
        if int(os.environ.get("RANK", "0")) > 0:  # only rank 0 claims the run and writes its events
            _compute(paths, spec, names, stop, measure)
            return
        me = Owner.this(*tasks.identity()) if tasks.is_task() else Owner.this()
        note = partial(tasks.leave_word, EXIT_INPUT) if tasks.is_task() else lambda message: None
        with claims.claim(paths, os.environ.get(tasks.UNIT), me, note):
            if part is not None:
                _compute_part(paths, spec, names, stop, part)
                return
            with _in_events(paths, names, measure):
                _compute(paths, spec, names, stop, measure)


def job(
    run: RunFolder,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...")],
    stages: Annotated[list[str], typer.Option("--stage")],
    part: PartOption = None,
) -> None:
    """Run the main process of a Slurm job. COMMAND, followed by the run and a stage, starts the stage's processes."""
    from distill.launch import batch_job, tasks

    tasks.require("job")
    paths, _ = _found(run, stages)
    code = batch_job.execute(paths, stages, None if part is None else read_share("--part", part, 0), command)
    if code:
        raise typer.Exit(code)


def _found(run: Path, names: Sequence[str]) -> tuple[RunPaths, "distill.spec.model.RunSpec"]:
    from distill.runs import todo

    paths = find_run(run.parent, str(run))
    spec = todo.load_spec(paths)
    unknown = [name for name in names if name not in spec.stages]
    if unknown:
        raise InputError(f"run '{paths.name}' has no stage '{unknown[0]}'; valid: {', '.join(spec.stages)}")
    return paths, spec


def _refuse_other_world(spec: "distill.spec.model.RunSpec", names: Sequence[str]) -> None:
    """Refuse another number of processes than the spec's."""
    launch, size = spec.launch, _world_size()
    wanted, stages = launch.world_size, ", ".join(f"'{name}'" for name in names)
    if (size or 1) == wanted:
        return
    if size is None:
        raise InputError(
            f"stage {stages} must be computed by {wanted} processes (launch.nodes={launch.nodes}, "
            f"launch.procs={launch.procs}), but WORLD_SIZE is not set; start them with {LAUNCHERS}"
        )
    raise InputError(
        f"WORLD_SIZE={size}, but stage {stages} must be computed by {wanted} process{'es' if wanted > 1 else ''} "
        f"(launch.nodes={launch.nodes}, launch.procs={launch.procs}); start this number, or change launch, e.g. "
        f"distill run RUN --resume launch.procs={size}"
    )


def _world_size() -> int | None:
    """The number of processes that a launcher started; None without a launcher. InputError if it did not say all."""
    from distill.launch import local

    given = [name for name in local.RANK_VARIABLES if name in os.environ]
    if given and "WORLD_SIZE" not in given:
        # `accelerate launch --cpu` with several processes sets only MASTER_ADDR and MASTER_PORT: each would train alone
        raise InputError(
            f"the environment sets {', '.join(given)}, but not WORLD_SIZE; start the processes with {LAUNCHERS}, or, "
            f"to compute in one process, run: unset {' '.join(given)}"
        )
    if not given:
        return None
    for name in NEEDED:
        if name not in given:
            raise InputError(f"WORLD_SIZE is set, but {name} is not; start the processes with {LAUNCHERS}")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        value = os.environ[name]
        if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) == 0):
            raise InputError(f"{name}={value}: must be a whole number; start the processes with {LAUNCHERS}")
    return int(os.environ["WORLD_SIZE"])


@contextmanager
def _saying_how_to_resume(paths: RunPaths) -> Iterator[None]:
    """Context manager: a stop says how to resume, but not in ranks above 0 (rank 0 says it), nor in jobs of Slurm."""
    from distill.launch import tasks

    try:
        yield
    except Stopped as stopped:
        silent = not stopped.resume or tasks.is_task() or int(os.environ.get("RANK", "0")) > 0
        raise Stopped(str(stopped), "" if silent else f"resume with: distill run {near(paths.root)} --resume") from None


@contextmanager
def _in_events(paths: RunPaths, names: list[str], measure: bool) -> Iterator[None]:
    """Context manager that records in the run's events that this process began, and how it ended."""
    from distill.launch import ranks

    append_event(paths, "started", pid=os.getpid(), host=platform.node(), stages=names)
    outcome, message = "failed", ""
    try:
        yield
        outcome = "finished"
    except Stopped as stopped:
        outcome, message = "stopped", str(stopped)
        if measure:
            raise Stopped(f"stopped; {ranks.MEASURED}", "") from None
        raise
    except KeyboardInterrupt:
        outcome, message = "stopped", "interrupted without saving"
        raise
    finally:
        error = sys.exception()
        append_event(paths, outcome, message=message or ("" if error is None else _brief(error)))


def _compute(
    paths: RunPaths,
    spec: "distill.spec.model.RunSpec",
    names: list[str],
    stop: "distill.core.stop.StopRequest",
    measure: bool,
) -> None:
    with importing():
        from distill.execution import devices, stages  # imports torch

    if "WORLD_SIZE" not in os.environ:
        stop.raise_if_requested("nothing (no stage had started yet)")
        stages.run(paths, spec, names, stop, measure=measure)
    else:  # no stop before all ranks have joined, since the others would wait for this one
        from distill.training.world import World

        def lost(message: str) -> None:
            if int(os.environ["RANK"]) == 0:
                append_event(paths, "failed", message=message)

        device = devices.place(spec.launch, spec.launch.procs, spec.numerics)
        os.environ.setdefault("DS_ACCELERATOR", device.type)
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else NCCL kills the process before it reports
        world = World.join(device, spec.launch.collective_minutes, int(os.environ["LOCAL_RANK"]), lost)
        stages.run(paths, spec, names, stop, world, measure=measure)


def _compute_part(
    paths: RunPaths,
    spec: "distill.spec.model.RunSpec",
    names: list[str],
    stop: "distill.core.stop.StopRequest",
    part: tuple[int, int],
) -> None:
    with importing():
        from distill.execution import stages

    stages.run(paths, spec, names, stop, part=part)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
