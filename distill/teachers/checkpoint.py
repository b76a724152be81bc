"""Loads teachers from diffusers checkpoints: a pipeline folder, a single model folder or a hub id.

Only safetensors files are loaded and no code from the folder is run. The network classes of students are taken from
this package. `students.loaded` reads students through this module too.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.printing import say_error
from distill.flow.conditioning import ClassLabels, ConditionTable, WithGuidance, with_range
from distill.flow.draws import sample_noise
from distill.flow.guidance import cfg
from distill.flow.interpolants import Prediction, linear
from distill.networks import quantised
from distill.networks.critic import whole
from distill.networks.experts import Experts
from distill.networks.velocity import TIME_SCALE
from distill.protocols import Architecture, Codec, Cond, Conditioning, NetworkCall, VelocityField
from distill.spec.model import CheckpointTeacher
from distill.teachers import encoder_files, files, lora, pipeline_index, schedulers, single_file, weights
from distill.teachers.conditions import ConditionFile, encoder_of, planned
from distill.teachers.conditions import read as read_conditions
from distill.teachers.convention import Asked, Convention, sides_of_patch
from distill.teachers.describe import LINEAR_NETWORKS, Facts, describe
from distill.teachers.layout import CONFIG, INDEX, SECOND
from distill.teachers.loaded import LoadedTeacher, Packaging
from distill.teachers.network_field import EdmField, InDtype, NetworkField, VeField
from distill.teachers.read import Config, StudentFacts, lasting, parse, short
from distill.teachers.schedulers import EdmSchedule, Family, LinearSchedule, Schedule, VeSchedule, VpSchedule
from distill.teachers.variants import MERGE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBED = 64  # pixels per side of the sample that probes a U-Net, if the network can take that size
LARGE = 1e12  # multiplications of a call on the CPU above which a message is printed, because probing takes long
DEEPER = 16  # positions of a sample for one at which most weights of a U-Net are used, as they are at lower levels
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")


@dataclass(frozen=True)
class TeacherCheckpoint:
    """The network of a checkpoint, frozen and in evaluation mode, with the facts from its files."""

    network: nn.Module
    architecture: Architecture | Convention
    schedule: Schedule | None  # None: there is no scheduler config, or the network's class is in LINEAR_NETWORKS
    student: StudentFacts
    shape: tuple[int, ...]  # of one sample
    conditioning: Conditioning
    digest: str
    description: str
    license: str  # from its files; empty: not stated
    codec: Codec
    call: NetworkCall
    packaging: Packaging
    base_digest: str  # SHA-256 over the config and the weights of the network alone, with whatever options it was read


def load(spec: CheckpointTeacher, device: torch.device, *, probe: bool, prompts: int | None = None) -> LoadedTeacher:
    """Loads the network of a checkpoint as a velocity field in its own schedule. probe, prompts: see `load_teacher`."""
    if probe and spec.conditions is not None:
        encoder_files.refuse_other(spec, encoder_of(Path(spec.conditions)))
    found = read(spec, device, "velocity", prompts)
    field, convention = field_of(spec, found.network, found.schedule, found.call), found.architecture
    if probe:
        _probe(field, found, spec, device)
    return LoadedTeacher(
        field=field,
        shape=found.shape,
        num_classes=found.conditioning.count,
        null_class=null_class(found.conditioning),
        digest=found.digest,
        description=found.description,
        network=found.network,
        given=found.conditioning,
        layers=found.architecture.layers(found.network),
        guidance_scale=found.student.guidance_scale,
        unconditional=found.student.unconditional,
        license=found.license,
        codec=found.codec,
        of_image=convention.of_image if isinstance(convention, Convention) else whole,
        combine=convention.combine if isinstance(convention, Convention) else cfg,
        boundary=_boundary(found),
        packaging=found.packaging,
        base_digest=found.base_digest,
    )


def _boundary(found: TeacherCheckpoint) -> float | None:
    """The time in [0, 1] below which the second of two networks is called; None if there is one network."""
    if not isinstance(found.network, Experts):
        return None
    assert isinstance(found.schedule, LinearSchedule), "describe checks this"
    return found.network.boundary / found.schedule.time_scale


def read(spec: CheckpointTeacher, device: torch.device, kind: str, prompts: int | None = None) -> TeacherCheckpoint:
    """Reads a checkpoint. Raises InputError unless its network is of this kind, one of the keys of `NETWORKS`.

    prompts: see `load_teacher`.
    """
    if spec.is_of_hub:
        _described(spec, kind, prompts, download=False)  # the weights of an invalid checkpoint are not downloaded
    spec, parts, facts, conditions, conditioning = _described(spec, kind, prompts, download=True)
    architecture, content = facts.architecture, facts.content
    dtype = DTYPES[spec.dtype]
    network, digests = _network(spec, parts, facts, dtype)
    if isinstance(architecture, Convention):
        architecture.from_pipeline(network, facts.path)
    added = _with_lora(spec, network, architecture)
    if isinstance(architecture, Convention):
        architecture.settled(network)
    network = network.to(device).eval().requires_grad_(False)
    if spec.quantize is not None:
        if not isinstance(architecture, Convention):
            raise InputError(
                f"teacher.quantize: {_name(spec)} is not the network of a latent-space pipeline, and others cannot be "
                "quantised; remove it"
            )
        quantised.quantize(network, architecture.layers(network), "teacher.quantize")
    chosen, schedule = facts.chosen, facts.schedule
    base = {"config": lasting(content), "weights": digests, **_second(parts, facts), **added}
    told = {} if chosen is None else schedulers.described(chosen)
    identity = {
        **base,
        "scheduler": {name: value for name, value in told.items() if name != "_diffusers_version"},
        "prediction": spec.prediction,
        "null_class": null_class(conditioning),
        # Gives inverted schedules a new digest, because earlier versions read them wrongly.
        **({"inverted": True} if isinstance(schedule, LinearSchedule) and schedule.inverted else {}),
        **_asked(spec, conditions),
    }
    call = architecture.call if dtype == torch.float32 else InDtype(architecture.call, dtype)
    return TeacherCheckpoint(
        network=network,
        architecture=architecture,
        schedule=schedule,
        student=parts.student,
        shape=facts.shape,
        conditioning=conditioning,
        digest=_digest(identity),
        description=f"{facts.network_class.__name__} from {_name(spec)}",
        license=license_of(parts.root, parts.student),
        codec=facts.codec,
        call=call,
        packaging=_packaging(spec, parts, facts, conditioning),
        base_digest=_digest(base),
    )


def _digest(identity: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _described(
    spec: CheckpointTeacher, kind: str, prompts: int | None = None, *, download: bool
) -> tuple[CheckpointTeacher, files.Parts, Facts, ConditionFile | None, Conditioning]:
    """The spec with what the card of a student adds, the files, what configs say, and what the network takes."""
    parts = files.find(spec, download=download)
    facts = describe(spec, parts, kind)
    spec = spec.with_guidance(parts.student, parts.root)
    architecture, path, content = facts.architecture, facts.path, facts.content
    null = spec.null_class if spec.null_class is not None else parts.student.null_class
    conditions = None if spec.conditions is None else read_conditions(Path(spec.conditions))
    if isinstance(architecture, Convention):
        asked = Asked(facts.size, conditions, spec.embedded_guidance, null, parts.is_student)
        if conditions is None and prompts is not None and (fields := architecture.fields(content)):
            constants = architecture.constants(content, asked)
            conditions = planned({name: each for name, each in fields.items() if name not in constants}, prompts)
            asked = replace(asked, conditions=conditions)
        found = with_range(architecture.conditioning(content, path, asked), parts.student.guidance_range)
        assert found is not None
        return spec, parts, facts, conditions, found
    return spec, parts, facts, conditions, architecture.conditioning(content, path, null)


def _network(
    spec: CheckpointTeacher, parts: files.Parts, facts: Facts, dtype: torch.dtype
) -> tuple[nn.Module, list[str]]:
    """The network on the CPU, with the second one of its pipeline if that has two, and the digests of their files."""

    def loaded(folder: Path, content: Config) -> tuple[ModelMixin, list[str]]:
        paths = files.weights(folder, spec.variant)
        return weights.network(folder, content, facts.network_class, paths, dtype)

    if parts.single is not None:
        return single_file.network(parts.single, parts.model, facts.content, facts.network_class, dtype)
    network, digests = loaded(parts.model, facts.content)
    if facts.boundary is None or parts.pipeline is None:
        return network, digests
    folder = parts.pipeline / SECOND
    second, more = loaded(folder, parse(folder / CONFIG))
    return Experts(network, second, facts.boundary), digests + more


def _second(parts: files.Parts, facts: Facts) -> dict[str, object]:
    """What identifies the second network of a pipeline, besides its weights; empty if there is one network."""
    if facts.boundary is None or parts.pipeline is None:
        return {}
    return {"second": {"config": lasting(parse(parts.pipeline / SECOND / CONFIG)), "boundary": facts.boundary}}


def _with_lora(
    spec: CheckpointTeacher, network: nn.Module, architecture: Architecture | Convention
) -> dict[str, object]:
    """Adds the LoRA of the spec to the network, if there is one. Returns what identifies it."""
    if spec.lora is None:
        return {}
    if isinstance(network, Experts):
        raise InputError(
            f"teacher.lora={spec.lora}: {spec.where} is a pipeline with two networks, and a LoRA is of one of them; "
            f"{MERGE}"
        )
    convention = architecture if isinstance(architecture, Convention) else None
    return {
        "lora": {"digest": lora.merge(network, convention, Path(spec.lora), spec.lora_scale), "scale": spec.lora_scale}
    }


def _name(spec: CheckpointTeacher) -> str:
    """The name of a teacher in results, which must not depend on its location: the hub id, or the folder's name."""
    name = Path(spec.path).name if Path(spec.path).exists() else spec.path
    return name + spec.changes


