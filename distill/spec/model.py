"""The run spec: immutable, validated data that defines everything a run does.

A spec is a DAG of stages that refer to each other by name. The student of a stage is a checkpoint like any other, so a
stage uses a student of this run as its teacher in the same way as a checkpoint from the hub. Progress is measured in
images (samples shown to the optimizer), never in steps. `launch` sets how a run is executed; the digest excludes it.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field, PositiveFloat

from distill.core.errors import InputError
from distill.core.field_types import (
    Below,
    EmaLength,
    Fraction,
    FrozenModel,
    GuidanceRange,
    Images,
    Line,
    Minutes,
    Name,
    Processes,
    Samples,
    VariantName,
)
from distill.spec.apportion import rows_by_share
from distill.spec.cachespec import CacheStage
from distill.spec.dataspec import (  # noqa: F401  (they are parts of the spec)
    CheckerboardData,
    DataSpec,
    DigitsData,
    HfData,
    ImageOptions,
    ImagesData,
    LatentsData,
    MnistData,
    NoData,
    TarsData,
    VideosData,
)
from distill.spec.guidancespec import UNCHANGED, FieldSettings, GuidanceSpec
from distill.spec.optimizerspec import OptimizerSpec
from distill.spec.rolespec import LoraSpec, MlpSpec, NetworkSpec, StudentSpec, UNetSpec  # noqa: F401  (parts of the spec)
from distill.spec.samplingspec import FINE, OF_DATA, SAMPLES, SEED, WITH_STATES, EvaluateStage, PairsStage, is_path  # noqa: F401  (they are parts of the spec)
from distill.spec.slurmspec import SlurmSpec

# --- teachers ---


def is_hub_id(path: str) -> bool:
    """Whether a teacher's path does not exist here and has the form of a hub id, org/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path, re.ASCII) is not None and not Path(path).exists()


class GaussianTeacher(FrozenModel):
    """Data from N(mean, diag(std^2)), whose velocity and flow map are known exactly."""

    kind: Literal["gaussian"]
    mean: list[float]
    """mean per coordinate; its length is the dimension"""
    std: list[PositiveFloat]
    """standard deviation per coordinate"""


class MixtureTeacher(FrozenModel):
    """Data from sum_k weights_k N(means_k, std^2 I), whose velocity is known exactly."""

    kind: Literal["mixture"]
    means: list[list[float]]
    """one row per component"""
    std: PositiveFloat
    """standard deviation of every component"""
    weights: list[PositiveFloat] | None = None
    """probability of each component; null: equal"""


class TrainedGuidance(Protocol):
    """What the card of a student says about the guidance scale that its network takes as an input; None: nothing."""

    @property
    def embedded_guidance(self) -> float | None: ...
    @property
    def guidance_range(self) -> GuidanceRange | None: ...


