"""A U-Net with several outputs: a policy, which is a flow map of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import inspect

from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .policies import called
from .velocity_unet import VelocityUNet2DModel


class PolicyUNet2DModel(VelocityUNet2DModel):
    """A VelocityUNet2DModel, or with path "linear" a UNet2DModel of the linear path, with several outputs.

    A policy (steps, data or gaussian) makes velocities of them, see `policies`. out_channels is in_channels
    times their number. grid: its times, of steps. The other arguments are those of VelocityUNet2DModel.
    """

    def __init__(self, *args: object, policy: str, grid: list[float] | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(policy=policy, grid=grid)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        target_timestep: Tensor | float | int | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W], timestep = 1000 t, target_timestep = 1000 s (numbers or [B]) -> velocity like sample.

        If target_timestep is None: -> outputs [B, M, C, H, W].
        """
        condition = self.condition(sample, class_labels, guidance_scale)
        if self.config.path in ("linear", "inverted"):
            result = self.velocity(sample, timestep, condition).unflatten(1, (-1, sample.shape[1]))
        else:  # each output is converted to a velocity, with the same sample
            result = self.velocity(sample[:, None], timestep, condition)
        if target_timestep is not None:
            result = called(self.config.policy, self.config.grid, result, sample, timestep, target_timestep)
        return UNet2DOutput(sample=result) if return_dict else (result,)

    def _native(self, condition: object, x: Tensor, time: Tensor) -> Tensor:
        """x [B, 1, C, H, W] -> outputs [B, M, C, H, W]."""
        return super()._native(condition, x[:, 0], time).unflatten(1, (-1, x.shape[2]))


# diffusers reads the arguments off the signature
_own = inspect.signature(PolicyUNet2DModel.__init__).parameters
_all = {**inspect.signature(VelocityUNet2DModel.__init__).parameters, "policy": _own["policy"], "grid": _own["grid"]}
PolicyUNet2DModel.__init__.__signature__ = inspect.Signature([*_all.values()])  # type: ignore[attr-defined]