def _asked(spec: CheckpointTeacher, conditions: ConditionFile | None) -> dict[str, object]:
    """The options of the spec that change what the network computes; those with their defaults are left out."""
    found = spec.model_dump(include={"size", "embedded_guidance", "dtype", "quantize"}, exclude_defaults=True)
    return found | ({} if conditions is None else {"conditions": conditions.digest})


def _packaging(spec: CheckpointTeacher, parts: files.Parts, facts: Facts, conditioning: Conditioning) -> Packaging:
    index = {} if parts.pipeline is None else parse(parts.pipeline / INDEX)
    options = pipeline_index.options_of(parts.pipeline_class, index)
    embedded, convention = None, facts.architecture
    constants = conditioning.constants if isinstance(conditioning, ConditionTable) else {}
    if isinstance(convention, Convention) and "guidance" in constants:
        embedded = convention.embedded_guidance if spec.embedded_guidance is None else spec.embedded_guidance
    changed = parts.is_student or parts.single is not None or bool(spec.lora or spec.variant)
    folder = None if changed else parts.pipeline
    return Packaging(parts.pipeline_class, _scheduler(spec, facts.schedule, facts.chosen), options, embedded, folder)


def _scheduler(spec: CheckpointTeacher, schedule: Schedule | None, chosen: Path | None) -> Config:
    """The content of the scheduler config that describes the network."""
    if schedule is None or chosen is None:
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": int(TIME_SCALE)}
    given = {} if spec.prediction is None or schedule.family == "linear" else {"prediction_type": spec.prediction}
    return {**schedulers.described(chosen), **given}


