"""Closed-form objects for tests: flow maps of Gaussian and mixture data, a class-conditional teacher, the trig path.

As in `teachers.analytic`, coordinates are computed in float64 and returned in the dtype of x_t.
"""

import hashlib
import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distill.flow import draws
from distill.flow.interpolants import Coefficients, Interpolant, like, linear
from distill.protocols import Cond
from distill.teachers.analytic import GaussianField, MixtureField, exact_noise, mean_of, normalised
from distill.teachers.loaded import LoadedTeacher

# If |s - t| is smaller, divided differences are replaced by the derivative at the midpoint, which is exact to 1e-11.
_NEAR = 1e-5


class GaussianFlowMap:
    """The exact average velocity of `GaussianField`, from X = alpha_s m + (q_s/q_t) (x - alpha_t m).

    Only alpha and sigma are divided by s - t, so that there is no cancellation as s -> t, where u = v.
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
        mean = mean_of(self.mean, self.conditional, x_t, cond)
        q_t = (alpha_t.square() * variance + sigma_t.square()).sqrt()
        q_s = (alpha_s.square() * variance + sigma_s.square()).sqrt()
        slope_q = (variance * slope_alpha * (alpha_t + alpha_s) + slope_sigma * (sigma_t + sigma_s)) / (q_t + q_s)
        return (slope_alpha * mean + slope_q / q_t * (x_t.double() - alpha_t * mean)).to(x_t.dtype)


class QuantileFlowMap:
    """The exact average velocity of a 1-D mixture, applied to every coordinate.

    An ODE flow in one dimension preserves quantiles, so CDF_s(X) = CDF_t(x) is solved for X: by bisection on the
    logarithm of the smaller tail, then by one Newton step. Derivatives are taken through the Newton step and are exact
    in forward and reverse mode. At s = t, u is the velocity. means, std, weights: [K].
    """

    def __init__(
        self, means: Tensor, std: Tensor, weights: Tensor | None = None, interpolant: Interpolant | None = None
    ) -> None:
        self.means, self.std = means.double(), std.double()
        self.weights = normalised(weights, means.shape[0])
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
        """X(x_t, t, s): the state x_s on the path through x_t [B, ...]; t and s are [B]."""
        z = self._standard(x_t.detach(), t.detach())  # [B, ..., K]
        alpha, q = self._moments(s.detach(), x_t)
        bracket = alpha * self.means.to(x_t.device) + q * z  # the maps of the single components; X is between them
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


def class_gaussian_teacher(means: Tensor, null_mean: Tensor, std: Tensor) -> LoadedTeacher:
    """A class-conditional Gaussian teacher: class k is N(means[k], diag(std^2)).

    Unconditional data is N(null_mean, diag(std^2)), so the guided data is Gaussian too. means: [K, ...]; null_mean and
    std have the shape of one sample. Samples of exact_data have the classes of `draws.sample_labels`.
    """
    num_classes = means.shape[0]
    rows = torch.cat([means, null_mean[None]]).double()
    content = {"kind": "class_gaussian", "means": rows.tolist(), "std": std.tolist()}

    def exact_data(seed: int, indices: Sequence[int]) -> Tensor:
        mean = rows[draws.sample_labels(indices, num_classes)]
        return (mean + std.double() * exact_noise(seed, indices, std.shape)).float()

    return LoadedTeacher(
        field=GaussianField(rows, std, conditional=True),
        shape=tuple(std.shape),
        num_classes=num_classes,
        null_class=num_classes,
        digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        description=f"the Gaussian teacher of {num_classes} classes",
        exact_data=exact_data,
    )


def trig(sigma_data: float = 1.0) -> Interpolant:
    """alpha = cos(angle), sigma = sigma_data sin(angle), angle = t pi/2 (TrigFlow, Lu & Song 2024, arXiv 2410.11081).

    The paper's z is sigma_data * noise. With sigma_data = 1, the v-prediction of a VP network is the velocity of this
    path per unit of angle.
    """
    half_pi = math.pi / 2

    def path(t: Tensor) -> Coefficients:
        cos, sin = torch.cos(t * half_pi), torch.sin(t * half_pi)
        return Coefficients(cos, sigma_data * sin, -half_pi * sin, sigma_data * half_pi * cos)

    def time_of(ratio: Tensor) -> Tensor:
        return torch.atan(ratio / sigma_data) / half_pi

    return Interpolant("trig", path, time_of)
