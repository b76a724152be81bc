"""Segments of the teacher's paths within time windows, and the straight lines that replace them.

Used by the recipes that straighten paths window by window. The lines are straight in the coordinates of the linear
path, where a single Euler step, which is a DDIM step, goes from one end to the other.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.flow import solvers, times
from distill.flow.interpolants import like, linear
from distill.protocols import Cond, VelocityField


@dataclass(frozen=True)
class Segment:
    """A segment of each sample's path, from `start` [B, ...] at t_s [B] to `end` [B, ...] at t_e [B], t_e < t_s."""

    start: Tensor
    end: Tensor
    t_s: Tensor
    t_e: Tensor

    @property
    def velocity(self) -> Tensor:
        """The velocity of the line between the ends, (end - start) / (t_e - t_s), [B, ...]."""
        return (self.end - self.start) / like(self.t_e - self.t_s, self.start)

    def at(self, t: Tensor) -> Tensor:
        """The points [B, ...] on the line between the ends at t [B]."""
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
    """Solves the field's ODE through the window that contains t [B], and returns the segment.

    The segment starts from `data` noised with `noise` to the start of the window. steps: number of solver steps.
    """
    t_s, t_e = times.window(t, borders)
    start = linear().mix(data, noise, t_s)
    return Segment(start, solvers.march(field, start, t_s, t_e, cond, solver, steps), t_s, t_e)
