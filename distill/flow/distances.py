"""Distances per sample: prediction and target [B, ...] -> [B]. They are exactly 0 if the two are equal."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, FilePath, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.errors import InputError
from distill.flow.codecs import PIXELS
from distill.flow.latent_lpips import DecodedLpips, LatentLpips
from distill.protocols import Codec, Teacher

Trunk = Literal["squeeze", "alex", "vgg"]
Resize = Literal["none", "to_64", "to_64_corners", "to_224"]

SMALLEST = {"none": 0, "to_64": 64, "to_64_corners": 64, "to_224": 224}  # minimum shorter side in pixels, by `resize`
POOLED = {"squeeze": 17, "alex": 31, "vgg": 16}  # minimum shorter side in pixels for the pooling layers of a trunk


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """||prediction - target||^2 / d, where d is the number of elements of one sample."""
    return (prediction - target).square().flatten(1).mean(1)


def pseudo_huber(prediction: Tensor, target: Tensor, scale: float = 0.00054) -> Tensor:
    """(sqrt(||prediction - target||^2 + c^2) - c) / d with c = scale d (Lee et al. 2024, arXiv 2405.20320).

    d is the number of elements of one sample. Note that iCT uses c = 0.00054 sqrt(d) instead.
    """
    squares = (prediction - target).square().flatten(1)  # [B, ...] -> [B, d]
    d = squares.shape[1]
    return _huber(squares.sum(1), scale * d) / d


def pseudo_huber_elementwise(prediction: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """Mean over elements of sqrt(difference^2 + c^2) - c (Wang et al. 2024, arXiv 2410.07303)."""
    return _huber((prediction - target).square(), c).flatten(1).mean(1)


def direction(prediction: Tensor, target: Tensor) -> Tensor:
    """Cosine distance: 1 - cos of the angle between prediction and target, each sample taken as one vector.

    It is computed as half the squared distance of the unit vectors, which stays accurate at small angles.
    """
    a, b = (F.normalize(each.flatten(1), dim=1, eps=1e-6) for each in (prediction, target))  # [B, d]
    return (a - b).square().sum(1) / 2


def _huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c, in a form that stays accurate if square << c^2."""
    return square / ((square + c * c).sqrt() + c)


class LpipsOptions(BaseModel):
    """The options of recipes that can compare images by LPIPS."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    lpips_trunk: Literal["squeeze", "alex", "vgg"] | None = None
    """backbone whose features LPIPS compares; null: no LPIPS"""
    lpips_path: FilePath | None = None
    """safetensors file with the weights of this network: torchvision's squeezenet1_1, alexnet or vgg16"""
    lpips_heads: bool | None = None
    """use the trained linear heads of LPIPS; null: true; use false for a backbone with other weights"""
    lpips_resize: Literal["none", "to_64", "to_64_corners", "to_224"] = "to_64"
    """enlarge images whose shorter side is below 64 or 224, bilinear; to_64_corners: with corners aligned"""
    lpips_on: Literal["pixels", "latents"] | None = None
    """for a teacher that works on latents; pixels: compare decoded images; latents: compare latents, by a vgg16_bn that
    was trained on latents (LatentLPIPS, arXiv 2405.05967); null: pixels"""

    @model_validator(mode="after")
    def _fits_latents(self) -> Self:
        if self.lpips_on == "latents" and self.lpips_trunk != "vgg":
            raise ValueError(
                "lpips_on: latents needs lpips_trunk: vgg, and in lpips_path one that was trained on latents"
            )
        if self.lpips_on == "latents" and "lpips_resize" in self.model_fields_set:
            raise ValueError("lpips_resize: no effect with lpips_on: latents, which are not enlarged; remove it")
        return self

    def lpips_given(self) -> list[str]:
        """The names of the LPIPS options that differ from their defaults."""
        return [name for name in self.model_dump(exclude_defaults=True) if name.startswith("lpips_")]

    def codec_of(self, teacher: Teacher | None, remedy: str) -> Codec:
        """What decodes the teacher's samples. Raises InputError if LPIPS is enabled but cannot compare them."""
        codec = PIXELS if teacher is None else teacher.codec
        if teacher is not None:
            self.check_shape(teacher.shape, remedy, codec)
        return codec

    def check_shape(self, shape: Sequence[int], remedy: str, codec: Codec = PIXELS) -> None:
        """Raises InputError if LPIPS is enabled but cannot compare samples of this shape, which `codec` decodes."""
        if self.lpips_trunk is None:
            return
        if self.lpips_on is not None and codec.is_identity:
            raise InputError(
                f"lpips_on={self.lpips_on} has no effect, because the teacher has no autoencoder; remove it"
            )
        if self.lpips_on == "latents":
            LatentLpips.check(shape, self.lpips_path, remedy)
            return
        pixels = codec.pixels(tuple(shape))
        if not Lpips.takes(pixels):
            raise InputError(f"lpips_trunk: LPIPS compares images, but samples have shape {list(pixels)}; {remedy}")
        _check_size(self.lpips_trunk, self.lpips_resize, pixels[1:])

    def lpips(self, codec: Codec = PIXELS) -> nn.Module | None:
        """The LPIPS network; None if no trunk is selected or the path of its weights is not given.

        codec: what decodes the samples that it compares.
        """
        if self.lpips_trunk is None or self.lpips_path is None:
            return None
        if self.lpips_on == "latents":
            return LatentLpips(self.lpips_path, heads=self.lpips_heads)
        heads = self.lpips_heads is not False
        found = Lpips(self.lpips_trunk, self.lpips_path, heads=heads, resize=self.lpips_resize)
        return found if codec.is_identity else DecodedLpips(found, codec)


