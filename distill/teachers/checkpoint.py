"""Teachers from diffusers checkpoints: a pipeline folder, a hub id or a single model folder. Only safetensors is read,
and no code of the folder is run: student folders' own network classes are loaded from this package. Students are read
here too (`students.loaded`).
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    SchedulerMixin,
    UNet2DModel,
)
from safetensors import SafetensorError, safe_open

from distill.guard import InputError, suggest
from distill.interpolants import Prediction, linear, vp
from distill.protocols import VelocityField
from distill.spec import CheckpointTeacher
from distill.students.acceleration_mlp import AccelerationMLP
from distill.students.acceleration_unet import AccelerationUNet2DModel
from distill.students.flow_map_mlp import FlowMapMLP
from distill.students.flow_map_unet import FlowMapUNet2DModel
from distill.students.velocity import TIME_SCALE
from distill.students.velocity_mlp import VelocityMLP
from distill.students.velocity_unet import VelocityUNet2DModel
from distill.teachers import by_id
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, NetworkField

Config = dict[str, Any]  # parsed JSON

NETWORKS: dict[str, tuple[type[ModelMixin], ...]] = {  # by what they are
    "velocity": (UNet2DModel, VelocityUNet2DModel, VelocityMLP),
    "flow_map": (FlowMapUNet2DModel, FlowMapMLP),
    "acceleration": (AccelerationUNet2DModel, AccelerationMLP),
}
LINEAR_NETWORKS = (VelocityUNet2DModel, VelocityMLP)  # of the linear path by construction
VP = (DDPMScheduler, DDIMScheduler)
LINEAR = (FlowMatchEulerDiscreteScheduler, FlowMapEulerDiscreteScheduler)
SCHEDULERS: dict[str, type[SchedulerMixin]] = {c.__name__: c for c in (*VP, *LINEAR, EDMEulerScheduler)}
PREDICTIONS: dict[str, tuple[Prediction, ...]] = {  # by schedule
    "vp": ("epsilon", "sample", "v_prediction"),
    "linear": ("velocity",),
    "edm": ("epsilon", "v_prediction"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,99}")


@dataclass(frozen=True)
class Parts:
    """The files of a checkpoint."""

    model: Path  # folder of config.json and the weights
    scheduler: Config | None
    student: Config  # distill.json of an exported student, or empty


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's network, frozen, in float32 and evaluation mode, and what its files say of it."""

    network: ModelMixin
    scheduler: Config | None  # None: there is none, or the network is of the linear path by construction
    student: Config
    shape: tuple[int, ...]  # of one sample
    num_classes: int | None
    null_class: int | None
    digest: str
    description: str
    license: str  # as its files say; empty: they do not


def load(spec: CheckpointTeacher, device: torch.device) -> LoadedTeacher:
    """The network of a checkpoint as a velocity field of its own schedule."""
    found = read(spec, device, "velocity")
    return LoadedTeacher(
        field=_field(found.network, found.scheduler, spec),
        shape=found.shape,
        num_classes=found.num_classes,
        null_class=found.null_class,
        digest=found.digest,
        description=found.description,
        network=found.network,
        guidance_scale=found.student.get("guidance_scale", 1.0),
        unconditional=found.student.get("unconditional", True),
        license=found.license,
    )


def read(spec: CheckpointTeacher, device: torch.device, kind: str) -> Checkpoint:
    """A checkpoint whose network is of this kind, one of `NETWORKS`; any other is refused."""
    folder = _folder(spec)
    parts = _parts(spec, folder)
    found = parts.student.get("kind", "velocity")
    if found != kind:
        raise InputError(f"teacher.path={spec.path} is a student of kind {found}; valid teachers: {kind}")
    config = _json(parts.model / "config.json")
    classes = {c.__name__: c for c in NETWORKS[kind]}
    _refuse_without_effect(spec, classes.get(str(config.get("_class_name"))))
    network, weights = _network(parts.model, config, classes)
    network = network.to(device).eval().requires_grad_(False)
    scheduler = None if isinstance(network, LINEAR_NETWORKS) else parts.scheduler
    num_classes, null_class = _classes(config, parts.student, spec)
    identity = {
        "config": {k: v for k, v in config.items() if k not in ("_diffusers_version", "_name_or_path")},
        "scheduler": {k: v for k, v in (scheduler or {}).items() if k != "_diffusers_version"},
        "prediction": spec.prediction,
        "null_class": null_class,
        "weights": weights,
    }
    return Checkpoint(
        network=network,
        scheduler=scheduler,
        student=parts.student,
        shape=_shape(parts.model, config),
        num_classes=num_classes,
        null_class=null_class,
        digest=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        # a hub id, or the folder's name alone: what is made with a teacher must not depend on where the teacher lies
        description=f"{config['_class_name']} from {Path(spec.path).name if Path(spec.path).is_dir() else spec.path}",
        license=_license(folder, parts.student),
    )


