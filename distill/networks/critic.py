"""The critic of distribution matching: a velocity field of the student's samples that also tells them from data."""

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks.architectures import drawn
from distill.networks.velocity import VelocityStudent
from distill.networks.velocity_mlp import VelocityMLP
from distill.protocols import Cond


class Critic(nn.Module):
    """(x_t, t, cond) -> velocity [B, ...] and logit [B], positive for real data, from the field's innermost features.

    One module, so that both are trained in one turn by one optimizer (Yin et al. 2024, arXiv 2405.14867). The field
    starts as `field`, the head is drawn, keyed by `seed`.
    """

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(self, field: VelocityStudent, seed: int) -> None:
        super().__init__()
        self.field = field
        network = field.network
        with drawn(seed, "head"):
            if isinstance(network, UNet2DModel) and network.mid_block is not None:
                channels = network.config.block_out_channels[-1]
                norm = nn.GroupNorm(network.config.norm_num_groups, channels)
                blocks = [nn.Conv2d(channels, channels, 3, padding=1), norm, nn.SiLU()]
                head = [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1)]
            elif isinstance(network, VelocityMLP):
                width = network.config.width
                head = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
            else:
                raise InputError(f"a {type(network).__name__} has no innermost features that are known here")
            self.head = nn.Sequential(*head).to(next(network.parameters()).device)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        features: list[Tensor] = []
        network = self.field.network
        inner = network.layers[-2] if isinstance(network, VelocityMLP) else network.mid_block
        handle = inner.register_forward_hook(lambda module, inputs, output: features.append(output))
        try:
            velocity = self.field(x_t, t, cond)
        finally:
            handle.remove()
        with torch.autocast(x_t.device.type, enabled=False):
            return velocity, self.head(features[0].float()).squeeze(1)
