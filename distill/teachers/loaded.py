"""A loaded teacher: a frozen velocity field, with the facts needed to use it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as new_field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange
from distill.flow.codecs import PIXELS
from distill.flow.conditioning import ClassLabels, ConditionTable, embeds_guidance, of_classes
from distill.flow.fields import Indexed
from distill.flow.guidance import Autoguided, Combine, Guided, Scaled, cfg, combination, two_scales
from distill.networks.critic import whole
from distill.networks.experts import Experts
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.protocols import Codec, Cond, Conditioning, LayerOutput, OfImage, VelocityField
from distill.spec.guidancespec import FieldSettings, GuidanceSpec


@dataclass(frozen=True)
class Packaging:
    """What the folder of a student has from its teacher's pipeline, if both have the same network class."""

    pipeline: str  # name of the pipeline class; "" if there was only the network
    scheduler: Mapping[str, Any]  # content of the scheduler config
    options: Mapping[str, Any] = new_field(default_factory=dict)  # of the pipeline class, as in model_index.json
    embedded_guidance: float | None = None  # that the network gets as an input; None: none, or one for each condition
    folder: Path | None = None  # of the pipeline, if the network has the weights that are stored there


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher of any kind after loading. Implements `protocols.Teacher`."""

    field: VelocityField
    shape: tuple[int, ...]  # of one sample
    num_classes: int | None  # without the null class; None: unconditional
    null_class: int | None  # class id of the null condition; None: there is none
    digest: str  # SHA-256 over configuration and weights
    description: str  # one line, for messages
    network: nn.Module | None = None  # the ModelMixin behind a checkpoint; None: closed form
    exact_data: Callable[[int, Sequence[int]], Tensor] | None = None  # (seed, indices) -> exact samples
    guidance_scale: float = 1.0  # scale of the guided velocity that the network was trained to predict; 1: no guidance
    unconditional: bool = True  # whether the null class, if there is one, was trained
    license: str = ""  # the licence, which also applies to its students; empty: not known
    given: Conditioning | None = None  # None: class labels, or no conditioning if there are no classes
    codec: Codec = PIXELS
    layers: Sequence[str] = ()  # names of the layers that `features` accepts, in the order of the network
    of_image: OfImage = whole  # what belongs to the sample in a layer's output
    combine: Combine = cfg  # guidance as the teacher's own pipeline does it
    boundary: float | None = None  # time below which the second of two networks is called; None: there is one network
    packaging: Packaging | None = None
    base_digest: str = ""  # SHA-256 over config and weights alone, whatever options are given; empty: no checkpoint
    weak: "LoadedTeacher | None" = None  # a worse model of the same data, for autoguidance
    form: GuidanceSpec | None = None  # how `guided` guides; None: classifier-free guidance at all times

    @property
    def conditioning(self) -> Conditioning:
        return self.given or of_classes(self.num_classes, self.null_class)

    def null(self, cond: Cond) -> Cond:
        """Returns the null condition, for as many rows as `cond` has. Raises InputError if there is none."""
        if not self.conditioning.has_null:
            if isinstance(self.given, ConditionTable):
                raise InputError(
                    f"{self.description} has no condition for the unconditional call, which guidance needs; use "
                    "guidance_scale: 1, or make the file of teacher.conditions again with `distill encode`"
                )
            raise InputError(
                f"{self.description} has no class id for the unconditional call, which guidance needs; "
                "use guidance_scale: 1, or set teacher.null_class to that class id"
            )
        return self.conditioning.null(cond)

    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]:
        """Returns the outputs of these layers for x_t [B, ...] at t [B], each [B, ...]. Gradients flow to x_t.

        Only what belongs to the samples is returned, without tokens of prompts.

        Raises InputError for a layer that is not in `layers`, and for closed-form teachers.
        """
        unknown = [name for name in layers if name not in self.layers]
        if unknown or self.network is None:
            why = "it has two networks" if isinstance(self.network, Experts) else "it is known in closed form"
            valid = ", ".join(self.layers) or f"none, because {why}"
            raise InputError(f"{self.description} has no layer {unknown[0] if unknown else ''}; valid: {valid}")
        found: dict[str, LayerOutput] = {}

        def keep(name: str, module: nn.Module, inputs: object, output: LayerOutput) -> None:
            found[name] = output

        network = self.network.network if isinstance(self.network, VelocityEdmUNet2DModel) else self.network
        hooks = [network.get_submodule(n).register_forward_hook(partial(keep, n)) for n in dict.fromkeys(layers)]
        try:
            self.field(x_t, t, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return [self.of_image(self.network, found[name], x_t, cond) for name in layers]

    def indexed(self, settings: FieldSettings) -> VelocityField:
        """Like `field_with`, but called with the index of each sample's condition. Used to solve the paths of pairs."""
        field = self.field_with(settings)
        return field if self.given is None or isinstance(self.given, ClassLabels) else Indexed(field, self.given)

    def guided(self, guidance_scale: float | GuidanceRange) -> VelocityField:
        """Returns the field with guidance, as recipes call it. With scale 1, it is the field itself.

        With a range of scales, each sample has its own, cond["guidance_scale"]; networks that embed the scale get it in
        cond["guidance"], and are called once. If there is an interval, samples at
        other times take a second row, too, whose result is not used: then calls do not wait for the device.

        Raises InputError if there is no null condition, or if it was not trained.
        """
        if isinstance(guidance_scale, tuple) and embeds_guidance(self.conditioning):
            if self.form is not None:
                raise InputError(
                    f"guidance: has no effect, because {self.description} takes the guidance scale as an input and is "
                    "called once; remove it, or give one number as the scale"
                )
            return self.field
        scale = guidance_scale[1] if isinstance(guidance_scale, tuple) else guidance_scale
        field = self.field_with(FieldSettings(scale, self.form))
        by_sample = isinstance(guidance_scale, tuple)
        return field.for_training(by_sample=by_sample) if isinstance(field, Guided | Autoguided) else field

    def field_with(self, settings: FieldSettings) -> VelocityField:
        """Returns the field with guidance and epsilon scaling. Without either, it is the field itself.

        Raises InputError as `guided` does, and if the settings do not fit the teacher or its weak model.
        """
        field = self._guided(settings)
        return field if settings.epsilon_scale == 1 else Scaled(field, settings.epsilon_scale)

    def identity_of(self, settings: FieldSettings) -> str:
        """Text that is equal for equal settings of this teacher; see `FieldSettings.identity`."""
        return settings.identity(self.weak.digest if self.weak is not None and settings.form.is_auto else None)

    def _guided(self, settings: FieldSettings) -> VelocityField:
        scale, form = settings.guidance_scale, settings.form
        if scale == 1:
            return self.field
        if form.is_auto:
            return Autoguided(self.field, self._weak().field, scale, settings.interval)
        if not self.conditioning.has_null:
            self.null({})  # raises the error of `null` before any computation
        if not self.unconditional:
            raise InputError(
                f"{self.description} has no unconditional prediction, because it was trained only on its teacher's "
                "outputs; use guidance_scale: 1, or guide a teacher trained on data"
            )
        if form.form == "rescaled" and math.prod(self.shape) < 2:
            raise InputError(
                f"{self.description} makes single numbers, which have no standard deviation; guidance of form: "
                "rescaled needs samples of at least two values"
            )
        combine = combination(form) or self.combine
        if form.guidance_scale_2 is not None:
            if self.boundary is None:
                raise InputError(
                    f"guidance.guidance_scale_2: {form.guidance_scale_2:g} has no effect, because {self.description} "
                    "is one network; remove it"
                )
            combine = two_scales(combine, self.boundary, form.guidance_scale_2)
        return Guided(self.field, self.null, scale, combine, settings.interval)

    def _weak(self) -> "LoadedTeacher":
        """The weak model. InputError if it makes other samples, or takes other conditions."""
        assert self.weak is not None, "autoguidance needs a weak model"
        ours, theirs = (
            f"samples of shape {list(each.shape)} with {each.num_classes or 'no'} classes" for each in (self, self.weak)
        )
        if ours != theirs:
            raise InputError(
                f"the weak model ({self.weak.description}) makes {theirs}, but the teacher ({self.description}) makes "
                f"{ours}; use a weak model of the same data"
            )
        packagings = [each.packaging for each in (self, self.weak)]
        mine, other = (None if each is None else each.embedded_guidance for each in packagings)
        if other is not None and mine is not None and mine != other:
            raise InputError(
                f"the weak model ({self.weak.description}) takes the embedded guidance {other:g}, but the teacher "
                f"({self.description}) {mine:g}, and both are called with one value; set teacher.embedded_guidance to "
                f"{other:g}, or use another weak model"
            )
        return self.weak
