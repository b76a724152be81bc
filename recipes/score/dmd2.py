"""DMD2 (Yin et al. 2024, arXiv 2405.14867): match the student's distribution to the teacher's with two score models.

The student's samples get the gradient of KL(fake || teacher) at x_t, which is x0_fake - x0_teacher, divided by the mean
of |sample - x0_teacher|. The student also learns to fool a discriminator. The critic has `ratio` updates per update of
the student: it learns the velocity of samples, and to distinguish noised samples from noised data. Students of several
steps are trained on their own states (backward simulation, fresh noise between steps), by gradients of the last step.

Deviations: networks predict v, x0 = x_t - t v; t = 1 is noise. Every update makes new samples, the critic's first.
The discriminator sees the same x_t as the scores; its head is one convolution and a mean. t is uniform, for the student
in [0.02, 0.98]. `weight: kl`, ((1 - t)/t)^2 without the normaliser, is the exact gradient of the KL divergence.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from distill.flow import distances, times
from distill.flow.fields import jump_to_data
from distill.flow.interpolants import like
from distill.protocols import Batch, Context, Init, Loss, Nets, Role, Teacher, Trained, Turn


class Config(BaseModel):
    """Options of score/dmd2."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    steps: Annotated[int, Field(gt=0, le=100_000)] = 1
    """number of steps of the student, N"""
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    """guidance scale of the teacher, which the student learns; 1: no guidance"""
    ratio: Annotated[int, Field(gt=0, le=100_000)] = 5
    """critic updates per student update"""
    gan_weight: Annotated[float, Field(ge=0)] = 3e-3
    """weight of the student's adversarial loss; 0: no discriminator"""
    critic_gan_weight: Annotated[float, Field(gt=0)] | None = None
    """weight of the discriminator's loss in the critic's loss; null: 0.01"""
    weight: Literal["normalised", "kl"] = "normalised"
    """weight of the difference of the scores in the student's loss"""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.gan_weight == 0 and self.critic_gan_weight is not None:
            raise ValueError("critic_gan_weight has no effect with gan_weight: 0; remove it")
        return self

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"data", "teacher"})

    @property
    def student(self) -> str:
        return "flow_map"


class Recipe:
    sampler = "renoise"

    def __init__(self, config: Config, teacher: Teacher | None) -> None:
        self.config, self.trained_steps, self.t_grid = config, config.steps, times.uniform_grid(config.steps).tolist()
        self.teacher = None if teacher is None else teacher.guided(config.guidance_scale)

    def networks(self, init: Init) -> dict[str, Role]:
        waiting = ("head.*",) if self.config.gan_weight == 0 else ()  # only the GAN trains the head
        self.t_grid = [1.0, *init.t_grid(self.trained_steps)[1:]]
        return {"student": Trained(init.flow_map(to_data=True)), "critic": Trained(init.critic(), waiting)}

    def turns(self, step: int, images: int) -> Iterator[Turn]:
        yield Turn("critic", self.critic_turn)
        if step % self.config.ratio == self.config.ratio - 1:
            yield Turn("student", self.student_turn)

    def student_turn(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert self.teacher is not None
        c, cond, samples = self.config, batch.cond, self.generate(nets, batch, ctx)
        t = times.uniform(ctx.draw.uniform("t", samples), 0.02, 0.98)
        x_t = nets["student"].interpolant.mix(samples, ctx.draw.normal("noise_t", samples), t)
        with torch.set_grad_enabled(c.gan_weight > 0):
            v_fake, logit = nets["critic"](x_t, t, cond)
        with torch.no_grad():
            v_real = self.teacher(x_t, t, cond)
            towards_fake = like(t, x_t) * (v_real - v_fake)  # x0_fake - x0_teacher
            weight = ((1 - t) / t).square()
            if c.weight == "normalised":
                weight = 1 / ((samples - x_t + like(t, x_t) * v_real).abs().flatten(1).mean(1) + 1e-6)  # not 1 / 0
            g = like(weight, x_t) * towards_fake
        match = distances.mse(samples, samples.detach() - g).mean() / 2  # d match / d samples = g / (B d)
        if c.gan_weight == 0:
            return Loss(match)
        deceived = nn.functional.softplus(-logit).mean()
        return Loss(match + c.gan_weight * deceived, {"match": match.detach(), "deceived": deceived.detach()})

    def critic_turn(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:
        assert batch.data is not None
        path = nets["student"].interpolant
        with torch.no_grad():
            samples = self.generate(nets, batch, ctx)
        t, noise = ctx.draw.uniform("t", samples), ctx.draw.normal("noise_t", samples)
        v_fake, logit = nets["critic"](path.mix(samples, noise, t), t, batch.cond)
        score = distances.mse(v_fake, path.velocity(samples, noise, t)).mean()
        if self.config.gan_weight == 0:
            return Loss(score)
        t, noise = ctx.draw.uniform("t_real", samples), ctx.draw.normal("noise_t_real", samples)
        _, logit_real = nets["critic"](path.mix(batch.data, noise, t), t, batch.cond)
        told_apart = (nn.functional.softplus(logit) + nn.functional.softplus(-logit_real)).mean()
        logs = {"score": score.detach(), "told_apart": told_apart.detach()}
        return Loss(score + (self.config.critic_gan_weight or 0.01) * told_apart, logs)

    def generate(self, nets: Nets, batch: Batch, ctx: Context) -> Tensor:
        """Samples of one of the student's steps, after its own earlier steps; gradients of the last call only."""
        assert batch.data is not None
        x, last = ctx.draw.normal("noise", batch.data), ctx.draw.integer("steps", self.config.steps)
        for step, t in enumerate(self.t_grid[: last + 1]):
            x = (1 - t) * x + t * ctx.draw.normal(f"noise {step}", x) if step > 0 else x
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                x = jump_to_data(nets["student"], x, torch.full((len(x),), t, device=x.device), batch.cond)
        return x
