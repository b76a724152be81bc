"""What training will hold in memory, stage by stage, before anything runs: from networks that are built and dropped."""

from pathlib import Path

import torch

from distill import data as datasets
from distill import memory, registry, teachers, workflow
from distill.card import SAMPLERS
from distill.data import DataSet
from distill.guard import InputError
from distill.interpolants import linear
from distill.protocols import Copy, Trained
from distill.sharded import Zero
from distill.spec import RunSpec, TrainStage
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import KINDS, LoadedStudent
from distill.students.velocity import TIME_SCALE, VelocityStudent
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import NetworkField

Student = LoadedTeacher | LoadedStudent  # one that another stage may start from


def estimate(spec: RunSpec, base: Path) -> dict[str, dict[str, int]]:
    """Bytes of a process by stage and kind: those of `memory.predict`, and "teacher". Activations come on top.

    Of a spec that has been checked. A stage whose networks cannot be told yet is left out.
    """
    found: dict[str, dict[str, int]] = {}
    students: dict[str, Student] = {}
    teacher = None if spec.teacher is None else teachers.load(spec.teacher, torch.device("cpu"))
    data = datasets.load(spec.data, spec.seed, keep=False)
    for name, stage in spec.stages.items():
        if isinstance(stage, TrainStage):
            try:
                found[name], students[name] = _stage(spec, stage, base, teacher, data, students)
            except InputError:
                continue  # the stage itself will say so
    return found


def _stage(
    spec: RunSpec,
    stage: TrainStage,
    base: Path,
    teacher: LoadedTeacher | None,
    data: DataSet | None,
    students: dict[str, Student],
) -> tuple[dict[str, int], Student]:
    launch = spec.launch
    module, config = registry.load(stage.recipe, base), workflow.recipe_config(stage, base)
    given = _found(students, stage.teacher) if stage.teacher is not None else teacher
    given = given if "teacher" in config.needs else None
    if isinstance(given, LoadedTeacher):
        given = teacher_on_linear_path(given)
    if isinstance(given, LoadedStudent):
        raise InputError(f"{given.description} is no teacher")
    samples = given if "pairs" in config.needs or data is None else data
    assert samples is not None, "workflow.check lets no such spec through"
    origin = _found(students, stage.init) if stage.init is not None else given
    init = StudentInit(origin, stage.network, samples.shape, samples.num_classes, 0, given, stage.dropout)
    roles = module.Recipe(config, given).networks(init)
    trained = {name: role.module for name, role in roles.items() if isinstance(role, Trained)}
    sizes = {name: [p.numel() for p in network.parameters()] for name, network in trained.items()}
    copies = [role.of for role in roles.values() if isinstance(role, Copy)]
    zero = Zero(launch.zero_stage, launch.divide_teacher, launch.zero_persistence_threshold, launch.offload_optimizer)
    bytes_ = memory.predict(sizes, copies, len(stage.ema_half_lives), launch.world_size, zero)
    if given is not None and given.network is not None:
        whole = memory.FLOAT * sum(p.numel() for p in given.network.parameters())
        bytes_["teacher"] = whole // launch.world_size if launch.divide_teacher else whole
    return bytes_, _pretend(trained["student"], init)


def _found(students: dict[str, Student], name: str) -> Student:
    if name not in students:
        raise InputError(f"the networks of stage '{name}' are not known")
    return students[name]


def _pretend(student: torch.nn.Module, init: StudentInit) -> Student:
    """An untrained student, as the stages that follow would load it."""
    facts = (init.shape, init.num_classes, init.null_class, "", "a student")
    for kind, each in KINDS.items():
        if kind != "velocity" and isinstance(student, each):
            return LoadedStudent(student, SAMPLERS[kind][0], {}, *facts)
    assert isinstance(student, VelocityStudent)
    network = student.network.eval().requires_grad_(False)
    return LoadedTeacher(NetworkField(network, linear(), "velocity", TIME_SCALE), *facts, network)
