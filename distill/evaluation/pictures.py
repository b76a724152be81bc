"""Samples as pictures: image grids and scatter plots, as PNG bytes."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GAP = 1  # pixels between images, before magnification
MIN_SIDE = 48  # pixels; smaller images are magnified by a whole factor
WHITE = 255
REPORT_PIXELS = 1 << 21  # of a picture in a report, which has one for each row of its table
LARGEST = 1 << 25  # pixels of any other picture


def columns_for(count: int, num_classes: int | None) -> int:
    """One column per class for 2 to 20 classes; else about as many columns as rows, at most 16."""
    if num_classes is not None and 2 <= num_classes <= 20:
        return num_classes
    return min(16, max(1, math.ceil(math.sqrt(count))))


def as_images(samples: Tensor) -> Tensor:
    """Samples [N, C, ...] as images that can be shown: the middle frame of a video, and the first channels of latents
    that there is no autoencoder for.
    """
    images = samples[:, :, samples.shape[2] // 2] if samples.ndim == 5 else samples
    channels = images.shape[1]
    return images if channels in (1, 3) else images[:, : 3 if channels > 3 else 1]


def images_png(images: Tensor, columns: int, pixels: int = LARGEST) -> bytes:
    """A grid of images as PNG, row by row. images: [N, C, H, W], C = 1 or 3, clamped to [-1, 1].

    Small images are magnified without smoothing, so that single pixels can be seen. If all images have more than
    `pixels` pixels, they are shown smaller, by a whole factor. ValueError for another C.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; only 1 (grey) and 3 (colour) can be shown")
    if (less := math.ceil(math.sqrt(count * height * width / pixels))) > 1 and min(height, width) >= less:
        images = torch.nn.functional.avg_pool2d(images.float().cpu().clamp(-1, 1), less)
        height, width = images.shape[2:]
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), WHITE, dtype=np.uint8)
    values = ((images.float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for i in range(count):
        top, left = (i // columns) * (height + GAP), (i % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = values[i]
    factor = math.ceil(MIN_SIDE / max(height, width))
    sheet = sheet.repeat(factor, axis=0).repeat(factor, axis=1)
    return _png(Image.fromarray(sheet[..., 0] if channels == 1 else sheet))


def scatter_png(points: Tensor, reference: Tensor | None, pixels: int = 360) -> bytes:
    """A scatter plot as PNG: the first two coordinates of points [N, D]; if D = 1, a histogram.

    reference: [M, D], drawn below in grey. pixels: side length at which it is shown; the PNG has twice as many.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(pixels / 100, pixels / 100), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.08, 0.84, 0.89))  # a layout computed from the labels would double the time
    points = points.float().cpu()
    shown = points if reference is None else reference.float().cpu()
    low, high = shown.quantile(0.001, dim=0), shown.quantile(0.999, dim=0)
    centre, reach = (low + high) / 2, 0.65 * (high - low) + 1e-6
    if points.shape[1] > 1:
        reach = reach[:2].max().expand(points.shape[1])  # a square: both axes have the same scale
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
