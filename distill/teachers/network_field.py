"""Converts networks to velocity fields, in the schedules they were trained with."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.flow.interpolants import Interpolant, Prediction, edm, like
from distill.flow.times import uniform_grid
from distill.flow.waiting import on
from distill.networks.linear_path import edm_velocity, vp_velocity
from distill.networks.velocity import TIME_SCALE
from distill.protocols import Cond, NetworkCall

PURE_NOISE = 1 - 1e-5  # later times of a VP table are those of pure noise, t = 1


def call_unet(network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
    """Calls a network that has the signature of diffusers' UNet2DModel, and may take the guidance scale of `cond`."""
    given = {name: cond[name] for name in ("class_labels", "guidance_scale") if name in cond}
    output: Tensor = network(x_t, time, **given).sample
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
    call: NetworkCall = call_unet

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
    call: NetworkCall = call_unet

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


@dataclass(frozen=True)
class VeField:
    """The velocity of a score network of a variance-exploding SDE, of images in [0, 1] (Song et al. 2021, arXiv
    2011.13456).

    Samples here are in [-1, 1], so they have twice the network's sigma on the path `edm()`. The network is called with
    its own sigma as the time.
    """

    network: nn.Module
    t_range: tuple[float, float]
    call: NetworkCall = call_unet

    @property
    def interpolant(self) -> Interpolant:
        return edm()

    @property
    def sigmas(self) -> tuple[float, float]:
        """The network's own sigma at both ends of `t_range`."""
        low, high = (t / (1 - t) / 2 for t in self.t_range)
        return low, high

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...] = data + 2 sigma noise, t = 2 sigma / (1 + 2 sigma) [B] -> dx_t/dt [B, ...] in x_t's dtype."""
        path, x = self.interpolant, x_t.double()
        sigma = path.ratio(t.double()) / 2
        score = self.call(self.network, ((x + 1) / 2).to(x_t.dtype), sigma.to(t.dtype), cond).double()
        return path.convert(x, -like(sigma, x) * score, t.double(), "epsilon", "velocity").to(x_t.dtype)


@dataclass(frozen=True)
class InDtype:
    """Calls a network whose weights are not in float32: x_t and the condition are converted, the time is not."""

    call: NetworkCall
    dtype: torch.dtype

    def __call__(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        converted = {name: each.to(self.dtype) if each.is_floating_point() else each for name, each in cond.items()}
        return self.call(network, x_t.to(self.dtype), time, converted)


@dataclass(frozen=True)
class LinearCall:
    """Calls a network of any schedule as a velocity network of the linear path, which is finite for all t in [0, 1].

    table: log(sigma/alpha) of a VP schedule. edm: sign, sigma_data, sigma_min and sigma_max of an EDM schedule. Else
    the schedule is linear, and the network is called with time_scale t, or if `inverted` with time_scale (1 - t).
    """

    call: NetworkCall
    prediction: Prediction
    table: Tensor | None = None
    edm: tuple[int, float, float, float] | None = None
    time_scale: float = TIME_SCALE
    inverted: bool = False

    def __call__(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...] and t [B] in [0, 1] -> the velocity, in the dtype of x_t."""
        if self.table is not None or self.edm is not None:

            def native(x: Tensor, time: Tensor) -> Tensor:
                return self.call(network, x, time, cond)

            if self.table is not None:
                return vp_velocity(native, self.prediction, on(self.table, x_t.device), x_t, t.double())
            assert self.edm is not None
            return edm_velocity(native, *self.edm, x_t, t.double())
        output = self.call(network, x_t, self.time_scale * (1 - t if self.inverted else t), cond).to(x_t.dtype)
        return -output if self.inverted else output

    def t_grid(self, steps: int) -> Tensor:
        """The times [steps + 1] along which a student is sampled if its recipe defines none; float64, from noise to 0.

        Uniform, except for a VP schedule of T steps: there, step i of N begins at n = T - 1 - floor(i T / N) of the
        table, where the schedulers of diffusers call a network ("trailing" spacing). The first time is less than 1,
        unless the table ends with pure noise (zero terminal SNR).
        """
        if self.table is None or steps > len(self.table):
            return uniform_grid(steps)
        last = len(self.table) - 1
        n = [last - i * len(self.table) // steps for i in range(steps)]
        times = torch.sigmoid(self.table[n])
        # Samplers round times to float32, which near 1 is too coarse to find the place in the table again.
        times[times > PURE_NOISE] = 1.0
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def linear_call(field: NetworkField | EdmField) -> LinearCall:
    """How to call the network of a field on the linear path."""
    if isinstance(field, NetworkField) and isinstance(field.call, LinearCall):
        return field.call
    if isinstance(field, EdmField):
        low, high = (t / (1 - t) for t in field.t_range)
        return LinearCall(field.call, "epsilon", edm=(field.sign, field.sigma_data, low, high))
    if field.interpolant.name == "linear":
        return LinearCall(field.call, field.prediction, time_scale=field.time_scale, inverted=field.inverted)
    n = torch.arange(int(field.time_scale) + 1, dtype=torch.float64, device="cpu")
    table = torch.log(field.interpolant.ratio(n / field.time_scale))
    return LinearCall(field.call, field.prediction, table)
