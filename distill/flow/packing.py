"""Latents as sequences of tokens: each token is a patch of 2x2 positions."""

import torch
from torch import Tensor


def packed(x: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, (h/2)(w/2), 4C], the values of a patch in the order (channel, row, column)."""
    rows, channels, height, width = x.shape
    patches = x.reshape(rows, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(rows, height // 2 * (width // 2), 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, to [B, C, height, width]."""
    rows, channels = tokens.shape[0], tokens.shape[2] // 4
    patches = tokens.reshape(rows, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(rows, channels, height, width)


def grid_ids(rows: int, columns: int, like: Tensor) -> Tensor:
    """(0, row, column) of each token, [rows * columns, 3], in the dtype and on the device of `like`."""
    ids = torch.zeros(rows, columns, 3, device=like.device, dtype=like.dtype)
    ids[..., 1] = torch.arange(rows, device=like.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=like.device)
    return ids.reshape(-1, 3)
