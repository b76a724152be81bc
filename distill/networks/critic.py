"""The critic of distribution matching: it models the velocity of the student's samples and classifies real or fake."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.interpolants import linear
from distill.networks.architectures import drawn
from distill.networks.experts import Experts
from distill.networks.velocity import VelocityStudent
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.networks.velocity_mlp import VelocityMLP
from distill.protocols import Cond, LayerOutput, OfImage


def whole(network: nn.Module, output: LayerOutput, x_t: Tensor, cond: Cond) -> Tensor:
    """The output of a layer, or the first of its outputs."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


class Critic(nn.Module):
    """A velocity field `field` with a classifier head on its innermost features (Yin et al. 2024, arXiv 2405.14867).

    (x_t, t, cond) -> velocity [B, ...] and logit [B], which is positive for real data. Field and head are one module,
    so that one optimizer trains both in one turn. The initial weights of the head depend on `seed`.

    layers: names of the modules of `field.network` whose output, [B, tokens, width] or [B, width, ...], is classified;
    two for networks that are `Experts`. None: those of a UNet2DModel with a mid block, of a network of EDM, or of a
    VelocityMLP; InputError if it is none of them. of_image: what belongs to the image in such an output.
    """

    interpolant = linear()
    t_range = (0.0, 1.0)

    def __init__(
        self,
        field: VelocityStudent,
        seed: int,
        layers: Sequence[str] | None = None,
        width: int = 0,
        of_image: OfImage = whole,
    ) -> None:
        super().__init__()
        self.field, self.of_image = field, of_image
        network = field.network
        with drawn(seed, "head"):
            if layers is not None:
                head = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
            elif isinstance(network, UNet2DModel) and network.mid_block is not None:
                channels = network.config.block_out_channels[-1]
                norm = nn.GroupNorm(network.config.norm_num_groups, channels)
                blocks = [nn.Conv2d(channels, channels, 3, padding=1), norm, nn.SiLU()]
                head = [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1)]
                layers = ["mid_block"]
            elif isinstance(network, VelocityEdmUNet2DModel):
                channels = network.config.base_channels * network.config.channel_multipliers[-1]
                norm = nn.GroupNorm(min(32, max(1, channels // 4)), channels)  # as in its blocks
                blocks = [nn.Conv2d(channels, channels, 3, padding=1), norm, nn.SiLU()]
                head = [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1)]
                layers = ["network.mid_block"]
            elif isinstance(network, VelocityMLP):
                width = network.config.width
                head = [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
                layers = [f"layers.{len(network.layers) - 2}"]
            else:
                raise InputError(
                    f"a discriminator does not support {type(network).__name__}; valid: a UNet2DModel with a "
                    "mid block, a network of EDM, an MLP"
                )
            self.head = nn.Sequential(*head).to(next(network.parameters()).device)
        own = UNet2DModel | VelocityEdmUNet2DModel | VelocityMLP
        self.layers, self.pooled = tuple(layers), not isinstance(network, own)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        network, found = self.field.network, list[LayerOutput]()

        def keep(module: nn.Module, inputs: object, output: LayerOutput) -> None:
            found.append(output)

        handles = [network.get_submodule(name).register_forward_hook(keep) for name in self.layers]
        try:
            velocity = self.field(x_t, t, cond)
        finally:
            for handle in handles:
                handle.remove()
        features = list[Tensor]()
        for i, output in enumerate(found):
            rows = network.rows[i] if isinstance(network, Experts) else slice(None)
            own = self.of_image(network, output, x_t[rows], {name: each[rows] for name, each in cond.items()})
            features.append(_pooled(own) if self.pooled else own)
        joined = network.joined(features) if isinstance(network, Experts) else features[0]
        with torch.autocast(x_t.device.type, enabled=False):
            return velocity, self.head(joined.float()).squeeze(1)


def _pooled(features: Tensor) -> Tensor:
    """The mean over tokens or positions, [B, width]."""
    if features.ndim == 3:
        return features.mean(1)
    return features.flatten(2).mean(2)
