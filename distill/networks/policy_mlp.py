"""An MLP with several outputs: a policy over vectors, which is a flow map of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .policies import called
from .velocity_mlp import VelocityMLP


class PolicyMLP(VelocityMLP):
    """A VelocityMLP with `outputs` outputs, of which a policy makes velocities; see `policies`.

    policy: steps, data or gaussian. grid: its times, of steps.
    """

    @register_to_config
    def __init__(
        self,
        dim: int,
        outputs: int,
        policy: str,
        grid: list[float] | None = None,
        width: int = 192,
        depth: int = 3,
        num_class_embeds: int | None = None,
        frequencies: int = 16,
        guidance_range: list[float] | None = None,
    ) -> None:
        super().__init__(
            dim=dim,
            width=width,
            depth=depth,
            num_class_embeds=num_class_embeds,
            frequencies=frequencies,
            guidance_range=guidance_range,
        )
        self.layers[-1] = nn.Linear(width, outputs * dim)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        target_timestep: Tensor | float | int | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, dim], timestep = 1000 t, target_timestep = 1000 s (numbers or [B]) -> velocity [B, dim].

        If target_timestep is None: -> outputs [B, M, dim].
        """
        hidden = self.first(sample, timestep, class_labels, guidance_scale)
        result = self.layers[1:](hidden).unflatten(1, (-1, self.config.dim))
        if target_timestep is not None:
            result = called(self.config.policy, self.config.grid, result, sample, timestep, target_timestep)
        return UNet2DOutput(sample=result) if return_dict else (result,)
