"""`distill pairs`: solves a teacher's paths and stores them. Several processes can share the work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import start
from distill.cli.common import StoreOption, check_out, near, read_share, store_path
from distill.cli.stage import compute
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import suggest
from distill.runs.run_store import RunPaths
from distill.solvers import solver_names
from distill.spec import kinds
from distill.spec.model import OF_DATA

if TYPE_CHECKING:
    import distill.spec.model


def pairs(
    given: Annotated[
        str,
        typer.Argument(metavar="TEACHER|SPEC", help="A teacher as for `distill eval`; or a spec, a preset, or a run."),
    ],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes of the spec.")] = None,
    shards: Annotated[
        str | None, typer.Option(metavar="I/N", help="Make only shards I, I + N, ...: this is process I of N.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write no pairs; solve 1,000 pairs at N and 2 N steps and say whether N is enough."
        ),
    ] = False,
    stage: Annotated[
        str | None, typer.Option(help="With a SPEC: the pairs stage to make; may be left out if there is only one.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="With a SPEC: name of the run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With a TEACHER: folder for the pairs. An unfinished set in it is continued."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="With a TEACHER: number of pairs [10000].")] = None,
    paths: Annotated[str | None, typer.Option(help="backward, forward, segments, trajectories [backward].")] = None,
    times: Annotated[
        str | None, typer.Option(help="Times of the stored states (trajectories, segments), like 1,0.5,0.")
    ] = None,
    optimal_times: Annotated[
        int | None,
        typer.Option(
            help="Instead of --times, for trajectories: the number of steps; their times are chosen for the smallest "
            "error (see `distill schedule`)."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real data of forward paths and segments: digits, or YAML.")] = None,
    solver: Annotated[str | None, typer.Option(help=f"{kinds.either(solver_names())} [heun].")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps [16].")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 = none [1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise [0].", min=0, max=2**63 - 1)] = None,
    block: Annotated[int | None, typer.Option(help="Pairs solved at once [256].")] = None,
    shard: Annotated[int | None, typer.Option(help="Pairs per file, a multiple of --block [4096].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored type: float32, float16, bfloat16 or uint8 [float32].")
    ] = None,
    store_noise: Annotated[bool | None, typer.Option("--store-noise", help="Store the noise too.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
    store: StoreOption = None,
) -> None:
    """Solve a teacher's ODE and store the ends of its paths, in --out for a TEACHER, in the run for a SPEC.

    N processes, on any machines, can share the work with --shards 1/N ... N/N; the files are the same, byte for byte.
    """
    from distill.cli import arguments

    share = None if shards is None else read_share("--shards", shards, 1)
    options = {
        "count": count, "paths": paths, "solver": solver, "steps": steps, "block": block, "shard": shard,
        "guidance_scale": guidance_scale, "dtype": dtype, "store_noise": store_noise, "optimal_times": optimal_times,
        "times": None if times is None else arguments.fractions("--times", times),
    }  # fmt: skip
    options = {key: value for key, value in options.items() if value is not None}
    if check:
        _refuse({"shards": shards, "out": out}, "--check solves 1,000 pairs and stores none")
    if not arguments.is_yaml(given) and _is_spec(store_path(store), given):
        others = {**options, "out": out, "data": data, "seed": seed, "device": device}
        _refuse(others, "a SPEC sets them: write changes like stages.pairs.count=5000")
        _of_spec(store_path(store), given, changes or [], name, stage, share, check)
        return
    _refuse({"stage": stage, "name": name, "changes": changes}, f"'{given}' is a teacher, not a spec")
    if out is None and not check:
        raise InputError("--out is missing: the folder to write the pairs to")
    _of_teacher(store_path(store), given, options, out, data, seed or 0, device or "auto", share, check)


def _is_spec(store: Path, given: str) -> bool:
    named = Path(given).suffix in (".yaml", ".yml") or start.is_run(store, given)
    return named or (start.is_spec(given) and not Path(given).is_dir())


def _refuse(options: Mapping[str, object], why: str) -> None:
    found = [key.replace("_", "-") for key, value in options.items() if value not in (None, [])]
    if found:
        raise InputError(f"{', '.join(f'--{key}' for key in found)}: no effect here; {why}")


def _refuse_empty(share: tuple[int, int] | None, stage: "distill.spec.model.Stage") -> None:
    """Raise InputError for a part without shards."""
    from distill.spec import pairspec
    from distill.spec.model import PairsStage

    assert isinstance(stage, PairsStage)
    files = pairspec.Layout(stage.count, stage.shard).files
    if share is not None and share[0] >= files:
        raise InputError(
            f"--shards {share[0] + 1}/{share[1]}: the set has {files:,} file{'s' if files > 1 else ''}, so this "
            "part would be empty; give a smaller N, or a smaller shard"
        )


def _of_teacher(
    store: Path,
    given: str,
    options: Mapping[str, object],
    out: Path | None,
    data: str | None,
    seed: int,
    device: str,
    share: tuple[int, int] | None,
    check: bool,
) -> None:
    from distill.cli import arguments
    from distill.spec import pairspec
    from distill.spec.model import NoData, PairsStage

    stage = arguments.stage(PairsStage, {"kind": "pairs", "count": 10000, **options})
    for mistake in pairspec.mistakes(stage, ""):
        raise InputError(arguments.as_option(mistake))
    _refuse_empty(share, stage)
    if data is not None and stage.paths not in OF_DATA:
        raise InputError(f"--data: {stage.paths} paths begin with noise, so it has no effect; remove it")
    real = NoData(kind="none") if data is None else arguments.data(data)
    if out is not None:
        check_out(out)
    where = arguments.teacher(given, store)
    from distill import teachers
    from distill.core.stop import StopRequest
    from distill.data import load_data
    from distill.execution.sources import Solving, note_labels
    from distill.runs.progress import Progress
    from distill.students import step_times

    place = arguments.device(device)
    teacher, real_data = teachers.load_teacher(where, place), load_data(real, seed)
    stage = step_times.with_times(stage, teacher, store, place)
    if stage.paths in OF_DATA and real_data is None and teacher.exact_data is None:
        raise InputError(f"--data is missing: {stage.paths} paths begin with real data, e.g. --data digits")
    if stage.paths in OF_DATA and real_data is not None:
        note_labels(teacher, real_data)
    solving = Solving.of(teacher, stage, seed=seed, device=place, data=real_data, law=teacher)
    if check:
        say(solving.accuracy().describe())
        return
    assert out is not None
    with StopRequest() as stop, Progress("pairs", pairspec.size(stage, share), "pairs", None) as progress:
        solving.generate(out, progress, stop, share)
    which = "" if share is None else f" (part {share[0] + 1} of {share[1]})"
    say(f"{pairspec.size(stage, share):,} pairs of {teacher.description} in {near(out.absolute())}{which}")
    say(_told(out))


def _of_spec(
    store: Path,
    given: str,
    changes: list[str],
    name: str | None,
    stage: str | None,
    share: tuple[int, int] | None,
    check: bool,
) -> None:
    run, spec = _run(store, given, changes, name, make=not check)
    chosen = _stage(spec, stage)
    _refuse_empty(share, spec.stages[chosen])
    of = spec.stages[chosen].teacher
    if of is not None and not run.stage(of).done.exists():
        raise InputError(
            f"stage '{chosen}' solves the paths of the student of '{of}', which is not trained yet; "
            f"distill run {f'{near(run.root)} --resume' if run.root.exists() else given}"
        )
    if check:
        from distill.execution import devices, stages
        from distill.spec import resolved

        work = stages.Work(run, resolved.of_run(spec, run.root), chosen, devices.place(spec.launch))
        with stages.solving(work, indexed=False) as solving:
            say(solving.accuracy().describe())
        return
    from distill.launch import tasks

    if share is not None:
        os.environ[tasks.UNIT] = f"{chosen}.part-{share[0] + 1}-of-{share[1]}"
    compute(run.root, [chosen], share)
    folder = run.stage(chosen).pairs
    say(f"pairs of stage '{chosen}' in {near(folder)}")
    say(f"{_told(folder)}; the rest of the run: distill run {near(run.root)} --resume")


def _told(folder: Path) -> str:
    """A text that says how much of a set is complete, and how good it is."""
    from distill.pairs import manifest

    found = manifest.read(folder)
    assert found is not None
    if not found.done:
        made = {*found.shards, *manifest.records(folder, found.layout)[0]}
        return f"{len(made)} of {found.layout.files} shards are complete"
    said = [f"the set of {found.count:,} pairs is complete"]
    if found.rounding.error:
        said.append(f"storing it as {found.dtype} changed it by {found.rounding.relative:.2%} (RMS)")
    if found.whiteness:
        w = found.whiteness
        said.append(
            f"its noise has mean {w.mean:.3f}, variance {w.variance:.3f}, correlation of neighbours {w.correlation:.3f}"
        )
    return "; ".join(said)


def _run(
    store: Path, given: str, changes: list[str], name: str | None, *, make: bool
) -> tuple[RunPaths, "distill.spec.model.RunSpec"]:
    """(run, spec): an existing run, or a new one. Several processes may call this at once; the first creates the run.

    make: if False, the run is not created.
    """
    if not start.is_run(store, given):
        source = start.find(given, changes, name)
        paths = RunPaths(store.absolute() / source.spec.name)
        if not make and not paths.root.exists():
            return paths, start.checked(source, store=store).resolved.spec
        if not paths.root.exists():
            try:
                return start.begin(store, source), source.spec
            except InputError:
                if not paths.spec.is_file():
                    raise  # the error is not that another process created the run first
    paths, again = start.find_again(store, given, changes, name)
    return paths, start.go_on(paths, again, trains=False)


def _stage(spec: "distill.spec.model.RunSpec", given: str | None) -> str:
    from distill.spec.model import PairsStage

    names = [name for name, stage in spec.stages.items() if isinstance(stage, PairsStage)]
    if given is None and len(names) == 1:
        return names[0]
    if not names:
        raise InputError(f"run '{spec.name}' has no pairs stage; its stages: {', '.join(spec.stages)}")
    if given is None:
        raise InputError(f"run '{spec.name}' has {len(names)} pairs stages; name one with --stage: {', '.join(names)}")
    if given not in names:
        raise InputError(f"--stage {given}: run '{spec.name}' has no such pairs stage; {suggest(given, names)}")
    return given
