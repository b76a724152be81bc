"""The reference for samples: features of real images, or exact samples of a teacher in closed form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from distill.core.printing import say_error
from distill.data import DataSet
from distill.data.encoded import DecodedData
from distill.data.source import Drawable
from distill.evaluation.metrics import features
from distill.evaluation.metrics.frechet import gaussian_frechet
from distill.evaluation.metrics.histogram import histogram_kl
from distill.evaluation.metrics.kernel import kid
from distill.evaluation.metrics.manifold import precision_recall
from distill.evaluation.metrics.wasserstein import sliced_wasserstein
from distill.evaluation.tally import MOST_COMPARED, FeatureSums
from distill.flow.draws import key
from distill.protocols import Codec
from distill.runs.results import HISTOGRAM, FeatureNet

FLOORS = 4  # number of other sets of exact samples that the floor is the mean over


@dataclass(frozen=True)
class Reference:
    """A set of samples from the distribution that generated samples should have, and how to compare with it."""

    name: str  # of the distance, e.g. "FD-digits", "SW2" or "histogram KL"
    identity: str  # identifies the set; distances from other sets are not comparable
    embed: Callable[[Tensor], Tensor]  # samples [N, ...] -> features [N, D]
    values: Tensor  # features of the set [M, D]
    distance: Callable[[FeatureSums, FeatureSums], float]
    whole: bool = False  # whether the distance needs the features of all samples
    network: FeatureNet | None = None
    floor: float | None = None  # mean distance between this set and other sets of exact samples
    points: Tensor | None = None  # exact samples, for pictures

    @cached_property
    def sums(self) -> FeatureSums:
        """Those of the set."""
        return FeatureSums.of(self.values, whole=self.whole)

    def measure(self, found: FeatureSums) -> dict[str, float]:
        """The metrics of samples, given the sums of their features: distance, KID, precision and recall."""
        real, some = self.values[:MOST_COMPARED], found.first[:MOST_COMPARED]
        precision, recall = precision_recall(real, some)
        distance = self.distance(found, self.sums)
        scale = self.values.square().mean().sqrt()  # the cubic kernel expects features of magnitude 1
        kernel = kid(some / scale, real / scale)
        return {"distance": distance, "kid": kernel, "precision": precision, "recall": recall}


def pixels_of(data: DataSet, codec: Codec, device: torch.device) -> DataSet | None:
    """The data as images, which `codec` decodes on `device` if they are latents. None: they cannot be decoded."""
    if data.encoded and codec.is_identity and len(data.shape) == 3:
        say_error(
            f"note: data '{data.name}' has latents, which the teacher has no autoencoder to decode: samples are "
            "compared with those of the teacher only"
        )
        return None
    pixels = DecodedData(data, codec, device) if data.encoded else data
    return pixels if len(pixels.shape) == 3 else None  # videos and vectors have no features


def of_images(data: DataSet, folder: Path) -> Reference:
    """The Frechet distance to real images. The feature network is kept in `folder`, and trained if it is not there."""
    net = features.prepare(data, folder)
    shown = FeatureNet(task=net.task, accuracy=net.accuracy, dim=net.reference.shape[1])
    return Reference(net.name, net.digest, net, net.reference, frechet_of, network=shown)


def of_exact(exact_data: Callable[[int, Sequence[int]], Tensor], count: int, seed: int) -> Reference:
    """The sliced Wasserstein distance to `count` exact samples, which are independent of the noise of `seed`.

    exact_data: (seed, indices) -> samples [N, D].
    """
    values = exact_data(key(seed, "reference"), range(count))
    others = (exact_data(key(seed, "floor", number), range(count)) for number in range(FLOORS))
    floor = sum(sliced_wasserstein(other, values) for other in others) / FLOORS
    return Reference(
        "SW2", f"exact/{count}", _itself, values, _wasserstein, whole=True, floor=floor, points=values[:2000]
    )


def of_law(data: Drawable, count: int, seed: int) -> Reference:
    """The KL divergence between histograms of `count` exact samples of a law in the plane and of generated ones."""
    values = data.draw(key(seed, "reference"), count)
    others = (data.draw(key(seed, "floor", number), count) for number in range(FLOORS))
    floor = sum(histogram_kl(values, other) for other in others) / FLOORS
    return Reference(
        HISTOGRAM, f"law/{count}", _itself, values, _divergence, whole=True, floor=floor, points=values[:2000]
    )


def frechet_of(x: FeatureSums, y: FeatureSums) -> float:
    """The Frechet distance; see `frechet`."""
    return gaussian_frechet(x.mean, x.covariance, y.mean, y.covariance)


def _wasserstein(x: FeatureSums, y: FeatureSums) -> float:
    return sliced_wasserstein(x.first, y.first)


def _divergence(x: FeatureSums, y: FeatureSums) -> float:
    return histogram_kl(y.first, x.first)


def _itself(samples: Tensor) -> Tensor:
    return samples
