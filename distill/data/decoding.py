"""Decodes images (PNG, JPEG ...) to pixels, and reads their headers without decoding."""

import io
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.core.errors import InputError
from distill.spec.imagefiles import formats

# What Pillow raises for a file that is damaged or not an image.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, RuntimeError, KeyError, IndexError, TypeError),
    *(struct.error, Image.DecompressionBombError),
)
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = b"IDAT"
PNG_MOVED = (b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"tRNS")  # chunks that may hold an orientation or a transparent colour
PNG_STOP = (b"fcTL", b"IEND")  # chunks at which Pillow stops reading after the pixels
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag; its values that exchange height and width
SET_BACKGROUND = (
    "set the colour behind transparent pixels: data.background=white, black or [red, green, blue]; opaque pixels keep "
    "their colours"
)
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class Header:
    """What is known about an image before it is decoded. Height and width are those of the decoded image."""

    height: int
    width: int
    alpha: bool
    """whether the image has an alpha channel or a transparent colour"""


def _opened(encoded: bytes) -> Image.Image:
    """Opens an encoded image of any supported format. The format is detected from the content."""
    return Image.open(io.BytesIO(encoded), formats=formats())


def header(encoded: bytes) -> Header:
    """Reads the header of an encoded image, without decoding it. Raises one of UNREADABLE if it has no valid header.

    The header of an ICO file is the exception: Pillow decodes such files when it opens them.
    """
    with _opened(_pixels_last(encoded)) as image:
        sides = (image.width, image.height) if _is_turned(image) else (image.height, image.width)
        return Header(*sides, _has_alpha(image))


def _is_turned(image: Image.Image) -> bool:
    """Whether decoding exchanges height and width, as the orientation in the EXIF or XMP data says."""
    if image.format == "TIFF":
        return False  # Pillow has already exchanged the sides
    return Image.Image.getexif(image).get(ORIENTATION) in TURNED  # PngImageFile.getexif may decode the image


def _pixels_last(encoded: bytes) -> bytes:
    """Moves EXIF data, texts and a transparent colour that come after the pixels of a PNG file before the pixels.

    Pillow reads what comes before the pixels when it opens a file, and the rest only when it decodes the file. Files of
    other formats are returned unchanged.
    """
    if not encoded.startswith(PNG_START):
        return encoded
    pixels, moved, start = 0, [], len(PNG_START)
    while start + 12 <= len(encoded):  # a chunk: length of its content, name, content, checksum
        stop = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        name = encoded[start + 4 : start + 8]
        if pixels and name in PNG_STOP:
            break
        if name == PNG_PIXELS:
            pixels = pixels or start
        elif pixels and name in PNG_MOVED and stop <= len(encoded):
            moved.append(encoded[start:stop])
        start = stop
    return b"".join([encoded[:pixels], *moved, encoded[pixels:]]) if moved else encoded


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def decode(
    encoded: bytes, name: str, size: tuple[int, int], channels: int, background: Colour | None = None
) -> NDArray[np.generic]:
    """Decodes an image to pixels [C, H, W], resized with antialiasing to just cover `size` (height, width).

    The pixels are uint8, or float32 in [0, 1] for 16-bit and floating-point images.

    name: the name of the image in messages.
    background: the colour behind transparent pixels. None: the image must not have an alpha channel.

    Raises InputError if the image has an alpha channel but there is no background, or if floating-point values are not
    in 0 to 1. Raises one of UNREADABLE if the image cannot be decoded.
    """
    with _opened(encoded) as opened:
        image = ImageOps.exif_transpose(opened)
    if _has_alpha(image):
        if background is None:
            raise InputError(f"{name} has an alpha channel; {SET_BACKGROUND}")
        behind = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    if image.mode[0] in "IF":  # 16-bit integers or floating point, one channel
        scale = np.float32(1 if image.mode == "F" else 65535)
        values = np.asarray(image, dtype=np.float32) / scale
        low, high = float(values.min()), float(values.max())  # NaN if any value is NaN
        if not (low >= 0 and high <= 1):
            raise InputError(
                f"{name} has values from {low:g} to {high:g}; floating-point images must be finite and within 0 to 1"
            )
        image = Image.fromarray(values)
    else:
        image = image.convert("L" if channels == 1 else "RGB")
    target = covering(image.height, image.width, size)
    if target != (image.height, image.width):
        image = image.resize(target[::-1], Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0, 1)  # Lanczos filters overshoot at edges; Pillow itself clips 8-bit images only
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image after it is resized to just cover `size`, with its aspect ratio kept."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))
