"""The student with several outputs per call: a flow map whose network describes the velocities of a whole interval."""

import torch
from torch import Tensor, nn

from distill.flow.interpolants import like
from distill.flow.waiting import on
from distill.networks.flow_map import FlowMapCall, FlowMapStudent
from distill.networks.flow_map_call import call
from distill.networks.policies import average_velocity, follow, velocity_at
from distill.protocols import Cond


class PolicyStudent(FlowMapStudent):
    """A flow map u(x_t, t, s, cond), whose network is called without s; a policy makes the average velocity from that.

    policy, grid: see `networks.policies`. outputs(x_t, t, cond) are those of the network, [B, M, ...]: student(x_t, t,
    None, cond). The other methods follow them, without calling the network.
    """

    def __init__(
        self, network: nn.Module, call: FlowMapCall = call, *, policy: str, grid: Tensor | None = None
    ) -> None:
        super().__init__(network, call)
        self.policy = policy
        self.grid = torch.empty(0, dtype=torch.float64, device="cpu") if grid is None else grid

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor | None, cond: Cond) -> Tensor:
        """x_t [B, ...], t and s [B] in [0, 1] -> average velocity [B, ...]. If s is None: -> outputs [B, M, ...]."""
        if s is not None:
            return super().forward(x_t, t, s, cond)
        like(t, x_t)  # checks the shape of t
        given = {name: cond[name] for name in ("class_labels", "guidance_scale") if name in cond}
        return self.network(x_t, 1000 * t, None, **given).sample.to(x_t.dtype)

    def average(self, outputs: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The average velocity [B, ...] from x_t at t, where `outputs` are from, to s [B] <= t."""
        return average_velocity(self.policy, on(self.grid, x_t.device), outputs, x_t, t, s)

    def follow(
        self, outputs: Tensor, x_r: Tensor, r: Tensor, end: Tensor, x: Tensor, t: Tensor, s: Tensor, substeps: int
    ) -> Tensor:
        """The state at s [B] of the path that is at x at t. outputs are from x_r at r; the interval ends at `end`."""
        return follow(self.policy, outputs, x_r, r, end, x, t, s, substeps)

    def velocity(self, outputs: Tensor, x_r: Tensor, r: Tensor, end: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [B, ...] of the policy at x [B, ...] and t [B]. See `follow`."""
        return velocity_at(self.policy, outputs, x_r, r, end, x, t)
