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
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
JPEG_END = b"\xff\xd9"
PNG_PIXELS = b"IDAT"
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # of chunks that may hold an orientation
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag; its values that exchange height and width
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}

Colour = tuple[int, int, int]  # red, green, blue, 0 to 255


@dataclass(frozen=True)
class Header:
    """What is known about an image before it is decoded. Height and width are those of the decoded image."""

    height: int
    width: int
    alpha: bool
    """whether the image has an alpha channel or a transparent colour"""
    decoded: bool
    """whether it must be decoded to check that it is complete and that its values are in range"""


def _opened(encoded: bytes) -> Image.Image:
    """Opens an encoded image of any supported format. The format is detected from the content."""
    return Image.open(io.BytesIO(encoded), formats=formats())


def header(encoded: bytes) -> Header:
    """Reads the header of an encoded image. Raises one of UNREADABLE if there is no valid header."""
    with _opened(encoded) as image:
        sure = image.mode[0] not in "IF" and _has_end(encoded, image.format)
        sides = (image.width, image.height) if _is_turned(image, encoded) else (image.height, image.width)
        return Header(*sides, _has_alpha(image), not sure)


def _is_turned(image: Image.Image, encoded: bytes) -> bool:
    """Whether decoding exchanges height and width, as the orientation in the EXIF or XMP data says. Reads no pixels,
    except of a PNG file with such data after its pixels.
    """
    if image.format == "TIFF":
        return False  # Pillow has already exchanged the sides
    if image.format == "PNG":
        pixels = encoded.find(PNG_PIXELS)
        if any(encoded.find(name, pixels) >= 0 for name in PNG_ORIENTATION):
            image.load()
    return Image.Image.getexif(image).get(ORIENTATION) in TURNED  # PngImageFile.getexif always reads the pixels


def _has_end(encoded: bytes, kind: str | None) -> bool:
    """Whether a PNG, JPEG or WebP file has its last bytes; False for other formats.

    A JPEG file may have other data after the end of the image.
    """
    match kind:
        case "PNG":
            return encoded.endswith(PNG_END)
        case "JPEG":
            return encoded.rfind(JPEG_END) > len(encoded) // 2
        case "WEBP":
            return len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    return False


def is_transparent(encoded: bytes) -> bool:
    """Whether any pixel is transparent. Decodes the image if it has an alpha channel."""
    with _opened(encoded) as image:
        return bool(_has_alpha(image) and image.convert("RGBA").getchannel("A").getextrema()[0] < 255)


def _has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def decode(
    encoded: bytes, name: str, size: tuple[int, int], channels: int, background: Colour | None = None
) -> NDArray[np.generic]:
    """Decodes an image to pixels [C, H, W], resized with antialiasing to just cover `size` (height, width).

    The pixels are uint8, or float32 in [0, 1] for 16-bit and floating-point images.

    name: the name of the image in messages.
    background: the colour behind transparent pixels. None: transparent pixels raise InputError.

    Raises InputError if floating-point values are not in 0 to 1, and one of UNREADABLE if the image cannot be decoded.
    """
    with _opened(encoded) as opened:
        image = ImageOps.exif_transpose(opened)
    if _has_alpha(image):
        image = image.convert("RGBA")
        if background is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
        elif image.getchannel("A").getextrema()[0] < 255:
            raise InputError(
                f"{name} has transparent pixels; set data.background to white, black or [red, green, blue], or remove "
                "the transparency"
            )
        image = image.convert("RGB")
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
