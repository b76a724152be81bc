"""The student that is a velocity field of the linear path."""

from torch import Tensor, nn

from distill.flow.interpolants import like, linear
from distill.networks.velocity_call import call
from distill.protocols import Cond, NetworkCall

TIME_SCALE = 1000.0  # networks of the linear path are called with timestep = 1000 t, as in diffusers' flow schedulers


class VelocityStudent(nn.Module):
    """The velocity v(x_t, t, cond) on the linear path.

    `network` is called as network(x_t, 1000 t, class_labels), like diffusers' UNet2DModel, unless `call` says
    otherwise. The result has the dtype of x_t, so that losses and solver states stay float32 under bf16 autocast.
    """

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(self, network: nn.Module, call: NetworkCall = call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...], t [B] in [0, 1] -> velocity [B, ...]."""
        like(t, x_t)  # checks the shape of t
        return self.call(self.network, x_t, t, cond)
