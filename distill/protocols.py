"""The nouns of the framework: what a field, a flow map, a teacher, a batch, a turn and a recipe are.

One time axis (t = 0 data, t = 1 noise), one quantity (velocity v = dx_t/dt), two kinds of network: a
velocity field v(x_t, t, cond) and a flow map u(x_t, t, s, cond), the average velocity from t to s, so that
x_s = x_t + (s - t) u. Nothing here has an implementation; a module that fits the shape fits the framework.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from distill.flow.draws import Rows
from distill.flow.interpolants import Interpolant

Cond = Mapping[str, Tensor]  # e.g. {"class_labels": [B] int64}; empty for an unconditional network


@runtime_checkable
class VelocityField(Protocol):
    """v(x_t, t, cond): x_t [B, ...], t [B] in `t_range` of its own interpolant's time -> [B, ...]."""

    @property
    def interpolant(self) -> Interpolant: ...
    @property
    def t_range(self) -> tuple[float, float]: ...
    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor: ...


@runtime_checkable
class FlowMap(Protocol):
    """u(x_t, t, s, cond): the average velocity from t to s <= t, both [B] -> [B, ...]."""

    @property
    def interpolant(self) -> Interpolant: ...
    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor: ...


@runtime_checkable
class Conditioning(Protocol):
    """What a network is conditioned on. Data and pairs hold an index for each sample (a class id, the row of a table);
    `collate` makes of them what the network is called with. All tensors of a condition have the first dimension B.
    """

    @property
    def count(self) -> int | None: ...  # indices are 0 ... count - 1; None: unconditional
    @property
    def has_null(self) -> bool: ...  # whether there is an unconditional call
    def collate(self, indices: Tensor) -> Cond: ...  # [B] int64 -> a condition on the same device
    def null(self, cond: Cond) -> Cond: ...  # the condition of the unconditional call, for as many rows


