"""Simple ReFlow (Kim et al. 2024, arXiv 2410.07815): reflow with improved loss, times, dropout and pairs.

With x_t = (1 - t) data + t noise and the student as a denoiser D(x_t) = x_t - t v(x_t, t), the error of a sample is
l = || phi(D(x_t) - data) ||^2 / d. phi = I + high_pass_weight (I - blur) is linear and invertible, so the minimum stays
the same. The loss is l / sg[l] (sg: no gradient), whose gradient is that of log l: all times and samples count equally.
The density of t is proportional to 10^t. The step times are a sigmoid grid, dense at both ends.

Two further parts are not options of this recipe, but of the train stage: `dropout`, to set less than the teacher's, and
`pairs: {backward: 0.8, forward: 0.2}`, to add forward pairs (real data and the noise to which it is inverted).
Projected pairs have the exact distribution of the data: with the option `project_block`, generated data is replaced by
real data, matched by optimal transport, with the class of the real data.

Deviations: the loss is l / sg[l + 1e-6] with l of each sample. The paper may use an average of l (unverified), which is
the same if x_t determines its pair. The blur is [1, 2, 1]/4 along both axes with repeated edges, its weight is 10, and
sharpness is 20 (all unverified). Pairs are projected within a batch, preferably to the same class, not over the whole
set (unverified). Forward pairs in the batch are projected, too. Steps are Euler's, not DPM-Solver's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import couplings, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Cond, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn

SMALL, MOST_STEPS = 1e-6, 16


class Config(BaseModel):
    """Options of reflow/simple_reflow."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    high_pass_weight: Annotated[float, Field(ge=0)] | None = None
    """weight of high frequencies (what a blur removes) in the distance between images; null: 10; not for vectors"""
    sharpness: Annotated[float, Field(gt=0, le=50)] | None = 20.0
    """sharpness of the sigmoid grid of step times, for 1 to 16 steps; null: uniform times, for any number of steps"""
    project_block: Annotated[int, Field(ge=2, le=100_000)] | None = None
    """number of pairs whose data is replaced together by matched real data; null: keep the generated data"""

    @property
    def needs(self) -> frozenset[str]:
        pairs = frozenset({"teacher", "pairs"})
        return pairs if self.project_block is None else pairs | {"data"}

    @property
    def student(self) -> str:
        return "velocity"

    @property
    def rows_together(self) -> int:
        return self.project_block or 1


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        if config.high_pass_weight is not None and teacher is not None and len(teacher.shape) != 3:
            raise InputError(f"high_pass_weight needs images, but samples have shape {list(teacher.shape)}; remove it")
        self.config = config
        self.high_pass_weight = 10.0 if config.high_pass_weight is None else config.high_pass_weight

    def networks(self, init: Init) -> dict[str, Role]:
        return {"student": Trained(init.velocity_field())}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times_of_states: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        sharpness = self.config.sharpness
        if sharpness is None:
            return {}
        return {steps: times.sigmoid_grid(steps, sharpness).tolist() for steps in range(1, MOST_STEPS + 1)}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        noise, (data, cond) = batch.pairs.noise, self.data_ends(batch)
        t = times.exp10(ctx.draw.uniform("t", data))  # [B]
        student = nets["student"]
        x_t, velocity = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        error = like(t, x_t) * (velocity - student(x_t, t, cond))  # D(x_t) - data
        if error.ndim == 4:
            error = error + self.high_pass_weight * high_pass(error)
        each = error.square().flatten(1).mean(1)  # [B]
        return Loss((each / (each.detach() + SMALL)).mean(), {"distance": each.mean().detach()})

    def data_ends(self, batch: Batch) -> tuple[Tensor, Cond]:
        """The generated data and its condition; or, for projected pairs, the matched real data and its condition."""
        assert batch.pairs is not None
        block = self.config.project_block
        if block is None:
            return batch.pairs.data, batch.cond
        assert batch.data is not None
        cost = couplings.costs(batch.pairs.data, batch.data, block).square()
        if "class_labels" in batch.cond:
            rows, columns = (couplings.in_blocks(c["class_labels"].cpu(), block) for c in (batch.cond, batch.data_cond))
            # A match with another class costs more than any permutation could save.
            cost += block * cost.max() * (rows[:, :, None] != columns[:, None, :])
        match = couplings.assignment(cost).to(batch.data.device)  # [B]
        return batch.data[match], {name: value[match] for name, value in batch.data_cond.items()}


def high_pass(images: Tensor) -> Tensor:
    """Images [B, C, H, W] minus their blur: a symmetric linear map with eigenvalues in [0, 1]."""
    blur = images
    for side in (2, 3):
        last = blur.shape[side] - 1
        before = torch.cat([blur.narrow(side, 0, 1), blur.narrow(side, 0, last)], side)
        after = torch.cat([blur.narrow(side, 1, last), blur.narrow(side, last, 1)], side)
        blur = (before + 2 * blur + after) / 4
    return images - blur
