"""The interfaces of the framework: velocity fields, flow maps, teachers, batches, turns and recipes.

Time t runs from 0 (data) to 1 (noise), and velocities are v = dx_t/dt. A network is a velocity field v(x_t, t, cond) or
a flow map u(x_t, t, s, cond). A flow map is the average velocity from t to s, so that x_s = x_t + (s - t) u.

Most classes are `typing.Protocol`s: a class that has their attributes and methods can be used without inheriting.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from distill.flow.codecs import LatentScaling
from distill.flow.draws import Rows, Split
from distill.flow.interpolants import Interpolant

Cond = Mapping[str, Tensor]  # e.g. {"class_labels": [B] int64}; empty for an unconditional network
NetworkCall = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]  # (network, x_t [B, ...], time [B], cond) -> like x_t

LayerOutput: TypeAlias = Tensor | tuple[object, ...]  # also None, or a tuple of features of several levels

# (network, output of one of its layers, x_t, cond) -> the part of the output that belongs to the samples, [B, ...]
OfImage = Callable[[nn.Module, LayerOutput, Tensor, Cond], Tensor]


@runtime_checkable
class VelocityField(Protocol):
    """The velocity v(x_t, t, cond), in the shape of x_t [B, ...]. t [B] is the time of `interpolant`, in `t_range`."""

    @property
    def interpolant(self) -> Interpolant: ...
    @property
    def t_range(self) -> tuple[float, float]: ...
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


@runtime_checkable
class FlowMap(Protocol):
    """The average velocity u(x_t, t, s, cond) from t to s <= t, in the shape of x_t [B, ...]. t and s are [B]."""

    @property
    def interpolant(self) -> Interpolant: ...
    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor: ...


@runtime_checkable
class Conditioning(Protocol):
    """What a network is conditioned on.

    Data and pairs hold one index per sample, such as a class id or the row of a table. `collate` converts the indices
    of a batch to the condition that the network is called with. The first dimension of all tensors of a condition is B.

    sizes: [B, 6] int64, in pixels: height and width of the original image, top and left of the crop in the resized
    image, height and width of the sample. They matter only to networks that are conditioned on them, like SDXL's. None:
    images of the size of the samples, not cropped.
    """

    @property
    def count(self) -> int | None: ...  # indices are 0 ... count - 1; None: unconditional
    @property
    def has_null(self) -> bool: ...  # whether the network can be called without a condition (the null condition)
    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond: ...  # [B] int64 -> on the same device
    def null(self, cond: Cond) -> Cond: ...  # the null condition, for as many rows as `cond` has


@runtime_checkable
class Codec(Protocol):
    """Converts pixels [B, C, H, W] in [-1, 1] to the samples that a network works on (such as latents), and back."""

    @property
    def is_identity(self) -> bool: ...
    @property
    def digest(self) -> str: ...  # SHA-256 over configuration and weights; "" for the identity
    @property
    def has_spread(self) -> bool: ...  # whether an image has a distribution of latents, see `moments`
    def scaling(self) -> LatentScaling: ...  # from what the autoencoder returns; does not load the autoencoder
    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]: ...  # of one encoded sample
    def pixels(self, shape: tuple[int, ...]) -> tuple[int, ...]: ...  # shape of one decoded sample
    def together(self, shape: tuple[int, ...]) -> int: ...  # encoded samples of this shape to decode at once, at most
    def encode(self, pixels: Tensor) -> Tensor: ...  # the mean, if an image has a distribution of latents
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]: ...  # mean and log variance, only if `has_spread`
    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class Architecture(Protocol):
    """How to read the config.json of networks of some classes, and how to call these networks.

    An architecture is found by the class name in config.json. That file is untrusted input: `shape` and `conditioning`
    must raise InputError if a value is invalid.

    path: where config.json is, for messages.
    null_class: class id of the null condition, from the spec or the student's distill.json.
    time: [B], in the units of the network's schedule, e.g. 1000 t on the linear path.
    """

    @property
    def classes(self) -> tuple[type[nn.Module], ...]: ...  # subclasses of diffusers' ModelMixin
    def shape(self, config: dict[str, Any], path: Path) -> tuple[int, ...]: ...  # of one sample
    def conditioning(self, config: dict[str, Any], path: Path, null_class: int | None) -> Conditioning: ...
    def layers(self, network: nn.Module) -> Sequence[str]: ...  # names of the modules whose outputs are features
    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor: ...  # -> shape of x_t


@runtime_checkable
class Teacher(Protocol):
    """A frozen velocity field, with the facts needed to use it. Recipes get a teacher on the linear path."""

    @property
    def field(self) -> VelocityField: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample, e.g. (1, 8, 8) or (2,)
    @property
    def num_classes(self) -> int | None: ...  # without the null class; None: unconditional
    @property
    def digest(self) -> str: ...  # SHA-256 over configuration and weights
    @property
    def conditioning(self) -> Conditioning: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def layers(self) -> Sequence[str]: ...  # names of the layers that `features` accepts, in the order of the network
    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]: ...
    def null(self, cond: Cond) -> Cond: ...  # the null condition
    # 1: no guidance. A range of scales (low, high): each sample has its own, cond["guidance_scale"] [B].
    def guided(self, guidance_scale: float | tuple[float, float]) -> VelocityField: ...


@dataclass(frozen=True)
class Pairs:
    """Endpoints of the teacher's ODE paths: data = ODE(noise), both [B, ...].

    If the states of the paths were stored, `states` [B, K, ...] are those at the decreasing `times` [B, K], float32.
    The states of a trajectory start with noise at t = 1 and end with data at t = 0. A segment has two states: noised
    real data, x_t = (1 - t) data + t noise, and the solution of the teacher's ODE from there at the second time.
    """

    noise: Tensor
    data: Tensor
    states: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch: real data, pairs, or both, with their conditions."""

    data: Tensor | None
    pairs: Pairs | None
    cond: Cond  # of the pairs, or of the data if there are no pairs
    data_cond: Cond = field(default_factory=dict)  # of the data, if there are both data and pairs

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each of its tensors converted by `function`."""

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        cond, data_cond = ({name: function(each) for name, each in c.items()} for c in (self.cond, self.data_cond))
        pairs = self.pairs
        if pairs is not None:
            states, times = optional(pairs.states), optional(pairs.times)
            pairs = Pairs(function(pairs.noise), function(pairs.data), states, times)
        return Batch(optional(self.data), pairs, cond, data_cond)

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory. Tensors that repeat memory, such as expanded ones, cannot be pinned and stay."""
        return self.map(lambda tensor: tensor.pin_memory() if tensor.is_contiguous() else tensor)


