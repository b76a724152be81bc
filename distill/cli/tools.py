"""`distill sample`, `eval` and `report`: tools for single students and runs, without a spec."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli import prompt_options
from distill.cli.common import JsonOption, StoreOption, TeacherHelp, check_out, near, print_json, store_path
from distill.cli.prompt_options import PromptOption, PromptsOption
from distill.cli.schedule import fitted_solver, refuse_schedule, schedule_along
from distill.core.collection import importing
from distill.core.errors import InputError
from distill.core.field_types import MAX_STEPS
from distill.core.printing import say, say_error, say_table
from distill.exchange import step_numbers, student_card
from distill.runs.run_store import find_run
from distill.spec.kinds import FITTED
from distill.spec.model import TeacherSpec

LATENTS = {"samples": 256, "block": 8}  # of an evaluation of large networks, as in specs that `distill init` writes
StudentArgument = Annotated[str, typer.Argument(metavar="STUDENT", help="A student folder, or RUN/STAGE of the store.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=2**63 - 1)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def sample(
    student: StudentArgument,
    out: Annotated[Path, typer.Option("--out", help="Output file: .png for a picture, .safetensors for the tensors.")],
    steps: Annotated[
        int | None,
        typer.Option(help="Number of steps; by default the fewest that the student is made for.", min=1, max=MAX_STEPS),
    ] = None,
    schedule: Annotated[
        str,
        typer.Option(
            help="uniform; optimal: the step times with the smallest error; or bns: the solver that was fitted to it "
            "(see `distill schedule`)."
        ),
    ] = "uniform",
    times: Annotated[
        str | None, typer.Option(help="Step times, like 1,0.6,0; replaces --steps and --schedule.")
    ] = None,
    seed: SeedOption = 0,
    count: Annotated[
        int | None,
        typer.Option(help="Number of samples; by default one for each prompt, else 64.", min=1, max=1_000_000),
    ] = None,
    classes: Annotated[
        str, typer.Option(help="One class, or one for each sample, like 3 or 0,1,2; by default all classes in turn.")
    ] = "",
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help=f"{TeacherHelp} A student that works on latents uses its size, autoencoder, and conditions or text "
            "encoders. By default the teacher of the student's run."
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale, for students that take it as an input; by default the middle of their range."
        ),
    ] = None,
    device: DeviceOption = "auto",
    store: StoreOption = None,
) -> None:
    """Draw samples of a student, of classes or prompts in turn."""
    from distill.cli import arguments

    texts = prompt_options.given(prompt, prompts)
    count = count or len(texts) or 64
    labels = arguments.numbers("--classes", classes) if classes else None
    runs, along = store_path(store), arguments.times("--times", times) if times else None
    refuse_schedule(schedule, times, ("uniform", "optimal", FITTED))
    if along and steps:
        raise InputError("--steps: no effect with --times; remove it")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file in it")
    if out.absolute().parent.is_dir():
        check_out(out.absolute().parent)
    folder = arguments.student(student, runs)
    card = student_card.read(folder)
    steps = len(along) - 1 if along else steps or card.fewest_steps
    if texts:
        like: TeacherSpec | None = arguments.prompted_teacher(teacher, card, folder, runs, classes)
    else:
        like = arguments.teacher(teacher, runs) if teacher else arguments.teacher_of_run(folder)
    with importing():
        from distill.evaluation import sample

    place = arguments.device(device)
    sample.write_samples(
        folder, out, like=like, prompts=texts, steps=steps, seed=seed, count=count, labels=labels, device=place,
        along=schedule_along(schedule, along, steps, runs, place),
        fit=(lambda student: fitted_solver(student, steps, runs)) if schedule == FITTED else None,
        guidance=guidance,
    )  # fmt: skip
    if said := step_numbers.untrained(card, [steps]):
        say_error(f"warning: {said}")
    made, steps_made = (f"{n} {what}{'s' if n > 1 else ''}" for n, what in ((count, "sample"), (steps, "step")))
    say(f"wrote {near(out.absolute())}: {made} at {steps_made}, seed {seed}")


def evaluate(
    student: StudentArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write results.json and pictures to.")],
    teacher: Annotated[
        str | None, typer.Option(help=f"{TeacherHelp} By default the teacher of the student's run.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Real data: digits, mnist, or YAML; by default the run's.")] = None,
    steps: Annotated[
        str | None, typer.Option(help="Numbers of steps of the student; by default 1,2,4 or those that it is made for.")
    ] = None,
    teacher_steps: Annotated[str, typer.Option(help="Numbers of Euler steps of the teacher.")] = "1,2,4,8,16",
    baselines: Annotated[
        str,
        typer.Option(
            help="Solvers with which the teacher is measured at the student's numbers of network calls, or none."
        ),
    ] = "euler,ab3,unipc2",
    schedule: Annotated[
        str,
        typer.Option(
            help="optimal: also measure at the step times with the smallest Euler error (see `distill schedule`)."
        ),
    ] = "uniform",
    times: Annotated[str | None, typer.Option(help="Also measure at these step times, like 1,0.6,0.")] = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Also measure with these functions of images and prompts, like my_metrics:clip,my_metrics:dino. "
            "They return scores or features."
        ),
    ] = None,
    guidance_scale: Annotated[
        float, typer.Option("--guidance-scale", help="Classifier-free guidance scale of the teacher; 1: no guidance.")
    ] = 1.0,
    guidance_scales: Annotated[
        str | None,
        typer.Option(
            "--guidance-scales", help="Also measure the teacher with its fine solver at these scales, e.g. 1,3,5."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples per row of the table; by default 2500, or 256 of latents.")
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Measure a student and its teacher, from the same noise, for classes or prompts in turn."""
    from distill.cli import arguments

    runs, texts = store_path(store), prompt_options.given(prompt, prompts)
    folder = arguments.student(student, runs)
    card = student_card.read(folder)
    counts = arguments.steps("--steps", steps) if steps is not None else step_numbers.to_measure(card)
    named = [] if baselines == "none" else [name.strip() for name in baselines.split(",")]
    size = {**(LATENTS if card.is_native else {"samples": 2500}), **({} if samples is None else {"samples": samples})}
    functions = [] if metrics is None else [each.strip() for each in metrics.split(",")]
    content = {"kind": "evaluate", "students": {"student": counts}, "baselines": named, "metrics": functions, **size}
    content |= {"guidance_scale": guidance_scale}
    if guidance_scales is not None:
        content["guidance_scales"] = arguments.fractions("--guidance-scales", guidance_scales)
    refuse_schedule(schedule, times)
    if schedule == "optimal" or times:
        ways = ["optimal" if times is None else arguments.times("--times", times)]
        also = {"student": ways} if card.kind == "velocity" and not card.t_grids else {}
        content |= {"times": {"teacher": ways, **also}}
    stage = arguments.evaluation(content | {"teacher_steps": arguments.steps("--teacher-steps", teacher_steps)})
    encoders = arguments.prompted_teacher(teacher, card, folder, runs) if texts else None
    given = arguments.teacher(teacher, runs) if teacher else arguments.teacher_of(folder, prompted=bool(texts))
    data_spec = arguments.data(data) if data else arguments.data_of(folder)
    check_out(out)
    with importing():
        from distill import teachers
        from distill.core.stop import StopRequest
        from distill.data import load_data
        from distill.evaluation import measuring, sample
        from distill.runs import results
        from distill.runs.progress import Progress
        from distill.spec import evalspec
        from distill.students.loaded import load_student
        from distill.teachers.of_students import in_size_of

    place = arguments.device(device)
    total = evalspec.num_samples(stage, {"student": card.sampler})
    with (
        sample.with_prompts(in_size_of(card.shape, given), texts, encoders, place) as teacher_spec,
        StopRequest() as stop,
        Progress("evaluate", total, "samples", None) as progress,
    ):
        assert teacher_spec is not None
        sample.refuse_without_prompts(folder, teacher_spec)
        loaded = teachers.load_teacher(teacher_spec, place)
        students = {"student": load_student(folder, place, teacher_spec, loaded)}
        real = load_data(data_spec, seed)
        found = measuring.measure(
            out, "eval", stage, loaded, students, real,
            seed=seed, device=place, progress=progress, stop=stop, store=runs, prompts=texts or None,
        )  # fmt: skip
    assert found is not None, "this process is alone"
    if said := step_numbers.untrained(card, counts):
        say_error(f"warning: {said}")
    if json:
        print_json(found.model_dump(mode="json"))
    else:
        say_table(results.table(found))
        say(f"results and pictures in {near(out.absolute())}")


def report(run: Annotated[str, typer.Argument(metavar="RUN")], store: StoreOption = None) -> None:
    """Write a run's report.html again from its results."""
    paths = find_run(store_path(store), run)
    with importing():
        from distill.evaluation import report_page

    say(near(report_page.write(paths)))