class CheckpointTeacher(FrozenModel):
    """A diffusers checkpoint: a pipeline folder, a single model folder, a hub id, or a single file with `config`. Only
    safetensors is loaded."""

    kind: Literal["diffusers"] = "diffusers"
    path: str
    """folder, hub id (org/name), or .safetensors file"""
    revision: str | None = None
    """commit of a hub id; null: the default branch"""
    subfolder: Below | None = None
    """folder inside `path`, or inside the repository of a hub id, that holds the pipeline or the model; null: `path`
    itself"""
    variant: VariantName | None = None
    """variant of the weights, like fp16; null: the plain weights, else fp32, fp16 or bf16, else the only variant"""
    config: str | None = None
    """for a single file as `path`: folder of the diffusers pipeline or model with the same config.json"""
    lora: str | None = None
    """LoRA that is added to the network's weights: a .safetensors file, or a folder with one"""
    lora_scale: Annotated[float, Field(ge=-100, le=100)] = 1.0
    """factor of the LoRA: the weights are W + lora_scale alpha/rank B A"""
    prediction: Literal["epsilon", "sample", "v_prediction", "velocity"] | None = None
    """what the network predicts; null: what its scheduler config says"""
    scheduler: str | None = None
    """folder of a scheduler config, if the checkpoint is a single model folder without one"""
    null_class: int | None = None
    """class id of the unconditional call, needed for guidance; null: the one in distill.json, if it has one"""
    size: Annotated[list[Annotated[int, Field(ge=1, le=16384)]], Field(min_length=2, max_length=3)] | None = None
    """for networks that work on latents: size of the samples in pixels, [height, width], or for video
    [frames, height, width]; null: the default size of the network"""
    conditions: str | None = None
    """for text-conditional networks: file with embeddings of prompts, made by `distill encode`; or a folder with the
    rows of each field in FIELD.npy, and the row of the unconditional call in null.FIELD.npy"""
    vae: str | None = None
    """for networks that work on latents: folder of the autoencoder; null: that of the pipeline"""
    embedded_guidance: Annotated[float, Field(ge=0, le=10_000)] | None = None
    """for networks that take the guidance scale as an input, like FLUX.1 dev: its value; null: the default of
    its pipeline"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """data type of the teacher's weights in memory; students are always trained in float32"""
    quantize: Literal["int8"] | None = None
    """int8: keep the weights of the linear layers in the blocks as 8-bit integers (torchao), for students that are
    LoRA; they are exported for the whole weights"""

    @property
    def is_of_hub(self) -> bool:
        """Whether its path is a hub id and not a local one."""
        return is_hub_id(self.path)

    @property
    def changes(self) -> str:
        """What follows the name of its path in results: the subfolder and the LoRA, without paths of this machine."""
        inside = "" if self.subfolder is None else f"/{self.subfolder}"
        return inside + ("" if self.lora is None else f" with the LoRA {Path(self.lora).name}")

    @property
    def where(self) -> str:
        """The folder or file in messages."""
        inside = "" if self.subfolder is None else f" with teacher.subfolder={self.subfolder}"
        return f"teacher.path={self.path}{inside}"

    def with_guidance(self, card: TrainedGuidance, student: Path) -> "CheckpointTeacher":
        """The spec of a student's network, or of its base, with the embedded guidance that it was trained with.

        card: that of the student. InputError if the spec says another value, unless it was trained with a range.
        """
        trained = card.embedded_guidance
        if trained is None:
            return self
        if self.embedded_guidance not in (None, trained) and card.guidance_range is None:
            raise InputError(
                f"teacher.embedded_guidance={self.embedded_guidance:g}: the student {student} was trained with "
                f"{trained:g}, and works with no other value; leave teacher.embedded_guidance out, or set it to "
                f"{trained:g}"
            )
        return self.model_copy(update={"embedded_guidance": trained})


TeacherSpec = Annotated[GaussianTeacher | MixtureTeacher | CheckpointTeacher, Field(discriminator="kind")]


# --- stages ---


class CheckpointSpec(FrozenModel):
    """When to save checkpoints, and how many to keep. A save waits until the one before it is written."""

    images: Images | None = None
    """save each time after this many images; null: by minutes only"""
    minutes: Minutes | None = 10.0
    """save this many minutes after the start of the last save; null: by images only"""
    keep: Annotated[int, Field(gt=0, le=1_000_000)] = 2
    """number of complete checkpoints to keep"""


