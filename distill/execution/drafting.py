"""Writes a spec to start from, for a teacher and a recipe: `distill init --teacher`. No weights are loaded.

Numbers that depend on the teacher (batch size, micro-batch, ZeRO stage) follow from the sizes of its network and of its
samples. The others are starting points, which whoever runs the spec will want to change.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distill.core.errors import InputError
from distill.core.space import human
from distill.execution.inspecting import HALF, InspectedTeacher
from distill.flow.conditioning import of_classes
from distill.flow.times import uniform_grid
from distill.protocols import Adapter, Cond, Conditioning, Copy, Frozen, Trained
from distill.spec import checks, pairspec, registry, specfile
from distill.spec.model import CheckpointTeacher, LaunchSpec, RunSpec, TrainStage
from distill.spec.resolved import ResolvedRecipe
from distill.students import native, sampling
from distill.training.choice import TrainedMemory, fitting
from distill.training.memory import FLOAT

# Options with which a recipe distils a teacher of any kind, where its defaults do not.
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "consistency/scm": {"derivative": "central", "h": 0.1},  # not all networks have forward-mode derivatives
    "reflow/consistency_fm": {"target": "teacher", "delta": 0.01},
    "shortcut/alphaflow": {"derivative": "central", "h": 0.1},
    "shortcut/meanflow": {"derivative": "central", "h": 0.1},
}
SMALLER = {"reflow/slimflow": {"phase": "anneal"}}  # options of a stage before, which trains a smaller network

UPDATES = 5000  # length of the training
LEAST_BATCH, MOST_BATCH = 64, 256  # more only if there are more GPUs
MICRO = ((50_000_000, 64), (500_000_000, 16), (4_000_000_000, 4))  # (parameters, micro-batch of smaller networks)
ELEMENTS = 1 << 22  # most numbers in the samples of a micro-batch
LARGE = 100_000_000  # parameters; larger networks recompute their activations
FOR_WEIGHTS = 0.7  # of the memory of a GPU; the rest is for activations
NODE = 8  # GPUs
STEPS = 4  # of students that are made for a certain number of steps
IMAGES, VIDEOS = "IMAGES", "VIDEOS"  # placeholders for the folder of the data
PROMPTS = {"kind": "prompts", "path": "PROMPTS.txt"}  # data of recipes that need no images; the path is a placeholder


@dataclass(frozen=True)
class DraftRequest:
    """What `distill init --teacher` is asked for. base: folder of the user's own recipes. memory: bytes of a GPU."""

    recipe: str
    base: Path
    gpus: int
    memory: int


@dataclass(frozen=True)
class Draft:
    """A spec, and what is still to do before it can run, one line each. bytes: per GPU, without activations."""

    spec: RunSpec
    to_do: list[str]
    bytes: int


