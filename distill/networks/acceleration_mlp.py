"""Two MLPs, a velocity over vectors and its acceleration.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import functools

from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .velocity_mlp import VelocityMLP


class AccelerationMLP(VelocityMLP):
    """A VelocityMLP, v(x_t, t, class), and a second one beside it, a(x_t, t, class | v), whose first layer takes in v
    too, to which it is blind until it is trained.
    """

    # diffusers reads the arguments off the signature
    @functools.wraps(VelocityMLP.__init__)  # type: ignore[misc]
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.acceleration = VelocityMLP.from_config(self.config)
        self.given = nn.Linear(self.config.dim, self.config.width, bias=False)
        nn.init.zeros_(self.given.weight)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        velocity: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, dim], timestep = 1000 t (a number or [B]), velocity that at t = 1 [B, dim], or None ->
        acceleration or velocity [B, dim].
        """
        if velocity is None:
            return super().forward(sample, timestep, class_labels, return_dict)
        network = self.acceleration
        hidden = network.layers[0](network.inputs(sample, timestep, class_labels)) + self.given(velocity)
        acceleration = network.layers[1:](hidden)
        return UNet2DOutput(sample=acceleration) if return_dict else (acceleration,)
