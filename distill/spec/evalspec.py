"""The rows of an evaluate stage before it runs: their networks, steps and network calls. Does not import torch."""

from collections.abc import Mapping

from distill.spec.guidancespec import UNCHANGED, FieldSettings
from distill.spec.kinds import about_calls, network_calls, per_velocity
from distill.spec.model import EvaluateStage
from distill.spec.samplingspec import uniform_times


def measuring(
    stage: EvaluateStage, students: Mapping[str, list[int]], origins: Mapping[str, str] | None = None
) -> EvaluateStage:
    """A copy of the stage that measures these students, at these numbers of steps, and no others.

    origins: new student -> the student of `stage` whose settings it gets.
    """
    like = {name: (origins or {}).get(name, name) for name in students}
    networks = {**({"teacher": "teacher"} if stage.teacher_steps else {}), **like}
    changes = {
        "students": dict(students),
        "fine_students": [name for name, origin in like.items() if origin in stage.fine_students],
        "times": {name: stage.times[origin] for name, origin in networks.items() if origin in stage.times},
    }
    return stage.model_copy(update=changes)


def steps_of_rows(stage: EvaluateStage) -> dict[str, list[int]]:
    """Network -> number of steps of each of its rows, without the rows of the fine solver and of teacher_solvers."""
    usual = {"teacher": stage.teacher_steps, **stage.students}
    further = {
        name: [steps for way in stage.times.get(name, []) for steps in (own if way == "optimal" else [len(way) - 1])]
        for name, own in usual.items()
    }
    return {name: own + further[name] for name, own in usual.items()}


def nfe_of_students(stage: EvaluateStage, samplers: Mapping[str, str]) -> list[int]:
    """The numbers of network calls with which students are measured, in increasing order.

    samplers: student -> name of its sampler.
    """
    rows = steps_of_rows(stage)
    return sorted({network_calls(samplers[name], steps) for name in stage.students for steps in rows[name]})


def solver_rows(stage: EvaluateStage, samplers: Mapping[str, str]) -> list[tuple[str, int]]:
    """(solver, number of steps) of the teacher's rows besides those of `teacher_steps` and of the fine solver.

    First those of `teacher_solvers`. Then for each number of network calls of a student, each of the `baselines` makes
    as many steps as these calls allow. In one step all baselines are equal, so only the first is measured. Other rows
    of the teacher are not repeated.
    """
    asked = [(solver, steps) for solver, each in stage.teacher_solvers.items() for steps in each]
    known = [*asked, *(("euler", steps) for steps in stage.teacher_steps), (stage.fine_solver, stage.fine_steps)]
    found = list[tuple[str, int]]()
    for solver in stage.baselines:
        for nfe in nfe_of_students(stage, samplers):
            counts = {n: stage.field_settings.network_calls(solver, uniform_times(n)) for n in range(1, nfe + 1)}
            steps = max((n for n, calls in counts.items() if calls <= nfe), default=0)
            same = steps == 1 and (("euler", 1) in known or any(n == 1 for _, n in found))
            if steps and not same and (solver, steps) not in [*known, *found]:
                found.append((solver, steps))
    return [*asked, *found]


def num_rows(stage: EvaluateStage, samplers: Mapping[str, str]) -> int:
    """Number of rows, that is, of sets of samples that are generated. Rows of fitted solvers are not counted."""
    usual = sum(map(len, steps_of_rows(stage).values()))
    further = len(stage.fine_students) + len(stage.guidance_scales)
    return usual + len(solver_rows(stage, samplers)) + 1 + further


def num_samples(stage: EvaluateStage, samplers: Mapping[str, str]) -> int:
    """Number of samples of all rows: the total in the stage's progress."""
    return stage.samples * num_rows(stage, samplers)


def calls(stage: EvaluateStage, samplers: Mapping[str, str]) -> dict[str, int]:
    """Network -> network calls for one sample of every row, summed over its rows, with those for guidance.

    They are estimates if the fine solver has a tolerance. samplers: student -> name of its sampler.
    """
    fine = _fine_calls(stage, UNCHANGED)
    by = {"teacher": "euler", **samplers}  # the fine rows are added below
    found = {name: sum(network_calls(by[name], n) for n in each) for name, each in steps_of_rows(stage).items()}
    found |= {name: found[name] + fine for name in stage.fine_students}
    return {**found, "teacher": _calls_of_teacher(stage, samplers)}


def _calls_of_teacher(stage: EvaluateStage, samplers: Mapping[str, str]) -> int:
    """Network calls for one sample of every row of the teacher.

    If guidance has an interval, they are those of a teacher that is defined at all times from 0 to 1, and of uniform
    times where optimal ones are asked for, which are not known yet.
    """
    usual = [uniform_times(steps) for steps in stage.teacher_steps]
    along = [grid for way in stage.times.get("teacher", []) for grid in (usual if way == "optimal" else [way])]
    rows = [("euler", t_grid) for t_grid in [*usual, *along]]
    rows += [(solver, uniform_times(steps)) for solver, steps in solver_rows(stage, samplers)]
    settings = stage.field_settings
    fine = sum(_fine_calls(stage, stage.settings_at(scale)) for scale in (None, *stage.guidance_scales))
    return fine + sum(settings.network_calls(solver, t_grid) for solver, t_grid in rows)


def _fine_calls(stage: EvaluateStage, settings: FieldSettings) -> int:
    """Network calls for one sample with the fine solver; an estimate if it has a tolerance."""
    if stage.fine_tolerance is not None:
        return per_velocity(settings.guidance_scale) * about_calls(stage.fine_tolerance)
    return settings.network_calls(stage.fine_solver, uniform_times(stage.fine_steps))
