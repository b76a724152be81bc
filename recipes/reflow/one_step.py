"""One-step distillation of a rectified flow (Liu et al. 2022, arXiv 2209.03003): jump from noise to the teacher's data.

Minimises E D( v(x_t, t), noise - data ), where D is a distance, data = ODE(noise) and x_t = (1 - t) data + t noise. t
is uniform on the grid of the student's step times, {1, (k-1)/k, ..., 1/k}; the student can be used only at these times.
For k = 1, t is 1 and x_t is the noise, so a perceptual distance can compare images: LPIPS( noise - v(noise, 1), data ).

Deviations: t = 1 exactly; the authors' code stops at 0.999, where x_t contains 0.1 % of the data. The pseudo-Huber
distance (rf++, Lee et al. 2024, arXiv 2405.20320) is added as an option.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from distill.flow import distances
from distill.flow.times import uniform_grid
from distill.protocols import Batch, Context, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(distances.LpipsOptions):
    """Options of reflow/one_step."""

    steps: Annotated[int, Field(gt=0, le=100_000)] = 1
    """number of Euler steps of the student, k"""
    distance: Literal["l2", "pseudo_huber", "lpips", "l2+lpips"] = "l2"
    """distance between prediction and target, per sample; lpips and l2+lpips need steps: 1"""
    lpips_weight: PositiveFloat | None = None
    """weight of LPIPS in l2+lpips; null: 1"""
    lpips_resize: Literal["none", "to_64", "to_64_corners", "to_224"] = "none"
    """enlarge images for LPIPS to 64 or 224 pixels; none: do not enlarge, as in the authors' code"""

    @property
    def perceptual(self) -> bool:
        return self.distance in ("lpips", "l2+lpips")

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if (given := self.lpips_given()) and not self.perceptual:
            raise ValueError(
                f"{', '.join(given)}: no effect with distance: {self.distance}; remove them, or use l2+lpips"
            )
        if self.perceptual and (self.lpips_trunk is None or self.lpips_path is None):
            raise ValueError(f"distance: {self.distance} needs lpips_trunk and lpips_path")
        if self.perceptual and self.steps > 1:
            raise ValueError(
                f"distance: {self.distance} compares images, which works only with steps: 1, not {self.steps}"
            )
        if self.lpips_weight is not None and self.distance == "lpips":
            raise ValueError("lpips_weight has no effect with distance: lpips; remove it, or use l2+lpips")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"})

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.codec = config.codec_of(teacher, "use distance: l2")
        self.config = config

    def networks(self, init: Init) -> dict[str, Role]:
        roles: dict[str, Role] = {"student": Trained(init.velocity_field())}
        if (lpips := self.config.lpips(self.codec)) is not None:
            roles["lpips"] = Frozen(lpips)
        return roles

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.loss)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        k = self.config.steps
        return {n: uniform_grid(n).tolist() for n in range(1, k + 1) if k % n == 0}

    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.pairs is not None
        data, noise = batch.pairs.data, batch.pairs.noise
        k = self.config.steps
        t = 1 - (ctx.draw.uniform("t", data) * k).floor() / k  # [B], uniform on {1, (k-1)/k, ..., 1/k}
        student = nets["student"]
        x_t, velocity = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        v = student(x_t, t, batch.cond)
        match self.config.distance:
            case "l2":
                return Loss(distances.mse(v, velocity).mean())
            case "pseudo_huber":
                return Loss(distances.pseudo_huber(v, velocity).mean())
            case "lpips":
                return Loss(nets["lpips"](noise - v, data).mean())
            case "l2+lpips":
                l2, lpips = distances.mse(v, velocity).mean(), nets["lpips"](noise - v, data).mean()
                weight = 1.0 if self.config.lpips_weight is None else self.config.lpips_weight
                return Loss(l2 + weight * lpips, {"l2": l2.detach(), "lpips": lpips.detach()})
