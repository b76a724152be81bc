"""What an evaluation sees of samples: features of all, and the first ones as images.

Latents are decoded once, a few at a time, so that the pixels of all samples are never in memory together.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.evaluation.judging import Judges
from distill.evaluation.metrics.reference import Reference
from distill.evaluation.pictures import as_images
from distill.protocols import Codec


@dataclass(frozen=True)
class SeenSamples:
    """features: [N, D]; None: there is nothing to compare with. first: samples as pixels or vectors, [n, ...].

    judged: what each of the user's metrics says of the samples, by name.
    """

    features: Tensor | None
    first: Tensor
    judged: Mapping[str, Tensor]


def seen(
    samples: Tensor,
    codec: Codec,
    reference: Reference | None,
    judges: Judges | None,
    count: int,
    device: torch.device,
) -> SeenSamples:
    """What an evaluation needs of samples [N, ...], and the first `count` of them.

    Without a reference and judges, no others are decoded. device: that latents are decoded on.
    """
    wanted = samples if reference is not None or judges is not None else samples[:count]
    block = len(wanted) if codec.is_identity else codec.together(tuple(samples.shape[1:]))
    features, first = list[Tensor](), list[Tensor]()
    judged: dict[str, list[Tensor]] = {}
    for start in range(0, len(wanted), block):
        part = wanted[start : start + block]
        pixels = part if codec.is_identity else codec.decode(part.to(device)).cpu()
        if reference is not None:
            features.append(reference.embed(pixels))
        if judges is not None:
            for name, found in judges.judge(pixels, start).items():
                judged.setdefault(name, []).append(found)
        if start < count:
            first.append(as_shown(pixels[: count - start]))
    by_name = {name: torch.cat(parts) for name, parts in judged.items()}
    return SeenSamples(torch.cat(features) if features else None, torch.cat(first), by_name)


def as_shown(samples: Tensor) -> Tensor:
    """Vectors as they are, and everything else as images."""
    return samples if samples.ndim == 2 else as_images(samples)