def field_of(
    spec: CheckpointTeacher, network: nn.Module, schedule: Schedule | None, call: NetworkCall
) -> NetworkField | EdmField | VeField:
    """The velocity field of a network in its schedule. Raises InputError if the schedule is not known."""
    if schedule is None:
        if isinstance(network, LINEAR_NETWORKS) or spec.prediction == "velocity":
            return NetworkField(network, linear(), "velocity", TIME_SCALE, call=call)
        raise InputError(
            f"teacher.path={spec.path} has no scheduler config, so its noise schedule is unknown; set "
            "teacher.scheduler to the folder of one, or teacher.prediction=velocity if the network uses the linear path"
        )
    if isinstance(schedule, VeSchedule):
        if spec.prediction is not None:
            raise InputError(
                f"teacher.prediction={spec.prediction} is not supported for the ve path, on which networks predict the "
                "score; remove it"
            )
        t_min, t_max = (2 * sigma / (1 + 2 * sigma) for sigma in (schedule.sigma_min, schedule.sigma_max))
        return VeField(network, (t_min, t_max), call)
    prediction = _prediction(spec, schedule.family, schedule.prediction)
    match schedule:
        case LinearSchedule():
            scale, inverted = schedule.time_scale, schedule.inverted
            return NetworkField(network, linear(), "velocity", scale, inverted=inverted, call=call)
        case EdmSchedule():
            t_min, t_max = (sigma / (1 + sigma) for sigma in (schedule.sigma_min, schedule.sigma_max))
            return EdmField(network, schedule.sigma_data, 1 if prediction == "epsilon" else -1, (t_min, t_max), call)
        case VpSchedule():
            if prediction == "epsilon" and schedule.zero_snr:
                raise InputError(
                    f"teacher.path={spec.path}: prediction epsilon does not work with rescale_betas_zero_snr, because "
                    "it does not determine the data at zero SNR; valid: sample, v_prediction"
                )
            return NetworkField(network, schedule.path, prediction, float(schedule.steps - 1), call=call)


