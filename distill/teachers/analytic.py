"""Closed-form teachers: the exact velocity of Gaussian data and of Gaussian mixtures, on any interpolant.

With x_t = alpha data + sigma noise and data ~ N(m, S^2), per coordinate: x_t ~ N(alpha m, q^2), where
q^2 = alpha^2 S^2 + sigma^2. Velocities are computed in float64 and returned in the dtype of x_t, because tests use them
as ground truth.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.flow import draws
from distill.flow.interpolants import Interpolant, like, linear
from distill.protocols import Cond
from distill.spec.model import GaussianTeacher, MixtureTeacher
from distill.teachers.loaded import LoadedTeacher


class GaussianField:
    """The velocity v = alpha' m + (q'/q) (x - alpha m) of data N(m, diag(std^2)).

    mean: in the shape of one sample. If `conditional`: [K + 1, ...], a row per class label; the last is the null class.
    std: in the shape of one sample, the same for all classes. Since v is affine in m, the field under guidance is that
    of the mean null + scale (mean - null).
    """

    def __init__(
        self,
        mean: Tensor,
        std: Tensor,
        interpolant: Interpolant | None = None,
        t_range: tuple[float, float] = (0.0, 1.0),
        *,
        conditional: bool = False,
    ) -> None:
        self.mean, self.std, self.conditional = mean.double(), std.double(), conditional
        self.interpolant, self.t_range = interpolant or linear(), t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        c = self.interpolant.path(t.double())
        alpha, sigma, d_alpha, d_sigma = (like(value, x_t) for value in c)
        variance = self.std.to(x_t.device).square()  # S^2
        mean = mean_of(self.mean, self.conditional, x_t, cond)
        q_squared = alpha.square() * variance + sigma.square()
        rate = (alpha * d_alpha * variance + sigma * d_sigma) / q_squared  # q'/q
        return (d_alpha * mean + rate * (x_t.double() - alpha * mean)).to(x_t.dtype)


class MixtureField:
    """The velocity v = alpha' E[data | x] + sigma' E[noise | x] of data from sum_k weights_k N(means_k, std_k^2 I).

    means: [K, ...]. std: a number or [K]. weights: [K]; None: equal weights.
    conditional: class label k selects component k alone, and label K (the null class) the whole mixture.

    There is no division by t, so the velocity is exact at both ends. With std = 0 the teacher memorises its means; it
    is then not defined at t = 0.
    """

    def __init__(
        self,
        means: Tensor,
        std: Tensor | float,
        weights: Tensor | None = None,
        interpolant: Interpolant | None = None,
        t_range: tuple[float, float] = (0.0, 1.0),
        *,
        conditional: bool = False,
    ) -> None:
        self.means, self.conditional = means.double(), conditional
        self.std = torch.as_tensor(std, dtype=torch.float64).expand(means.shape[0])
        self.weights = normalised(weights, means.shape[0])
        self.interpolant, self.t_range = interpolant or linear(), t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        like(t, x_t)
        means = self.means.to(x_t.device).flatten(1)  # [K, d]
        alpha, sigma, d_alpha, d_sigma = (value[:, None] for value in self.interpolant.path(t.double()))  # [B, 1]
        variance = self.std.to(x_t.device).square()  # [K]
        c = alpha.square() * variance + sigma.square()  # [B, K]: the variance of x_t from component k
        offset = x_t.double().flatten(1)[:, None] - alpha[:, :, None] * means  # [B, K, d]
        logits = self._log_weights(x_t, cond) - means.shape[1] / 2 * c.log() - offset.square().sum(2) / (2 * c)
        # [B, K]: probability of component k given x_t. softmax would start all threads for a few numbers.
        posterior = (logits - logits.logsumexp(1, keepdim=True)).exp()
        data = posterior @ means + ((posterior * alpha * variance / c)[:, :, None] * offset).sum(1)
        noise = ((posterior * sigma / c)[:, :, None] * offset).sum(1)
        return (d_alpha * data + d_sigma * noise).reshape(x_t.shape).to(x_t.dtype)

    def _log_weights(self, x_t: Tensor, cond: Cond) -> Tensor:
        log_weights = self.weights.to(x_t.device).log()  # [K]
        if not self.conditional:
            return log_weights
        labels = cond["class_labels"][:, None]  # [B, 1]
        classes = torch.arange(len(log_weights), device=x_t.device)
        kept = (labels == classes) | (labels == len(log_weights))
        return log_weights.masked_fill(~kept, -torch.inf)


def gaussian_teacher(spec: GaussianTeacher) -> LoadedTeacher:
    """Makes the teacher of a spec {kind: gaussian}. Raises InputError if mean and std differ in length or are empty."""
    if not spec.mean or len(spec.mean) != len(spec.std):
        raise InputError(
            f"teacher.mean has {len(spec.mean)} numbers and teacher.std {len(spec.std)}; give one of each per dimension"
        )
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        return (mean + std * exact_noise(seed, indices, mean.shape)).float()

    return LoadedTeacher(
        field=GaussianField(mean, std),
        shape=tuple(mean.shape),
        num_classes=None,
        null_class=None,
        digest=_digest(spec),
        description=f"the Gaussian teacher in {len(spec.mean)} dimensions",
        exact_data=exact_data,
    )


def mixture_teacher(spec: MixtureTeacher) -> LoadedTeacher:
    """Makes the teacher of a spec {kind: mixture}. Raises InputError if the lengths of its lists do not fit."""
    lengths = sorted({len(row) for row in spec.means})
    if len(lengths) != 1 or not lengths[0]:
        raise InputError(f"teacher.means needs rows of one length of at least 1, got lengths {lengths}")
    if spec.weights is not None and len(spec.weights) != len(spec.means):
        raise InputError(
            f"teacher.weights has {len(spec.weights)} numbers for {len(spec.means)} rows of means; give one each"
        )
    means = torch.tensor(spec.means, dtype=torch.float64)
    weights = normalised(None if spec.weights is None else torch.tensor(spec.weights), len(means))

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        chance = draws.sample_noise(draws.key(seed, "exact component"), indices, (1,)).double()
        quantile = torch.special.ndtr(chance).squeeze(1)  # uniform, one per index
        component = torch.searchsorted(weights.cumsum(0), quantile, right=True).clamp(max=len(means) - 1)
        return (means[component] + spec.std * exact_noise(seed, indices, means.shape[1:])).float()

    return LoadedTeacher(
        field=MixtureField(means, spec.std, weights),
        shape=tuple(means.shape[1:]),
        num_classes=None,
        null_class=None,
        digest=_digest(spec),
        description=f"the mixture teacher of {len(means)} Gaussians in {lengths[0]} dimensions",
        exact_data=exact_data,
    )


def mean_of(mean: Tensor, conditional: bool, x_t: Tensor, cond: Cond) -> Tensor:
    """The mean of the whole distribution, or if `conditional`, of the class of each sample [B, ...]."""
    mean = mean.to(x_t.device)
    return mean[cond["class_labels"]] if conditional else mean


def normalised(weights: Tensor | None, count: int) -> Tensor:
    """Scales weights [K] to sum to 1, in float64. None: equal weights."""
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights.double()
    return weights / weights.sum()


def exact_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise from which exact samples are made, [n, ...] float64; not the noise that sampling starts with."""
    return draws.sample_noise(draws.key(seed, "exact data"), indices, tuple(shape)).double()


def _digest(spec: GaussianTeacher | MixtureTeacher) -> str:
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
