"""`distill merge`, `unmerge`, `extract` and `lora-check`: LoRAs of students.

torch is imported only when a command has checked its arguments.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli import prompt_options
from distill.cli.common import (
    JsonOption,
    StoreOption,
    TeacherHelp,
    check_out,
    near,
    print_json,
    print_table,
    store_path,
)
from distill.cli.prompt_options import PromptOption, PromptsOption
from distill.cli.tools import DeviceOption, SeedOption
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human
from distill.exchange import student_card
from distill.spec.model import CheckpointTeacher

if TYPE_CHECKING:
    import torch

    import distill.students.comparing

LoraStudent = Annotated[
    str, typer.Argument(metavar="STUDENT", help="The folder of a LoRA student, or RUN/STAGE of the store.")
]
FullStudent = Annotated[
    str, typer.Argument(metavar="STUDENT", help="The folder of a student with all weights, or RUN/STAGE of the store.")
]
TeacherOption = Annotated[
    str | None,
    typer.Option(help=f"The base of the LoRA. {TeacherHelp} By default the teacher of the student's run."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder to create.")]
ScaleOption = Annotated[float, typer.Option(help="Factor of the LoRA's change.")]
SamplesOption = Annotated[int, typer.Option(help="Number of samples to compare.", min=1, max=10_000)]
MOST_NAMES = 5  # parameters that are named in a message


def merge(
    student: LoraStudent,
    out: OutOption,
    teacher: TeacherOption = None,
    scale: ScaleOption = 1.0,
    store: StoreOption = None,
) -> None:
    """Merge a LoRA student into the weights of its base: a student with all weights, in float32."""
    folder, base = _student(student, teacher, store, with_conditions=False)
    _check(out, scale)
    with importing():
        from distill.students import merged

    merged.merge_student(folder, base, out.absolute(), scale)
    say(f"merged {near(folder)} into {near(out.absolute())}, with scale {scale:g}")


def unmerge(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of a student with all weights.")],
    lora: Annotated[
        Path, typer.Option("--lora", help="The LoRA: a safetensors file of diffusers, or the folder of a LoRA student.")
    ],
    out: OutOption,
    scale: Annotated[float, typer.Option(help="Factor with which the LoRA was merged.")] = 1.0,
) -> None:
    """Take a LoRA out of the weights of a student that it was merged into. The weights are exact up to rounding."""
    _check(out, scale)
    with importing():
        from distill.students import merged

    merged.unmerge_student(folder, merged.lora_of(lora), out.absolute(), scale)
    say(f"took {near(lora.absolute())} out of {near(folder.absolute())}: {near(out.absolute())}")


def extract(
    student: FullStudent,
    rank: Annotated[list[int], typer.Option("--rank", help="Rank of the LoRA; may be repeated.")],
    out: OutOption,
    teacher: TeacherOption = None,
    samples: SamplesOption = 4,
    seed: SeedOption = 0,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Extract LoRA students from a student with all weights: OUT/rank-R for each rank.

    The change from the teacher's weights to the student's is approximated by singular value decomposition. The table
    compares samples at the fewest steps of the student, from the same noise and conditions, with the student's own.
    """
    texts = prompt_options.given(prompt, prompts)
    folder, base = _student(student, teacher, store, with_conditions=not texts)
    _check(out)
    from distill.cli import arguments

    with importing():
        from distill.runs.progress import Progress
        from distill.students import extracting

    place = arguments.device(device)
    with _conditioned(folder, base, texts, teacher, store, place) as given, ExitStack() as until:
        progress = until.enter_context(Progress("extract", 0, "weights", None))

        def tell(done: int, total: int) -> None:
            progress.total = total
            progress.update(done, {})
            if done == total:  # what follows, such as samples, is not counted
                until.close()

        found = extracting.extract(
            folder, given, rank, out.absolute(), samples=samples, seed=seed, device=place, tell=tell
        )
    if json:
        print_json(found.as_json())
        return
    rows = [
        [str(each.rank) if each.rank else "0 (the base)", human(each.size) if each.size else "-", f"{each.kept:.2%}"]
        + [_decibels(each.difference), f"{each.difference.rms:.3g}"]
        for each in found.rows
    ]
    heads = ["rank", "file", "change kept", "PSNR", "RMS difference"]
    print_table(heads, rows, right=heads)
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    say(f"PSNR and RMS difference: {found.compared} of {found.samples} samples at {steps}, seed {seed}")
    say(f"the size of the change is {found.change:.2%} of that of the base's weights")
    if found.others:
        shown = ", ".join(f"{name} {share:.2%}" for name, share in [*found.others.items()][:MOST_NAMES])
        more = f", and {len(found.others) - MOST_NAMES:,} more" if len(found.others) > MOST_NAMES else ""
        say(f"{sum(found.others.values()):.2%} of the change is in parameters that a LoRA cannot hold: {shown}{more}")
    say(f"wrote {near(out.absolute())}: {', '.join(f'rank-{each.rank}' for each in found.rows if each.rank)}")


