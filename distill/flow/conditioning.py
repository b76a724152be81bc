"""Conditioning on class labels or on rows of a table, and no conditioning."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.core.field_types import GuidanceRange, middle
from distill.protocols import Cond, Conditioning


@dataclass(frozen=True)
class ClassLabels:
    """Class ids, cond["class_labels"] [B] int64. null_class: class id of the null condition; None: there is none."""

    count: int
    null_class: int | None = None

    @property
    def has_null(self) -> bool:
        return self.null_class is not None

    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond:
        return {"class_labels": indices}

    def null(self, cond: Cond) -> Cond:
        assert self.null_class is not None
        return {**cond, "class_labels": torch.full_like(cond["class_labels"], self.null_class)}


@dataclass(frozen=True)
class Unconditional:
    """No condition: `cond` is always empty."""

    count: None = None
    has_null: bool = False

    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond:
        return {}

    def null(self, cond: Cond) -> Cond:
        return cond


@runtime_checkable
class ConditionRows(Protocol):
    """The rows of a table of conditions: one for each condition, with one tensor for each field."""

    @property
    def fields(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]: ...  # shape of one row, and data type
    def __len__(self) -> int: ...
    def take(self, indices: Tensor) -> dict[str, Tensor]: ...  # [B] int64 on the CPU -> [B, ...] by field, on the CPU


@dataclass(frozen=True)
class HeldRows:
    """Rows in memory: [count, ...] by field. Implements `ConditionRows`."""

    tensors: Mapping[str, Tensor]

    @property
    def fields(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(each.shape[1:]), each.dtype) for name, each in self.tensors.items()}

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        return {name: each[indices] for name, each in self.tensors.items()}


@dataclass(frozen=True)
class ConditionTable:
    """Conditions that were computed beforehand, such as embeddings of prompts: index i has row i.

    null_rows: [1, ...] by field, of the null condition; None: there is none.
    constants: [...] by field, equal for all samples. of_sizes: computes, from the sizes of images [B, 6] (see
    `protocols.Conditioning`), those constants that depend on them, each [B, ...]. It is used where sizes are given; a
    field that is not in `constants` is left out. dtypes: by field, the data type that the network takes, to which rows
    are converted when they are used; a field that is not named has the data type of its rows.

    prompts: those of the first rows, for captions; empty: not known. guidance_range: (low, high) of the guidance scales
    that the network knows, of which the constant `guidance` or `guidance_scale` is one; None: it knows one, or none.

    The null condition has the constants of the condition that it replaces, and so also its sizes, as in the pipelines
    of diffusers.
    """

    rows: ConditionRows
    null_rows: Mapping[str, Tensor] | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    of_sizes: Callable[[Tensor], dict[str, Tensor]] | None = None
    prompts: Sequence[str] = ()
    guidance_range: GuidanceRange | None = None
    _placed: dict[torch.device, tuple[dict[str, Tensor], dict[str, Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """the null row and the constants on each device where they were used"""

    @property
    def count(self) -> int:
        return len(self.rows)

    @property
    def has_null(self) -> bool:
        return self.null_rows is not None

    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond:
        taken = self.rows.take(indices.cpu())
        found = {name: each.to(indices.device, self._dtype(name, each)) for name, each in taken.items()}
        found |= _repeated(self._on(indices.device)[1], len(indices))
        if sizes is not None and self.of_sizes is not None:
            computed = {name: each for name, each in self.of_sizes(sizes).items() if name in self.constants}
            found |= {name: each.to(indices.device, self.constants[name].dtype) for name, each in computed.items()}
        return found

    def null(self, cond: Cond) -> Cond:
        assert self.null_rows is not None
        like = next(iter(cond.values()))
        return _repeated(self._on(like.device)[0], len(like)) | {name: cond[name] for name in self.constants}

    def _dtype(self, name: str, rows: Tensor) -> torch.dtype:
        return self.dtypes.get(name, rows.dtype)

    def _on(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The null row and the constants on a device, which each guided call uses. They are copied to it once."""
        if device not in self._placed:
            null = {name: each[0].to(device, self._dtype(name, each)) for name, each in (self.null_rows or {}).items()}
            self._placed[device] = (null, {name: each.to(device) for name, each in self.constants.items()})
        return self._placed[device]


GUIDANCE_SCALE = "guidance_scale"  # the condition of networks that get this input here
EMBEDDED = "guidance"  # that of networks that have it already


