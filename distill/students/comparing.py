"""How far the samples of two networks differ that are made from the same noise and conditions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.protocols import Codec
from distill.students.loaded import LoadedStudent
from distill.students.sampling import blocks, of_student, times_of


@dataclass(frozen=True)
class Difference:
    """rms: root of the mean squared difference. psnr: peak signal-to-noise ratio in decibels; infinite if equal."""

    rms: float
    psnr: float


def drawn_samples(student: LoadedStudent, *, steps: int, seed: int, count: int, device: torch.device) -> Tensor:
    """Samples 0 to count - 1 of a student [count, ...] on the CPU. RunError if one is not finite."""
    block = min(count, student.codec.together(student.shape))
    method = of_student(student, times_of(student, steps))
    found = blocks(method, student, seed=seed, count=count, block=block, device=device)
    return torch.cat([each.samples for each in found])


@torch.no_grad()
def pictures(samples: Tensor, codec: Codec, device: torch.device) -> Tensor:
    """The images of samples [N, ...], in [-1, 1], on the CPU. Without an autoencoder, the latents themselves."""
    if codec.is_identity:
        return samples
    return torch.cat([codec.decode(each[None].to(device)).float().clamp(-1, 1).cpu() for each in samples])


def difference(found: Tensor, reference: Tensor, codec: Codec) -> Difference:
    """The difference of two sets of `pictures`.

    The peak of the PSNR is 2 for images, since they are in [-1, 1]; for latents, it is the range of the reference.
    """
    mean = (found.double() - reference.double()).square().mean().item()
    peak = 2.0 if not codec.is_identity else (reference.max() - reference.min()).item()
    return Difference(math.sqrt(mean), 10 * math.log10(peak**2 / mean) if mean and peak else math.inf)
