"""A U-Net trained on a VP or EDM path, called as a velocity network of the linear path.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

from functools import partial

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from .guidance_input import ClassesAndGuidance, scales
from .linear_path import edm_velocity, log_sigmas, ve_velocity, vp_velocity


class VelocityUNet2DModel(UNet2DModel):
    """v(x, t) of x = (1 - t) data + t noise from a network of another schedule, finite for all t in [0, 1].

    path "vp": alphas_cumprod [N] and prediction (epsilon, sample or v_prediction) are the network's own. With
    sigma = t / (1 - t) it is called at n(sigma), linear in log sigma between the table's entries and held at its ends,
    on c x with c = 1 / sqrt((1 - t)^2 + t^2), as it was trained.
    path "linear": a plain UNet2DModel of the linear path, prediction "velocity".
    path "inverted": a UNet2DModel of the linear path that is called with 1000 (1 - t) and gives minus the velocity.
    path "edm": sigma_data, sigma_min, sigma_max and prediction (epsilon: F as in Karras et al. 2022; v_prediction: its
    negative) are the network's own.
    path "ve": a network that is called with sigma, from sigma_min to sigma_max, and predicts the score of images in
    [0, 1].
    guidance_range: [low, high] of the guidance scales that it takes as a further input; None: none.
    Without it, the state dict is that of the UNet2DModel; the other arguments are UNet2DModel's.
    """

    @register_to_config
    def __init__(
        self,
        path: str,
        prediction: str,
        alphas_cumprod: list[float] | None = None,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        guidance_range: list[float] | None = None,
    ) -> None:
        valid = {
            "vp": ("epsilon", "sample", "v_prediction"),
            "edm": ("epsilon", "v_prediction"),
            "ve": ("score",),
            "linear": ("velocity",),
            "inverted": ("velocity",),
        }
        if prediction not in valid.get(path, ()) or (path == "vp") != (alphas_cumprod is not None):
            raise ValueError(f"path={path}, prediction={prediction}: valid {valid}; vp alone has alphas_cumprod")
        super().__init__(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            center_input_sample=center_input_sample,
            time_embedding_type=time_embedding_type,
            time_embedding_dim=time_embedding_dim,
            freq_shift=freq_shift,
            flip_sin_to_cos=flip_sin_to_cos,
            down_block_types=down_block_types,
            mid_block_type=mid_block_type,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            mid_block_scale_factor=mid_block_scale_factor,
            downsample_padding=downsample_padding,
            downsample_type=downsample_type,
            upsample_type=upsample_type,
            dropout=dropout,
            act_fn=act_fn,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            attn_norm_num_groups=attn_norm_num_groups,
            norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
            add_attention=add_attention,
            class_embed_type=class_embed_type,
            num_class_embeds=num_class_embeds,
            num_train_timesteps=num_train_timesteps,
        )
        if guidance_range is not None:
            if num_class_embeds is None or class_embed_type is not None:
                raise ValueError("guidance_range needs num_class_embeds, and no class_embed_type")
            width = self.time_embedding.linear_2.out_features
            self.class_embedding: nn.Module | None = ClassesAndGuidance(num_class_embeds, guidance_range, width)
        # Not a buffer: it must stay float64 whatever the network is cast to.
        self._log_sigma = torch.empty(0, dtype=torch.float64, device="cpu")
        if alphas_cumprod is not None:
            self._log_sigma = log_sigmas(alphas_cumprod)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        guidance_scale: Tensor | float | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W] on the linear path, timestep = 1000 t (a number or [B]) -> velocity [B, C, H, W]."""
        velocity = self.velocity(sample, timestep, self.condition(sample, class_labels, guidance_scale))
        return UNet2DOutput(sample=velocity) if return_dict else (velocity,)

    def condition(
        self, sample: Tensor, class_labels: Tensor | None, guidance_scale: Tensor | float | None
    ) -> Tensor | tuple[Tensor, Tensor] | None:
        """What `class_embedding` embeds: class labels [B], with the guidance scales [B] if it takes these."""
        given = scales(self.config.guidance_range, guidance_scale, sample)
        if given is not None and class_labels is None:
            raise ValueError("a class-conditional network needs class_labels")
        return class_labels if given is None or class_labels is None else (class_labels, given)

    def velocity(self, sample: Tensor, timestep: Tensor | float | int, condition: object) -> Tensor:
        """condition: what `class_embedding` embeds."""
        t = torch.as_tensor(timestep, dtype=torch.float64, device=sample.device).expand(sample.shape[0]) / 1000
        network = partial(self._native, condition)
        match self.config.path:
            case "vp":
                return vp_velocity(network, self.config.prediction, self._log_sigma, sample, t)
            case "edm":
                c = self.config
                sign = 1 if c.prediction == "epsilon" else -1
                return edm_velocity(network, sign, c.sigma_data, c.sigma_min, c.sigma_max, sample, t)
            case "ve":
                return ve_velocity(network, self.config.sigma_min, self.config.sigma_max, sample, t)
            case "inverted":
                return -super().forward(sample, 1000 * (1 - t).float(), condition).sample
            case _:
                return super().forward(sample, 1000 * t.float(), condition).sample

    def _native(self, condition: object, x: Tensor, time: Tensor) -> Tensor:
        """The network as it was trained, at its own scale and time. x is converted to the data type of its weights."""
        return super().forward(x.to(self.conv_in.weight.dtype), time, condition).sample
