"""Teachers: frozen velocity fields, in closed form or from diffusers checkpoints."""

import torch

from distill.spec.model import GaussianTeacher, MixtureTeacher, TeacherSpec
from distill.teachers import checkpoint
from distill.teachers.analytic import gaussian_teacher, mixture_teacher
from distill.teachers.loaded import LoadedTeacher

__all__ = ["LoadedTeacher", "load_teacher"]


def load_teacher(
    spec: TeacherSpec, device: torch.device, *, probe: bool = True, prompts: int | None = None
) -> LoadedTeacher:
    """Loads the teacher of a spec. The network of a checkpoint is moved to `device`.

    Closed-form teachers compute on the device of their input.

    probe: call a checkpoint's network on `device` with one sample at three times. Raises InputError if it cannot be
    called or its velocity is not finite. Ranks skip this: the command that validated their run has done it, and ranks
    may shard a teacher that is too large to be called on one CPU.
    prompts: the number of prompts of a cache that is not made yet. A teacher that takes prompts, and has no
    `conditions`, is loaded with stand-ins of their embeddings; its digest is then not that of a run.
    """
    if isinstance(spec, GaussianTeacher):
        return gaussian_teacher(spec)
    if isinstance(spec, MixtureTeacher):
        return mixture_teacher(spec)
    return checkpoint.load(spec, device, probe=probe, prompts=prompts)
