"""LPIPS for samples that are latents: of the images that they decode to, or of the latents themselves."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Codec

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of VGG16's convolutions
POOLED = (3, 4)  # stages at whose ends positions are pooled
LEAST = 1 << len(POOLED)  # smallest side of latents
TRUNK = re.compile(r"(?:features|net\.slice[1-5])\.(\d+)\.(weight|bias|running_mean|running_var)")
HEAD = re.compile(r"lin([0-4])\.(?:model\.1\.)?weight")


class DecodedLpips(nn.Module):
    """LPIPS of the images that two batches of latents decode to: [B, ...] twice -> [B].

    Gradients flow through the decoder, which is frozen and computes in float32. It is not one of this module's
    networks, so it counts as part of the data.
    """

    def __init__(self, lpips: nn.Module, codec: Codec) -> None:
        super().__init__()
        self.lpips, self.codec = lpips, codec

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            distances: Tensor = self.lpips(self.codec.decode(prediction), self.codec.decode(target))
        return distances


class LatentLpips(nn.Module):
    """LatentLPIPS (Kang et al. 2024, arXiv 2405.05967): two batches of latents [B, C, h, w] -> [B].

    The trunk is a VGG16 with batch normalisation that was trained to classify latents: its first convolution takes C
    channels, and its first three poolings are left out, since an autoencoder has made the sides smaller already. The
    features at the end of each of its five stages are compared as in LPIPS. Latents are scaled as the network of the
    teacher takes them.

    path: a safetensors file with `features.N.NAME` as torchvision names the weights of vgg16_bn, or with the names of
    the authors' package. It may have the heads `lin0.weight` to `lin4.weight`, [1, channels, 1, 1].
    heads: weight the channels by these; False: sum the channels; None: weight them if the file has heads.

    The authors add an L1 distance, and the same random augmentations of both batches, because the plain distance alone
    can be small for latents whose images differ; here, combine it with another distance.
    """

    def __init__(self, path: Path, *, heads: bool | None = None) -> None:
        super().__init__()
        trunk, weights = _read(path)
        channels = _channels(trunk, path)
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced below
            self.stages = nn.ModuleList(_stages(channels))
        if heads and not weights:
            raise InputError(f"lpips_heads=true, but lpips_path={path} has no heads lin0 to lin4; use false or null")
        self._load(trunk, path, channels)
        if any(each.shape != (1, stage[-1], 1, 1) for each, stage in zip(weights, STAGES, strict=bool(weights))):
            raise InputError(f"lpips_path={path} has heads lin0 to lin4 of other shapes than [1, channels, 1, 1]")
        chosen = weights if heads is not False else []
        self.heads = nn.ParameterList([nn.Parameter(each) for each in chosen])
        self.requires_grad_(False).eval()

    def _load(self, given: Mapping[str, Tensor], path: Path, channels: int) -> None:
        """Raises InputError if weights are missing or have another shape."""
        expected = {_place(name): (name, each) for name, each in self.state_dict().items() if "num_batches" not in name}
        wrong = [f"features.{place} is missing" for place in expected if place not in given]
        for place, (_, each) in expected.items():
            if place in given and given[place].shape != each.shape:
                wrong.append(f"features.{place} is {list(given[place].shape)}, not {list(each.shape)}")
        if wrong:
            raise InputError(
                f"lpips_path={path} does not contain a vgg16_bn for latents of {channels} channels: "
                f"{', '.join(wrong[:3])}"
            )
        self.load_state_dict(self.state_dict() | {name: given[place] for place, (name, _) in expected.items()})

    @staticmethod
    def check(shape: Sequence[int], path: Path | None, remedy: str) -> None:
        """Raises InputError if latents of this shape cannot be compared. path: of the trunk; None: it is not known."""
        if len(shape) != 3 or min(shape[1:]) < LEAST:
            raise InputError(
                f"lpips_on: latents have shape {list(shape)}; LPIPS compares those of images, with sides of at least "
                f"{LEAST}; {remedy}"
            )
        if path is not None and (channels := _channels(_read(path)[0], path)) != shape[0]:
            raise InputError(
                f"lpips_path={path} is a trunk for latents of {channels} channels, but samples have {shape[0]}; give "
                "one that was trained on latents of the teacher's autoencoder"
            )

    def train(self, mode: bool = True) -> "LatentLpips":
        """Keeps evaluation mode, because of the batch normalisation."""
        return super().train(False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(prediction.device.type, enabled=False):
            a, b, distances = prediction.float(), target.float(), []
            for i, stage in enumerate(self.stages):
                a, b = stage(a), stage(b)
                squares = (_unit(a) - _unit(b)).square()
                weighted = squares * self.heads[i] if len(self.heads) else squares
                distances.append(weighted.sum(1).flatten(1).mean(1))
            return torch.stack(distances).sum(0)


def _channels(trunk: Mapping[str, Tensor], path: Path) -> int:
    """The channels of the latents that a trunk was trained on."""
    first = trunk.get("0.weight")
    if first is None or first.ndim != 4:
        raise InputError(
            f"lpips_path={path} does not contain a vgg16_bn: features.0.weight is missing, or no convolution"
        )
    return first.shape[1]


def _unit(features: Tensor) -> Tensor:
    """Features [B, C, h, w] of unit length over the channels, with a finite gradient where all are zero."""
    norm = features.square().sum(1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny).sqrt()
    return features / (norm + 1e-10)


def _stages(channels: int) -> list[nn.Sequential]:
    stages = []
    for i, widths in enumerate(STAGES):
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        stages.append(nn.Sequential(*layers, nn.MaxPool2d(2) if i in POOLED else nn.Identity()))
    return stages


def _place(name: str) -> str:
    """The name of a tensor in torchvision's network, which numbers the layers of all stages: N.NAME."""
    _, stage, layer, tensor = name.split(".")
    before = sum(3 * len(widths) + 1 for widths in STAGES[: int(stage)])
    return f"{before + int(layer)}.{tensor}"


def _read(path: Path) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights of the trunk, by N.NAME, and those of the heads."""
    try:
        given = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"lpips_path={path} cannot be read ({error}); give a safetensors file") from error
    trunk = {f"{found[1]}.{found[2]}": each for name, each in given.items() if (found := TRUNK.fullmatch(name))}
    heads = {found[1]: each for name, each in given.items() if (found := HEAD.fullmatch(name))}
    return trunk, [heads[key].float() for key in sorted(heads)]
