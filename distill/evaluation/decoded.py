"""What an evaluation sees of samples: features of all, and the first ones as images.

Latents are decoded once, a few at a time, so that the pixels of all samples are never in memory together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.evaluation.metrics.reference import Reference
from distill.evaluation.pictures import as_images
from distill.protocols import Codec


@dataclass(frozen=True)
class SeenSamples:
    """features: [N, D]; None: there is nothing to compare with. first: samples as pixels or vectors, [n, ...]."""

    features: Tensor | None
    first: Tensor


def seen(samples: Tensor, codec: Codec, reference: Reference | None, count: int, device: torch.device) -> SeenSamples:
    """The features of samples [N, ...] and the first `count` of them. Without a reference, no others are decoded.

    device: that latents are decoded on.
    """
    if codec.is_identity:
        return SeenSamples(reference.embed(samples) if reference else None, as_shown(samples[:count]))
    features, first = [], []
    wanted = samples if reference else samples[:count]
    block = codec.together(tuple(samples.shape[1:]))
    for start in range(0, len(wanted), block):
        pixels = codec.decode(wanted[start : start + block].to(device)).cpu()
        if reference:
            features.append(reference.embed(pixels))
        if start < count:
            first.append(as_shown(pixels[: count - start]))
    return SeenSamples(torch.cat(features) if features else None, torch.cat(first))


def as_shown(samples: Tensor) -> Tensor:
    """Vectors as they are, and everything else as images."""
    return samples if samples.ndim == 2 else as_images(samples)
