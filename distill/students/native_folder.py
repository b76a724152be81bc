"""The folders of students that keep the network class of their teacher's pipeline.

The network lies where it lies in the pipeline, so that plain diffusers loads it. Beside it is what a flow map or an
acceleration needs in addition.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.core.errors import InputError, RunError
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.networks.experts import Experts
from distill.networks.flow_map import FlowMapStudent
from distill.networks.two_times import TwoNetworks, TwoTimes
from distill.spec.model import CheckpointTeacher
from distill.students import native
from distill.students.native import FIRST, SECOND
from distill.students.stock import Stock
from distill.teachers import checkpoint, files, layout, pipeline_index, weights
from distill.teachers.checkpoint import TeacherCheckpoint
from distill.teachers.loaded import Packaging
from distill.teachers.network_field import EdmField, LinearCall, NetworkField, linear_call
from distill.teachers.read import parse, unreadable

SECOND_TIME = "second_time/diffusion_pytorch_model.safetensors"  # the embedding of t - s, in a flow map
TO_DATA = "renoise"  # the sampler of flow maps that may have no second time
ACCELERATION = "acceleration"  # prefix of the folders of the acceleration's networks
SHARD = "5GB"
DISTILLED = {"is_distilled": True}  # of pipelines that then use no classifier-free guidance


def write(network: nn.Module, folder: Path, packaging: Packaging, card: StudentCard, stock: Stock) -> StudentCard:
    """Writes the networks of a student, its scheduler config and model_index.json to a new folder.

    The network is changed if its pipeline would guide it otherwise (see `Convention.for_pipeline`). If the pipeline
    cannot sample it, the scheduler is its teacher's.

    Returns the card with the class of the network, and how its pipeline samples it.
    """
    base = native.base_of(network)
    if stock.works:
        native.convention_for(base).for_pipeline(base)
    for name, part in networks(network):
        part.save_pretrained(folder / name, max_shard_size=SHARD)
    scheduler = stock.scheduler_or(packaging)
    _write_json(folder / "scheduler" / layout.SCHEDULER, scheduler)
    name, first = next(networks(base))
    pipeline = packaging.pipeline or native.convention_for(base).pipeline_of(dict(first.config))
    options = {**packaging.options, **pipeline_index.options_of(pipeline, DISTILLED)}
    if isinstance(base, Experts):
        options["boundary_ratio"] = base.boundary / (scheduler.get("num_train_timesteps") or 1000)
    components = {each: ["diffusers", type(part).__name__] for each, part in networks(base)}
    components["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(folder / layout.INDEX, pipeline_index.index_of(pipeline, components, options))
    return card.model_copy(
        update={
            "network": type(first).__name__,
            "component": name,
            "stock": stock.call,
            "embedded_guidance": packaging.embedded_guidance,
        }
    )


def compare(network: nn.Module, folder: Path) -> None:
    """RunError unless plain diffusers reads the same configs and, bit for bit, the same weights."""
    for name, part in networks(network):
        read = type(part).from_pretrained(folder / name)
        ours, theirs = part.state_dict(), read.state_dict()
        different = [
            key
            for key, weight in ours.items()
            if key not in theirs or theirs[key].dtype != weight.dtype or not torch.equal(weight.cpu(), theirs[key])
        ]
        different += [key for key in theirs if key not in ours]
        different += [key for key, value in _options(part).items() if _options(read).get(key) != value]
        if different:
            raise RunError(
                f"export failed: diffusers loads another {different[0]} of {name} than was written; nothing was "
                "exported"
            )


def load(found: TeacherCheckpoint, spec: CheckpointTeacher, kind: str) -> native.NativeStudent:
    """The student of this kind in a folder, whose network was read."""
    folder, network = Path(spec.path), found.network
    field = checkpoint.field_of(spec, network, found.schedule, found.call)
    assert isinstance(field, EdmField | NetworkField), "describe refuses the ve path for these networks"
    call = linear_call(field)
    if kind == "velocity":
        return native.velocity(network, call)
    if kind == "flow_map":
        to_data = is_to_data(student_card.read(folder))
        if to_data:
            return native.flow_map(network, call, 0, to_data)
        return flow_map(network, call, folder / SECOND_TIME, student_card.read(folder))
    names = [name for name in (ACCELERATION, f"{ACCELERATION}_2") if (folder / name).is_dir()]
    parts = [network_in(folder / name, checkpoint.DTYPES[spec.dtype]) for name in names]
    grown = Experts(parts[0], parts[1], network.boundary) if isinstance(network, Experts) else parts[0]
    return native.acceleration(TwoNetworks(network, grown), call)


def is_to_data(card: StudentCard) -> bool:
    """Whether a flow map has no second time, because it only jumps to data."""
    return card.sampler == TO_DATA and SECOND_TIME not in card.files


def digest(found: TeacherCheckpoint, folder: Path) -> str:
    """SHA-256 over the network's digest and the student's further files."""
    more = sorted([*folder.glob(SECOND_TIME), *folder.glob(f"{ACCELERATION}*/*.safetensors")])
    if not more:
        return found.digest
    digests = [found.digest]
    for path in more:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def networks(network: nn.Module) -> Iterator[tuple[str, ModelMixin]]:
    """The networks of a student by the name of their folder."""
    base = native.base_of(network)
    if isinstance(base, Experts):
        yield from ((FIRST, base.transformer), (SECOND, base.transformer_2))
    else:
        yield native.convention_for(base).folder, base
    if isinstance(network, TwoTimes):
        yield Path(SECOND_TIME).parent.name, network.gap
    if isinstance(network, TwoNetworks):
        if isinstance(network.acceleration, Experts):
            yield from ((ACCELERATION, network.acceleration.transformer),)
            yield f"{ACCELERATION}_2", network.acceleration.transformer_2
        else:
            yield ACCELERATION, network.acceleration


def network_in(folder: Path, dtype: torch.dtype) -> ModelMixin:
    """The network in a folder of a student, in this data type. InputError if it is damaged."""
    config = parse(folder / layout.CONFIG)
    network_class = native.by_name(str(config.get("_class_name")))
    if network_class is None:
        raise InputError(f"{folder / layout.CONFIG} names no network that is supported; copy or download it again")
    found, _ = weights.network(folder, config, network_class, files.weights(folder), dtype)
    native.convention_for(found).settled(found)
    return found


def flow_map(network: nn.Module, call: LinearCall, path: Path, card: StudentCard) -> FlowMapStudent:
    """A flow map of a network and the embedding of t - s in a file. InputError if this is damaged or does not fit."""
    try:
        tensors: Mapping[str, Tensor] = load_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise InputError(f"{path} is damaged; copy or download it again") from error
    hidden = tensors.get("hidden.weight")  # [width, 2 waves]; the folder of a LoRA has no config that says how many
    waves = hidden.shape[1] // 2 if hidden is not None and hidden.ndim == 2 else 1
    embeds = any(name.startswith("guidance.") for name in tensors)  # else the network has its own, or takes no scale
    known = card.guidance_range if embeds else None
    student = native.flow_map(network, call, 0, waves=max(1, waves), guidance_range=known)
    gap = student.network.gap
    expected = gap.state_dict()
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in expected.items()}:
        raise InputError(f"{path} does not fit the network of its folder; copy or download it again")
    if not all(each.isfinite().all() for each in tensors.values()):
        raise InputError(f"{path} contains NaN or infinity; copy or download it again")
    gap.load_state_dict(tensors)
    return student


def _options(network: ModelMixin) -> dict[str, object]:
    """The config as it is stored, without where the network came from."""
    stored: dict[str, object] = json.loads(network.to_json_string())
    return {key: value for key, value in stored.items() if not key.startswith("_")}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
