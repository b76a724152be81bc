"""PDD, parallel decoding distillation (Shaul et al. 2026, arXiv 2607.26004): all fine steps of the teacher in one call.

The path from a state x_n at t_n is determined, so one network call returns the velocities h_n, h_n+1, ... of all later
intervals of a fine grid t_0 = 1 > ... > t_N = 0. Each is trained where the student's own earlier ones lead:
    minimise E || h_k(x_n, t_n) - v(X_k, t_k) ||^2 / d,   X_k = x_n + sum_{n <= j < k} (t_j+1 - t_j) h_j(x_n, t_n),
where v is the teacher's velocity, or with `solver: midpoint` that of its midpoint step. Only h_k has a gradient. No
derivative is needed. A step of the student from t_n to t_m is the sum of its intervals, so it is a flow map.

With `states: student`, x_n is where earlier steps of the student, of random lengths, lead from noise; of the data, only
conditions matter. These steps are made in each training step; the authors keep states, and begin at 0.999, not at 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import Tensor, nn

from distill.flow import distances, solvers
from distill.flow.guidance_options import GuidanceScale
from distill.flow.interpolants import like
from distill.flow.times import one_of, shifted_grid
from distill.flow.waiting import on
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of shortcut/pdd."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    intervals: Annotated[int, Field(gt=0, le=1024)] = 32
    """number of intervals of the fine grid, N"""
    shortest: Annotated[int, Field(gt=0, le=1024)] = 8
    """fewest intervals of a step of the student; it is made for up to intervals / shortest steps"""
    longest: Annotated[int, Field(gt=0, le=1024)] | None = None
    """most intervals of a step of the student; null: all"""
    shift: PositiveFloat = 1.0
    """times are k u / (1 + (k - 1) u) for even u, with this k; 1: even times"""
    solver: Literal["euler", "midpoint"] = "midpoint"
    """step of the teacher over one interval; midpoint takes two calls"""
    states: Literal["student", "data"] = "student"
    """where steps begin: where the student's own steps lead from noise, or at noised data"""
    asked: Annotated[int, Field(gt=0, le=1024)] = 1
    """intervals that each sample learns in a training step; more need more calls of the teacher only"""
    guidance_scale: GuidanceScale = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance; [low, high]: it is an input"""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.intervals % self.shortest:
            raise ValueError(f"intervals={self.intervals} is not a multiple of shortest={self.shortest}; change either")
        if self.longest is not None and (self.longest % self.shortest or self.longest > self.intervals):
            raise ValueError(f"longest={self.longest}; valid: multiples of shortest={self.shortest}, at most intervals")
        return self

    def lengths(self) -> dict[int, int]:
        """Number of steps of a student -> intervals of each."""
        blocks, most = self.intervals // self.shortest, self.longest or self.intervals
        found = {steps: self.intervals // steps for steps in range(1, blocks + 1) if blocks % steps == 0}
        return {steps: length for steps, length in found.items() if length <= most}

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "jump"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.teacher = config, None if teacher is None else teacher.guided(config.guidance_scale)
        self.grid = shifted_grid(config.intervals, config.shift)  # [N + 1]

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.policy("steps", self.config.intervals, self.grid.tolist()))}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return {steps: self.grid[::length].tolist() for steps, length in self.config.lengths().items()}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, student, cond = self.config, nets["student"], batch.cond
        assert batch.data is not None and self.teacher is not None
        noise, grid = ctx.draw.normal("noise", batch.data), on(self.grid, batch.data.device)
        if c.states == "data":
            n = c.shortest * one_of(c.intervals // c.shortest, ctx.draw.uniform("n", noise))  # [B]
            x_n = student.interpolant.mix(batch.data, noise, grid[n].float())
        else:
            x_n, n = self.own_state(student, noise, grid, cond, ctx)
        t_n, within = grid[n].float(), (c.intervals - n).clamp(max=c.longest or c.intervals)
        outputs, rows, total = student(x_n, t_n, None, cond), torch.arange(len(n), device=n.device), 0 * t_n
        for i in range(c.asked):
            k = ((ctx.draw.uniform(f"k{i}", noise) + i) / c.asked * within).long()
            k = n + torch.minimum(k, within - 1)  # [B]; before, rounding can give `within`
            t, s = grid[k].float(), grid[k + 1].float()
            with torch.no_grad():
                x_k = x_n + like(t - t_n, x_n) * student.average(outputs, x_n, t_n, t)
                v = (solvers.step(self.teacher, x_k, t, s, cond, c.solver) - x_k) / like(s - t, x_k)
            total = total + distances.mse(outputs[rows, k], v)
        return Loss((total / c.asked).mean())

    @torch.no_grad()
    def own_state(self, student: nn.Module, x: Tensor, grid: Tensor, cond: Cond, ctx: Context) -> tuple[Tensor, Tensor]:
        """States x_n [B, ...] to which steps of the student lead from noise x, and n [B]."""
        c, blocks = self.config, self.config.intervals // self.config.shortest
        n = torch.zeros(len(x), dtype=torch.int64, device=x.device)  # in units of `shortest`
        for i in range(steps := ctx.draw.integer("steps", max(c.lengths()))):
            most = (blocks - n - (steps - i)).clamp(max=(c.longest or c.intervals) // c.shortest)
            m = n + 1 + (ctx.draw.uniform(f"length{i}", x) * most).long()
            t, s = grid[n * c.shortest].float(), grid[m * c.shortest].float()
            x, n = x + like(s - t, x) * student.average(student(x, t, None, cond), x, t, s), m
        return x, n * c.shortest
