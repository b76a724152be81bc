"""The optimizer of a train stage."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from distill.core.field_types import Fraction, FrozenModel


class OptimizerSpec(FrozenModel):
    """The optimizer of each trained network."""

    name: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """adamw; adamw_8bit: with moments in a quarter of the memory (needs bitsandbytes); muon: orthogonal steps for
    weight matrices, and adamw with the same learning rate for all other weights, such as those of convolutions"""
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-3
    """learning rate after the warm-up"""
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    """decay of the averages of gradient and squared gradient"""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """epsilon, added to the denominator of the update"""
    weight_decay: float = Field(0.0, ge=0, le=1000)
    """decoupled weight decay"""
    momentum: Fraction | None = None
    """for muon: decay of the average of gradients of weight matrices; null: 0.95"""
    warmup_images: int = Field(0, ge=0, le=10**13)
    """linear warm-up, in images"""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """learning-rate schedule from the end of the warm-up to the end of the stage"""
    clip: PositiveFloat | None = 1.0
    """maximum gradient norm of each network; larger gradients are clipped; null: no clipping"""

    def learning_rate(self, images: float, total: int) -> float:
        """Learning rate after `images` of `total` images.

        Linear warm-up, then constant, or cosine or linear decay to 0 at `total`. The engine passes the middle of each
        step, so that neither the first nor the last step has learning rate 0.
        """
        if images < self.warmup_images:
            return self.lr * images / self.warmup_images
        rest = total - self.warmup_images
        progress = min(1.0, (images - self.warmup_images) / rest) if rest > 0 else 0.0
        match self.decay:
            case "constant":
                return self.lr
            case "linear":
                return self.lr * (1 - progress)
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * progress))


def mistakes(optimizer: OptimizerSpec, images: int, where: str) -> Iterator[str]:
    """The mistakes in an optimizer for a training of `images` images. where: its place in the spec."""
    if optimizer.warmup_images >= images:
        yield (
            f"{where}.warmup_images: {optimizer.warmup_images} of {images} images; "
            "the warm-up must end before the training does"
        )
    if 1 in optimizer.betas:
        yield f"{where}.betas: {list(optimizer.betas)}; both must be below 1"
    if optimizer.momentum == 1:
        yield f"{where}.momentum: 1; it must be below 1"
    if optimizer.name != "muon" and optimizer.momentum is not None:
        yield f"{where}.momentum: has no effect with {optimizer.name}; remove it, or set name: muon"
