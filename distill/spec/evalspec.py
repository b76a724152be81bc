"""The rows of an evaluate stage before it runs: their networks, steps and network calls. Does not import torch."""

from collections.abc import Mapping

from distill.solvers import find_solver
from distill.spec.kinds import network_calls, per_velocity
from distill.spec.model import EvaluateStage


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


def num_rows(stage: EvaluateStage) -> int:
    """Number of rows, that is, of sets of samples that are generated."""
    with_solvers = sum(map(len, stage.teacher_solvers.values()))
    return sum(map(len, steps_of_rows(stage).values())) + with_solvers + 1 + len(stage.fine_students)


def num_samples(stage: EvaluateStage) -> int:
    """Number of samples of all rows: the total in the stage's progress."""
    return stage.samples * num_rows(stage)


def calls(stage: EvaluateStage, samplers: Mapping[str, str]) -> dict[str, int]:
    """Network -> network calls for one sample of every row, summed over its rows, with those for guidance.

    samplers: student -> name of its sampler.
    """
    fine = find_solver(stage.fine_solver).calls(stage.fine_steps)
    by = {"teacher": "euler", **samplers}  # the fine rows are added below
    found = {name: sum(network_calls(by[name], n) for n in each) for name, each in steps_of_rows(stage).items()}
    found |= {name: found[name] + fine for name in ("teacher", *stage.fine_students)}
    found["teacher"] += sum(find_solver(name).calls(n) for name, each in stage.teacher_solvers.items() for n in each)
    return {**found, "teacher": per_velocity(stage.guidance_scale) * found["teacher"]}
