"""What training will hold in memory, stage by stage, before anything runs: from networks that are built and dropped."""

from collections.abc import Mapping
from dataclasses import dataclass
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

CPU = torch.device("cpu")
Student = LoadedTeacher | LoadedStudent  # one that another stage may start from


@dataclass(frozen=True)
class Built:
    """The networks of a train stage, untrained."""

    student: Student
    """as the stages that follow would load it"""
    sizes: dict[str, list[int]]
    """elements of the parameters of each that is trained"""
    copies: list[str]
    """whose target copies there are"""
    teacher: LoadedTeacher | None
    """whom the recipe calls"""


def estimate(spec: RunSpec, base: Path) -> dict[str, dict[str, int]]:
    """Bytes of a process by stage and kind: those of `memory.predict`, and "teacher". Activations come on top.

    Of a spec that has been checked. A stage whose networks cannot be told yet is left out.
    """
    teacher = None if spec.teacher is None else teachers.load(spec.teacher, CPU, probe=False)
    return {name: _bytes(spec, name, built) for name, built in build(spec, base, teacher).items()}


def build(spec: RunSpec, base: Path, teacher: LoadedTeacher | None) -> dict[str, Built]:
    """The networks of each train stage, whose teacher is the spec's where it names none; as far as they can be told."""
    found: dict[str, Built] = {}
    data = datasets.load(spec.data, spec.seed, keep=False)
    for name, stage in spec.stages.items():
        if isinstance(stage, TrainStage):
            try:
                found[name] = _stage(stage, base, teacher, data, found)
            except InputError:
                continue  # the stage itself will say so
    return found


def _stage(
    stage: TrainStage, base: Path, teacher: LoadedTeacher | None, data: DataSet | None, found: Mapping[str, Built]
) -> Built:
    module, config = registry.load(stage.recipe, base), workflow.recipe_config(stage, base)
    given = _student(found, stage.teacher) if stage.teacher is not None else teacher
    given = given if "teacher" in config.needs else None
    if isinstance(given, LoadedTeacher):
        given = teacher_on_linear_path(given)
    if isinstance(given, LoadedStudent):
        raise InputError(f"{given.description} is no teacher")
    samples = given if "pairs" in config.needs or data is None else data
    assert samples is not None, "workflow.check lets no such spec through"
    origin = _student(found, stage.init) if stage.init is not None else given
    init = StudentInit(origin, stage.network, samples.shape, samples.num_classes, 0, given, stage.dropout)
    roles = module.Recipe(config, given).networks(init)
    trained = {name: role.module for name, role in roles.items() if isinstance(role, Trained)}
    sizes = {name: [p.numel() for p in network.parameters()] for name, network in trained.items()}
    copies = [role.of for role in roles.values() if isinstance(role, Copy)]
    return Built(_pretend(trained["student"], init), sizes, copies, given)


def _bytes(spec: RunSpec, name: str, built: Built) -> dict[str, int]:
    launch, stage = spec.launch, spec.stages[name]
    assert isinstance(stage, TrainStage)
    zero = Zero(launch.zero_stage, launch.divide_teacher, launch.zero_persistence_threshold, launch.offload_optimizer)
    averages = len(stage.ema_half_lives)
    bytes_ = memory.predict(built.sizes, built.copies, averages, launch.world_size, zero)
    if built.teacher is not None and built.teacher.network is not None:
        whole = memory.FLOAT * sum(p.numel() for p in built.teacher.network.parameters())
        bytes_["teacher"] = whole // launch.world_size if launch.divide_teacher else whole
    return bytes_


def _student(found: Mapping[str, Built], name: str) -> Student:
    if name not in found:
        raise InputError(f"the networks of stage '{name}' are not known")
    return found[name].student


def _pretend(student: torch.nn.Module, init: StudentInit) -> Student:
    """An untrained student, as the stages that follow would load it."""
    facts = (init.shape, init.num_classes, init.null_class, "", "a student")
    for kind, each in KINDS.items():
        if kind != "velocity" and isinstance(student, each):
            return LoadedStudent(student, SAMPLERS[kind][0], {}, *facts)
    assert isinstance(student, VelocityStudent)
    network = student.network.eval().requires_grad_(False)
    return LoadedTeacher(NetworkField(network, linear(), "velocity", TIME_SCALE), *facts, network)
