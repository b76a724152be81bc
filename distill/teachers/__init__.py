"""Teachers: frozen velocity fields, in closed form or from diffusers checkpoints."""

import torch

from distill.spec.model import GaussianTeacher, MixtureTeacher, TeacherSpec
from distill.teachers import checkpoint
from distill.teachers.analytic import gaussian_teacher, mixture_teacher
from distill.teachers.loaded import LoadedTeacher

__all__ = ["LoadedTeacher", "load_teacher"]


def load_teacher(spec: TeacherSpec, device: torch.device, *, probe: bool = True) -> LoadedTeacher:
    """The teacher of a spec; a checkpoint's network lies on `device`, closed forms follow their input.

    probe: call a checkpoint's network there, three times with one sample, and refuse it unless it can be called and its
    velocity is finite. Ranks do without: the command that checked their run has done it, and they may divide a teacher
    that is too large to be called on one CPU.
    """
    if isinstance(spec, GaussianTeacher):
        return gaussian_teacher(spec)
    if isinstance(spec, MixtureTeacher):
        return mixture_teacher(spec)
    return checkpoint.load(spec, device, probe=probe)
