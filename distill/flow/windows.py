"""Segments of a teacher's paths, between the borders of windows of time, and the straight lines that replace them.

Straight in the linear path's coordinates: that is where one Euler step, which is one DDIM step, takes either end to
the other. Shared by the recipes that straighten window by window.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.flow import solvers, times
from distill.flow.interpolants import like, linear
from distill.protocols import Cond, VelocityField


@dataclass(frozen=True)
class Segment:
    """Of each sample's path, `start` at t_s and `end` at t_e < t_s. Points [B, ...], times [B]."""

    start: Tensor
    end: Tensor
    t_s: Tensor
    t_e: Tensor

    @property
    def velocity(self) -> Tensor:
        """(z_e - z_s) / (t_e - t_s), of the line between the ends [B, ...]."""
        return (self.end - self.start) / like(self.t_e - self.t_s, self.start)

    def at(self, t: Tensor) -> Tensor:
        """z_t [B, ...] on the line between the ends; t [B]."""
        return self.start + like(t - self.t_s, self.start) * self.velocity


def solve(
    field: VelocityField,
    data: Tensor,
    noise: Tensor,
    t: Tensor,
    cond: Cond,
    *,
    borders: Tensor,
    solver: Literal["euler", "heun"],
    steps: int,
) -> Segment:
    """The segment of the window that holds t [B]: from data noised to its start, by steps of the field to its end."""
    t_s, t_e = times.window(t, borders)
    start = linear().mix(data, noise, t_s)
    return Segment(start, solvers.march(field, start, t_s, t_e, cond, solver, steps), t_s, t_e)