def lora_check(
    student: LoraStudent,
    teacher: TeacherOption = None,
    samples: SamplesOption = 4,
    seed: SeedOption = 0,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Compare a LoRA student on an int8 base with the same on the bfloat16 base, from the same noise and conditions.

    Large networks are often used with weights in int8. If the LoRA survives this, its samples change by about as much
    as those of the base alone.
    """
    texts = prompt_options.given(prompt, prompts)
    folder, base = _student(student, teacher, store, with_conditions=not texts)
    from distill.cli import arguments

    with importing():
        from distill.students import lora_check

    place = arguments.device(device)
    with _conditioned(folder, base, texts, teacher, store, place) as given:
        found = lora_check.check(folder, given, samples=samples, seed=seed, device=place)
    if json:
        print_json(found.as_json())
        return
    rows = [
        [what, _decibels(each), f"{each.rms:.3g}"]
        for what, each in (
            ("base alone: int8 against bfloat16", found.base),
            ("with the LoRA: int8 against bfloat16", found.lora),
            ("in bfloat16: with the LoRA against without it", found.effect),
        )
    ]
    print_table(["compared", "PSNR", "RMS difference"], rows, right=["PSNR", "RMS difference"])
    steps = f"{found.steps} step{'s' if found.steps > 1 else ''}"
    say(
        f"{found.compared} of {found.samples} samples at {steps}, seed {seed}; {found.layers:,} linear layers of the "
        "base in int8"
    )


def _student(
    given: str, teacher: str | None, store: str | None, *, with_conditions: bool
) -> tuple[Path, CheckpointTeacher]:
    """The folder of a student, and its base, which may have the conditions in the cache of the student's run."""
    from distill.cli import arguments

    runs = store_path(store)
    folder = arguments.student(given, runs)
    base = arguments.teacher(teacher, runs) if teacher else arguments.teacher_of(folder, prompted=not with_conditions)
    if not isinstance(base, CheckpointTeacher):
        raise InputError(f"--teacher: a teacher of kind {base.kind} has no weights; give a checkpoint")
    return folder, base


@contextmanager
def _conditioned(
    folder: Path,
    base: CheckpointTeacher,
    texts: list[str],
    teacher: str | None,
    store: str | None,
    device: "torch.device",
) -> Iterator[CheckpointTeacher]:
    """The base in the size of a student's samples, with the conditions of the prompts, if there are any."""
    from distill.cli import arguments
    from distill.evaluation import sample
    from distill.teachers.of_students import in_size_of

    card = student_card.read(folder)
    encoders = arguments.prompted_teacher(teacher, card, folder, store_path(store)) if texts else None
    with sample.with_prompts(in_size_of(card.shape, base), texts, encoders, device) as given:
        sample.refuse_without_prompts(folder, given)
        assert isinstance(given, CheckpointTeacher)
        yield given


def _check(out: Path, scale: float = 1.0) -> None:
    """InputError if the folder exists, cannot be written, or if the scale is not a number other than 0."""
    if out.exists():
        raise InputError(f"--out {out}: exists already; name another folder")
    check_out(out)
    if not math.isfinite(scale) or scale == 0:
        raise InputError(f"--scale {scale:g}: has no effect or is not finite; give another number")


def _decibels(found: "distill.students.comparing.Difference") -> str:
    return "equal" if math.isinf(found.psnr) else f"{found.psnr:.1f} dB"
