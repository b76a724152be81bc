"""Teachers in closed form: the exact velocity of Gaussian and mixture data on any path, and exact flow maps.

With x_t = alpha data + sigma noise and data ~ N(m, S^2): x_t ~ N(alpha m, q^2), q^2 = alpha^2 S^2 + sigma^2. What holds
of a coordinate here is computed in float64 and returned in the dtype of x_t: these are the tests' truth.
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

_NEAR = 1e-5  # times nearer than this: a divided difference is the derivative at the midpoint, exact to 1e-11


class GaussianField:
    """v = alpha' m + (q'/q) (x - alpha m) for data N(m, diag(std^2)).

    mean: of one sample's shape, or [K + 1, ...] where `conditional`: class_labels choose the row, the last is null.
    std has one sample's shape. With one std for all classes, the guided field is that of the mean
    null + scale (mean - null), since v is affine in m.
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
        mean = _mean(self.mean, self.conditional, x_t, cond)
        q_squared = alpha.square() * variance + sigma.square()
        rate = (alpha * d_alpha * variance + sigma * d_sigma) / q_squared  # q'/q
        return (d_alpha * mean + rate * (x_t.double() - alpha * mean)).to(x_t.dtype)


class GaussianFlowMap:
    """The exact average velocity of `GaussianField`, from X = alpha_s m + (q_s/q_t) (x - alpha_t m).

    Differences over s - t are taken of alpha and sigma alone, so that nothing cancels as s -> t, where u = v.
    """

    def __init__(
        self, mean: Tensor, std: Tensor, interpolant: Interpolant | None = None, *, conditional: bool = False
    ) -> None:
        self.mean, self.std, self.conditional = mean.double(), std.double(), conditional
        self.interpolant = interpolant or linear()

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        t, s = t.double(), s.double()
        at_t, at_s, middle = (self.interpolant.path(time) for time in (t, s, (t + s) / 2))
        near = (s - t).abs() < _NEAR
        gap = torch.where(near, torch.ones_like(t), s - t)
        slope_alpha = like(torch.where(near, middle.d_alpha, (at_s.alpha - at_t.alpha) / gap), x_t)
        slope_sigma = like(torch.where(near, middle.d_sigma, (at_s.sigma - at_t.sigma) / gap), x_t)
        alpha_t, alpha_s = like(at_t.alpha, x_t), like(at_s.alpha, x_t)
        sigma_t, sigma_s = like(at_t.sigma, x_t), like(at_s.sigma, x_t)
        variance = self.std.to(x_t.device).square()
        mean = _mean(self.mean, self.conditional, x_t, cond)
        q_t = (alpha_t.square() * variance + sigma_t.square()).sqrt()
        q_s = (alpha_s.square() * variance + sigma_s.square()).sqrt()
        slope_q = (variance * slope_alpha * (alpha_t + alpha_s) + slope_sigma * (sigma_t + sigma_s)) / (q_t + q_s)
        return (slope_alpha * mean + slope_q / q_t * (x_t.double() - alpha_t * mean)).to(x_t.dtype)