def _refuse_without_effect(spec: CheckpointTeacher, network: type[ModelMixin] | None) -> None:
    if spec.revision is not None and Path(spec.path).is_dir():
        raise InputError(
            f"teacher.revision={spec.revision} has no effect: {spec.path} is a folder here, not a hub id; remove it"
        )
    given = {"prediction": spec.prediction, "scheduler": spec.scheduler}
    if network is not None and network in LINEAR_NETWORKS:
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    f"teacher.{name}={value} has no effect: {spec.path} is a {network.__name__}, which predicts the "
                    "velocity of the linear path by construction; remove it"
                )


def _folder(spec: CheckpointTeacher) -> Path:
    """The local folder of a path or hub id."""
    path = Path(spec.path)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"teacher.path={spec.path} is a file; give the folder that holds config.json and safetensors")
    if not by_id.is_id(spec.path):
        raise InputError(f"teacher.path={spec.path} does not exist; give a folder, or a hub id like org/name")
    return by_id.snapshot(spec)


def _parts(spec: CheckpointTeacher, folder: Path) -> Parts:
    """Where network and scheduler of a pipeline or of a single model folder lie."""
    student = _json(folder / "distill.json") if (folder / "distill.json").is_file() else {}
    if (folder / "model_index.json").is_file():
        index = _json(folder / "model_index.json")
        parts = sorted(k for k, v in index.items() if not k.startswith("_") and isinstance(v, list) and v[0])
        if parts != ["scheduler", "unet"]:
            raise InputError(
                f"teacher.path={spec.path} is a pipeline of {', '.join(parts) or 'nothing'}; valid: pixel pipelines of "
                "scheduler and unet"
            )
        model, nearby = folder / "unet", [folder / "scheduler"]
    elif (folder / "config.json").is_file():
        model, nearby = folder, [folder / "scheduler", folder.parent / "scheduler"]
    else:
        raise InputError(
            f"teacher.path={spec.path} has neither model_index.json nor config.json, but {_listing(folder)}; give a "
            "diffusers pipeline folder or model folder"
        )
    if spec.scheduler is not None:
        nearby = [Path(spec.scheduler)]
        if not (nearby[0] / "scheduler_config.json").is_file():
            raise InputError(f"teacher.scheduler={spec.scheduler} has no scheduler_config.json; give its folder")
    found = next((path for path in (n / "scheduler_config.json" for n in nearby) if path.is_file()), None)
    return Parts(model, _json(found) if found else None, student)