def draft(given: CheckpointTeacher, teacher: InspectedTeacher, request: DraftRequest) -> Draft:
    """A spec that passes `checks.check`. InputError if the recipe does not fit the teacher.

    given: the teacher as the user named it.
    """
    recipe = _recipe(request, OPTIONS.get(request.recipe, {}))
    cached = "conditions" in teacher.to_set and bool(teacher.text_encoders)  # prompts or captions are the data
    _refuse(request, recipe, teacher, cached=cached)
    scale = teacher.guidance.scale if teacher.guidance.has_null is not False else 1.0
    options = dict(OPTIONS.get(request.recipe, {}))
    if scale != 1 and "pairs" not in recipe.needs and "guidance_scale" in recipe.module.Config.model_fields:
        options["guidance_scale"] = scale
        recipe = _recipe(request, options)
    launch, size = _launch(request, recipe, teacher)
    batch = launch.world_size * (launch.known_micro_batch or 1)
    batch *= math.ceil(LEAST_BATCH / batch)
    name = _stage_name(request.recipe)
    with_images = "data" in recipe.needs
    stages: dict[str, Any] = {"cache": {"kind": "cache"}} if cached else {}
    student = _training(request, options, batch) | {"optimizer": _optimizer(batch, 1e-5)}
    if "pairs" in recipe.needs:
        stages["pairs"] = _pairs(teacher, scale, with_states="states" in recipe.needs)
        student["pairs"] = "pairs"
    if "teacher" not in recipe.needs:
        student |= {"network": _unet(teacher), "optimizer": _optimizer(batch, 2e-4)}
    elif request.recipe in SMALLER and not teacher.is_latent and teacher.size:
        more = SMALLER[request.recipe] | {"anneal_images": UPDATES * batch // 2}
        before = {"network": _unet(teacher), "optimizer": _optimizer(batch, 2e-4), "pairs": "pairs"}
        stages["anneal"] = _training(request, more, batch) | before
        student["init"] = "anneal"
    stages[name] = student
    content = {
        "name": _run_name(given, name),
        "teacher": _teacher(given, teacher, cached=cached),
        **({"data": _data(teacher, captions=cached)} if with_images else {"data": PROMPTS} if cached else {}),
        "stages": stages,
        "launch": launch.model_dump(mode="json", exclude_defaults=True),
    }
    stages["evaluate"] = _evaluation(teacher, scale, name, _steps(recipe, content, name))
    made = specfile.validate(content, "the spec")
    checks.check(made, request.base)
    to_do = _to_do(teacher, content, with_data=with_images)
    if size > FOR_WEIGHTS * request.memory:
        to_do.append(
            f"memory: weights, gradients, optimizer and averages need {human(size)} on each GPU, and a GPU has "
            f"{human(request.memory)}; use more GPUs (--gpus), or larger ones (--gpu-memory)"
        )
    return Draft(made, to_do, size)


def _recipe(request: DraftRequest, options: Mapping[str, object]) -> ResolvedRecipe:
    module = registry.load(request.recipe, request.base)
    return ResolvedRecipe(module, registry.configure(request.recipe, module, dict(options), "options"))


def _refuse(request: DraftRequest, recipe: ResolvedRecipe, teacher: InspectedTeacher, *, cached: bool) -> None:
    """InputError if a spec for this recipe and teacher could not run, whatever else it says.

    cached: whether its conditions are those of the cache stage.
    """
    makes = "videos" if _makes_videos(teacher) else "vectors" if not teacher.size else "images"
    if "teacher" not in recipe.needs and (teacher.is_latent or makes != "images"):
        raise InputError(
            f"{request.recipe} trains a new network on images, without a teacher, so it has no use for "
            f"{teacher.path}; name a recipe that distils a teacher: see `distill recipes`"
        )
    why = ""
    if makes == "vectors":
        why = "for which no kind of data is supported"
    elif makes == "videos" and not cached:
        other = "teacher.conditions is given" if teacher.text_encoders else "it has none"
        why = f"which have captions and no classes: its text encoders must encode the captions, but {other}"
    if "data" in recipe.needs and why:
        described = {name: registry.describe(name, request.base).needs for name in registry.names()}
        with_pairs = [name for name, needs in described.items() if "pairs" in needs and "jvp" not in needs]
        raise InputError(
            f"{request.recipe} needs real data, and this teacher makes {makes}, {why}; use a recipe that trains on "
            f"pairs of the teacher: {', '.join(with_pairs)}"
        )


def _makes_videos(teacher: InspectedTeacher) -> bool:
    return len(teacher.size) == 3


def _launch(request: DraftRequest, recipe: ResolvedRecipe, teacher: InspectedTeacher) -> tuple[LaunchSpec, int]:
    """How to train on these GPUs, and the predicted bytes on each, without activations."""
    if request.gpus > NODE and request.gpus % NODE:
        raise InputError(
            f"--gpus {request.gpus}: give up to {NODE}, or a multiple of {NODE} for several machines; the spec's "
            "launch.nodes and launch.procs set any other division"
        )
    micro = next((each for parameters, each in MICRO if teacher.parameters < parameters), 1)
    while micro > 1 and (micro * math.prod(teacher.shape) > ELEMENTS or micro * request.gpus > MOST_BATCH):
        micro //= 2
    micro = math.lcm(micro, recipe.rows_together)
    launch = LaunchSpec.model_validate(
        {
            "nodes": max(1, request.gpus // NODE),
            "procs": min(request.gpus, NODE),
            "micro_batch": micro,
            "activation_checkpointing": teacher.recomputes and teacher.parameters > LARGE,
            "slurm": {"gpus_per_node": min(request.gpus, NODE)},
        }
    )
    return fitting(launch, _memory(recipe, teacher), int(FOR_WEIGHTS * request.memory))


def _memory(recipe: ResolvedRecipe, teacher: InspectedTeacher) -> TrainedMemory:
    """The networks of a recipe, if all are as large as the teacher's."""
    roles = recipe.module.Recipe(recipe.config, None).networks(_Sized(teacher.classes, is_latent=teacher.is_latent))
    sizes, still, frozen = dict[str, list[int]](), dict[str, list[int]](), 0
    for name, role in roles.items():
        each = [n for n in teacher.sizes for _ in range(_copies(role.module))] if not isinstance(role, Copy) else []
        if isinstance(role, Trained):
            sizes[name] = each
        elif isinstance(role, Adapter):
            sizes[name], still[name] = [], each
        elif isinstance(role, Frozen):
            frozen += FLOAT * sum(each)
    copies = [role.of for role in roles.values() if isinstance(role, Copy)]
    bytes_of = HALF if teacher.is_stored_in_half else FLOAT
    held = bytes_of * teacher.parameters if "teacher" in recipe.needs else 0
    return TrainedMemory(sizes, still, copies, averages=1, frozen=frozen + held)


def _training(request: DraftRequest, options: Mapping[str, object], batch: int) -> dict[str, Any]:
    half_life = UPDATES * batch // 20
    return {
        "kind": "train",
        "recipe": request.recipe,
        "options": dict(options),
        "images": UPDATES * batch,
        "batch_size": batch,
        "ema_half_lives": [half_life],
        "export": half_life,
        "precision": "bf16",
    }


def _optimizer(batch: int, lr: float) -> dict[str, Any]:
    return {"lr": lr, "warmup_images": UPDATES * batch // 50}


def _pairs(teacher: InspectedTeacher, scale: float, *, with_states: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "pairs", "count": 50_000, "solver": "ab3", "steps": 24, "precision": "bf16"}
    if teacher.is_latent:
        found |= {"count": 10_000, "block": 8, "shard": 512, "dtype": "float16"}
    if with_states:
        found |= {"paths": "trajectories", "times": [1 - i / STEPS for i in range(STEPS + 1)]}
    return found | ({} if scale == 1 else {"guidance_scale": scale})


def _evaluation(teacher: InspectedTeacher, scale: float, student: str, steps: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": "evaluate", "students": {student: steps}, "fine_solver": "ab3", "fine_steps": 24}
    found |= {"samples": 256, "block": 8} if teacher.is_latent else {"samples": 2500, "block": 250}
    return found | ({} if scale == 1 else {"guidance_scale": scale})


def _steps(recipe: ResolvedRecipe, content: Mapping[str, Any], student: str) -> list[int]:
    """Numbers of steps to measure the student with: the fewest that it supports, or 1, 2 and 4."""
    spec = specfile.validate(dict(content), "the spec")
    stage = spec.stages[student]
    assert isinstance(stage, TrainStage)
    made = recipe.module.Recipe(recipe.config, None)
    grids = sampling.own_grids(made, pairspec.times_of(spec, stage))
    return sorted(grids)[:2] if grids else [1, 2, 4]


def _teacher(given: CheckpointTeacher, teacher: InspectedTeacher, *, cached: bool) -> dict[str, Any]:
    """cached: its conditions are those of the cache stage."""
    found: dict[str, Any] = {"kind": "diffusers", "path": given.path}
    if teacher.takes_size:
        found["size"] = list(teacher.size)
    if "conditions" in teacher.to_set and not cached:
        found["conditions"] = f"{_run_name(given, 'conditions')}.safetensors"
    if teacher.is_stored_in_half:
        found["dtype"] = "bfloat16"
    return found | given.model_dump(mode="json", exclude_defaults=True)


def _data(teacher: InspectedTeacher, *, captions: bool) -> dict[str, Any]:
    channels = 3 if teacher.is_latent else teacher.shape[0]
    kind, path = ("videos", VIDEOS) if _makes_videos(teacher) else ("images", IMAGES)
    found = {"kind": kind, "path": path, "size": list(teacher.size), "channels": channels}
    return found | ({"captions": True} if captions else {})


def _to_do(teacher: InspectedTeacher, content: Mapping[str, Any], *, with_data: bool) -> list[str]:
    found = [f"teacher.{name}: {why}" for name, why in teacher.to_set.items() if name == "scheduler"]
    if content.get("data") == PROMPTS:
        found.append(f"data.path: set it to a file with prompts, one on each line; {PROMPTS['path']} is a placeholder")
    elif "conditions" in content["teacher"] and "conditions" in teacher.to_set:
        path = content["teacher"]["conditions"]
        found.append(
            f"teacher.conditions: {path} does not exist yet; make it with: distill encode {teacher.path} PROMPTS.txt "
            f"--out {path}"
        )
    if with_data:
        labels, made = "", "images"
        if _makes_videos(teacher):
            labels, made = ", with a caption for each: NAME.txt beside the folder NAME of its frames", "videos"
        elif "conditions" in teacher.to_set and "conditions" not in content["teacher"]:
            labels = ", with a caption for each: NAME.txt beside NAME.jpg, or a metadata.jsonl"
        elif teacher.conditions:
            labels = ", whose classes are the rows of teacher.conditions, one for each prompt"
        elif teacher.classes is not None:
            labels = f", with its {teacher.classes:,} classes as sub-folders"
        found.append(f"data.path: set it to the folder of the real {made}{labels}")
    return found


def _unet(teacher: InspectedTeacher) -> dict[str, Any]:
    """A new U-Net, with a resolution for each time that the sides can be halved, at most four."""
    sides, levels = teacher.size, 1
    while levels < 4 and all(side % (1 << levels) == 0 and side >> levels >= 4 for side in sides):
        levels += 1
    return {"kind": "unet", "channels": [64 << min(i, 2) for i in range(levels)], "attention": True}


def _stage_name(recipe: str) -> str:
    """The name of the stage that trains the student: that of the recipe."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem).strip("-_")[:30]
    return "student" if name in ("", "teacher", "pairs", "evaluate", "anneal", "cache") else name


def _run_name(given: CheckpointTeacher, stage: str) -> str:
    teacher = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(given.path).name).strip("-._")[:30]
    return f"{teacher or 'teacher'}-{stage}"


class _Sized(nn.Module):
    """Stands for networks as large as `count` teachers. Implements `protocols.Init`."""

    null_class = None

    def __init__(self, classes: int | None, count: int = 1, *, is_latent: bool = False) -> None:
        super().__init__()
        self.num_classes, self.count, self.is_latent = classes, count, is_latent

    @property
    def conditioning(self) -> Conditioning:
        return of_classes(self.num_classes, self.num_classes)

    def velocity_field(self) -> nn.Module:
        return _Sized(self.num_classes)

    def flow_map(self, to_data: bool = False) -> nn.Module:
        return _Sized(self.num_classes)

    def policy(self, policy: str, count: int, grid: Sequence[float] | None = None, spread: float = 0.0) -> nn.Module:
        if self.is_latent:
            raise InputError(native.ONE_OUTPUT)
        return _Sized(self.num_classes)

    def acceleration(self) -> nn.Module:
        return _Sized(self.num_classes, 2)

    def critic(self) -> nn.Module:
        return _Sized(self.num_classes)

    def t_grid(self, steps: int) -> list[float]:
        return uniform_grid(steps).tolist()

    def null(self, cond: Cond) -> Cond:
        return cond


def _copies(module: nn.Module) -> int:
    """How many networks of the teacher's size a network of a recipe is; 0 for others, such as LPIPS."""
    return module.count if isinstance(module, _Sized) else 0
