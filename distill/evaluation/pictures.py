"""Samples as pictures: image grids and scatter plots, as PNG bytes."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 1  # pixels between images, before they are magnified
MIN_SIDE = 48  # pixels of a shown image: smaller ones are magnified by a whole factor
WHITE = 255


def columns_for(count: int, num_classes: int | None) -> int:
    """One column per class, where that is a readable number; else about as many columns as rows, at most 16."""
    if num_classes is not None and 2 <= num_classes <= 20:
        return num_classes
    return min(16, max(1, math.ceil(math.sqrt(count))))


def images_png(images: Tensor, columns: int) -> bytes:
    """Images [N, C, H, W] in [-1, 1], clamped, C = 1 or 3, row by row with `columns` in a row.

    Small ones are magnified without smoothing, so that digits of 8x8 can be judged by eye.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; only 1 (grey) and 3 (colour) can be shown")
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), WHITE, dtype=np.uint8)
    pixels = ((images.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i in range(count):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = pixels[i]
    factor = math.ceil(MIN_SIDE / max(height, width))
    sheet = sheet.repeat(factor, axis=0).repeat(factor, axis=1)
    return _png(Image.fromarray(sheet[..., 0] if channels == 1 else sheet))


def scatter_png(points: Tensor, reference: Tensor | None, pixels: int = 360) -> bytes:
    """Vectors [N, D] over a reference [M, D] in grey, if there is one: first two coordinates; D = 1: histograms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=200, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = points.float().cpu()
    shown = points if reference is None else reference.float().cpu()
    low, high = shown.quantile(0.001, dim=0), shown.quantile(0.999, dim=0)
    centre, reach = (low + high) / 2, 0.65 * (high - low) + 1e-6
    if points.shape[1] > 1:
        reach = reach[:2].max().expand(points.shape[1])  # a square, so that both axes have one scale
    low, high = (centre - reach).tolist(), (centre + reach).tolist()
    axes.set_xlim(low[0], high[0])
    if points.shape[1] == 1:
        bins = np.linspace(low[0], high[0], 61).tolist()
        if reference is not None:
            axes.hist(reference[:, 0].cpu().numpy(), bins, density=True, color="#c9c9c4")
        axes.hist(points[:, 0].numpy(), bins, density=True, histtype="step", color="#2f5d8a", linewidth=1.2)
        axes.set_yticks([])
    else:
        if reference is not None:
            x, y = reference[:, :2].cpu().numpy().T
            axes.scatter(x, y, s=2, color="#c9c9c4", linewidths=0)
        x, y = points[:, :2].numpy().T
        axes.scatter(x, y, s=2, color="#2f5d8a", linewidths=0, alpha=0.7)
        axes.set_ylim(low[1], high[1])
        axes.set_aspect("equal")
    axes.tick_params(labelsize=7, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