class MixtureField:
    """v = alpha' E[data | x] + sigma' E[noise | x] for data sum_k weights_k N(means_k, std_k^2 I).

    means [K, ...], std a number or [K], weights [K] (null: equal). Where `conditional`, class label k means component k
    alone and label K, the null class, the whole mixture. Nothing is divided by t: exact at both ends. std = 0 is the
    teacher that memorises its means (then not at t = 0).
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
        self.weights = _normalised(weights, means.shape[0])
        self.interpolant, self.t_range = interpolant or linear(), t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        like(t, x_t)
        means = self.means.to(x_t.device).flatten(1)  # [K, d]
        alpha, sigma, d_alpha, d_sigma = (value[:, None] for value in self.interpolant.path(t.double()))  # [B, 1]
        variance = self.std.to(x_t.device).square()  # [K]
        c = alpha.square() * variance + sigma.square()  # [B, K]: the variance of x_t from component k
        offset = x_t.double().flatten(1)[:, None] - alpha[:, :, None] * means  # [B, K, d]
        logits = self._log_weights(x_t, cond) - means.shape[1] / 2 * c.log() - offset.square().sum(2) / (2 * c)
        # [B, K]: probability of component k given x_t; not softmax, which wakes all threads for a few numbers
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


class QuantileFlowMap:
    """The exact average velocity of a 1-D mixture, applied to every coordinate: ODE flows on a line keep quantiles.

    CDF_s(X) = CDF_t(x) by bisection, in logarithms of the smaller tail, then one Newton step, through which derivatives
    flow (exact in both modes). means, std, weights: [K]. At s = t, u is the velocity.
    """

    def __init__(
        self, means: Tensor, std: Tensor, weights: Tensor | None = None, interpolant: Interpolant | None = None
    ) -> None:
        self.means, self.std = means.double(), std.double()
        self.weights = _normalised(weights, means.shape[0])
        self.interpolant = interpolant or linear()

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        gap = s.double() - t.double()
        here = gap == 0
        apart = like(torch.where(here, torch.ones_like(gap), gap), x_t)
        u = (self.jump(x_t.double(), t.double(), s.double()) - x_t.double()) / apart
        if here.any():
            field = MixtureField(self.means[:, None], self.std, self.weights, self.interpolant)
            v = field(x_t.double().reshape(-1, 1), like(t, x_t).expand_as(x_t).reshape(-1), {}).reshape(x_t.shape)
            u = torch.where(like(here, x_t), v, u)
        return u.to(x_t.dtype)

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """X(x_t, t, s): x_s on the path through x_t [B, ...]; t and s [B]."""
        z = self._standard(x_t.detach(), t.detach())  # [B, ..., K]
        alpha, q = self._moments(s.detach(), x_t)
        bracket = alpha * self.means.to(x_t.device) + q * z  # where each component alone would go: X is between them
        low, high = bracket.amin(-1), bracket.amax(-1)
        upper = self._log_cdf(x_t.detach(), t.detach(), 1.0) > self._log_cdf(x_t.detach(), t.detach(), -1.0)
        side = torch.where(upper, -1.0, 1.0).to(x_t)  # 1: lower tail; -1: upper tail
        goal = self._log_cdf(x_t, t, side)
        for _ in range(64):
            middle = (low + high) / 2
            below = side * (self._log_cdf(middle, s.detach(), side) - goal.detach()) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        x_s = (low + high) / 2
        log_cdf = self._log_cdf(x_s, s, side)
        slope = side * (self._log_density(x_s, s.detach()) - log_cdf.detach()).exp()  # d log_cdf / dx
        return x_s - (log_cdf - goal) / slope

    def _moments(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.interpolant.path(t)
        alpha, sigma = like(c.alpha, x)[..., None], like(c.sigma, x)[..., None]
        return alpha, (alpha.square() * self.std.to(x.device).square() + sigma.square()).sqrt()

    def _standard(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, q = self._moments(t, x)
        return (x[..., None] - alpha * self.means.to(x.device)) / q  # [B, ..., K]

    def _log_cdf(self, x: Tensor, t: Tensor, side: Tensor | float) -> Tensor:
        z = self._standard(x, t) * (side[..., None] if isinstance(side, Tensor) else side)
        return (self.weights.to(x.device).log() + torch.special.log_ndtr(z)).logsumexp(-1)

    def _log_density(self, x: Tensor, t: Tensor) -> Tensor:
        normal = torch.distributions.Normal(0.0, 1.0)
        log_density = normal.log_prob(self._standard(x, t)) - self._moments(t, x)[1].log()
        return (self.weights.to(x.device).log() + log_density).logsumexp(-1)


def gaussian_teacher(spec: GaussianTeacher) -> LoadedTeacher:
    """The teacher of a spec's {kind: gaussian}."""
    if not spec.mean or len(spec.mean) != len(spec.std):
        raise InputError(
            f"teacher.mean has {len(spec.mean)} numbers and teacher.std {len(spec.std)}; give one of each per dimension"
        )
    mean, std = torch.tensor(spec.mean, dtype=torch.float64), torch.tensor(spec.std, dtype=torch.float64)

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        return (mean + std * _exact_noise(seed, indices, mean.shape)).float()

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
    """The teacher of a spec's {kind: mixture}."""
    lengths = sorted({len(row) for row in spec.means})
    if len(lengths) != 1 or not lengths[0]:
        raise InputError(f"teacher.means needs rows of one length of at least 1, got lengths {lengths}")
    if spec.weights is not None and len(spec.weights) != len(spec.means):
        raise InputError(
            f"teacher.weights has {len(spec.weights)} numbers for {len(spec.means)} rows of means; give one each"
        )
    means = torch.tensor(spec.means, dtype=torch.float64)
    weights = _normalised(None if spec.weights is None else torch.tensor(spec.weights), len(means))

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        chance = draws.sample_noise(draws.key(seed, "exact component"), indices, (1,)).double()
        quantile = torch.special.ndtr(chance).squeeze(1)  # uniform, one per index
        component = torch.searchsorted(weights.cumsum(0), quantile, right=True).clamp(max=len(means) - 1)
        return (means[component] + spec.std * _exact_noise(seed, indices, means.shape[1:])).float()

    return LoadedTeacher(
        field=MixtureField(means, spec.std, weights),
        shape=tuple(means.shape[1:]),
        num_classes=None,
        null_class=None,
        digest=_digest(spec),
        description=f"the mixture teacher of {len(means)} Gaussians in {lengths[0]} dimensions",
        exact_data=exact_data,
    )


def class_gaussian_teacher(means: Tensor, null_mean: Tensor, std: Tensor) -> LoadedTeacher:
    """Class k is N(means[k], diag(std^2)), unconditional N(null_mean, same): guided, it is a Gaussian too.

    means [K, ...]; null_mean and std have one sample's shape. exact_data has the classes of `draws.sample_labels`.
    """
    num_classes = means.shape[0]
    rows = torch.cat([means, null_mean[None]]).double()
    content = {"kind": "class_gaussian", "means": rows.tolist(), "std": std.tolist()}

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        mean = rows[draws.sample_labels(indices, num_classes)]
        return (mean + std.double() * _exact_noise(seed, indices, std.shape)).float()

    return LoadedTeacher(
        field=GaussianField(rows, std, conditional=True),
        shape=tuple(std.shape),
        num_classes=num_classes,
        null_class=num_classes,
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        description=f"the Gaussian teacher of {num_classes} classes",
        exact_data=exact_data,
    )


def _mean(mean: Tensor, conditional: bool, x_t: Tensor, cond: Cond) -> Tensor:
    mean = mean.to(x_t.device)
    return mean[cond["class_labels"]] if conditional else mean


def _normalised(weights: Tensor | None, count: int) -> Tensor:
    weights = torch.ones(count, dtype=torch.float64) if weights is None else weights.double()
    return weights / weights.sum()


def _exact_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    return draws.sample_noise(draws.key(seed, "exact data"), indices, tuple(shape)).double()  # not the sampling noise


def _digest(spec: GaussianTeacher | MixtureTeacher) -> str:
    return hashlib.sha256(json.dumps(spec.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
