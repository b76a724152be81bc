"""A U-Net that knows two times: a flow map of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import inspect
import math

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .velocity_unet import VelocityUNet2DModel


class Conditions(nn.Module):
    """Embedding of (class_labels, t - s), to be added to that of t; that of t - s is zero until it is trained.

    t - s enters as cos and sin of k pi/2 (t - s), k = 1 ... waves: smooth, for derivatives with respect to it.
    """

    def __init__(self, classes: nn.Module | None, dim: int, waves: int) -> None:
        super().__init__()
        self.classes, self.waves = classes, waves
        self.gap = nn.Sequential(nn.Linear(2 * waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        nn.init.zeros_(self.gap[2].weight)
        nn.init.zeros_(self.gap[2].bias)

    def forward(self, given: tuple[object, Tensor]) -> Tensor:
        """(what `classes` embeds, such as class_labels [B], or None; t - s [B]) -> [B, dim]."""
        class_labels, gap = given
        k = torch.arange(1, self.waves + 1, dtype=torch.float32, device=gap.device)
        angle = gap.float()[:, None] * k * (math.pi / 2)  # [B, waves]
        embedded = self.gap(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.gap[0].weight.dtype))
        if self.classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given to an unconditional network")
            return embedded
        if class_labels is None:
            raise ValueError("a class-conditional network needs class_labels")
        total: Tensor = embedded + self.classes(class_labels)
        return total


class FlowMapUNet2DModel(VelocityUNet2DModel):
    """u(x_t, t, s, class) of x_t = (1 - t) data + t noise, the average velocity from t to s.

    A VelocityUNet2DModel, or with path "linear" a UNet2DModel of the linear path, whose time embedding is joined by one
    of t - s. Without it, it is the velocity. second_time_waves: of this embedding; older students, whose configs do not
    say so, have 16. The other arguments are those of VelocityUNet2DModel.
    """

    def __init__(self, *args: object, second_time_waves: int = 16, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_to_config(second_time_waves=second_time_waves)
        width = self.time_embedding.linear_2.out_features
        self.class_embedding = Conditions(self.class_embedding, width, second_time_waves)

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
        condition = self.condition(sample, class_labels, guidance_scale)
        velocity = self.velocity(sample, timestep, (condition, gap))
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)


# diffusers reads the arguments off the signature
_own = inspect.signature(FlowMapUNet2DModel.__init__).parameters["second_time_waves"]
_all = {**inspect.signature(VelocityUNet2DModel.__init__).parameters, "second_time_waves": _own}
FlowMapUNet2DModel.__init__.__signature__ = inspect.Signature([*_all.values()])  # type: ignore[attr-defined]
