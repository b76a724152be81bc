"""The mistakes in the settings of an evaluation. Does not import torch."""

from collections.abc import Iterator, Sequence

from distill.core.text import suggest
from distill.solvers import find_solver
from distill.spec.kinds import ADAPTIVE
from distill.spec.samplingspec import FINE, FINE_STEPS, OWN_COLUMNS, EvaluateStage, is_path


def mistakes(stage: EvaluateStage, prefix: str) -> Iterator[str]:
    """The mistakes in the settings of an evaluation that can be found without the rest of the spec.

    prefix: of the names of its fields in messages.
    """
    for student, steps in stage.students.items():
        if not steps:
            yield f"{prefix}students.{student}: no numbers of steps given, e.g. [1, 2, 4]"
    for solver in dict.fromkeys(each for each in stage.baselines if stage.baselines.count(each) > 1):
        yield f"{prefix}baselines: '{solver}' is listed twice"
    functions = [each.partition(":")[2] for each in stage.metrics]
    for name in dict.fromkeys(each for each in functions if functions.count(each) > 1):
        yield f"{prefix}metrics: two functions are named '{name}', which names their columns; rename one"
    scales = [f"{each:g}" for each in (stage.guidance_scale, *stage.guidance_scales)]  # as in the names of files
    for scale in dict.fromkeys(each for each in scales if scales.count(each) > 1):
        yield f"{prefix}guidance_scales: {scale} is measured already; list each other scale once"
    for name in ("prompt_groups", "rare_words"):
        if getattr(stage, name) and not stage.metrics:
            yield f"{prefix}{name}: has no effect without metrics; give {prefix}metrics, or remove it"
    for name, words in stage.prompt_groups.items():
        if not words or not all(each.strip() for each in words):
            yield f"{prefix}prompt_groups.{name}: {words} given; must be words, like [red, blue]"
    for name in functions:
        if name in OWN_COLUMNS:
            yield f"{prefix}metrics: a column of every evaluation is named '{name}'; rename the function"
    for each in stage.medians:
        if each not in stage.metrics:
            yield f"{prefix}medians: '{each}' is not in {prefix}metrics; {suggest(each, stage.metrics)}"
    for network, ways in stage.times.items():
        here = f"{prefix}times.{network}"
        if network not in ("teacher", *stage.students):
            yield f"{here}: this stage does not measure '{network}'; {suggest(network, ['teacher', *stage.students])}"
        for times in ways:
            if times != "optimal" and not is_path(times):
                yield f"{here}: {times} given; times must decrease from 1 to 0, like [1, 0.6, 0]"
        most = max({"teacher": stage.teacher_steps, **stage.students}.get(network, []), default=0)
        if network == "teacher" and not stage.teacher_steps:
            yield f"{here}: has no effect, because teacher_steps is empty; remove it, or give numbers of steps"
        if "optimal" in ways and most > FINE:
            yield f"{here}: optimal times are found for at most {FINE} steps, not {most}; give fewer steps"
    yield from _fine_solver(stage, prefix)
    for solver, counts in stage.teacher_solvers.items():
        yield from _with_solver(stage, solver, counts, f"{prefix}teacher_solvers.{solver}")
    for student in stage.fine_students:
        if student not in stage.students:
            yield f"{prefix}fine_students: '{student}' is not in {prefix}students; {suggest(student, stage.students)}"
        elif stage.fine_students.count(student) > 1:
            yield f"{prefix}fine_students: '{student}' is listed twice"


def _fine_solver(stage: EvaluateStage, prefix: str) -> Iterator[str]:
    """The mistakes in the accuracy of the fine solver: dopri5 has a tolerance, the others a number of steps."""
    if stage.fine_solver != ADAPTIVE:
        if stage.fine_tolerance is not None:
            yield f"{prefix}fine_tolerance: has no effect with fine_solver: {stage.fine_solver}; remove it"
        return
    if stage.fine_tolerance is None:
        yield f"{prefix}fine_tolerance: missing; {ADAPTIVE} needs it, e.g. 1e-4"
    if stage.field_settings.varies:
        yield (
            f"{prefix}fine_solver: {ADAPTIVE} does not work with guidance.interval, where the velocity jumps; use "
            f"another solver, such as heun"
        )
    if stage.fine_steps != FINE_STEPS:
        yield f"{prefix}fine_steps: has no effect with fine_solver: {ADAPTIVE}, which chooses its steps; remove it"


def _with_solver(stage: EvaluateStage, solver: str, counts: Sequence[int], where: str) -> Iterator[str]:
    """The mistakes in the numbers of steps that the teacher is measured with by a solver."""
    least = find_solver(solver).least_steps
    if not counts:
        yield f"{where}: no numbers of steps given, e.g. [20, 40]"
    for steps in dict.fromkeys(counts):
        if steps < least:
            yield f"{where}: {solver} needs at least {least} steps, not {steps}"
        if counts.count(steps) > 1:
            yield f"{where}: {steps} steps are listed twice"
        if solver == "euler" and steps in stage.teacher_steps:
            yield f"{where}: {steps} steps are in teacher_steps already; remove them here"
        if (solver, steps) == (stage.fine_solver, stage.fine_steps):
            yield f"{where}: {steps} steps are measured already, as fine_solver and fine_steps; remove them here"
