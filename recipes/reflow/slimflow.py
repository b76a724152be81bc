"""SlimFlow (Zhu et al. 2024, arXiv 2407.12718): a one-step student in a new, smaller network.

`phase: anneal` trains a new `network`, with the loss || v(x_t, t) - (noise_b - data) ||^2 / d, where data = ODE(noise),
noise_b = sqrt(1 - beta^2) noise + beta fresh, and x_t = (1 - t) data + t noise_b. beta decreases from 1 (flow matching
on the teacher's samples) to 0 (reflow). `phase: distill` starts from that student (the stage's `init`) and keeps a
frozen copy v_T. Its loss is D( noise - v(noise, 1), data ) + D( fresh - v(fresh, 1), x_t - t v_T(x_t, t) ). The target
of the second term takes two steps: x_t = fresh - (1 - t) v(fresh, 1), with t uniform in (0.2, 0.8), and v_T from x_t.
With `middle: flow`, v_T also takes the first of these steps.

Deviations: t = 1 exactly in distill; in the authors' code, the input contains 0.1 % of the target. In anneal, t is in
[0, 1). The student and v_T start from the same weights, which the previous stage has exported.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import distances, times
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Frozen, Init, Loss, Nets, Role, Teacher, Trained, Turn

LPIPS = {"lpips_trunk", "lpips_path"}
BETA = {"linear": lambda k: 1 - min(1.0, k), "exp": lambda k: math.exp(-k)}
BETA |= {"cosine": lambda k: (1 + math.cos(math.pi * min(1.0, k))) / 2}


class Config(distances.LpipsOptions):
    """Options of reflow/slimflow."""

    phase: Literal["anneal", "distill"] = "distill"
    """anneal: annealed reflow of a new network; distill: its flow-guided distillation to one step"""
    anneal_images: Annotated[int, Field(gt=0, le=10**13)] | None = None
    """for anneal: number of images until beta is 0 (with exp: 1/e); use much fewer than the stage's images"""
    schedule: Literal["linear", "exp", "cosine"] | None = None
    """for anneal: how beta decreases; null: linear"""
    flip: bool = False
    """flip images and their noise horizontally, in half of the batches"""
    middle: Literal["student", "flow"] | None = None
    """for distill: network that takes the first of the two steps, student (v) or flow (v_T); null: student"""
    distance: Literal["l2", "lpips"] = "l2"
    """for distill: distance D in both terms of the loss"""
    lpips_resize: Literal["none", "to_64", "to_64_corners", "to_224"] = "to_64_corners"
    """enlarge images for LPIPS to 64 (corners aligned, as the authors do) or 224 pixels; none: do not enlarge"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        given, lpips = self.model_dump(exclude_defaults=True).keys(), set(self.lpips_given())
        distill = {"middle", "distance", *lpips}
        if unused := sorted(given & (distill if self.phase == "anneal" else {"anneal_images", "schedule"})):
            raise ValueError(f"{', '.join(unused)}: no effect with phase: {self.phase}; remove them")
        if self.phase == "anneal" and self.anneal_images is None:
            raise ValueError("phase: anneal needs anneal_images, the number of images until beta is 0")
        if lpips and self.distance == "l2":
            raise ValueError(f"{', '.join(sorted(lpips))}: no effect with distance: l2; remove them, or use lpips")
        if self.distance == "lpips" and not lpips >= LPIPS:
            raise ValueError("distance: lpips needs lpips_trunk and lpips_path")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"teacher", "pairs"} | ({"weights"} if self.phase == "distill" else set()))

    @property
    def student(self) -> str:
        return "velocity"


class Recipe:
    sampler = "euler"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        if config.flip and teacher is not None and len(teacher.shape) != 3:
            raise InputError(f"flip needs images, but samples have shape {list(teacher.shape)}; remove it")
        self.codec = config.codec_of(teacher, "use distance: l2")
        self.config = config

    def networks(self, init: Init) -> dict[str, Role]:
        c, roles = self.config, dict[str, Role](student=Trained(init.velocity_field()))
        if c.phase == "distill":
            roles["flow"] = Frozen(init.velocity_field())
        if (lpips := c.lpips(self.codec)) is not None:
            roles["lpips"] = Frozen(lpips)
        return roles

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("student", self.anneal if self.config.phase == "anneal" else self.distill)

    def t_grids(self, times: Sequence[float] | None) -> Mapping[int, Sequence[float]]:
        return {} if self.config.phase == "anneal" else {1: [1.0, 0.0]}

    def anneal(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        c, (data, noise), student = self.config, self.ends(batch, ctx), nets["student"]
        beta, t = BETA[c.schedule or "linear"](ctx.images / (c.anneal_images or 1)), ctx.draw.uniform("t", data)
        noise = math.sqrt(1 - beta**2) * noise + beta * ctx.draw.normal("fresh", noise)
        x_t, v = student.interpolant.mix(data, noise, t), student.interpolant.velocity(data, noise, t)
        return Loss(distances.mse(student(x_t, t, batch.cond), v).mean())

    def distill(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        (data, noise), student, flow, cond = self.ends(batch, ctx), nets["student"], nets["flow"], batch.cond
        fresh, t = ctx.draw.normal("fresh", noise), times.uniform(ctx.draw.uniform("t", noise), 0.2, 0.8)
        distance, one = nets["lpips"] if self.config.distance == "lpips" else distances.mse, torch.ones_like(t)
        v = student(fresh, one, cond)
        with torch.no_grad():
            x_t = fresh - like(1 - t, v) * (flow(fresh, one, cond) if self.config.middle == "flow" else v)
            target = x_t - like(t, x_t) * flow(x_t, t, cond)
        pairs, guided = distance(noise - student(noise, one, cond), data).mean(), distance(fresh - v, target).mean()
        return Loss(pairs + guided, {"pairs": pairs.detach(), "guided": guided.detach()})

    def ends(self, batch: Batch, ctx: Context) -> tuple[Tensor, Tensor]:
        """Data and noise of the pairs; both are mirrored, or none."""
        assert batch.pairs is not None
        data, noise = batch.pairs.data, batch.pairs.noise
        mirrored = self.config.flip and ctx.draw.integer("flip", 2) == 1
        return (data.flip(-1), noise.flip(-1)) if mirrored else (data, noise)
