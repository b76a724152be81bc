"""The U-Nets of EDM: SongUNet2DModel (DDPM++ and NCSN++) and DhariwalUNet2DModel (ADM).

Karras et al. 2022 (arXiv 2206.00364, table 7) list their options. The designs are those of Song et al. 2021
(arXiv 2011.13456) and Dhariwal and Nichol 2021 (arXiv 2105.05233). Both are called with c_noise = log(sigma) / 4 as
time, and return F as in Karras et al., eq. (7). The input that describes the augmentation of training images is left
out, because it is zero when samples are drawn.

This file is shipped inside student folders: it imports torch and diffusers only.
"""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional

from .edm_blocks import BlockStyle, EdmBlock, ImageInput

HEAD_CHANNELS = 64  # of an attention head of ADM


class EdmDown(nn.Module):
    """One level on the way down. It begins with a block that halves the size, except for the first level."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: BlockStyle,
        *,
        first: bool,
        blocks: int,
        attention: bool,
        image_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.change = None if first else EdmBlock(channels, channels, style, change="down")
        self.image = None if image_channels is None or first else ImageInput(image_channels, channels, style)
        widths = [channels, *[out_channels] * (blocks - 1)]
        self.blocks = nn.ModuleList(EdmBlock(width, out_channels, style, attention=attention) for width in widths)

    def forward(self, x: Tensor, image: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the features, the image for the next level, and the features that the way up needs."""
        kept = []
        if self.change is not None:
            x = self.change(x, embedding)
            if self.image is not None:
                x = image = (x + self.image(image)) * math.sqrt(0.5)
            kept.append(x)
        for block in self.blocks:
            x = block(x, embedding)
            kept.append(x)
        return x, image, kept


class EdmUp(nn.Module):
    """One level on the way up. It begins with a block that doubles the size, except for the last level.

    kept: channels of the features of the way down, in the order in which they are used.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        style: BlockStyle,
        kept: Sequence[int],
        attention: set[int],
        *,
        last: bool,
    ) -> None:
        super().__init__()
        self.change = None if last else EdmBlock(channels, channels, style, change="up")
        widths = [channels, *[out_channels] * (len(kept) - 1)]
        self.blocks = nn.ModuleList(
            EdmBlock(width + more, out_channels, style, attention=i in attention)
            for i, (width, more) in enumerate(zip(widths, kept, strict=True))
        )

    def forward(self, x: Tensor, kept: Sequence[Tensor], embedding: Tensor) -> Tensor:
        if self.change is not None:
            x = self.change(x, embedding)
        for block, more in zip(self.blocks, kept, strict=True):
            x = block(torch.cat([x, more], dim=1), embedding)
        return x


class EdmMiddle(nn.Module):
    """Two blocks at the lowest level, the first of them with attention."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EdmBlock(channels, channels, style, attention=each) for each in (True, False))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, embedding)
        return x