@runtime_checkable
class Source(Protocol):
    """A stateless source of batches: a batch depends only on the seed and the step."""

    # These rows of the global batch of `step`. They are on the CPU; encoded data may be on the device of the networks.
    def batch(self, step: int, rows: Rows) -> Batch: ...


@runtime_checkable
class Draw(Protocol):
    """Random numbers for a recipe, which must use no others.

    They depend only on (seed, step, turn, name, row of the global batch), so any number of ranks draws the same
    numbers.
    """

    def normal(self, name: str, like: Tensor) -> Tensor: ...  # in the shape, dtype and device of `like`
    def uniform(self, name: str, like: Tensor) -> Tensor: ...  # [B] in [0, 1), float32
    def integer(self, name: str, below: int) -> int: ...  # in 0 ... below - 1, equal on all ranks and micro-batches
    def split(self, fraction: float, like: Tensor) -> Split: ...  # this fraction of the rows, and the others


@runtime_checkable
class Context(Protocol):
    """What a loss is told about the run."""

    @property
    def step(self) -> int: ...
    @property
    def images(self) -> int: ...  # samples that the student has been trained on so far
    @property
    def progress(self) -> float: ...  # part of the training that is done: 0 at its start, less than 1 at its last step
    @property
    def draw(self) -> Draw: ...
    @property
    def carry(self) -> dict[str, Tensor]: ...  # passed from turn to turn of one step and micro-batch, detached


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and scalars to log."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


