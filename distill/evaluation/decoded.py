"""What an evaluation sees of a block of samples: features, and the first ones as images.

Latents are decoded a few at a time, so that the pixels of all are never in memory together.
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
    """features: [n, D]; None: there is nothing to compare with. shown: samples as pixels or vectors; None: none are.

    judged: what each of the user's metrics says of the samples, by name.
    """

    features: Tensor | None
    shown: Tensor | None
    judged: Mapping[str, Tensor]


def seen(
    samples: Tensor,
    start: int,
    codec: Codec,
    reference: Reference | None,
    judges: Judges | None,
    shown: int,
    device: torch.device,
) -> SeenSamples:
    """What an evaluation needs of consecutive samples [n, ...]. start: the number of the first of them.

    shown: how many samples of the row are shown. Without a reference and judges, no others are decoded. device: that
    latents are decoded on.
    """
    left = max(0, shown - start)
    wanted = samples if reference is not None or judges is not None else samples[:left]
    together = max(1, len(wanted)) if codec.is_identity else codec.together(tuple(samples.shape[1:]))
    features, pictures = list[Tensor](), list[Tensor]()
    judged: dict[str, list[Tensor]] = {}
    for at in range(0, len(wanted), together):
        part = wanted[at : at + together]
        pixels = part if codec.is_identity else codec.decode(part.to(device)).cpu()
        if reference is not None:
            features.append(reference.embed(pixels))
        if judges is not None:
            for name, found in judges.judge(pixels, start + at).items():
                judged.setdefault(name, []).append(found)
        if at < left:
            pictures.append(as_shown(pixels[: left - at]))
    by_name = {name: torch.cat(parts) for name, parts in judged.items()}
    return SeenSamples(torch.cat(features) if features else None, torch.cat(pictures) if pictures else None, by_name)


def as_shown(samples: Tensor) -> Tensor:
    """Vectors as they are, and everything else as images."""
    return samples if samples.ndim == 2 else as_images(samples)
