"""Encoded images (PNG, JPEG ...) as samples: checked once when loaded, decoded, cropped and flipped when asked for."""

import hashlib
import io
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from distill.draws import uniforms
from distill.guard import InputError
from distill.spec import ImageOptions

# What Pillow raises on a file that is damaged or no image at all.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
KEEP_BYTES = 2**30  # decoded images are kept in memory up to this much


class ImageData:
    """Rows of a `datasets.Dataset` whose column "image" is {"bytes", "path"}, as samples of channels x size x size.

    Building it decodes every image once, so that what cannot be decoded is known, named and skipped before training:
    more than options.max_unreadable of them are refused. Grey images in a colour set get equal channels, colour images
    in a grey set their luminance; transparency is refused, since it would need a background.
    """

    def __init__(
        self,
        name: str,
        rows: datasets.Dataset,
        labels: Sequence[int] | None,
        num_classes: int | None,
        options: ImageOptions,
        seed: int,
    ) -> None:
        if len(rows) == 0:
            raise InputError(f"data '{name}' holds no rows")
        self.name, self.num_classes = name, num_classes
        self.shape = (options.channels, options.size, options.size)
        self._rows, self._options, self._seed = rows, options, seed
        self._kept: dict[int, NDArray[np.generic]] = {}
        self._kept_bytes = 0
        self._readable: list[int] = []
        self.unreadable: list[str] = []
        content = hashlib.sha256(repr((options.size, options.channels, options.crop, options.flip)).encode())
        for row in range(len(rows)):
            try:
                content.update(hashlib.sha256(self._encoded(row)).digest())
                self._decoded(row)
            except InputError:
                raise
            except UNREADABLE:
                self.unreadable.append(self._name(row))
                continue
            self._readable.append(row)
            content.update(str(None if labels is None else labels[row]).encode())
        self._labels = None if labels is None else torch.tensor([labels[row] for row in self._readable])
        self.digest = content.hexdigest()
        self._report(len(rows))

    def __len__(self) -> int:
        return len(self._readable)

    def items(self, epoch: int, indices: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images [n, C, S, S] float32 in [-1, 1] and labels; crop and flip keyed by (seed, epoch, row)."""
        images = torch.stack([self._sample(self._readable[i], epoch) for i in indices])
        return images, None if self._labels is None else self._labels[list(indices)]

    def _sample(self, row: int, epoch: int) -> Tensor:
        pixels = self._decoded(row)  # [C, H, W], min(H, W) = size
        size = self._options.size
        spare_y, spare_x = pixels.shape[1] - size, pixels.shape[2] - size
        u = uniforms(3, self._seed, epoch, row)
        if self._options.crop == "random":
            y, x = int(u[0] * (spare_y + 1)), int(u[1] * (spare_x + 1))
        else:
            y, x = spare_y // 2, spare_x // 2
        sample = torch.from_numpy(pixels[:, y : y + size, x : x + size].copy())
        sample = sample / 127.5 - 1 if sample.dtype == torch.uint8 else sample * 2 - 1
        return sample.flip(2) if self._options.flip and u[2] < 0.5 else sample

    def _decoded(self, row: int) -> NDArray[np.generic]:
        if row in self._kept:
            return self._kept[row]
        pixels = decode(self._encoded(row), self._name(row), self._options.size, self._options.channels)
        if self._kept_bytes + pixels.nbytes <= KEEP_BYTES:
            self._kept[row] = pixels
            self._kept_bytes += pixels.nbytes
        return pixels

    def _encoded(self, row: int) -> bytes:
        image = self._rows[row]["image"]
        if image is None:
            raise ValueError("no image in this row")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def _name(self, row: int) -> str:
        image = self._rows[row]["image"]
        return f"row {row}" if image is None or image["path"] is None else f"{image['path']} (row {row})"

    def _report(self, total: int) -> None:
        found, limit = len(self.unreadable), self._options.max_unreadable
        if not found:
            return
        names = ", ".join(self.unreadable[:5]) + (", ..." if found > 5 else "")
        count = f"{self.name}: {found} of {total} images cannot be decoded"
        if found > limit or not self._readable:
            raise InputError(
                f"{count}, data.max_unreadable is {limit}: {names}; repair or remove them, or raise the limit"
            )
        warnings.warn(f"{count} and are skipped: {names}", stacklevel=2)


def decode(encoded: bytes, name: str, size: int, channels: int) -> NDArray[np.generic]:
    """[C, H, W] with the shorter side resized (antialiased) to `size`: uint8, or float32 in [0, 1] for deep images."""
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise InputError(f"{name} is transparent in places; flatten the images onto a background first")
        image = image.convert("RGB")
    if image.mode[0] in "IF":  # 16-bit integers or floating point, one channel
        values = np.asarray(image).astype(np.float32) / (1 if image.mode == "F" else 65535)
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise InputError(
                f"{name} has values from {values.min():g} to {values.max():g}; "
                "floating-point images must be finite and lie in 0 to 1"
            )
        image = Image.fromarray(values)
    else:
        image = image.convert("L" if channels == 1 else "RGB")
    scale = size / min(image.size)
    target = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 1)  # Lanczos overshoots at edges; Pillow clips 8-bit images itself
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
