"""An MLP that is called like a diffusers U-Net: a velocity field over vectors.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .guidance_input import GuidanceInput, scales


class VelocityMLP(ModelMixin, ConfigMixin):
    """v(x_t, t, class) of the linear path for x_t [B, dim]: `depth` hidden layers of `width`, SiLU.

    Time enters as cos and sin of k pi/2 t, k = 1 ... frequencies: smooth, and no two t in [0, 1] look alike. With no
    frequencies, t itself enters.
    num_class_embeds counts the null class, if there is one. guidance_range: [low, high] of the guidance scales that it
    takes as a further input; None: none.
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        width: int = 192,
        depth: int = 3,
        num_class_embeds: int | None = None,
        frequencies: int = 16,
        guidance_range: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds is not None else None
        embedded = self.num_times + (width if num_class_embeds is not None else 0)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(dim + embedded if i == 0 else width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))
        self.guidance = None if guidance_range is None else GuidanceInput(guidance_range, width)

    @property
    def num_times(self) -> int:
        """How many numbers a time enters as."""
        return 2 * self.config.frequencies or 1

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, dim], timestep = 1000 t (a number or [B]), class_labels [B] int64 -> velocity [B, dim]."""
        velocity = self.layers[1:](self.first(sample, timestep, class_labels, guidance_scale))
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)

    def first(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None,
        guidance_scale: Tensor | float | None,
    ) -> Tensor:
        """The output of the first layer, [B, width]."""
        hidden: Tensor = self.layers[0](self.inputs(sample, timestep, class_labels))
        given = scales(self.config.guidance_range, guidance_scale, sample)
        return hidden if given is None or self.guidance is None else hidden + self.guidance(given).to(hidden.dtype)

    def inputs(self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None) -> Tensor:
        """What the first layer sees, [B, dim + num_times + width of a class]."""
        inputs = [sample, self.times(sample, timestep)]
        if self.class_embedding is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to an unconditional network")
        elif class_labels is None:
            raise ValueError("a class-conditional network needs class_labels")
        else:
            inputs.append(self.class_embedding(class_labels).to(sample.dtype))
        return torch.cat(inputs, dim=1)

    def times(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """[B, num_times] in the dtype of sample."""
        t = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(sample.shape[0]) / 1000
        if self.config.frequencies == 0:
            return t[:, None].to(sample.dtype)
        k = torch.arange(1, self.config.frequencies + 1, dtype=torch.float32, device=sample.device)
        angle = t[:, None] * k * (math.pi / 2)  # [B, frequencies]
        return torch.cat([angle.cos(), angle.sin()], dim=1).to(sample.dtype)