@runtime_checkable
class Codec(Protocol):
    """From pixels [B, C, H, W] in [-1, 1] to what a network sees, and back."""

    @property
    def is_identity(self) -> bool: ...
    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]: ...  # of one encoded sample
    def encode(self, pixels: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class Architecture(Protocol):
    """How the networks of some classes are described by their config.json and called: one file for each, found by the
    class names. Config values come from a file that anybody may have written: refuse what is wrong by an InputError.
    """

    @property
    def classes(self) -> tuple[type[nn.Module], ...]: ...  # ModelMixins
    def shape(self, config: dict[str, Any], path: Path) -> tuple[int, ...]: ...  # of one sample
    def conditioning(self, config: dict[str, Any], path: Path, null_class: int | None) -> Conditioning: ...
    def layers(self, network: nn.Module) -> Sequence[str]: ...  # modules whose outputs are features, by name
    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor: ...  # output like x_t

    # path: of config.json. null_class: of the unconditional call, as the spec or the student's distill.json says.
    # time [B]: as the network's schedule counts it, e.g. 1000 t on the linear path.


@runtime_checkable
class Teacher(Protocol):
    """A frozen velocity field and what must be known to use it. A recipe is given one on the linear path."""

    @property
    def field(self) -> VelocityField: ...
    @property
    def shape(self) -> tuple[int, ...]: ...  # of one sample, e.g. (1, 8, 8) or (2,)
    @property
    def num_classes(self) -> int | None: ...  # real classes; None: unconditional
    @property
    def digest(self) -> str: ...  # sha256 over configuration and weights
    @property
    def conditioning(self) -> Conditioning: ...
    @property
    def codec(self) -> Codec: ...
    @property
    def layers(self) -> Sequence[str]: ...  # names of what `features` can give, in the order of the network
    def features(self, x_t: Tensor, t: Tensor, cond: Cond, layers: Sequence[str]) -> list[Tensor]: ...
    def null(self, cond: Cond) -> Cond: ...  # the condition of the unconditional call
    def guided(self, guidance_scale: float) -> VelocityField: ...  # 1 = none


@dataclass(frozen=True)
class Pairs:
    """Ends of the teacher's own paths: data = ODE(noise). Both [B, ...]. Where they were kept, also `states`
    [B, K, ...] of each path at its decreasing `times` [B, K], float32.

    States of a trajectory begin with noise at t = 1 and end with data at t = 0; of a segment there are two: noised real
    data, x_t = (1 - t) data + t noise, and where the teacher's ODE takes it.
    """

    noise: Tensor
    data: Tensor
    states: Tensor | None = None
    times: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """What one micro-batch holds: real data, pairs, or both, and their conditions."""

    data: Tensor | None
    pairs: Pairs | None
    cond: Cond  # of the pairs; where there are none, of the data
    data_cond: Cond = field(default_factory=dict)  # of the data, where it comes beside pairs


@runtime_checkable
class Source(Protocol):
    """Where batches come from; stateless, so that (seed, step) is the whole position."""

    def batch(self, step: int, rows: Rows) -> Batch: ...  # these rows of step's global batch, on the CPU


@runtime_checkable
class Draw(Protocol):
    """The only randomness of a recipe: keyed (seed, step, turn, name, row of the batch), so any ranks draw the same."""

    def normal(self, name: str, like: Tensor) -> Tensor: ...  # like's shape, dtype and device
    def uniform(self, name: str, like: Tensor) -> Tensor: ...  # [B] in [0, 1), float32
    def integer(self, name: str, below: int) -> int: ...  # one in 0 ... below - 1, for all ranks and micro-batches
    def every(self, fraction: float, like: Tensor) -> Tensor: ...  # [B] bool: this part of the global batch, evenly


@runtime_checkable
class Context(Protocol):
    """What a loss may know of the run."""

    @property
    def step(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def draw(self) -> Draw: ...
    @property
    def carry(self) -> dict[str, Tensor]: ...  # detached; shared by the turns of one step and micro-batch


@dataclass(frozen=True)
class Loss:
    """A scalar to minimise, and scalars to log."""

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


# A network as a loss sees it: the active one trainable, the others raw and frozen, all called alike.
Nets = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Turn:
    """One network, one loss, one optimizer step."""

    network: str
    loss: Callable[[Nets, Batch, Context], Loss]


@dataclass(frozen=True)
class Trained:
    """A network with an optimizer of its own.

    waiting: names of parameters, or patterns such as "head.*", that the first turns need not reach. Any other that no
    backward pass of its network's first two turns reaches, on any rank, is an error: most likely it never would be.
    lr: multiplies the learning rate of the stage for this network.
    groups: by the name of a parameter, or a pattern, a further factor of its learning rate.
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
    """A network that is called but never moves (gradients may flow through it)."""

    module: nn.Module


@dataclass(frozen=True)
class Copy:
    """A target network, frozen, with full weights on every rank: it starts as the trained network `of`, and after each
    of its optimizer steps becomes decay copy + (1 - decay) of. Decay 0: its last weights, always.
    """

    of: str
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"a copy with decay {self.decay} would never follow '{self.of}'; valid: 0 <= decay < 1")


@dataclass(frozen=True)
class Adapter:
    """A network whose weights stay, and low-rank adapters beside some of its layers, which train: each target layer
    gets the weights W + alpha / rank B A. It starts as `module`, of which it is a copy; exports have them merged.

    targets: names of linear and convolution layers, or the ends of their names, such as "to_q" or "layers.0".
    lr: multiplies the learning rate of the stage.
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
    """Where a recipe's networks come from: the teacher's weights, another stage's student, or fresh ones.

    A flow map that starts from a velocity network is that velocity, whatever s; a velocity with its acceleration is it
    twice, whatever v. A critic starts as the teacher, if that
    has weights.
    """

    @property
    def num_classes(self) -> int | None: ...  # of the networks it makes; None: unconditional
    @property
    def conditioning(self) -> Conditioning: ...
    def velocity_field(self) -> nn.Module: ...  # a module that is a VelocityField on the linear path
    def flow_map(self) -> nn.Module: ...  # a module that is a FlowMap on the linear path
    def acceleration(self) -> nn.Module: ...  # (x_t, t, None, cond) -> velocity v, (x_t, t, v, cond) -> dv/dt
    def critic(self) -> nn.Module: ...  # (x_t, t, cond) -> velocity [B, ...] and logit [B]
    def null(self, cond: Cond) -> Cond: ...  # the condition of the unconditional call


@runtime_checkable
class Recipe(Protocol):
    """An objective. Its module has a docstring naming the paper, `class Config(BaseModel)` and `class Recipe`.

    `Config` has the properties `needs` (a set of "data", "pairs", "states", "teacher", "weights", "jvp"; "states"
    beside "pairs": those with states; "weights": trained ones to start from) and `student` ("velocity" | "flow_map" |
    "acceleration" | "generator"), which may depend on its options.
    """

    sampler: str  # a name in distill/samplers/

    def networks(self, init: Init) -> dict[str, Role]: ...
    def turns(self, step: int, images: int) -> Iterator[Turn]: ...  # the same on every rank


@runtime_checkable
class Stateful(Protocol):
    """A recipe that remembers something from step to step."""

    def state(self) -> dict[str, Tensor]: ...  # small, equal on all ranks; a resume copies the saved ones into these


@runtime_checkable
class Gridded(Protocol):
    """A recipe whose student is sampled along times of its own, and at some numbers of steps only."""

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]: ...

    # N -> its times [N + 1], 1 ... 0; none: uniform, any N. times: of the states of its pairs, if all have the same.