@dataclass(frozen=True)
class WithGuidance:
    """Conditions with a guidance scale, cond["guidance_scale"] [B] float32, for a network that takes it as an input.

    guidance_range: (low, high) of the scales that the network knows. scale: of all samples; None: the middle.
    """

    given: Conditioning
    guidance_range: GuidanceRange
    scale: float | None = None

    @property
    def count(self) -> int | None:
        return self.given.count

    @property
    def has_null(self) -> bool:
        return self.given.has_null

    def collate(self, indices: Tensor, sizes: Tensor | None = None) -> Cond:
        scale = middle(self.guidance_range) if self.scale is None else self.scale
        scales = torch.full(indices.shape, scale, dtype=torch.float32, device=indices.device)
        return {**self.given.collate(indices, sizes), GUIDANCE_SCALE: scales}

    def null(self, cond: Cond) -> Cond:
        return {**self.given.null(without_guidance(cond)), GUIDANCE_SCALE: cond[GUIDANCE_SCALE]}


def without_guidance(cond: Cond) -> Cond:
    """The condition without the guidance scale."""
    return {name: each for name, each in cond.items() if name != GUIDANCE_SCALE}


def guidance_of(conditioning: Conditioning) -> GuidanceRange | None:
    """The range of guidance scales that a network takes as an input; None if it takes none, or only one."""
    return conditioning.guidance_range if isinstance(conditioning, WithGuidance | ConditionTable) else None


def with_guidance(conditioning: Conditioning, scale: float | None, where: str) -> Conditioning:
    """The conditions with this guidance scale; None: as they are. InputError if the network does not know it.

    where: the option that gives the scale, for the message.
    """
    if scale is None:
        return conditioning
    if (known := guidance_of(conditioning)) is None:
        raise InputError(f"{where} {scale:g}: this student does not take a guidance scale; leave it out")
    if not known[0] <= scale <= known[1]:
        raise InputError(
            f"{where} {scale:g}: this student was trained for guidance scales from {known[0]:g} to {known[1]:g}"
        )
    return taking(conditioning.given if isinstance(conditioning, WithGuidance) else conditioning, known, scale)


def taking(given: Conditioning, guidance_range: GuidanceRange, scale: float | None = None) -> Conditioning:
    """The conditions of a network that takes a guidance scale of this range too. scale: None: the middle."""
    if not isinstance(given, ConditionTable):
        return WithGuidance(given, guidance_range, scale)
    name = EMBEDDED if EMBEDDED in given.constants else GUIDANCE_SCALE
    value = torch.tensor(middle(guidance_range) if scale is None else scale)
    old = given.constants.get(name, value)
    constants = {**given.constants, name: torch.full_like(old, float(value))}
    return replace(given, guidance_range=guidance_range, constants=constants)


def for_scales(given: Conditioning, wanted: GuidanceRange | None) -> Conditioning:
    """The conditions of networks that are to take the guidance scales of this range too; None: those given.

    given: of the network that they start from. InputError if it is unconditional.
    """
    if wanted is None or guidance_of(given) == wanted:
        return given
    if given.count is None:
        text = "guidance_scale: [{:g}, {:g}]".format(*wanted)
        raise InputError(
            f"{text} has no effect on networks without classes or prompts; remove it, or give labelled data"
        )
    return taking(given, wanted)


def with_range(given: Conditioning | None, guidance_range: GuidanceRange | None) -> Conditioning | None:
    """The conditions of a student whose card has this range; None as a range: those given."""
    return given if guidance_range is None or given is None else taking(given, guidance_range)


def embeds_guidance(conditioning: Conditioning) -> bool:
    """Whether the network takes a guidance scale that is the same for all conditions, as FLUX.1 dev does."""
    return isinstance(conditioning, ConditionTable) and EMBEDDED in conditioning.constants


def between(conditioning: Conditioning, cond: Cond, uniform: Tensor) -> Cond:
    """`cond` with a guidance scale for each sample: from the lowest to the highest, at `uniform` [B] in [0, 1)."""
    known = guidance_of(conditioning)
    assert known is not None
    scales, name = known[0] + (known[1] - known[0]) * uniform, EMBEDDED if EMBEDDED in cond else GUIDANCE_SCALE
    return {**cond, name: scales.to(cond[name].dtype)}


def _repeated(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Each tensor [...] as [count, ...], without a copy."""
    return {name: each.expand(count, *each.shape) for name, each in tensors.items()}


def of_classes(num_classes: int | None, null_class: int | None) -> Conditioning:
    """Returns the conditioning of a network with `num_classes` classes. None: an unconditional network."""
    return Unconditional() if num_classes is None else ClassLabels(num_classes, null_class)
