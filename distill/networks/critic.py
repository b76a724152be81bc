"""The critic of distribution matching: it models the velocity of the student's samples and classifies real or fake."""

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
    """A velocity field `field` with a classifier head on its innermost features (Yin et al. 2024, arXiv 2405.14867).

    (x_t, t, cond) -> velocity [B, ...] and logit [B], which is positive for real data. Field and head are one module,
    so that one optimizer trains both in one turn. The initial weights of the head depend on `seed`. Raises InputError
    if `field.network` is neither a UNet2DModel with a mid block nor a VelocityMLP.
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
                raise InputError(
                    f"a discriminator does not support {type(network).__name__}; valid: a UNet2DModel with a "
                    "mid block, an MLP"
                )
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