class TrainStage(FrozenModel):
    """Train a recipe's networks and export the student."""

    kind: Literal["train"]
    recipe: Line
    """name of a recipe, like reflow/reflow (see `distill recipes`), or your own file, like ./mine.py"""
    options: dict[str, Any] = {}
    """the recipe's own options; `distill recipes NAME` lists them"""
    teacher: Name | None = None
    """train stage whose student is the teacher; null: the spec's teacher"""
    init: Name | None = None
    """train stage whose student's weights are the initial weights; null: the teacher's, or those of `network`"""
    network: NetworkSpec | None = None
    """train a new network; null: start from the network of init or of the teacher, with its weights"""
    dropout: Fraction | None = None
    """dropout probability in training, for a network started from init or the teacher; null: as in that network"""
    student: StudentSpec | None = None
    """train a student of another size than init or the teacher, of its network class and with some of its weights;
    null: of the same size"""
    lora: Annotated[dict[Name, LoraSpec], Field(max_length=16)] = {}
    """networks that are trained as adapters of the teacher's, by their name in the recipe, such as student or critic;
    networks without an entry are trained in full"""
    guidance: GuidanceSpec | None = None
    """another form of guidance of the teacher, or guidance at some times only, with the scale options.guidance_scale;
    null: classifier-free guidance at all times"""
    pairs: Name | dict[Name, Fraction] | None = None
    """pairs stage to train on; or several, with the fraction of each in a batch: {pairs: 0.8, forward: 0.2}"""
    images: Images
    """training length in images"""
    batch_size: Samples = 128
    """global batch: images per optimizer step"""
    optimizer: OptimizerSpec = OptimizerSpec()
    ema_half_lives: Annotated[list[PositiveFloat], Field(max_length=64)] = []
    """half-lives, in images, of the EMA weights to keep"""
    ema_lengths: Annotated[list[EmaLength], Field(max_length=64)] = []
    """lengths, relative to the training so far, of the EMA weights to keep, as in EDM2; 0.1 is a common one"""
    ema_snapshots: Images | None = None
    """keep the EMA weights of ema_lengths each time after this many images, so that `distill export --ema-length` can
    make those of any other length afterwards; ema_lengths: [0.05, 0.1] is a good choice for it; null: do not"""
    export: Literal["raw"] | PositiveFloat = "raw"
    """weights to export: raw, or the EMA weights of one of ema_half_lives or ema_lengths"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the networks; weights, optimizer and losses stay fp32"""
    checkpoint: CheckpointSpec = CheckpointSpec()

    @property
    def starts_from(self) -> str | None:
        """The stage whose student it starts from; None: the spec's teacher, or a new network."""
        return None if self.network is not None else self.init or self.teacher

    @property
    def averages(self) -> list[float]:
        """The half-lives and lengths of the averages of the student's weights."""
        return [*self.ema_half_lives, *self.ema_lengths]

    @property
    def pair_shares(self) -> dict[str, float]:
        """The pairs stages that this stage trains on -> the share of each in a batch."""
        if self.pairs is None:
            return {}
        return {self.pairs: 1.0} if isinstance(self.pairs, str) else dict(self.pairs)

    @property
    def rows_of_pairs(self) -> list[int]:
        """Number of rows of a batch from each stage of `pair_shares`. InputError if one would give no row."""
        return rows_by_share(self.batch_size, list(self.pair_shares.values()))


NetworkStage = TrainStage | PairsStage | EvaluateStage  # a stage that may have a teacher
Stage = Annotated[NetworkStage | CacheStage, Field(discriminator="kind")]


class LaunchSpec(FrozenModel):
    """How the run is executed. Not part of the digest: a resume may change it, and the change is recorded."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one"""
    nodes: Annotated[int, Field(gt=0, le=100_000)] = 1
    """number of nodes that work together, for `distill submit`"""
    procs: Processes = 1
    """number of processes per node; they train together, and divide pairs, caches and evaluations among them"""
    threads: Processes | None = None
    """CPU threads per process; null: the available CPUs, divided by procs"""
    micro_batch: Samples | Literal["auto"] | None = None
    """samples per forward pass of a process, with gradient accumulation up to its part of batch_size; null: that part
    in one pass; auto: as many as fit into memory, found by trying when training begins"""
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """worker processes per training process, which read and decode the next batches; the values do not depend on it; 0:
    none; null: with a GPU, one for each free CPU of the process, at most 8; on the CPU none, since training uses it"""
    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 optimizer state, 2 gradients too, 3 weights too; null: no DeepSpeed"""
    zero_persistence_threshold: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """for zero_stage 3: weights with at most this many elements are not sharded; null: DeepSpeed's default"""
    offload_optimizer: bool = False
    """for zero_stage 1-3: keep the optimizer state in CPU memory and update it there"""
    divide_teacher: bool = False
    """shard the weights of the frozen teacher over the processes, as zero_stage 3 does; false: each has a full copy"""
    activation_checkpointing: bool = False
    """recompute activations in the backward pass instead of keeping them: less memory, about a third more time"""
    activation_offload: bool = False
    """for activation_checkpointing: keep the inputs of blocks in CPU memory until the backward pass"""
    collective_minutes: Minutes = 10.0
    """timeout: a process exits if it waits longer for the others, or if one forward and backward pass takes longer"""
    slurm: SlurmSpec = SlurmSpec()

    @property
    def known_micro_batch(self) -> int | None:
        """The micro-batch, if the spec gives a number."""
        return None if self.micro_batch == "auto" else self.micro_batch

    @property
    def world_size(self) -> int:
        """Number of processes that train together, on all nodes."""
        return self.nodes * self.procs


