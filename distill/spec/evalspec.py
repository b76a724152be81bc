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
    """Network -> number of steps of each of its rows, without the rows of the fine solver."""
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


def baseline_rows(stage: EvaluateStage, samplers: Mapping[str, str]) -> list[tuple[str, int]]:
    """(solver, number of steps) of the teacher's rows that students are compared with.

    For each number of network calls of a student, each of the `baselines` makes as many steps as these calls allow. In
    one step all solvers are equal, so only the first is measured. Other rows of the teacher are not repeated.
    """
    per, found = per_velocity(stage.guidance_scale), list[tuple[str, int]]()
    for solver in stage.baselines:
        for nfe in nfe_of_students(stage, samplers):
            steps = max((n for n in range(1, nfe + 1) if per * find_solver(solver).calls(n) <= nfe), default=0)
            known = (solver, steps) == (stage.fine_solver, stage.fine_steps)
            known |= solver == "euler" and steps in stage.teacher_steps
            same = steps == 1 and (1 in stage.teacher_steps or any(n == 1 for _, n in found))
            if steps and not known and not same and (solver, steps) not in found:
                found.append((solver, steps))
    return found


def num_rows(stage: EvaluateStage, samplers: Mapping[str, str]) -> int:
    """Number of rows, that is, of sets of samples that are generated. Rows of fitted solvers are not counted."""
    usual = sum(map(len, steps_of_rows(stage).values()))
    return usual + len(baseline_rows(stage, samplers)) + 1 + len(stage.fine_students)


def num_samples(stage: EvaluateStage, samplers: Mapping[str, str]) -> int:
    """Number of samples of all rows: the total in the stage's progress."""
    return stage.samples * num_rows(stage, samplers)


def calls(stage: EvaluateStage, samplers: Mapping[str, str]) -> dict[str, int]:
    """Network -> network calls for one sample of every row, summed over its rows, with those for guidance.

    samplers: student -> name of its sampler.
    """
    fine = find_solver(stage.fine_solver).calls(stage.fine_steps)
    by = {"teacher": "euler", **samplers}  # the fine rows are added below
    found = {name: sum(network_calls(by[name], n) for n in each) for name, each in steps_of_rows(stage).items()}
    found |= {name: found[name] + fine for name in ("teacher", *stage.fine_students)}
    baselines = sum(find_solver(solver).calls(steps) for solver, steps in baseline_rows(stage, samplers))
    return {**found, "teacher": per_velocity(stage.guidance_scale) * (found["teacher"] + baselines)}
