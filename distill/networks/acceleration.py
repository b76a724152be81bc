"""The student that predicts a velocity and its acceleration, so that its paths are curved."""

from collections.abc import Callable

from torch import Tensor, nn

from distill.flow.interpolants import like, linear
from distill.networks.acceleration_call import call
from distill.protocols import Cond

AccelerationCall = Callable[[nn.Module, Tensor, Tensor, Tensor | None, Cond], Tensor]


class AccelerationStudent(nn.Module):
    """A module with two networks: a velocity and an acceleration.

    v(x_t, t, None, cond) is a velocity. Sampling uses it at t = 1 only. a(x_t, t, v, cond) is the acceleration dv/dt of
    the path that starts at t = 1 with velocity v.

    `network` is called as network(x_t, 1000 t, class_labels, velocity), unless `call` says otherwise. The result has
    the dtype of x_t.
    """

    interpolant = linear()  # for both endpoints of a path; in between, the path is curved

    def __init__(self, network: nn.Module, call: AccelerationCall = call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor | None, cond: Cond) -> Tensor:
        """x_t [B, ...], t [B] in [0, 1], v [B, ...] -> acceleration [B, ...]. If v is None: -> velocity [B, ...]."""
        like(t, x_t)  # checks the shape of t
        return self.call(self.network, x_t, t, v, cond)
