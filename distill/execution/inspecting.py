"""What the files of a teacher say about it, without loading its weights: for `distill inspect` and `distill init`."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distill.core.errors import InputError
from distill.flow.conditioning import ClassLabels
from distill.flow.interpolants import Interpolant
from distill.flow.solvers import on_linear_path
from distill.protocols import Conditioning
from distill.spec.model import CheckpointTeacher
from distill.teachers import checkpoint, files, overview, schedulers, weights
from distill.teachers import conditions as condition_files
from distill.teachers.codecs import LatentCodec
from distill.teachers.convention import Asked, Convention
from distill.teachers.describe import Facts, describe
from distill.teachers.layout import CONFIG, INDEX, SECOND
from distill.teachers.read import parse, short
from distill.training import memory
from distill.training.plain import PLAIN

HALF = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class InspectedNetwork:
    """A network of a teacher. dtypes: of its stored weights, with the number of tensors of each; empty: no weights."""

    folder: str
    parameters: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class InspectedSchedule:
    """The path that the network was trained on. options: those of its family."""

    family: str
    scheduler: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class InspectedAutoencoder:
    """Frames and pixels per side that become one: (temporal, spatial)."""

    name: str
    factors: Sequence[int]


@dataclass(frozen=True)
class InspectedGuidance:
    """Guidance as in the pipeline. scale: its default in u + scale (c - u), where 1 is no second call.

    embedded: the scale that the network takes as an input; None: it takes none.
    has_null: whether the condition of the second call is known; None: it depends on the file of teacher.conditions.
    """

    words: str
    scale: float
    embedded: float | None
    has_null: bool | None


@dataclass(frozen=True)
class InspectedTeacher:
    """The facts of a teacher.

    shape: of one sample. size: of one sample in pixels, [frames,] height, width; empty for vectors.
    conditions: the shape of each field for one sample, in which None is any length; or the number of classes.
    t_range: times of the linear path for which the network was trained; None: the schedule is not known.
    memory: bytes. to_set: options of the teacher that must, or may, be set in a spec.
    takes_size: whether teacher.size sets the size of its samples. recomputes: whether its activations can be
    recomputed. sizes: number of elements of each parameter.
    """

    path: str
    network: str
    networks: Sequence[InspectedNetwork]
    pipeline: str
    prediction: str
    schedule: InspectedSchedule | None
    shape: Sequence[int]
    size: Sequence[int]
    autoencoder: InspectedAutoencoder | None
    conditions: Mapping[str, Sequence[int | None]]
    classes: int | None
    text_encoders: Mapping[str, str]
    guidance: InspectedGuidance
    t_range: tuple[float, float] | None
    license: str
    memory: Mapping[str, int]
    to_set: Mapping[str, str]
    is_latent: bool
    takes_size: bool
    recomputes: bool
    sizes: Sequence[int]

    @property
    def parameters(self) -> int:
        """Number of parameters of all its networks."""
        return sum(each.parameters for each in self.networks)

    @property
    def is_stored_in_half(self) -> bool:
        """Whether all weights are stored in bfloat16."""
        return all(set(each.dtypes) == {"BF16"} for each in self.networks)


def inspect(spec: CheckpointTeacher) -> InspectedTeacher:
    """Reads the configs and the headers of the weights. InputError if the teacher is not supported, or is damaged.

    Of a hub id, the configs are downloaded if they are not in the cache.
    """
    parts = files.find(spec, download=False)
    to_set: dict[str, str] = {}
    if parts.chosen is not None:
        try:
            schedulers.read(parts.chosen)
        except InputError as error:
            to_set["scheduler"] = str(error)
            parts = dataclasses.replace(parts, scheduler=None, chosen=None)
    facts = describe(spec, parts, "velocity")
    spec = spec.with_guidance(parts.student, parts.root)
    networks, empty = _networks(parts, facts, spec)
    field = None
    try:
        field = on_linear_path(checkpoint.field_of(spec, empty[0], facts.schedule, facts.architecture.call))
    except InputError as error:
        if facts.schedule is not None:
            raise
        to_set.setdefault("scheduler", str(error))
    null = spec.null_class if spec.null_class is not None else parts.student.null_class
    conditioning = _conditioning(spec, facts, null, to_set)
    codec = facts.codec if isinstance(facts.codec, LatentCodec) else None
    sizes = [p.numel() for network in empty for p in network.parameters()]
    return InspectedTeacher(
        path=spec.path,
        network=facts.network_class.__name__,
        networks=networks,
        pipeline=parts.pipeline_class,
        prediction=_prediction(spec, facts, known=field is not None),
        schedule=_schedule(facts),
        shape=facts.shape,
        size=facts.size,
        autoencoder=None if codec is None else InspectedAutoencoder(codec.config["_class_name"], codec.factors),
        conditions=_fields(facts),
        classes=conditioning.count if isinstance(conditioning, ClassLabels) else None,
        text_encoders=_text_encoders(parts),
        guidance=_guidance(spec, facts, conditioning),
        t_range=None if field is None else field.t_range,
        license=checkpoint.license_of(parts.root, parts.student),
        memory=_memory(sizes),
        to_set=to_set,
        is_latent=isinstance(facts.architecture, Convention) or codec is not None,
        takes_size=isinstance(facts.architecture, Convention),
        recomputes=bool(facts.network_class._supports_gradient_checkpointing),
        sizes=sizes,
    )


def _networks(
    parts: files.Parts, facts: Facts, spec: CheckpointTeacher
) -> tuple[list[InspectedNetwork], list[nn.Module]]:
    """The networks, and each of them without weights. Those of a hub id may not be downloaded yet."""
    folders = [parts.model]
    if facts.boundary is not None and parts.pipeline is not None:
        folders.append(parts.pipeline / SECOND)
    found, empty = [], list[nn.Module]()
    for folder in folders:
        network = weights.without_weights(folder, parse(folder / CONFIG), facts.network_class)
        dtypes: Counter[str] = Counter()
        if parts.single is not None:
            dtypes.update(each.dtype for each in weights.stored([parts.single]))
        elif Path(spec.path).is_dir() or any(folder.glob("*.safetensors")):
            shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
            stored = weights.fitting(folder, weights.stored(files.weights(folder, spec.variant)), shapes)
            dtypes.update(each.dtype for each in stored.values())
        name = str(folder.relative_to(parts.root)) if folder.is_relative_to(parts.root) else folder.name
        found.append(InspectedNetwork(name, sum(p.numel() for p in network.parameters()), dict(dtypes.most_common())))
        empty.append(network)
    return found, empty


def _prediction(spec: CheckpointTeacher, facts: Facts, *, known: bool) -> str:
    if not known:
        return ""
    return spec.prediction or ("velocity" if facts.schedule is None else facts.schedule.prediction)


def _schedule(facts: Facts) -> InspectedSchedule | None:
    """The schedule with the options of its family, whatever they are."""
    schedule, options = facts.schedule, dict[str, object]()
    if schedule is None:
        return None
    for each in dataclasses.fields(schedule):
        value = getattr(schedule, each.name)
        if each.name not in ("family", "prediction") and not isinstance(value, Interpolant):
            options[each.name] = value
    name = "" if facts.chosen is None else str(parse(facts.chosen).get("_class_name"))
    return InspectedSchedule(schedule.family, name, options)


def _conditioning(
    spec: CheckpointTeacher, facts: Facts, null: int | None, to_set: dict[str, str]
) -> Conditioning | None:
    """What the network is conditioned on; None if the spec does not say it yet. Adds what is missing to `to_set`."""
    architecture = facts.architecture
    if isinstance(architecture, Convention):
        if architecture.fields(facts.content) and spec.conditions is None:
            to_set["conditions"] = (
                "a file with embeddings of prompts; make it with: distill encode TEACHER PROMPTS.txt --out FILE; or "
                "leave it out, and begin the stages with cache: {kind: cache}"
            )
            return None
        given = None if spec.conditions is None else condition_files.read(Path(spec.conditions))
        asked = Asked(facts.size, given, spec.embedded_guidance, null)
        found = architecture.conditioning(facts.content, facts.path, asked)
    else:
        found = architecture.conditioning(facts.content, facts.path, null)
    if isinstance(found, ClassLabels) and found.null_class is None:
        to_set["null_class"] = (
            "only for guidance: the class id of the unconditional call, if the network has one; valid: "
            f"{_null_class(facts, found.count)}"
        )
    return found


def _null_class(facts: Facts, count: int) -> str:
    """In words, the null class that a network with `count` classes may have."""
    assert not isinstance(facts.architecture, Convention), "no convention leaves it to the spec"
    try:
        facts.architecture.conditioning(facts.content, facts.path, count)
    except InputError:
        return f"the last of its {count} embeddings, {count - 1}"
    return f"{count}, which stands for none of its classes 0 to {count - 1}"


def _fields(facts: Facts) -> dict[str, Sequence[int | None]]:
    architecture = facts.architecture
    if not isinstance(architecture, Convention):
        return {}
    return {name: field.shape for name, field in architecture.fields(facts.content).items()}


def _text_encoders(parts: files.Parts) -> dict[str, str]:
    """The classes of the text encoders that a pipeline has, by component."""
    if parts.pipeline is None:
        return {}
    index = parse(parts.pipeline / INDEX)
    names = [name for name in parts.components if name.startswith("text_encoder")]
    return {name: short(str(index[name][1])) for name in names if (parts.pipeline / name).is_dir()}


def _guidance(spec: CheckpointTeacher, facts: Facts, conditioning: Conditioning | None) -> InspectedGuidance:
    architecture = facts.architecture
    has_null = None if conditioning is None else conditioning.has_null
    if not isinstance(architecture, Convention):
        words = "second call, default scale 1 (none)" if has_null else "none"
        return InspectedGuidance(words, 1.0, None, has_null)
    asked = Asked(facts.size, None, spec.embedded_guidance, spec.null_class)
    embedded = None
    if "guidance" in architecture.constants(facts.content, asked):
        embedded = architecture.embedded_guidance if spec.embedded_guidance is None else spec.embedded_guidance
    scale = architecture.scale_of(facts.content)
    return InspectedGuidance(overview.guidance(architecture, scale, embedded), scale, embedded, has_null)


def _memory(sizes: Sequence[int]) -> dict[str, int]:
    """Bytes of the weights alone, and for training a copy with AdamW and one average (EMA), by kind."""
    predicted = memory.predict({"student": sizes}, [], 1, 1, PLAIN)
    return {
        "weights in float32": memory.FLOAT * sum(sizes),
        "weights in bfloat16": HALF * sum(sizes),
        "training of a copy": sum(predicted.values()),
    }