def _prediction(spec: CheckpointTeacher, family: Family, configured: Prediction) -> Prediction:
    """The prediction type of the network. Raises InputError if it does not exist in this family of schedules."""
    given = spec.prediction or configured
    if given not in schedulers.PREDICTIONS[family]:
        raise InputError(
            f"teacher.prediction={given} is not supported for the {family} path; "
            f"valid: {', '.join(schedulers.PREDICTIONS[family])}"
        )
    return given


@torch.no_grad()
def _probe(field: VelocityField, found: TeacherCheckpoint, spec: CheckpointTeacher, device: torch.device) -> None:
    """Raises InputError if the field cannot be called, or is not finite at the start, middle or end of its time range.

    Makes three calls with one sample each, on the device of the network. The sample may be smaller than the network's
    own (see `small_shape`).
    """
    x = sample_noise(0, [0], small_shape(found.architecture, _config(found.network), found.shape)).to(device)
    cond = found.conditioning.collate(torch.zeros(1, dtype=torch.int64, device=device))
    if device.type == "cpu" and _multiplications(found, x, cond) > LARGE:
        say_error(
            f"teacher.path={spec.path}: testing its network on a sample of shape {list(x.shape[1:])}; this may take "
            "minutes"
        )
    first, last = field.t_range
    for t in (first, (first + last) / 2, last):
        velocity = _called(field, x, torch.tensor([t], device=device), cond, found.shape, spec)
        if not velocity.isfinite().all():
            embedding = _config(found.network).get("time_embedding_type")
            known = f" (its time_embedding_type is {embedding})" if embedding not in (None, "positional") else ""
            raise InputError(
                f"teacher.path={spec.path}: the velocity of {found.description} at t={t:.4g} contains NaN or "
                f"infinity{known}; use a network that works at all times from t={first:.4g} to t={last:.4g}"
            )


def small_shape(architecture: Architecture | Convention, config: Config, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the sample that probes a network with samples of this shape.

    It is small if possible, and the network accepts it exactly if it accepts samples of its own shape. A U-Net halves
    the size at each level, and on the way up the sizes must match again. Whether they do depends only on size modulo
    2^(levels - 1), which the small shape keeps. At the lowest level at least two pixels per side remain. For other
    networks, see `Convention.small`.
    """
    if "down_block_types" not in config:
        return architecture.small(config, shape) if isinstance(architecture, Convention) else shape
    step = 1 << (len(config["down_block_types"]) - 1)
    least = max(PROBED, 2 * step)
    return (shape[0], *(side if side <= least else least + (side - least) % step for side in shape[1:]))


def _config(network: nn.Module) -> Config:
    """The config of a network, or that of the first of two."""
    return dict((network.transformer if isinstance(network, Experts) else network).config)


def _multiplications(found: TeacherCheckpoint, x: Tensor, cond: Cond) -> float:
    """About how many multiplications a call with the sample x takes: parameters times tokens."""
    config, positions = _config(found.network), x[0, 0].numel()
    if "down_block_types" in config:
        tokens = positions / DEEPER
    else:
        patch = sides_of_patch(config)
        tokens = positions / (patch[0] * patch[1] ** 2)
    tokens += sum(each.shape[1] for each in cond.values() if each.ndim == 3)
    return tokens * sum(p.numel() for p in found.network.parameters())


def _called(
    field: VelocityField, x: Tensor, t: Tensor, cond: Cond, shape: tuple[int, ...], spec: CheckpointTeacher
) -> Tensor:
    try:
        return field(x, t, cond)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        tried = "" if x.shape[1:] == shape else f" (tried: {list(x.shape[1:])})"
        files = "its config.json" + ("" if spec.conditions is None else f", or the conditions in {spec.conditions}")
        raise InputError(
            f"teacher.path={spec.path}: its network cannot be called with a sample of shape {list(shape)}{tried}: "
            f"{short(str(error), 200)}; correct {files}"
        ) from error


def license_of(folder: Path, student: StudentFacts) -> str:
    """The licence named by a checkpoint's distill.json or by the metadata of its model card; "" if none is valid."""
    found: str | None = student.license
    path = folder / "README.md"
    if not found and path.is_file():
        with path.open(errors="replace") as card:
            head = card.read(1 << 20).partition("\n---")[0]
        told = dict(re.findall(r"^(license|license_name):[ \"']*([^\"'\n]*?)[ \"']*$", head, re.MULTILINE))
        found = told.get("license_name") if told.get("license") == "other" else told.get("license")
    return found if found and LICENSE.fullmatch(found) else ""


def null_class(conditioning: Conditioning) -> int | None:
    """The class id of the null condition; None if there is none."""
    given = conditioning.given if isinstance(conditioning, WithGuidance) else conditioning
    return given.null_class if isinstance(given, ClassLabels) else None
