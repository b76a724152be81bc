"""Shared by recipes that learn the teacher's paths in segments of time: options, step times, sources of segments."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.flow import windows
from distill.flow.guidance_options import GuidanceScale
from distill.flow.times import discrete, one_of, uniform, window_grids
from distill.flow.windows import Segment
from distill.protocols import Batch, Cond, Context, Pairs, VelocityField


class WindowOptions(BaseModel):
    """The options of a recipe that solves the teacher's paths in windows of time while it trains."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    windows: Annotated[int, Field(gt=0, le=100_000)] = 4
    """number of equal windows of time, K; the student takes K steps or more"""
    times_per_window: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """number of equally spaced training times per window; 1: only its start, for K steps only; null: all times"""
    solver: Literal["euler", "heun"] = "euler"
    """solver of the teacher's path within a window"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""


def grids(borders: Tensor, levels: int | None) -> Mapping[int, Sequence[float]]:
    """Step times by number of steps N, for a student of K segments between `borders`: N = K, ..., 16.

    levels: number of times per segment at which the student was trained. If it is 1, or if K > 16, only N = K.
    """
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
    """Times t [B], and for each the segment of a teacher's path through the window of t.

    The segment starts from real data noised to the start of the window, and ends after `steps` solver steps of the
    teacher. levels: number of equally spaced times t per window; None: t is uniform.
    """
    assert batch.data is not None and teacher is not None
    u, noise = ctx.draw.uniform("t", batch.data), ctx.draw.normal("noise", batch.data)
    t = uniform(u) if levels is None else discrete(u, (len(borders) - 1) * levels)
    with torch.no_grad():
        return t, windows.solve(teacher, batch.data, noise, t, cond, borders=borders, solver=solver, steps=steps)


def stored(pairs: Pairs | None, u: Tensor) -> Segment:
    """One segment of each path of the pairs, between two consecutive states. u [B], uniform in [0, 1), selects it."""
    assert pairs is not None and pairs.states is not None and pairs.times is not None
    states, times, rows = pairs.states, pairs.times, torch.arange(len(u), device=u.device)  # [B, K + 1, ...]
    k = one_of(times.shape[1] - 1, u)
    return Segment(states[rows, k], states[rows, k + 1], times[rows, k], times[rows, k + 1])