class Lpips(nn.Module):
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924): two batches of images [B, 1 or 3, H, W] in [-1, 1] -> [B].

    path: a safetensors file with the weights of torchvision's squeezenet1_1, alexnet or vgg16. Layers after the
    features are ignored.
    heads: weight the channels by the calibrated heads of the lpips package. False: sum the channels, for a trunk that
    the heads were not fitted to.
    resize: enlarge images (bilinear) whose shorter side is below 64 or 224 to that size; to_64_corners does so with
    align_corners. "none": no resizing.

    Grey images are repeated to three channels. The network is frozen and always in evaluation mode. It computes in
    float32, also under autocast, because features are divided by their norm.
    """

    def __init__(self, trunk: Trunk, path: Path, *, heads: bool = True, resize: Resize = "to_64") -> None:
        super().__init__()
        self.trunk, self.resize = trunk, resize
        try:
            import lpips  # imported here because it takes two seconds
        except (ImportError, OSError, RuntimeError) as error:  # e.g. torchvision was built for another torch version
            raise InputError(
                f"lpips_trunk={trunk} needs the packages lpips and torchvision, which cannot be imported ({error}); "
                "install versions that fit this version of torch, or set lpips_trunk to null"
            ) from error
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # the random weights are replaced below
            warnings.simplefilter("ignore", UserWarning)  # lpips uses a deprecated argument of torchvision
            self.metric = lpips.LPIPS(net=trunk, pnet_rand=True, lpips=heads, verbose=False)
        self.metric.net.load_state_dict(self._trunk_weights(trunk, path))
        self.requires_grad_(False).eval()

    def _trunk_weights(self, trunk: Trunk, path: Path) -> dict[str, Tensor]:
        """Loads torchvision's weights `features.N.rest`, renamed to `sliceK.N.rest` as the lpips package names them.

        Raises InputError if the file cannot be read, or if weights are missing or have another shape.
        """
        if not path.is_file():
            raise InputError(
                f"lpips_path={path} does not exist; give a safetensors file of torchvision's {trunk} weights"
            )
        try:
            given = load_file(path)
        except SafetensorError as error:
            raise InputError(f"lpips_path={path} is not a complete safetensors file ({error})") from error
        expected = self.metric.net.state_dict()
        sources = {name: "features." + name.split(".", 1)[1] for name in expected}
        wrong = [f"{source} is missing" for source in sources.values() if source not in given]
        for name, source in sources.items():
            if source in given and given[source].shape != expected[name].shape:
                wrong.append(f"{source} is {list(given[source].shape)}, not {list(expected[name].shape)}")
        if wrong:
            raise InputError(f"lpips_path={path} does not contain torchvision's {trunk}: {', '.join(wrong)}")
        return {name: given[source] for name, source in sources.items()}

    @staticmethod
    def takes(shape: Sequence[int]) -> bool:
        """Whether samples of this shape can be compared: images with one or three channels."""
        return len(shape) == 3 and shape[0] in (1, 3)

    def train(self, mode: bool = True) -> "Lpips":
        """Keeps evaluation mode, because the heads contain dropout."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            layers = zip(self._features(prediction), self._features(target), self._heads(), strict=True)
            distances = [head((a - b).square()).flatten(1).mean(1) for a, b, head in layers]
            return torch.stack(distances).sum(0)

    def _features(self, images: Tensor) -> list[Tensor]:
        """The features of each layer [B, C, h, w], normalized to unit length over the channels."""
        features = self.metric.net(self.metric.scaling_layer(self._prepare(images)))
        # If no channel is active, the lpips package takes the square root of 0, whose gradient is not finite.
        norms = [f.square().sum(1, keepdim=True).clamp(min=torch.finfo(f.dtype).tiny).sqrt() for f in features]
        return [f / (norm + 1e-10) for f, norm in zip(features, norms, strict=True)]

    def _heads(self) -> list[Callable[[Tensor], Tensor]]:
        """Functions that sum the channels of each layer with their weights, [B, C, h, w] -> [B, 1, h, w]."""
        if self.metric.lpips:
            return list(self.metric.lins)
        return [lambda squares: squares.sum(1, keepdim=True)] * self.metric.L

    def _prepare(self, images: Tensor) -> Tensor:
        """[B, 1 or 3, H, W] -> [B, 3, h, w] float32, resized for the trunk."""
        if not self.takes(images.shape[1:]):
            raise ValueError(f"LPIPS compares images [B, 1 or 3, H, W], got {list(images.shape)}")
        _check_size(self.trunk, self.resize, images.shape[2:])
        images = images.float().expand(-1, 3, -1, -1)
        shorter, least = min(images.shape[2:]), SMALLEST[self.resize]
        if shorter < least:
            size = [round(side * least / shorter) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=self.resize == "to_64_corners")
        return images


def _check_size(trunk: Trunk, resize: Resize, size: Sequence[int]) -> None:
    if max(min(size), SMALLEST[resize]) < POOLED[trunk]:
        raise InputError(
            f"LPIPS with {trunk} needs images of at least {POOLED[trunk]} x {POOLED[trunk]} pixels, but these have "
            f"{size[0]} x {size[1]}; set lpips_resize to to_64, to_64_corners or to_224 instead of {resize}"
        )