# The networks of a recipe by name, as a loss gets them: only the network of the current turn is trainable.
Nets = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one network, on one loss."""

    network: str
    loss: Callable[[Nets, Batch, Context], Loss]


@dataclass(frozen=True)
class Trained:
    """A network that is trained, by an optimizer of its own.

    waiting: parameters, by name or by a pattern such as "head.*", that may get no gradient in the first turns. If any
    other parameter has a gradient on none of the ranks in the first two turns of its network, InputError is raised:
    most likely the loss does not depend on it.
    lr: factor of the stage's learning rate for this network.
    groups: further factors of the learning rate, by parameter name or pattern.
    """

    module: nn.Module
    waiting: tuple[str, ...] = ()
    lr: float = 1.0
    groups: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, factor in {"lr": self.lr, **{f"groups['{key}']": each for key, each in self.groups.items()}}.items():
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"Trained: {name}={factor} multiplies a learning rate; valid: a finite number above 0")


@dataclass(frozen=True)
class Frozen:
    """A network that is called but not trained. Gradients may flow through it."""

    module: nn.Module


@dataclass(frozen=True)
class Copy:
    """A frozen target network: an exponential moving average (EMA) of the trained network `of`.

    Every rank holds its full weights. It starts as `of`. After each optimizer step of `of`,
    copy = decay * copy + (1 - decay) * of. With decay 0, it always equals `of`.

    decay: a number, or a function of the progress of the training, see `Context.progress`.
    """

    of: str
    decay: float | Callable[[float], float] = 0.0

    def __post_init__(self) -> None:
        self.decay_at(0.0)

    def decay_at(self, progress: float) -> float:
        """The decay. ValueError if it is not in [0, 1)."""
        decay = self.decay(progress) if callable(self.decay) else self.decay
        if not 0 <= decay < 1:
            raise ValueError(f"copy of '{self.of}': decay={decay} is invalid; valid: 0 <= decay < 1")
        return decay


@dataclass(frozen=True)
class Adapter:
    """A copy of `module` with frozen weights and trained low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685).

    Each target layer has the weights W + (alpha / rank) B A, of which A and B are trained. At first B A is zero. In
    exported networks the adapters are merged into the weights.

    targets: names of linear and convolution layers, or the ends of their names, such as "to_q" or "layers.0".
    lr: factor of the stage's learning rate.
    """

    module: nn.Module
    rank: int
    alpha: float
    targets: tuple[str, ...]
    lr: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"Adapter: rank={self.rank}; valid: a whole number above 0")
        for name, value in {"alpha": self.alpha, "lr": self.lr}.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Adapter: {name}={value}; valid: a finite number above 0")
        if not self.targets:
            raise ValueError("Adapter: targets is empty; name at least one layer")


Role = Trained | Frozen | Copy | Adapter


@runtime_checkable
class Init(Protocol):
    """Makes a recipe's networks from the teacher's weights, from the student of another stage, or from fresh weights.

    A flow map that starts from a velocity network v returns v(x_t, t) for every s, and so does each output of a policy,
    but for noise of the standard deviation `spread`, relative to that of the last layer's weights. An acceleration
    network that starts from it returns v(x_t, t) both as velocity and as acceleration, for every given velocity. A
    critic starts from the teacher if the teacher has weights.

    A recipe that calls its flow map with s = 0 only should say so by `to_data`: then networks of latent-space pipelines
    get no second time, and the pipelines can sample them. `t_grid` returns the steps + 1 times along which its student
    is sampled, if it defines none itself: uniform ones, or those at which the pipeline's scheduler calls the network.
    Where the first one is less than 1, x is the noise scaled by sqrt(t^2 + (1 - t)^2), and the jump to data from there
    is the same as from the noise at t = 1.
    """

    @property
    def num_classes(self) -> int | None: ...  # of the networks that are made; None: unconditional
    @property
    def conditioning(self) -> Conditioning: ...
    def velocity_field(self) -> nn.Module: ...  # a module that is a VelocityField on the linear path
    def flow_map(self, to_data: bool = False) -> nn.Module: ...  # a module that is a FlowMap on the linear path
    def policy(
        self, policy: str, count: int, grid: Sequence[float] | None = None, spread: float = 0.0
    ) -> nn.Module: ...  # a FlowMap whose network has several outputs, see networks/policies.py and networks/policy.py
    def acceleration(self) -> nn.Module: ...  # (x_t, t, None, cond) -> velocity v, (x_t, t, v, cond) -> dv/dt
    def critic(self) -> nn.Module: ...  # (x_t, t, cond) -> velocity [B, ...] and logit [B]
    def t_grid(self, steps: int) -> Sequence[float]: ...
    def null(self, cond: Cond) -> Cond: ...  # the null condition


@runtime_checkable
class Recipe(Protocol):
    """A training objective.

    The module of a recipe has a docstring that names the paper, `class Config(BaseModel)` and `class Recipe`. `Config`
    has two properties, which may depend on its options. `needs` is a set of "data", "pairs", "states", "teacher",
    "weights" and "jvp": "states" with "pairs" means pairs that have states, and "weights" means trained weights to
    start from. `student` is "velocity", "flow_map" or "acceleration". Optional properties: `rows_together`, the number
    of samples whose losses depend on each other (the micro-batch must be a multiple of it); `guidance_scale`, with
    which it calls its teacher; `guidance_sync`, whether it drops the teacher's condition where it drops the student's.
    """

    sampler: str  # the sampler of its students: a file in distill/students/samplers/

    def networks(self, init: Init) -> dict[str, Role]: ...
    def turns(self, step: int, images: int) -> Iterator[Turn]: ...  # of one step; must be the same on every rank


@runtime_checkable
class Stateful(Protocol):
    """A recipe with state that is kept from step to step and saved in checkpoints."""

    def state(self) -> dict[str, Tensor]: ...  # small, equal on all ranks; on resume, saved values are copied into them


@runtime_checkable
class Gridded(Protocol):
    """A recipe that defines the sampling times of its student.

    `t_grids` maps each number of steps N that is allowed to its N + 1 times, from 1 to 0. An empty mapping allows any
    N, on a uniform grid. times: of the states of the pairs, if they are the same for all pairs; else None.
    """

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]: ...


@runtime_checkable
class ForSteps(Protocol):
    """A recipe that trains its student for certain numbers of steps, although it can be sampled in others.

    `trained_steps`: a number, several, or None if its options aim at none in particular. With `t_grids`, they must be
    among its numbers of steps. It is known once the recipe is made.
    """

    @property
    def trained_steps(self) -> int | Sequence[int] | None: ...
