"""An evaluate stage before it runs: of whom it has rows, in how many steps, what a sample of each costs. No tensors."""

from collections.abc import Mapping

from distill.solvers import find_solver
from distill.spec.kinds import network_calls, per_velocity
from distill.spec.model import EvaluateStage


def measuring(
    stage: EvaluateStage, students: Mapping[str, list[int]], origins: Mapping[str, str] | None = None
) -> EvaluateStage:
    """The evaluation of these students, at their numbers of steps; what the stage says of others is left out.

    origins: of students that are to be measured like one that the stage names.
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
    """Network -> steps of each row that an evaluation will have of it, except those of the fine solver."""
    usual = {"teacher": stage.teacher_steps, **stage.students}
    further = {
        name: [steps for way in stage.times.get(name, []) for steps in (own if way == "optimal" else [len(way) - 1])]
        for name, own in usual.items()
    }
    return {name: own + further[name] for name, own in usual.items()}


def num_rows(stage: EvaluateStage) -> int:
    """Sets of samples that are made."""
    return sum(map(len, steps_of_rows(stage).values())) + 1 + len(stage.fine_students)


def num_samples(stage: EvaluateStage) -> int:
    """In all sets together: the length of the stage's progress."""
    return stage.samples * num_rows(stage)


def calls(stage: EvaluateStage, samplers: Mapping[str, str]) -> dict[str, int]:
    """Network -> its calls for a sample in each of its rows, together; guidance counted. samplers: of the students."""
    fine = find_solver(stage.fine_solver).calls(stage.fine_steps)
    by = {"teacher": "euler", **samplers}  # its fine rows aside
    found = {name: sum(network_calls(by[name], n) for n in each) for name, each in steps_of_rows(stage).items()}
    found |= {name: found[name] + fine for name in ("teacher", *stage.fine_students)}
    return {**found, "teacher": per_velocity(stage.guidance_scale) * found["teacher"]}
