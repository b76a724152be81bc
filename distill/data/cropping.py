"""Crops and flips decoded images."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.flow.draws import uniforms
from distill.spec.model import ImageOptions


class Cropped(NamedTuple):
    """An image as it is used in one epoch."""

    row: int
    pixels: Tensor  # [C, H, W]
    sizes: list[int]  # see `protocols.Conditioning`; the left of the crop is that in the flipped image


def cropped(
    pixels: NDArray[np.generic],
    sides: tuple[int, int],
    size: tuple[int, int],
    options: ImageOptions,
    seed: int,
    epoch: int,
    row: int,
) -> Cropped:
    """Crops and flips pixels [C, H, W] that just cover a sample, and scales them to [-1, 1].

    sides: height and width of the original. size: height and width of the sample.
    """
    height, width = size
    spare_y, spare_x = pixels.shape[1] - height, pixels.shape[2] - width
    u = uniforms(3, seed, epoch, row)
    if options.crop == "random":
        y, x = int(u[0] * (spare_y + 1)), int(u[1] * (spare_x + 1))
    else:
        y, x = spare_y // 2, spare_x // 2
    sample = torch.from_numpy(pixels[:, y : y + height, x : x + width].copy())
    if options.flip and u[2] < 0.5:
        sample = sample.flip(2)
        x = spare_x - x if options.crop == "random" else x  # in the middle, it is the same up to a pixel
    return Cropped(row, scaled(sample), [*sides, y, x, height, width])


def scaled(pixels: Tensor) -> Tensor:
    """Pixels (uint8, or float32 in [0, 1]) as float32 in [-1, 1]. float32 pixels are overwritten.

    It computes in place, because large temporary tensors take longer than decoding an image.
    """
    return pixels.float().div_(127.5).sub_(1) if pixels.dtype == torch.uint8 else pixels.mul_(2).sub_(1)
