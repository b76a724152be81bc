"""Extracts a LoRA from a student: the best approximation of its change by matrices of a low rank.

The change of a layer is the student's weight minus that of the base. Its singular value decomposition (SVD), cut off
after `rank` values, is the matrix of this rank with the smallest squared error (Eckart and Young, 1936).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.networks.adapters import adaptable
from distill.students.lora_weights import LoraLayer, LoraWeights
from distill.teachers.read import short


@dataclass(frozen=True)
class DecomposedLayer:
    """The change of one layer as up down, cut off after the largest singular values.

    up: [out, k]. down: [k, in, ...], with the kernel of a convolution. values: [k] float64. Column i of up and row i of
    down have length sqrt(values[i]). energy: the squared sum of the change, which is that of all singular values.
    """

    up: Tensor
    down: Tensor
    values: Tensor
    energy: float

    def kept(self, rank: int) -> float:
        """The share of the energy that this rank keeps, in [0, 1]."""
        return min(1.0, self.values[:rank].square().sum().item() / self.energy)

    def at(self, rank: int) -> LoraLayer:
        """The LoRA of this rank, or of all values if there are fewer. Alpha is the rank, so the factor is 1."""
        down, up = self.down[:rank].contiguous(), self.up[:, :rank].contiguous()
        return LoraLayer(down, up.reshape(up.shape + (1,) * (down.ndim - 2)), float(len(down)))


@dataclass(frozen=True)
class DecomposedChange:
    """What has changed between two networks of one class.

    layers: by the name of the layer. others: the squared sum of the change of every other parameter by its name, such
    as norms and biases, which a LoRA cannot hold. Unchanged ones are in neither.
    """

    layers: Mapping[str, DecomposedLayer]
    others: Mapping[str, float]

    @cached_property
    def energy(self) -> float:
        """The squared sum of the whole change."""
        return sum(each.energy for each in self.layers.values()) + sum(self.others.values())

    def kept(self, rank: int) -> float:
        """The share of the energy of the whole change that a LoRA of this rank keeps."""
        return sum(each.kept(rank) * each.energy for each in self.layers.values()) / self.energy

    @property
    def shares(self) -> dict[str, float]:
        """The share of the energy of each parameter that a LoRA cannot hold, the largest first."""
        found = {name: each / self.energy for name, each in self.others.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def lora(self, rank: int, network: str, component: str) -> LoraWeights:
        """The LoRA of this rank. network, component: see `LoraWeights`."""
        return LoraWeights(network, component, {name: each.at(rank) for name, each in self.layers.items()})


@torch.no_grad()
def decompose(
    base: nn.Module,
    student: nn.Module,
    ranks: Sequence[int],
    device: torch.device,
    tell: Callable[[int], None] = lambda done: None,
) -> DecomposedChange:
    """Decomposes the change of a student's network, layer by layer, so that one layer is on `device` at a time.

    ranks: those that are asked for; no more than the largest one is kept. tell: is told how many layers are done.

    The decomposition is in float64. Raises InputError if the networks do not have the same parameters, if nothing has
    changed, or if a rank is below 1 or above the sides of all layers.
    """
    before, after = _pairs(base, student)
    refuse_ranks(student, ranks)
    weights = {f"{name}.weight": name for name in adaptable(student)}
    layers, others = {}, {}
    for done, (name, weight) in enumerate(after.items()):
        tell(done)
        change = weight.to(device, torch.float64)
        if name in before:
            change = change - before[name].to(device, torch.float64)
        if not change.isfinite().all():
            raise InputError(f"the weights {short(name)} are not finite; give another student or teacher")
        if not change.any():
            continue
        if name in weights:
            layers[weights[name]] = _decomposed(change, max(ranks))
        else:
            others[name] = change.square().sum().item()
    tell(len(after))
    if not layers:
        changed = "only parameters that a LoRA cannot hold have changed" if others else "nothing has changed"
        raise InputError(f"the student has the weights of its teacher in all layers ({changed}); train it first")
    return DecomposedChange(layers, others)


@torch.no_grad()
def relative_change(base: nn.Module, student: nn.Module) -> float:
    """The root of the squared change of all parameters, relative to that of the base's parameters.

    It is small for a student that was trained from this base, and about 1.4 for unrelated networks. Raises InputError
    if the networks do not have the same parameters.
    """
    before, after = _pairs(base, student)
    change = size = 0.0
    for name, weight in after.items():
        own = before[name].to(weight.device, torch.float64) if name in before else torch.zeros_like(weight).double()
        change += (weight.double() - own).square().sum().item()
        size += own.square().sum().item()
    return math.sqrt(change / size) if size else math.inf


def refuse_ranks(network: nn.Module, ranks: Sequence[int]) -> None:
    """InputError if a rank is below 1 or above the smaller side of all layers."""
    most = max((min(len(each.weight), each.weight[0].numel()) for each in adaptable(network).values()), default=0)
    for rank in ranks:
        if not 1 <= rank <= most:
            raise InputError(
                f"--rank {rank}: valid are 1 to {most}, the smaller side of the largest layer; a LoRA of rank {most} "
                "already keeps everything"
            )


def _decomposed(change: Tensor, rank: int) -> DecomposedLayer:
    """change: [out, in, ...] float64.

    The singular vectors of the smaller side are the eigenvectors of the matrix times its transpose, which are found ten
    times faster. Singular values below 1e-8 of the largest one are not exact, but those of weights in float32 are not
    exact either.
    """
    matrix = change.flatten(1)
    transposed = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if transposed else matrix
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    vectors = vectors.flip(1)[:, :rank]
    values = squares.flip(0)[:rank].clamp(min=0).sqrt()
    length = values.clamp(min=1e-6 * values[0].item()).sqrt()
    first, second = vectors * length, vectors.T @ matrix / length[:, None]
    up, down = (second.T, first.T) if transposed else (first, second)
    down = down.reshape(-1, *change.shape[1:])
    up, down = (each.to("cpu", torch.float32, copy=True) for each in (up, down))
    return DecomposedLayer(up, down, values.cpu(), change.square().sum().item())


def _pairs(base: nn.Module, student: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters of both networks. InputError unless they are the same.

    The student may have further ones that are zero, so that they have no effect.
    """
    before, after = dict(base.named_parameters()), dict(student.named_parameters())
    differs = [name for name in after if name in before and before[name].shape != after[name].shape]
    differs += [name for name in after if name not in before and after[name].any()]
    differs += [name for name in before if name not in after]
    if differs:
        raise InputError(
            f"the student and this teacher are networks of different sizes: {short(differs[0])} differs; give the "
            f"{type(base).__name__} that the student started from"
        )
    return before, after
