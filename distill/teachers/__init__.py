"""Teachers: frozen velocity fields, in closed form or from diffusers checkpoints."""

import torch

from distill.spec import GaussianTeacher, MixtureTeacher, TeacherSpec
from distill.teachers import checkpoint
from distill.teachers.analytic import gaussian_teacher, mixture_teacher
from distill.teachers.loaded import LoadedTeacher

__all__ = ["LoadedTeacher", "load"]


def load(spec: TeacherSpec, device: torch.device) -> LoadedTeacher:
    """The teacher of a spec; a checkpoint's network lies on `device`, closed forms follow their input."""
    if isinstance(spec, GaussianTeacher):
        return gaussian_teacher(spec)
    if isinstance(spec, MixtureTeacher):
        return mixture_teacher(spec)
    return checkpoint.load(spec, device)