class EdmUNet2DModel(ModelMixin, ConfigMixin):
    """What both networks share: all but the embedding of the time and the class."""

    _keep_in_fp32_modules = ["frequencies"]
    num_classes: int | None
    frequencies: Tensor

    def _build(
        self,
        style: BlockStyle,
        ends: tuple[int, int],
        widths: Sequence[int],
        layers_per_block: int,
        attention: Sequence[bool],
        *,
        first_width: int,
        attends_often: bool,
        residual: bool = False,
    ) -> None:
        """Adds the layers. ends: channels of the input and of the output. widths, attention: by level.

        attends_often: whether all blocks of a level with attention have it on the way up, too; else only the last.
        residual: whether the image is added to the features of each level.
        """
        in_channels, out_channels = ends
        levels = len(widths)
        self.conv_in = nn.Conv2d(in_channels, first_width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        width, kept, image = first_width, [first_width], in_channels
        for level, out in enumerate(widths):
            self.down_blocks.append(
                EdmDown(
                    width,
                    out,
                    style,
                    first=level == 0,
                    blocks=layers_per_block,
                    attention=attention[level],
                    image_channels=image if residual else None,
                )
            )
            kept += [*([width] if level else []), *[out] * layers_per_block]
            image, width = width if level else image, out
        self.mid_block = EdmMiddle(width, style)
        for level in reversed(range(levels)):
            used = [kept.pop() for _ in range(layers_per_block + 1)]
            places = range(layers_per_block + 1) if attends_often else [layers_per_block]
            here = set(places) if attention[level] else set()
            self.up_blocks.append(EdmUp(width, widths[level], style, used, here, last=level == levels - 1))
            width = widths[level]
        self.norm_out = style.norm(width)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def embedded(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        """timestep [B], classes: [B, K], one-hot; zero for the null class -> [B, E]."""
        raise NotImplementedError

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        further: Tensor | None = None,
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W], timestep = c_noise (a number or [B]), class_labels [B] -> F [B, C, H, W].

        A network with K classes has the null class K, of a call without a condition. further: [B, E], is added to the
        embedding of time and class.
        """
        if (class_labels is None) != (self.num_classes is None):
            needed = "needs class_labels" if class_labels is None else "does not take class_labels"
            raise ValueError(f"a network with num_classes={self.num_classes} {needed}")
        noise = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(len(sample))
        classes = None
        if class_labels is not None and self.num_classes is not None:
            classes = functional.one_hot(class_labels, self.num_classes + 1)[:, :-1].to(sample.dtype)
        embedding = self.embedded(noise, classes)
        embedding = embedding if further is None else embedding + further.to(embedding.dtype)
        x, image = self.conv_in(sample), sample
        kept = [x]
        for down in self.down_blocks:
            x, image, more = down(x, image, embedding)
            kept += more
        x = self.mid_block(x, embedding)
        for up in self.up_blocks:
            used = len(up.blocks)
            x = up(x, kept[: -used - 1 : -1], embedding)
            del kept[-used:]
        found = self.conv_out(functional.silu(self.norm_out(x)))
        return UNet2DOutput(sample=found) if return_dict else (found,)


class SongUNet2DModel(EdmUNet2DModel):
    """DDPM++ (time_embedding_type positional, encoder_type standard, filter_taps [1, 1]) and NCSN++ (fourier, residual,
    [1, 3, 3, 1]).

    channel_multipliers: of base_channels, by level. time_channels_multiplier: of base_channels, for the embedding of
    the time. attention_sizes: sides of the levels with attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int | None = None,
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
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        time, width = base_channels * time_channels_multiplier, base_channels * embedding_multiplier
        style = BlockStyle(1e-6, math.sqrt(0.5), False, None, True, dropout, width, tuple(filter_taps))
        self.full_turns = time_embedding_type == "fourier"
        if self.full_turns:  # random numbers, which are stored with the weights
            self.register_buffer("frequencies", torch.zeros(time // 2))
        else:
            powers = torch.arange(time // 2, dtype=torch.float32) / (time // 2 - 1)
            self.register_buffer("frequencies", 10000.0**-powers, persistent=False)
        self.class_embedding = nn.Linear(num_classes, time) if num_classes else None
        self.time_in, self.time_out = nn.Linear(time, width), nn.Linear(width, width)
        self._build(
            style,
            (in_channels, out_channels),
            [base_channels * each for each in channel_multipliers],
            layers_per_block,
            [sample_size >> level in attention_sizes for level in range(len(channel_multipliers))],
            first_width=base_channels,
            attends_often=False,
            residual=encoder_type == "residual",
        )

    def embedded(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        frequencies = self.frequencies.float() * (2 * math.pi if self.full_turns else 1)
        angle = torch.outer(timestep, frequencies)
        found = torch.cat([angle.sin(), angle.cos()], dim=1).to(self.time_in.weight.dtype)
        if classes is not None and self.class_embedding is not None:
            found = found + self.class_embedding(classes * math.sqrt(classes.shape[1]))
        return functional.silu(self.time_out(functional.silu(self.time_in(found))))


class DhariwalUNet2DModel(EdmUNet2DModel):
    """ADM. The options are those of SongUNet2DModel."""

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int | None = None,
        base_channels: int = 192,
        channel_multipliers: Sequence[int] = (1, 2, 3, 4),
        embedding_multiplier: int = 4,
        layers_per_block: int = 3,
        attention_sizes: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        width = base_channels * embedding_multiplier
        powers = torch.arange(base_channels // 2, dtype=torch.float32) / (base_channels // 2)
        self.register_buffer("frequencies", 10000.0**-powers, persistent=False)
        self.time_in, self.time_out = nn.Linear(base_channels, width), nn.Linear(width, width)
        self.class_embedding = nn.Linear(num_classes, width, bias=False) if num_classes else None
        widths = [base_channels * each for each in channel_multipliers]
        self._build(
            BlockStyle(1e-5, 1.0, True, HEAD_CHANNELS, False, dropout, width),
            (in_channels, out_channels),
            widths,
            layers_per_block,
            [sample_size >> level in attention_sizes for level in range(len(widths))],
            first_width=widths[0],
            attends_often=True,
        )

    def embedded(self, timestep: Tensor, classes: Tensor | None) -> Tensor:
        angle = torch.outer(timestep, self.frequencies.float())
        found = torch.cat([angle.cos(), angle.sin()], dim=1).to(self.time_in.weight.dtype)
        found = self.time_out(functional.silu(self.time_in(found)))
        if classes is not None and self.class_embedding is not None:
            found = found + self.class_embedding(classes)
        return functional.silu(found)
