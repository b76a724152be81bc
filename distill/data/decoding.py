"""From the bytes of an image (PNG, JPEG ...) to pixels, and what its header tells without decoding."""

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.core.errors import InputError
from distill.spec.imagefolder import formats

# What Pillow raises on a file that is damaged or no image at all.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, KeyError, IndexError, TypeError),
    *(struct.error, Image.DecompressionBombError),
)
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
JPEG_END = b"\xff\xd9"
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded."""

    height: int
    width: int
    alpha: bool
    """it may be transparent in places"""
    decoded: bool
    """whether only decoding can tell that it is whole and its values are in range"""


def _opened(encoded: bytes) -> Image.Image:
    """An encoded image of the formats that are read, whatever the name of its file says."""
    return Image.open(io.BytesIO(encoded), formats=formats())


def header(encoded: bytes) -> Header:
    """Of an encoded image; one of UNREADABLE if it has none."""
    with _opened(encoded) as image:
        sure = image.mode[0] not in "IF" and _has_end(encoded, image.format)
        return Header(image.height, image.width, _has_alpha(image), not sure)


def _has_end(encoded: bytes, kind: str | None) -> bool:
    """Whether the last bytes are there, for the formats of large sets. JPEGs may have anything behind their end."""
    match kind:
        case "PNG":
            return encoded.endswith(PNG_END)
        case "JPEG":
            return encoded.rfind(JPEG_END) > len(encoded) // 2
        case "WEBP":
            return len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    return False


def is_transparent(encoded: bytes) -> bool:
    """Whether any pixel is; decodes."""
    with _opened(encoded) as image:
        return bool(_has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < 255)


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def decode(
    encoded: bytes, name: str, size: tuple[int, int], channels: int, background: Colour | None = None
) -> NDArray[np.generic]:
    """[C, H, W] that just covers `size` (height, width), resized with antialiasing: uint8, or float32 in [0, 1] of deep
    images. Transparent pixels show the background; without one they are refused.
    """
    with _opened(encoded) as opened:
        image = ImageOps.exif_transpose(opened)
    if _has_alpha(image):
        image = image.convert("RGBA")
        if background is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
        elif image.getchannel("A").getextrema()[0] < 255:
            raise InputError(f"{name} is transparent in places; give data.background, or flatten it")
        image = image.convert("RGB")
    if image.mode[0] in "IF":  # 16-bit integers or floating point, one channel
        scale = np.float32(1 if image.mode == "F" else 65535)
        values = np.asarray(image, dtype=np.float32) / scale
        low, high = float(values.min()), float(values.max())  # NaN, if any value is
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{name} has values from {low:g} to {high:g}; floating-point images must be finite and lie in 0 to 1"
            )
        image = Image.fromarray(values)
    else:
        image = image.convert("L" if channels == 1 else "RGB")
    target = covering(image.height, image.width, size)
    if target != (image.height, image.width):
        image = image.resize(target[::-1], Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 1)  # Lanczos overshoots at edges; Pillow clips 8-bit images itself
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an image once it is resized to just cover `size`, keeping its proportions."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))
