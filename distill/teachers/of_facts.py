"""Teachers without weights, made from the facts about published models: for plans."""

from pathlib import Path

import torch
from torch import nn

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks import quantised
from distill.networks.velocity import TIME_SCALE
from distill.plans.facts import ModelFacts
from distill.spec.model import CheckpointTeacher, TeacherSpec
from distill.teachers import conditions
from distill.teachers.architectures import class_of, known
from distill.teachers.checkpoint import DTYPES
from distill.teachers.convention import Asked, Convention
from distill.teachers.loaded import LoadedTeacher, Packaging
from distill.teachers.network_field import InDtype, NetworkField


def teacher_of(model: ModelFacts, spec: TeacherSpec | None = None) -> LoadedTeacher:
    """The teacher, with a network on the meta device, and with prompts of the greatest length.

    spec: gives the size of the samples and the data type of the weights; None: the model's own size, and float32. The
    path is the linear one even if the model was trained on another, which hardly matters for the costs. InputError if
    the network does not make samples of this size.
    """
    own = spec if isinstance(spec, CheckpointTeacher) else CheckpointTeacher(path=model.title)
    convention, path = known()[model.network], Path(model.title)
    assert isinstance(convention, Convention)
    with torch.device("meta"):
        network: nn.Module = class_of(model.network)(**model.config)
    network = network.to(DTYPES[own.dtype]).eval().requires_grad_(False)
    size = tuple(own.size or model.pixels)
    if len(size) != len(model.pixels):
        words = "[height, width]" if len(model.pixels) == 2 else "[frames, height, width]"
        raise InputError(f"teacher.size: {model.title} makes samples of size {words}; give {len(model.pixels)} numbers")
    frames, side = convention.default_factors
    latent = (*((each - 1) // frames + 1 for each in size[:-2]), *(each // side for each in size[-2:]))
    fields = convention.fields(network.config)
    constants = convention.constants(network.config, Asked(size, embedded_guidance=own.embedded_guidance))
    needed = {name: each for name, each in fields.items() if name not in constants}
    prompts = conditions.planned(needed, 1, model.tokens)
    given = convention.conditioning(
        network.config, path, Asked(size, conditions=prompts, embedded_guidance=own.embedded_guidance)
    )
    convention.settled(network)
    if own.quantize is not None:
        quantised.quantize(network, convention.layers(network), "teacher.quantize")
    call = convention.call if own.dtype == "float32" else InDtype(convention.call, DTYPES[own.dtype])
    return LoadedTeacher(
        field=NetworkField(network, linear(), "velocity", TIME_SCALE, call=call),
        shape=convention.latent_shape(network.config, path, latent),
        num_classes=given.count,
        null_class=None,
        digest="",
        description=model.title,
        network=network,
        given=given,
        layers=convention.layers(network),
        of_image=convention.of_image,
        combine=convention.combine,
        packaging=Packaging(convention.pipeline_of(network.config), {}),
    )
