"""Metrics of a user, for evaluations in several processes: scores, features, and numbers that are refused."""

import torch
from torch import Tensor


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def halves(images: Tensor, prompts: list[str]) -> Tensor:
    """The mean of the upper and of the lower half."""
    return torch.stack([images[:, 0, :4].mean((1, 2)), images[:, 0, 4:].mean((1, 2))], 1)


def infinite(images: Tensor, prompts: list[str]) -> Tensor:
    return torch.full((len(images),), torch.inf)
