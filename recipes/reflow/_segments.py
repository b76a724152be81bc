"""Shared by the recipes that learn the teacher's paths segment by segment: options, grids, where segments come from."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.flow import windows
from distill.flow.times import discrete, one_of, uniform, window_grids
from distill.flow.windows import Segment
from distill.protocols import Batch, Cond, Context, Pairs, VelocityField


class WindowOptions(BaseModel):
    """The options of a recipe that solves the teacher's paths in windows of time while it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    windows: Annotated[int, Field(gt=0, le=100_000)] = 4
    """equal windows of time in this stage, K; the student takes K steps or more"""
    times_per_window: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """train at so many times of a window, equally far apart, its start the first; 1: for K steps only; null: any"""
    solver: Literal["euler", "heun"] = "euler"
    """of the teacher, within a window"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """of the teacher, baked into the student; 1 = none"""


def grids(borders: Tensor, levels: int | None) -> Mapping[int, Sequence[float]]:
    """The t_grids of a student of segments between these borders; levels: times of each that it was trained at."""
    return window_grids(borders, most=1 if levels == 1 else 16)


def solved(
    teacher: VelocityField | None,
    batch: Batch,
    cond: Cond,
    ctx: Context,
    *,
    borders: Tensor,
    levels: int | None,
    solver: Literal["euler", "heun"],
    steps: int,
) -> tuple[Tensor, Segment]:
    """Times t [B], uniform or on so many levels of each window, and the window's segment for each: from real data
    noised to its start, by steps of the teacher to its end.
    """
    assert batch.data is not None and teacher is not None
    u, noise = ctx.draw.uniform("t", batch.data), ctx.draw.normal("noise", batch.data)
    t = uniform(u) if levels is None else discrete(u, (len(borders) - 1) * levels)
    with torch.no_grad():
        return t, windows.solve(teacher, batch.data, noise, t, cond, borders=borders, solver=solver, steps=steps)


def stored(pairs: Pairs | None, u: Tensor) -> Segment:
    """Of each path of the pairs one segment between states that follow one another, any of them by u [B] in [0, 1)."""
    assert pairs is not None and pairs.states is not None and pairs.times is not None
    states, times, rows = pairs.states, pairs.times, torch.arange(len(u), device=u.device)  # [B, K + 1, ...]
    k = one_of(times.shape[1] - 1, u)
    return Segment(states[rows, k], states[rows, k + 1], times[rows, k], times[rows, k + 1])
