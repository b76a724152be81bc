"""A velocity and its acceleration as a student: paths that bend, all the way by as much as at first."""

from torch import Tensor, nn

from distill.flow.interpolants import like, linear
from distill.networks.acceleration_call import call
from distill.protocols import Cond


class AccelerationStudent(nn.Module):
    """Two networks of one module: v(x_t, t, None, cond), a velocity, of which that of the noise at t = 1 is used, and
    a(x_t, t, v, cond), the acceleration dv/dt of the path that left t = 1 with velocity v.

    Called as network(x_t, 1000 t, class_labels, velocity). The result has the dtype of x_t.
    """

    interpolant = linear()  # of both ends; between them the path bends

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, v: Tensor | None, cond: Cond) -> Tensor:
        """x_t [B, ...], t [B] in [0, 1], v like x_t or None -> acceleration or velocity [B, ...]."""
        like(t, x_t)  # refuses any other shape of t
        return call(self.network, x_t, t, v, cond)
