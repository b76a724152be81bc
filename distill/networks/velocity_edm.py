"""A U-Net of EDM, called as a velocity network of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from .guidance_input import GuidanceInput, scales
from .linear_path import edm_velocity


class VelocityEdmUNet2DModel(ModelMixin, ConfigMixin):
    """v(x, t) of x = (1 - t) data + t noise from a network of the EDM path, finite for all t in [0, 1].

    design: "song" (SongUNet2DModel) or "dhariwal" (DhariwalUNet2DModel), which is `network`. sigma_data, sigma_min and
    sigma_max are the network's own, sign is that of its output, as in `edm_velocity`. num_class_embeds: K + 1 for a
    network with K classes; the class K is the null class. guidance_range: [low, high] of the guidance scales that it
    takes as a further input; None: none. The other arguments are the network's.
    """

    @register_to_config
    def __init__(
        self,
        design: str,
        sign: int,
        sigma_data: float,
        sigma_min: float,
        sigma_max: float,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        base_channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 2, 2),
        embedding_multiplier: int = 4,
        layers_per_block: int = 4,
        attention_sizes: Sequence[int] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        time_embedding_type: str = "positional",
        time_channels_multiplier: int = 1,
        encoder_type: str = "standard",
        filter_taps: Sequence[int | float] = (1, 1),
        guidance_range: list[float] | None = None,
    ) -> None:
        super().__init__()
        common = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "num_classes": None if num_class_embeds is None else num_class_embeds - 1,
            "base_channels": base_channels,
            "channel_multipliers": tuple(channel_multipliers),
            "embedding_multiplier": embedding_multiplier,
            "layers_per_block": layers_per_block,
            "attention_sizes": tuple(attention_sizes),
            "dropout": dropout,
            "label_dropout": label_dropout,
        }
        if design == "song":
            self.network = SongUNet2DModel(
                **common,
                time_embedding_type=time_embedding_type,
                time_channels_multiplier=time_channels_multiplier,
                encoder_type=encoder_type,
                filter_taps=tuple(filter_taps),
            )
        elif design == "dhariwal":
            self.network = DhariwalUNet2DModel(**common)
        else:
            raise ValueError(f"design={design!r}; valid: 'song', 'dhariwal'")
        width = self.network.time_out.out_features
        self.guidance = None if guidance_range is None else GuidanceInput(guidance_range, width)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W] on the linear path, timestep = 1000 t (a number or [B]) -> velocity [B, C, H, W]."""
        velocity = self.velocity(sample, timestep, class_labels, self.guided(sample, guidance_scale))
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)

    def guided(self, sample: Tensor, guidance_scale: Tensor | float | None) -> Tensor | None:
        """The embedding of the guidance scale, [B, E]; None if the network takes none."""
        given = scales(self.config.guidance_range, guidance_scale, sample)
        return None if given is None or self.guidance is None else self.guidance(given)

    def velocity(
        self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None, further: Tensor | None
    ) -> Tensor:
        """further: [B, E], is added to the network's embedding of time and class."""
        t = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device).expand(sample.shape[0]) / 1000
        dtype = self.network.conv_in.weight.dtype

        def network(x: Tensor, time: Tensor) -> Tensor:
            return self.network(x.to(dtype), time, class_labels, further=further).sample

        c = self.config
        return edm_velocity(network, c.sign, c.sigma_data, c.sigma_min, c.sigma_max, sample, t)
