"""A U-Net of EDM that knows two times: a flow map of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import inspect
import math

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .velocity_edm import VelocityEdmUNet2DModel


class FlowMapEdmUNet2DModel(VelocityEdmUNet2DModel):
    """u(x_t, t, s, class) of x_t = (1 - t) data + t noise, the average velocity from t to s.

    A VelocityEdmUNet2DModel, to whose embedding of time and class one of t - s is added. It is zero until it is
    trained, so that u is the velocity at first. t - s enters as cos and sin of k pi/2 (t - s), k = 1 ...
    second_time_waves: smooth, for derivatives with respect to it. Older students, whose configs do not say how many
    waves, have 16. The other arguments are those of VelocityEdmUNet2DModel.
    """

    def __init__(self, *args: object, second_time_waves: int = 16, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(second_time_waves=second_time_waves)
        width = self.network.time_out.out_features
        self.gap = nn.Sequential(nn.Linear(2 * second_time_waves, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.gap[2].weight)
        nn.init.zeros_(self.gap[2].bias)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        target_timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W], timestep = 1000 t, target_timestep = 1000 s (numbers or [B]) -> velocity like sample."""
        gap = torch.as_tensor(timestep, dtype=torch.float64) - torch.as_tensor(target_timestep, dtype=torch.float64)
        gap = gap.to(sample.device).expand(sample.shape[0]) / 1000
        k = torch.arange(1, self.config.second_time_waves + 1, dtype=torch.float32, device=gap.device)
        angle = gap.float()[:, None] * k * (math.pi / 2)  # [B, waves]
        further = self.gap(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.gap[0].weight.dtype))
        guided = self.guided(sample, guidance_scale)
        velocity = self.velocity(sample, timestep, class_labels, further if guided is None else further + guided)
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)


# diffusers reads the arguments off the signature
_own = inspect.signature(FlowMapEdmUNet2DModel.__init__).parameters["second_time_waves"]
_all = {**inspect.signature(VelocityEdmUNet2DModel.__init__).parameters, "second_time_waves": _own}
FlowMapEdmUNet2DModel.__init__.__signature__ = inspect.Signature([*_all.values()])  # type: ignore[attr-defined]
