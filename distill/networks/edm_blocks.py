"""The blocks of EDM's U-Nets; see `edm_unet`.

This file is shipped inside student folders: it imports torch only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


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
    taps: tuple[int | float, ...] = (1, 1)

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

    def __init__(self, taps: Sequence[int | float], change: str) -> None:
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
