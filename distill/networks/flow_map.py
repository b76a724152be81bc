"""The student that is a flow map of the linear path."""

from collections.abc import Callable

from torch import Tensor, nn

from distill.flow.interpolants import like, linear
from distill.networks.flow_map_call import call
from distill.protocols import Cond

# Of the embedding of t - s in a new flow map: at most 8 radians from t - s = 0 to 1. Recipes that learn from
# derivatives by a time are misled by faster waves: with 16, up to 25 radians, scm ends several times farther from the
# ring (recipes/LOG.md, 2026-12-01).
SECOND_TIME_WAVES = 5

FlowMapCall = Callable[[nn.Module, Tensor, Tensor, Tensor, Cond], Tensor]


class FlowMapStudent(nn.Module):
    """The average velocity u(x_t, t, s, cond) from t to s <= t, so that x_s = x_t + (s - t) u.

    `network` is called as network(x_t, 1000 t, 1000 s, class_labels), unless `call` says otherwise. At s = t, u is the
    velocity. The result has the dtype of x_t.
    """

    interpolant = linear()

    def __init__(self, network: nn.Module, call: FlowMapCall = call) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_t [B, ...], t and s [B] in [0, 1] -> average velocity [B, ...]."""
        like(t, x_t), like(s, x_t)  # checks the shapes of t and s
        return self.call(self.network, x_t, t, s, cond)
