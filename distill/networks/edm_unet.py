"""The U-Nets of EDM: SongUNet2DModel (DDPM++ and NCSN++) and DhariwalUNet2DModel (ADM).

Karras et al. 2022 (arXiv 2206.00364, table 7) list their options. The designs are those of Song et al. 2021
(arXiv 2011.13456) and Dhariwal and Nichol 2021 (arXiv 2105.05233). Both are called with c_noise = log(sigma) / 4 as
time, and return F as in Karras et al., eq. (7). The input that describes the augmentation of training images is left
out, because it is zero when samples are drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn
from torch.nn import functional

HEAD_CHANNELS = 64  # of an attention head of ADM


@dataclass(frozen=True)
class BlockStyle:
    """How the residual blocks of one design differ from those of the other.

    gain: factor of the sum of a block's result and its input. scales: whether the embedding scales and shifts the
    features, instead of only being added to them. head_channels: channels of an attention head; None: there is one
    head. projects: whether the skip connection has a convolution in blocks that change the size. taps: of the filter
    with which a block changes the size.
    """

    eps: float
    gain: float
    scales: bool
    head_channels: int | None
    projects: bool
    dropout: float
    embedding_channels: int
    taps: tuple[float, ...] = (1, 1)

    def norm(self, channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(min(32, max(1, channels // 4)), channels, eps=self.eps)

    def heads(self, channels: int) -> int:
        """The number of attention heads; 0: too few channels for attention."""
        return 1 if self.head_channels is None else channels // self.head_channels


class FirFilter(nn.Module):
    """Filters each channel of x [B, C, H, W].

    change: "up" doubles the sides, and "down" halves them. "wider" adds one pixel, for a convolution without padding.
    """

    kernel: Tensor

    def __init__(self, taps: Sequence[float], change: str) -> None:
        super().__init__()
        row = torch.tensor(taps, dtype=torch.float32)
        self.change = change
        self.register_buffer("kernel", torch.outer(row, row) / row.sum().square(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels, width = x.shape[1], len(self.kernel)
        kernel = self.kernel.to(x.dtype).expand(channels, 1, -1, -1)
        if self.change == "up":
            return functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=(width - 1) // 2, groups=channels)
        if self.change == "down":
            return functional.conv2d(x, kernel, stride=2, padding=(width - 1) // 2, groups=channels)
        return functional.conv2d(x, kernel, padding=(width - 1) // 2 + 1, groups=channels)


class EdmAttention(nn.Module):
    """Self-attention over the pixels of x [B, C, H, W], added to x."""

    def __init__(self, channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.heads, self.gain = style.heads(channels), style.gain
        self.norm = style.norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        together = self.qkv(self.norm(x)).reshape(len(x), self.heads, -1, 3, x.shape[2] * x.shape[3])
        query, key, value = (each.mT for each in together.unbind(3))  # [B, heads, H W, C / heads]
        found = functional.scaled_dot_product_attention(query, key, value)
        return self.gain * (x + self.out(found.mT.reshape(x.shape)))


class EdmBlock(nn.Module):
    """A residual block, which may change the size ("up", "down") and end with attention."""

    def __init__(
        self, channels: int, out_channels: int, style: BlockStyle, *, change: str = "", attention: bool = False
    ) -> None:
        super().__init__()
        self.gain, self.scales = style.gain, style.scales
        self.norm_in = style.norm(channels)
        self.change = FirFilter(style.taps, change) if change else nn.Identity()
        self.conv_in = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(style.embedding_channels, out_channels * (2 if style.scales else 1))
        self.norm_out = style.norm(out_channels)
        self.dropout = nn.Dropout(style.dropout)
        self.conv_out = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        projects = channels != out_channels or (bool(change) and style.projects)
        self.skip = nn.Conv2d(channels, out_channels, 1) if projects else nn.Identity()
        attends = attention and style.heads(out_channels) > 0
        self.attention = EdmAttention(out_channels, style) if attends else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B, channels, H, W], embedding [B, E] -> [B, out_channels, H', W']."""
        inside = self.conv_in(self.change(functional.silu(self.norm_in(x))))
        given = self.embedding(embedding)[:, :, None, None]
        if self.scales:
            scale, shift = given.chunk(2, dim=1)
            inside = self.norm_out(inside) * (1 + scale) + shift
        else:
            inside = self.norm_out(inside + given)
        inside = self.conv_out(self.dropout(functional.silu(inside)))
        return self.attention(self.gain * (inside + self.skip(self.change(x))))


class ImageInput(nn.Module):
    """The image of the level above (first the input itself), halved, as NCSN++ adds it to the features of a level."""

    def __init__(self, channels: int, out_channels: int, style: BlockStyle) -> None:
        super().__init__()
        self.filter = FirFilter(style.taps, "wider")
        self.conv = nn.Conv2d(channels, out_channels, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(self.filter(image))


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

    _keep_in_fp32_modules = ("frequencies",)
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
    ) -> UNet2DOutput | tuple[Tensor]:
        """sample [B, C, H, W], timestep = c_noise (a number or [B]), class_labels [B] -> F [B, C, H, W].

        A network with K classes has the null class K, of a call without a condition.
        """
        if (class_labels is None) != (self.num_classes is None):
            needed = "needs class_labels" if class_labels is None else "does not take class_labels"
            raise ValueError(f"a network with num_classes={self.num_classes} {needed}")
        noise = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(len(sample))
        classes = None
        if class_labels is not None and self.num_classes is not None:
            classes = functional.one_hot(class_labels, self.num_classes + 1)[:, :-1].to(sample.dtype)
        embedding = self.embedded(noise, classes)
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
        filter_taps: Sequence[float] = (1, 1),
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
