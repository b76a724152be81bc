"""`distill export`: a student as a folder for other people, also as a complete pipeline or in another data type."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from distill.cli import arguments
from distill.cli.common import StoreOption, TeacherHelp, near, store_path
from distill.cli.students import chosen_student
from distill.core.atomic import hidden_folder
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.text import short, suggest
from distill.runs import todo
from distill.runs.run_store import RunPaths, find_run
from distill.spec.model import RunSpec, TeacherSpec, TrainStage

DTYPES = ("fp32", "bf16")
WHICH = (
    "RUN or RUN/STAGE: the student of a train stage; if it is not finished, that of the newest checkpoint. "
    "RUN@step-N: that of this checkpoint. RUN@best: the student with the smallest distance at the fewest measured "
    "steps. Or a student's folder."
)


@dataclass(frozen=True)
class ExportedStudent:
    """What is exported. name: of the new folder."""

    name: str
    folder: Path | None = None  # of a finished student
    run: RunPaths | None = None
    stage: str = ""
    step: int | None = None  # of the checkpoint, if it is not finished; None: the newest

    @property
    def spec(self) -> RunSpec:
        assert self.run is not None
        return todo.load_spec(self.run)


def export(
    student: Annotated[str, typer.Argument(metavar="RUN[/STAGE][@best|@step-N]", help=WHICH)],
    stage: Annotated[
        str | None,
        typer.Argument(metavar="[STAGE]", help="By default the only train stage, or the last if it is done."),
    ] = None,
    half_life: Annotated[
        float | None,
        typer.Option(help="Export the EMA weights of a checkpoint with this half-life, in images."),
    ] = None,
    ema_length: Annotated[
        float | None,
        typer.Option(
            help="Export EMA weights of this length, relative to the training, like 0.12: those of a checkpoint if the "
            "stage's ema_lengths has it, else made from the stage's snapshots (ema_snapshots).",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Export the weights of a checkpoint without averaging (EMA).")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; by default RUN-STAGE, or FOLDER-export.")
    ] = None,
    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Write the complete pipeline of a student that works on latents, with the text encoders, tokenizers "
            "and autoencoder of its teacher; DiffusionPipeline.from_pretrained(FOLDER) loads it.",
        ),
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of the network's weights, fp32 or bf16; by default fp32.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help=f"With --whole: {TeacherHelp} By default the teacher of the student's run.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Export a student, even during training. It is first compared with what plain diffusers loads and samples."""
    runs = store_path(store)
    given = {"--raw": raw or None, "--half-life": half_life, "--ema-length": ema_length}
    options = [name for name, value in given.items() if value is not None]
    if len(options) > 1:
        raise InputError(f"{' and '.join(options)} cannot be combined")
    if half_life is not None and half_life < 1:
        raise InputError(f"--half-life {half_life:g}: half-lives are at least 1 image; for a length give --ema-length")
    if ema_length is not None and not 0.01 <= ema_length <= 0.28:
        raise InputError(f"--ema-length {ema_length:g}: give a number from 0.01 to 0.28, a fraction of the training")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {short(dtype)}: {suggest(dtype, DTYPES)}")
    if teacher is not None and not whole:
        raise InputError(f"--teacher {short(teacher)} has no effect without --whole; leave it out")
    weights: Literal["raw"] | float | None = "raw" if raw else half_life or ema_length
    found = _found(student, stage, runs, weights)
    folder = out or Path(found.name)
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; name another folder with --out")
    origin = _teacher(found, teacher, runs) if whole else None
    with importing():
        from distill.students import packaged

    package = packaged.Package(dtype or "fp32", origin) if whole or dtype is not None else None
    if package is None and found.folder is None:
        _export_checkpoint(found, weights, folder)
    elif found.folder is None:
        with hidden_folder(folder.absolute()) as temporary:
            _export_checkpoint(found, weights, temporary / "student")
            packaged.export(temporary / "student", folder, package)
    else:
        packaged.export(found.folder, folder, package)
    say(f"exported {near(folder.absolute())}")


def _found(given: str, stage: str | None, store: Path, weights: Literal["raw"] | float | None) -> ExportedStudent:
    """The student that the user has named. weights: those of a checkpoint that are asked for; None: the usual ones."""
    from distill.exchange import publishing

    plain = stage is not None or not ("@" in given or (Path(given) / "distill.json").is_file())
    if plain and (stage is not None or (store / given / "spec.yaml").is_file() or "/" not in given):
        run, step = find_run(store, given), None
        name = publishing.train_stage(run, stage)
    else:
        found = chosen_student(given, store)
        if found is None:
            raise InputError(
                f"there is no run or student '{short(given)}'; give RUN or RUN/STAGE of {store}, or a student's folder"
            )
        if isinstance(found, Path):
            if weights is not None:
                option = "--raw" if weights == "raw" else "--half-life" if weights >= 1 else "--ema-length"
                raise InputError(f"{option} has no effect: {found} has one set of weights; name a run, or leave it out")
            return ExportedStudent(f"{found.absolute().name}-export", found)
        run, name, step = found.run, found.stage, found.step
    new = f"{run.name}-{name}" + (f"-step-{step}" if step is not None else "")
    if weights is None and step is None and (run.student(name) / "distill.json").is_file():
        return ExportedStudent(new, run.student(name), run, name)
    _refuse_weights(run, name, weights, step)
    return ExportedStudent(new, None, run, name, step)


def _refuse_weights(run: RunPaths, name: str, weights: Literal["raw"] | float | None, step: int | None) -> None:
    """InputError if a stage has no such weights, or its checkpoints were deleted."""
    stage = todo.load_spec(run).stages[name]
    assert isinstance(stage, TrainStage)
    if isinstance(weights, float) and weights not in stage.averages:
        if weights >= 1:
            valid = ", ".join(f"{half:g}" for half in stage.ema_half_lives) or "none; use --raw"
            raise InputError(f"--half-life {weights:g} is not one of the stage's; valid: {valid}")
        valid = ", ".join(f"{each:g}" for each in stage.ema_lengths) or "none"
        if stage.ema_snapshots is None:
            raise InputError(
                f"--ema-length {weights:g} is not one of ema_lengths ({valid}) of stage '{name}', and it keeps no "
                "snapshots to make others from; set ema_snapshots in the spec of the next run"
            )
        if step is not None:
            raise InputError(
                f"--ema-length {weights:g}: checkpoints have only ema_lengths ({valid}); leave out @step-{step} to "
                "make other lengths from the snapshots"
            )
        return
    if run.stage(name).done.exists() and not run.stage(name).checkpoints.is_dir():
        raise InputError(
            f"the checkpoints of stage '{name}' were deleted; use its exported student: {near(run.student(name))}"
        )


def _teacher(found: ExportedStudent, given: str | None, store: Path) -> TeacherSpec:
    """The teacher whose components the whole pipeline gets."""
    if given is not None:
        return arguments.teacher(given, store)
    if found.run is not None:
        if (teacher := found.spec.teacher) is not None:
            return teacher
        raise InputError(f"run '{found.run.name}' has no teacher; give the pipeline of its network with --teacher")
    raise InputError(f"{found.folder} is not part of a run, so its teacher is not known; give --teacher")


def _export_checkpoint(found: ExportedStudent, weights: Literal["raw"] | float | None, folder: Path) -> None:
    from distill.execution import train_stage

    assert found.run is not None
    spec = found.spec
    stage = spec.stages[found.stage]
    assert isinstance(stage, TrainStage)
    train_stage.export_checkpoint(found.run, spec, found.stage, weights or stage.export, folder, found.step)