# Fields of stages, of the teacher and of the kinds of data that were added after 0.2.0.
ADDED = {
    "guidance", "epsilon_scale", "tolerance", "baselines", "teacher_solvers", "fine_tolerance", "student", "lora",
    "ema_lengths", "ema_snapshots",
}  # fmt: skip
ADDED_TO_OPTIMIZER = {"name", "momentum"}
ADDED_TO_MLP = {"frequencies"}
ADDED_TO_TEACHER = {
    "vae", "size", "conditions", "embedded_guidance", "dtype", "subfolder", "variant", "config", "lora", "lora_scale",
    "quantize",
}  # fmt: skip
ADDED_TO_DATA = {
    "images": {"captions", "split", "buckets"},
    "hf": {"caption_column", "stream", "limit", "buckets"},
}


class RunSpec(FrozenModel):
    """The spec of a run."""

    name: Name
    """name of the run; not part of the digest"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of all random numbers; the same spec with the same seed gives the same results"""
    numerics: Literal["exact", "fast"] = "exact"
    """exact: deterministic algorithms and full float32 precision, so that the same spec gives the same bits on the same
    machine; fast: on GPUs also TF32, sums in lower precision, and algorithms that are chosen by timing"""
    compile: bool = False
    """for numerics: fast: compile the networks of training with torch.compile, block by block where blocks repeat"""
    teacher: TeacherSpec | None = None
    """the teacher of every stage that sets no other"""
    data: DataSpec = NoData(kind="none")
    """real data, for recipes and pairs that need it and for the evaluation"""
    stages: dict[Name, Stage]
    """the stages by name, in the order in which they run"""
    launch: LaunchSpec = LaunchSpec()

    @property
    def has_exact_teacher(self) -> bool:
        """Whether the spec's teacher is known in closed form."""
        return isinstance(self.teacher, GaussianTeacher | MixtureTeacher)

    @property
    def cache(self) -> str | None:
        """The name of the cache stage, whose caches all other stages wait for; None if there is none."""
        return next((name for name, stage in self.stages.items() if isinstance(stage, CacheStage)), None)

    def guidance_of_pairs(self, stage: TrainStage) -> FieldSettings:
        """The settings with which the pairs of a train stage are made; they are the same for all of them."""
        solved = [self.stages[name] for name in stage.pair_shares]
        return next((each.field_settings for each in solved if isinstance(each, PairsStage)), UNCHANGED)

    @property
    def hub_inputs(self) -> set[str]:
        """The inputs that are given by hub id and downloaded before jobs run: a subset of "teacher" and "data".

        Makes no network request.
        """
        teacher = isinstance(self.teacher, CheckpointTeacher) and self.teacher.is_of_hub
        return {name for name, is_of_hub in (("teacher", teacher), ("data", self.data.is_downloaded)) if is_of_hub}

    def digest(self) -> str:
        """sha256 of the spec without `launch` and `name`. Specs with the same digest give the same numbers.

        Defaults of fields that earlier versions did not have are left out, so that it is the same as theirs.
        """
        content = self.model_dump(mode="json", exclude={"launch", "name"})
        content = _without_defaults(content, self, {"numerics", "compile"})
        content["stages"] = {name: stage_content(stage) for name, stage in self.stages.items()}
        content["data"] = _without_defaults(content["data"], self.data, ADDED_TO_DATA.get(self.data.kind, set()))
        if self.teacher is not None:
            content["teacher"] = _without_defaults(content["teacher"], self.teacher, ADDED_TO_TEACHER)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def stage_content(stage: Stage) -> dict[str, Any]:
    """The fields of a stage, without defaults of those that earlier versions did not have."""
    content = _without_defaults(stage.model_dump(mode="json"), stage, ADDED)
    if isinstance(stage, TrainStage):
        content["optimizer"] = _without_defaults(content["optimizer"], stage.optimizer, ADDED_TO_OPTIMIZER)
        if isinstance(stage.network, MlpSpec):
            content["network"] = _without_defaults(content["network"], stage.network, ADDED_TO_MLP)
    return content


def _without_defaults(content: dict[str, Any], of: BaseModel, added: set[str]) -> dict[str, Any]:
    """The dumped content of a model without those of the fields `added` that have their default."""
    given = of.model_dump(include=added, exclude_defaults=True)
    return {key: value for key, value in content.items() if key in given or key not in added}
