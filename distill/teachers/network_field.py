"""Converts networks to velocity fields, in the schedules they were trained with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.flow.interpolants import Interpolant, Prediction, edm, like
from distill.protocols import Cond

Call = Callable[[nn.Module, Tensor, Tensor, Cond], Tensor]


def call_unet(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Calls a network that has the signature of diffusers' UNet2DModel."""
    output: Tensor = network(x_t, time, class_labels=cond.get("class_labels")).sample
    return output


@dataclass(frozen=True)
class NetworkField:
    """The velocity of a network that predicts `prediction` on `interpolant`.

    The network is called as call(network, x_t, time_scale t, cond). Predictions of other kinds are converted to
    velocity in float64. VP networks have time_scale N - 1, networks of the linear path usually 1000. Clipping and
    thresholding of samples by a scheduler are not part of the network and are not applied.

    inverted: the network was trained with time from 0 (noise) to 1 (data). It is called with time_scale (1 - t), and
    its output is the negative velocity (linear path only).
    """

    network: nn.Module
    interpolant: Interpolant
    prediction: Prediction
    time_scale: float
    t_range: tuple[float, float] = (0.0, 1.0)
    inverted: bool = False
    call: Call = call_unet

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...], t [B] in t_range -> dx_t/dt [B, ...] in x_t's dtype."""
        like(t, x_t)
        time = self.time_scale * (1 - t if self.inverted else t)
        output = self.call(self.network, x_t, time, cond)
        if self.inverted:
            return -output.to(x_t.dtype)
        if self.prediction == "velocity":
            return output.to(x_t.dtype)
        velocity = self.interpolant.convert(x_t.double(), output.double(), t.double(), self.prediction, "velocity")
        return velocity.to(x_t.dtype)


@dataclass(frozen=True)
class EdmField:
    """The velocity of an EDM network F on the path `edm()`: D = c_skip x + c_out F(c_in x, c_noise).

    See Karras et al. 2022 (arXiv 2206.00364), eq. (7) and table 1. sign: -1 for networks that diffusers'
    EDMEulerScheduler calls v_prediction, which output -F; else 1.
    """

    network: nn.Module
    sigma_data: float
    sign: int
    t_range: tuple[float, float]
    call: Call = call_unet

    @property
    def interpolant(self) -> Interpolant:
        return edm()

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...] = data + sigma noise, t = sigma / (1 + sigma) [B] -> dx_t/dt [B, ...] in x_t's dtype."""
        path, x = self.interpolant, x_t.double()
        sigma = path.ratio(t.double())
        norm = (sigma.square() + self.sigma_data**2).sqrt()
        c_skip, c_out, c_in = self.sigma_data**2 / norm.square(), sigma * self.sigma_data / norm, 1 / norm
        c_noise = torch.log(sigma) / 4
        scaled = (like(c_in, x) * x).to(x_t.dtype)
        output = self.call(self.network, scaled, c_noise.to(t.dtype), cond).double()
        data = like(c_skip, x) * x + self.sign * like(c_out, x) * output
        return path.convert(x, data, t.double(), "sample", "velocity").to(x_t.dtype)
