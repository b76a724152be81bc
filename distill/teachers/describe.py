"""What the files of a checkpoint say about its network, without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from diffusers import ModelMixin
from pydantic import Field

from distill.core.errors import InputError
from distill.core.text import suggest
from distill.flow.codecs import PIXELS
from distill.networks.architectures import NETWORKS
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.networks.velocity_mlp import VelocityMLP
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.protocols import Architecture, Codec
from distill.spec.model import CheckpointTeacher
from distill.teachers import architectures, files, schedulers
from distill.teachers.architectures.unet import UNet, check_pixels
from distill.teachers.codecs import LatentCodec, latent_size, pixel_size
from distill.teachers.convention import Convention
from distill.teachers.layout import CONFIG, INDEX, SECOND
from distill.teachers.read import Config, Read, checked, parse, short
from distill.teachers.schedulers import EdmSchedule, LinearSchedule, Schedule, VeSchedule, VpSchedule

# Classes that are always called on the linear path.
LINEAR_NETWORKS = (VelocityUNet2DModel, VelocityEdmUNet2DModel, VelocityMLP)
PIXEL_PIPELINE = ["scheduler", "unet"]  # the components of a pipeline in pixel space
LATENT_PIPELINE = ["scheduler", "unet", "vqvae"]  # and of unconditional latent diffusion
OF_CONVENTIONS = {"size", "conditions", "embedded_guidance", "vae"}  # options of teachers that have a convention


@dataclass(frozen=True)
class Facts:
    """The network of a checkpoint, before its weights are read."""

    path: Path  # its config.json
    content: Config
    network_class: type[ModelMixin]
    architecture: Architecture | Convention
    schedule: Schedule | None  # None: there is no scheduler config, or the network's class is in LINEAR_NETWORKS
    chosen: Path | None  # the scheduler config that `schedule` was read from
    shape: tuple[int, ...]  # of one sample
    codec: Codec
    size: tuple[int, ...]  # of one sample in pixels, [frames,] height, width; empty for vectors
    boundary: float | None  # if there are two networks: the time from which on the first one is called


class _Index(Read):
    """The options in model_index.json that are read."""

    boundary_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None


def describe(spec: CheckpointTeacher, parts: files.Parts, kind: str) -> Facts:
    """Reads and checks the configs of a checkpoint. InputError if its network is not supported, or not of this kind."""
    if parts.student.kind != kind:
        raise InputError(
            f"teacher.path={spec.path} is a student of kind {short(parts.student.kind)}; valid teachers: {kind}"
        )
    path = parts.model / CONFIG
    content = parse(path)
    network_class = _network_class(spec, path, content, kind)
    architecture = architectures.known()[network_class.__name__]
    _refuse_pipeline(spec, parts, network_class, architecture)
    linear_by_construction = network_class in LINEAR_NETWORKS
    chosen = None if linear_by_construction else parts.chosen
    schedule = None if chosen is None else _schedule(spec, chosen, parts.scheduler)
    codec: Codec = PIXELS
    autoencoder = parts.autoencoder if spec.vae is None else Path(spec.vae)
    if isinstance(architecture, Convention):
        if chosen is not None:
            architecture.check_scheduler(schedulers.described(chosen), chosen)
        factors = architecture.default_factors
        if autoencoder is not None:
            codec = LatentCodec.of(autoencoder, spec.variant)
            factors = codec.factors
        latent = tuple(parts.student.shape[1:]) or None
        if spec.size is not None:
            latent = latent_size(tuple(spec.size), factors, "teacher.size")
        shape = architecture.latent_shape(content, path, latent)
        if isinstance(codec, LatentCodec):
            _refuse_other_channels(codec, shape, path)
        size = pixel_size(shape[1:], factors)
    else:
        shape = architecture.shape(content, path)
        size = shape[1:]
        used = set()
        if isinstance(architecture, UNet) and autoencoder is not None:
            codec, used = LatentCodec.of(autoencoder, spec.variant), {"vae"}
            _refuse_other_channels(codec, shape, path)
            size = pixel_size(size, codec.factors)
        elif isinstance(architecture, UNet) and not parts.is_student:
            check_pixels(shape[0], path)
        options = spec.model_dump(include=OF_CONVENTIONS - used, exclude_none=True)
        for name, value in options.items() if not parts.is_student else ():
            raise InputError(
                f"teacher.{name}={value} has no effect: {spec.path} has a {network_class.__name__}, whose samples "
                "and conditions are given by its config.json; remove it"
            )
    if isinstance(schedule, VeSchedule) and (isinstance(architecture, Convention) or not codec.is_identity):
        raise InputError(
            f"{chosen}: schedulers of the ve path are for images in [0, 1], but the {network_class.__name__} of "
            f"{spec.path} works on latents; set teacher.scheduler to the folder of a scheduler of another path"
        )
    return Facts(
        path,
        content,
        network_class,
        architecture,
        schedule,
        chosen,
        shape,
        codec,
        size,
        _boundary(parts, schedule),
    )


def _refuse_other_channels(codec: LatentCodec, shape: tuple[int, ...], path: Path) -> None:
    """InputError if an autoencoder makes latents of another number of channels than samples of this shape have."""
    channels = codec.shape((0, *pixel_size(shape[1:], codec.factors)))[0]
    if channels != shape[0]:
        raise InputError(
            f"{path}: this network works on latents of {shape[0]} channels, but the autoencoder in {codec.folder} "
            f"makes latents of {channels} channels; give the autoencoder that the network was trained with"
        )


def _refuse_pipeline(
    spec: CheckpointTeacher,
    parts: files.Parts,
    network_class: type[ModelMixin],
    architecture: Architecture | Convention,
) -> None:
    """InputError if the network belongs to a pipeline that calls it in another way."""
    if isinstance(architecture, Convention):
        if parts.pipeline_class and parts.pipeline_class not in architecture.pipelines:
            raise InputError(
                f"teacher.path={spec.path} is a {short(parts.pipeline_class)}, which is not supported, because it "
                f"calls its {network_class.__name__} in another way; valid: {', '.join(architecture.pipelines)}"
            )
    elif parts.pipeline is not None and list(parts.components) not in (PIXEL_PIPELINE, LATENT_PIPELINE):
        inside = "" if parts.pipeline == parts.folder else f"part of {parts.pipeline}, "
        raise InputError(
            f"teacher.path={spec.path} is {inside}a pipeline with the components "
            f"{short(', '.join(parts.components)) or 'none'}; valid for a {network_class.__name__}: pixel-space "
            "pipelines with only scheduler and unet, or with vqvae as the autoencoder of its latents"
        )


def _boundary(parts: files.Parts, schedule: Schedule | None) -> float | None:
    """The time of the boundary between the two networks of a pipeline; None if it has one."""
    if parts.pipeline is None or SECOND not in parts.components:
        return None
    index = parts.pipeline / INDEX
    ratio = checked(_Index, parse(index), index).boundary_ratio
    if ratio is None or not isinstance(schedule, LinearSchedule):
        raise InputError(
            f"{index}: this pipeline has two networks, so it needs a boundary_ratio between 0 and 1, and a scheduler "
            "of the linear path"
        )
    return ratio * schedule.time_scale


def _network_class(spec: CheckpointTeacher, path: Path, config: Config, kind: str) -> type[ModelMixin]:
    """The network class that a config names.

    Raises InputError if it is not supported, or if the spec has options that have no effect on it.
    """
    name, ours = architectures.class_name(config), {each.__name__: each for each in NETWORKS[kind]}
    taken = {each.__name__ for members in NETWORKS.values() for each in members}
    # Networks of latent-space pipelines can be students of any kind; those of other packages are velocity fields.
    others = [
        each
        for each, architecture in architectures.known().items()
        if each not in taken and (kind == "velocity" or isinstance(architecture, Convention))
    ]
    if not isinstance(name, str) or name not in [*ours, *others]:
        raise InputError(
            f"{path}: network class {short(str(name))} is not supported; {suggest(short(str(name)), [*ours, *others])}"
        )
    found = ours.get(name) or architectures.class_of(name)
    if found in LINEAR_NETWORKS:
        for setting, value in {"prediction": spec.prediction, "scheduler": spec.scheduler}.items():
            if value is not None:
                raise InputError(
                    f"teacher.{setting}={value} has no effect: {spec.path} is a {name}, which always predicts the "
                    "velocity of the linear path; remove it"
                )
    return found


def _schedule(spec: CheckpointTeacher, chosen: Path, own: Path | None) -> Schedule:
    """Reads the schedule of the scheduler config `chosen`.

    Raises InputError if it contradicts `own`, the checkpoint's own config. What `own` does not tell, because its class
    or an option is not known, is not compared.
    """
    schedule = schedulers.read(chosen)
    if own is None or own == chosen:
        return schedule
    given, found = f"teacher.scheduler={spec.scheduler} describes", f"the checkpoint's own scheduler ({own})"
    told = schedulers.described(own)
    predicted = told.get("prediction_type")
    predicted = "velocity" if predicted == "flow_prediction" else predicted
    name = told.get("_class_name")
    if isinstance(name, str) and name in schedulers.KINDS:
        before = schedulers.read(own, strict=False)
        predicted = before.prediction
        if before.family != schedule.family:
            raise InputError(
                f"{given} the {schedule.family} path, but {found} the {before.family} path; remove teacher.scheduler"
            )
        if isinstance(before, LinearSchedule) and before != schedule:
            raise InputError(
                f"teacher.scheduler={spec.scheduler} and the checkpoint's own scheduler ({own}, a {name}) disagree on "
                "the scale or direction of time, or on the sign of the output; remove teacher.scheduler"
            )
        if _scale(before) != _scale(schedule):
            raise InputError(
                f"{given} {_scale(schedule)}, but {found} {_scale(before)}; remove teacher.scheduler, or correct it"
            )
    if spec.prediction is None and predicted is not None and predicted != schedule.prediction:
        raise InputError(
            f"{given} a network that predicts {schedule.prediction}, but {found} one that predicts "
            f"{short(str(predicted))}; remove teacher.scheduler, or say what is predicted in teacher.prediction"
        )
    return schedule


def _scale(schedule: Schedule) -> str:
    """The option besides the path that changes how the network is called, as a text to compare and to show."""
    match schedule:
        case VpSchedule():
            return f"num_train_timesteps={schedule.steps}"
        case EdmSchedule():
            return f"sigma_data={schedule.sigma_data}"
    return ""