def _network(folder: Path, config: Config, classes: Mapping[str, type[ModelMixin]]) -> tuple[ModelMixin, list[str]]:
    """The network, every weight of which came from the files, and the sha256 of the files."""
    name = str(config.get("_class_name"))
    if name not in classes:
        raise InputError(f"{folder / 'config.json'}: network class {name} is not supported; {suggest(name, classes)}")
    if config.get("time_embedding_type") == "learned":
        raise InputError(
            f"{folder / 'config.json'}: time_embedding_type learned knows whole steps only; valid: positional"
        )
    files = _weight_files(folder)
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                broken = [k for k in tensors.keys() if not tensors.get_tensor(k).isfinite().all()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or damaged ({error}); copy or download it again") from error
        if broken:
            raise InputError(f"{path} holds NaN or infinity in {', '.join(broken[:3])}; give sound weights")
    try:
        # low_cpu_mem_usage off: it would leave a missing weight without memory before it can be reported
        network, report = classes[name].from_pretrained(
            str(folder),
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder}: config.json and the weights do not fit together: {error}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(kind):
            names = ", ".join(str(k) for k in report[kind][:3])
            raise InputError(f"{folder}: config.json and the weights do not fit together: {kind} {names}")
    network.register_to_config(_name_or_path="")  # a student that starts here must not carry this machine's paths
    return network, [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards of an index."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if index.is_file():
        files = [folder / name for name in sorted(set(_json(index)["weight_map"].values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InputError(f"{index} names {', '.join(missing)}, which are not there; copy or download them")
        return files
    raise InputError(
        f"{folder} has no {WEIGHTS}, but {_listing(folder)}; only safetensors is loaded. Where you trust a pickled "
        f"file, convert it: python -c \"from diffusers import UNet2DModel as M; M.from_pretrained('{folder}', "
        "use_safetensors=False).save_pretrained('NEW')\""
    )


def _field(network: ModelMixin, scheduler: Config | None, spec: CheckpointTeacher) -> VelocityField:
    """The network in the schedule of its scheduler config."""
    if scheduler is None:
        if isinstance(network, LINEAR_NETWORKS) or spec.prediction == "velocity":
            return NetworkField(network, linear(), "velocity", TIME_SCALE)
        raise InputError(
            f"teacher.path={spec.path} has no scheduler config, so its schedule is unknown; give its folder as "
            "teacher.scheduler, or teacher.prediction=velocity for a network of the linear path"
        )
    name = str(scheduler.get("_class_name"))
    if name not in SCHEDULERS:
        raise InputError(
            f"teacher.path={spec.path}: scheduler class {name} is not supported; {suggest(name, SCHEDULERS)}. "
            "Give the folder of one that fits as teacher.scheduler"
        )
    schedule = SCHEDULERS[name].from_config(scheduler)
    config = schedule.config
    if isinstance(schedule, LINEAR):
        _prediction(spec, "linear", "velocity")
        return NetworkField(network, linear(), "velocity", float(config.num_train_timesteps))
    kind = "vp" if isinstance(schedule, VP) else "edm"
    prediction = _prediction(spec, kind, config.prediction_type)
    if kind == "edm":
        t_range = tuple(sigma / (1 + sigma) for sigma in (config.sigma_min, config.sigma_max))
        return EdmField(network, config.sigma_data, 1 if prediction == "epsilon" else -1, (t_range[0], t_range[1]))
    if prediction == "epsilon" and config.rescale_betas_zero_snr:
        raise InputError(
            f"teacher.path={spec.path}: a noise prediction says nothing about the data at zero terminal SNR; "
            "valid with rescale_betas_zero_snr: sample, v_prediction"
        )
    return NetworkField(network, vp(schedule.alphas_cumprod), prediction, float(config.num_train_timesteps - 1))


def _prediction(spec: CheckpointTeacher, schedule: str, configured: Prediction) -> Prediction:
    """What the network predicts, among what its schedule allows."""
    given = spec.prediction or configured
    if given not in PREDICTIONS[schedule]:
        raise InputError(
            f"teacher.prediction={given} does not exist on the {schedule} path; "
            f"valid: {', '.join(PREDICTIONS[schedule])}"
        )
    return given


def _license(folder: Path, student: Config) -> str:
    """The terms that a checkpoint's distill.json or the head of its model card names, if they are one plain word."""
    found, path = student.get("license"), folder / "README.md"
    if not found and path.is_file():
        head = path.read_text(errors="replace").partition("\n---")[0]
        told = dict(re.findall(r"^(license|license_name):[ \"']*([^\"'\n]*?)[ \"']*$", head, re.MULTILINE))
        found = told.get("license_name") if told.get("license") == "other" else told.get("license")
    return found if isinstance(found, str) and LICENSE.fullmatch(found) else ""


def _classes(config: Config, student: Config, spec: CheckpointTeacher) -> tuple[int | None, int | None]:
    """(number of real classes, null class): the null class, if there is one, is the last embedding."""
    if config.get("class_embed_type") is not None:
        raise InputError(
            f"teacher.path={spec.path}: class_embed_type {config['class_embed_type']} is not supported; "
            "valid: networks with num_class_embeds alone"
        )
    embeddings = config.get("num_class_embeds")
    null_class = spec.null_class if spec.null_class is not None else student.get("null_class")
    if null_class is None:
        return embeddings, None
    if embeddings is None:
        raise InputError(f"teacher.null_class={null_class}, but {spec.path} has no class embeddings; leave it out")
    if null_class != embeddings - 1:
        raise InputError(
            f"teacher.null_class={null_class}: {spec.path} has {embeddings} class embeddings, valid: the last, "
            f"{embeddings - 1}"
        )
    return embeddings - 1, null_class


def _shape(folder: Path, config: Config) -> tuple[int, ...]:
    """Of one sample."""
    if "dim" in config:
        return (config["dim"],)
    size, channels = config.get("sample_size"), config.get("in_channels", 3)
    if size is None or channels != config.get("out_channels", 3):
        raise InputError(
            f"{folder / 'config.json'}: sample_size={size}, in_channels={channels}, "
            f"out_channels={config.get('out_channels', 3)}; valid: a sample_size and equal channels"
        )
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _json(path: Path) -> Config:
    try:
        parsed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"{path} holds no JSON object; copy or download it again")
    return parsed


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
