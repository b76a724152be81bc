"""Derivatives of a network by its time, without the ripple of its time embedding.

Networks of diffusers embed 1000 t in waves, of which the fastest turns 159 times while t goes from 0 to 1. What they
have learned of these waves is smooth on average only: the exact derivative by t is mostly ripple, by which recipes that
learn from derivatives are misled. Here, the derivative goes through a smooth fit of the embedding, and values stay.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distill.flow.waiting import on

WAVES = 5  # cosines and sines of k pi/2 t in the fit, k = 1 ... WAVES: at most 8 radians while t goes from 0 to 1
POINTS = 257  # times at which the embedding is fitted
WAVES_OF, LAYERS_OF = "time_proj", ("time_embedding", "timestep_embedder")  # as diffusers names them
OTHER_TIMES = "edm", "ve"  # paths of networks that embed noise levels, not times from 0 to 1000


def time_embeddings(network: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The parts of a network that embed its time, from 0 to 1000: the waves, and the layers after them."""
    found = []
    for part in network.modules():
        config = vars(part).get("_internal_dict") or {}  # where diffusers keeps it
        if config.get("path") in OTHER_TIMES:
            return []
        children = dict(part.named_children())
        found += [(children[WAVES_OF], children[name]) for name in LAYERS_OF if {name, WAVES_OF} <= children.keys()]
    return found


@contextmanager
def smooth_times(network: nn.Module, span: float = 1000.0) -> Iterator[None]:
    """Context manager: forward-mode derivatives of the network by its time are those of the smooth fits.

    span: times are fitted from 0 to this number.
    """
    with ExitStack() as hooks:
        for waves, layers in time_embeddings(network):
            seen: list[Tensor] = []
            hooks.enter_context(_removed(waves.register_forward_pre_hook(partial(_note, seen))))
            replace = partial(_replace, waves, seen, span)  # first: a hook of TwoTimes may add the second time
            hooks.enter_context(_removed(layers.register_forward_hook(replace, prepend=True)))
        yield


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _note(seen: list[Tensor], module: nn.Module, inputs: tuple[Tensor]) -> None:
    seen[:] = inputs


def _replace(
    waves: nn.Module, seen: list[Tensor], span: float, layers: nn.Module, inputs: tuple[Tensor], embedded: Tensor
) -> Tensor:
    """The embedding with the derivative of its fit."""
    time = seen.pop()
    grid = torch.linspace(0, span, POINTS, device=time.device)
    values = layers.forward(waves.forward(grid).to(inputs[0].dtype))  # `forward` itself calls no hooks
    fit = _basis(time.float() / span) @ (on(_inverse(), time.device) @ values.float())
    return embedded.detach() + (fit - fit.detach()).to(embedded.dtype)


def _basis(t: Tensor) -> Tensor:
    """[B] -> [B, 2 WAVES + 1]."""
    k = torch.arange(1, WAVES + 1, dtype=t.dtype, device=t.device)
    angle = t[:, None] * k * (math.pi / 2)
    return torch.cat([torch.ones_like(t)[:, None], angle.cos(), angle.sin()], dim=1)


@cache
def _inverse() -> Tensor:
    """[2 WAVES + 1, POINTS]: from values on the grid to the coefficients of their fit by least squares."""
    return torch.linalg.pinv(_basis(torch.linspace(0, 1, POINTS, dtype=torch.float64))).float()
