"""`distill pairs`: generates pairs with a teacher and stores them. Several processes can share the work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import start
from distill.cli.common import StoreOption, check_out, near, read_share, store_path
from distill.cli.stage import compute
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import suggest
from distill.runs.run_store import RunPaths
from distill.spec import checks, kinds
from distill.spec.guidancespec import WEAK
from distill.spec.model import OF_DATA

if TYPE_CHECKING:
    import distill.spec.model


def pairs(
    given: Annotated[
        str,
        typer.Argument(metavar="TEACHER|SPEC", help="A teacher, as for `distill eval`; or a spec, a preset or a run."),
    ],
    changes: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Changes of the spec.")] = None,
    shards: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Share the work among N processes: this is process I, from 1 to N."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check whether the number of solver steps is enough: solve up to 1,000 pairs, then with twice as many "
            "steps, and so on until the results agree. Writes nothing.",
        ),
    ] = False,
    stage: Annotated[
        str | None, typer.Option(help="With a SPEC: the pairs stage to run; not needed if there is only one.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="With a SPEC: name of the run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="With a TEACHER: folder for the pairs. If it has an unfinished set, it is resumed."),
    ] = None,
    count: Annotated[int | None, typer.Option(help="With a TEACHER: number of pairs [10000].")] = None,
    paths: Annotated[
        str | None, typer.Option(help="Kind of paths: backward, forward, segments or trajectories [backward].")
    ] = None,
    times: Annotated[
        str | None, typer.Option(help="Times of the stored states (trajectories, segments), like 1,0.5,0.")
    ] = None,
    optimal_times: Annotated[
        int | None,
        typer.Option(
            help="For trajectories, instead of --times: the number of steps between stored states; their times are "
            "chosen to minimize the error (see `distill schedule`)."
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real data for forward paths and segments: digits, or YAML.")] = None,
    solver: Annotated[
        str | None, typer.Option(help=f"{kinds.either([*kinds.ode_solvers(), kinds.AUTO, kinds.FITTED])} [heun].")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="For --solver auto: relative error of the pairs that is allowed [0.01].")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps [16].")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 = none [1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise [0].", min=0, max=2**63 - 1)] = None,
    block: Annotated[int | None, typer.Option(help="Batch size of the solver [256].")] = None,
    shard: Annotated[int | None, typer.Option(help="Pairs per file, a multiple of --block [4096].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Stored type: float32, float16, bfloat16 or uint8 [float32].")
    ] = None,
    store_noise: Annotated[bool | None, typer.Option("--store-noise", help="Store the noise too.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda [auto].")] = None,
    store: StoreOption = None,
) -> None:
    """Generate pairs of noise and data by solving a teacher's ODE. With a TEACHER they are written to --out, with a
    SPEC to its run.

    N processes, on any machines, can share the work with --shards 1/N ... N/N; the files are the same, byte for byte.
    """
    from distill.cli import arguments

    share = None if shards is None else read_share("--shards", shards, 1)
    options = {
        "count": count, "paths": paths, "solver": solver, "steps": steps, "block": block, "shard": shard,
        "guidance_scale": guidance_scale, "dtype": dtype, "store_noise": store_noise,
        "optimal_times": optimal_times, "tolerance": tolerance,
        "times": None if times is None else arguments.fractions("--times", times),
    }  # fmt: skip
    options = {key: value for key, value in options.items() if value is not None}
    if check:
        _refuse({"--shards": shards, "--out": out}, "with --check, which writes nothing")
    if not arguments.is_yaml(given) and _is_spec(store_path(store), given):
        others = {**options, "out": out, "data": data, "seed": seed, "device": device}
        others = {f"--{key.replace('_', '-')}": value for key, value in others.items()}
        _refuse(others, "with a SPEC; override its values instead, like stages.pairs.count=5000")
        _of_spec(store_path(store), given, changes or [], name, stage, share, check)
        return
    overrides = dict.fromkeys(changes or [], True)
    _refuse({"--stage": stage, "--name": name, **overrides}, f"with a teacher ('{given}'), only with a SPEC")
    if out is None and not check:
        raise InputError("--out is missing; give the folder to write the pairs to")
    _of_teacher(store_path(store), given, options, out, data, seed or 0, device or "auto", share, check)


def _is_spec(store: Path, given: str) -> bool:
    named = Path(given).suffix in (".yaml", ".yml") or start.is_run(store, given)
    return named or (start.is_spec(given) and not Path(given).is_dir())


def _refuse(options: Mapping[str, object], why: str) -> None:
    found = [key for key, value in options.items() if value is not None]
    if found:
        raise InputError(f"{', '.join(found)} cannot be used {why}")


def _refuse_empty(share: tuple[int, int] | None, stage: "distill.spec.model.Stage") -> None:
    """Raise InputError for a part without shards."""
    from distill.spec.layout import Layout
    from distill.spec.model import PairsStage

    assert isinstance(stage, PairsStage)
    files = Layout.of(stage).files
    if share is not None and share[0] >= files:
        raise InputError(
            f"--shards {share[0] + 1}/{share[1]}: the set has {files:,} shard{'s' if files > 1 else ''}, so there is "
            "none for this process; use a smaller N, or fewer pairs per shard"
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
        raise InputError(f"--data has no effect on {stage.paths} paths, which start from noise; remove it")
    real = NoData(kind="none") if data is None else arguments.data(data)
    if out is not None:
        check_out(out)
    where = arguments.teacher(given, store)
    with importing():
        from distill import pairs, teachers
        from distill.core.stop import StopRequest
        from distill.data import load_data
        from distill.execution.solving import Solving
        from distill.execution.sources import note_labels
        from distill.runs.progress import Progress

    place = arguments.device(device)
    teacher, real_data = teachers.load_teacher(where, place), load_data(real, seed)
    if stage.paths in OF_DATA and real_data is None and teacher.exact_data is None:
        raise InputError(f"--data is missing: {stage.paths} paths start from real data; add it, e.g. --data digits")
    if stage.paths in OF_DATA and real_data is not None:
        note_labels(teacher, real_data)
    solving = Solving.of(teacher, stage, store, seed=seed, device=place, data=real_data, law=teacher)
    if check:
        say(solving.accuracy())
        return
    assert out is not None
    with StopRequest() as stop, Progress("pairs", pairspec.size(stage, share), "pairs", None) as progress:
        solving.prepare(out, progress, stop).generate(out, progress, stop, share)
        pairs.finish(out, progress)
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
    if spec.cache is not None and not run.stage(spec.cache).done.exists():
        raise InputError(
            f"stage '{chosen}' waits for the cache stage '{spec.cache}', which is not done yet; make it with: "
            f"distill run {f'{near(run.root)} --resume' if run.root.exists() else given}"
        )
    for field, of, _ in checks.references(spec.stages[chosen]):
        if not run.stage(of).done.exists():
            what = "weak model" if field == WEAK else "teacher"
            raise InputError(
                f"the {what} of stage '{chosen}' is the student of stage '{of}', which is not trained yet; train it "
                f"with: distill run {f'{near(run.root)} --resume' if run.root.exists() else given}"
            )
    if check:
        from distill.execution import devices, solving
        from distill.execution.work import Work
        from distill.spec import resolved

        work = Work(run, resolved.of_run(spec, run.root), chosen, devices.place(spec.launch, numerics=spec.numerics))
        with solving.opened(work, indexed=False) as solved:
            say(solved.accuracy())
        return
    from distill.launch import tasks

    if share is not None:
        os.environ[tasks.UNIT] = f"{chosen}.part-{share[0] + 1}-of-{share[1]}"
    compute(run.root, [chosen], share)
    folder = run.stage(chosen).pairs
    say(f"pairs of stage '{chosen}' in {near(folder)}")
    say(f"{_told(folder)}; run the remaining stages with: distill run {near(run.root)} --resume")


def _told(folder: Path) -> str:
    """A text that says how much of a set is complete, and how good it is."""
    from distill.pairs import manifest
    from distill.shards import manifest as files

    found = manifest.read(folder)
    assert found is not None
    if not found.done:
        made = files.made(manifest.KIND, folder, found)
        return f"{made} of {found.layout.files} shards are complete"
    said = [f"the set of {found.count:,} pairs is complete"]
    if found.rounding.error:
        said.append(f"storing the data as {found.dtype} changed it by {found.rounding.relative:.2%} (RMS)")
    if found.whiteness:
        w = found.whiteness
        said.append(
            f"the noise has mean {w.mean:.3f}, variance {w.variance:.3f}, correlation of neighbouring values "
            f"{w.correlation:.3f}"
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
