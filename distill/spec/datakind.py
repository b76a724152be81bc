"""What the kinds of data in `dataspec` have in common. Does not import torch."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol, Self

from pydantic import Field

from distill.core.errors import InputError
from distill.core.field_types import FrozenModel
from distill.core.text import printable
from distill.spec import bucketing
from distill.spec.imagefields import Background, FittingBuckets, ImageSize, sides

# Part of `DataKind.identity`. In earlier versions, indexes depended on whether there is no background. They do not any
# more, but this value stays, so that the indexes in stores and runs are still found.
WITHOUT_BACKGROUND = True


class Absolute(Protocol):
    """A path that a user gave -> the one to use. holds: a path below it that should exist; empty: none."""

    def __call__(self, path: str, holds: str = "") -> str: ...


class DataKind(FrozenModel):
    """What all kinds of data have in common. The defaults are those of samples that are part of no file."""

    @property
    def place(self) -> str | None:
        """The path, URL or hub id of the data; None: there is none."""
        return None

    @property
    def name(self) -> str:
        """The name of the data set in messages."""
        return "none"

    @property
    def has_samples(self) -> bool:
        """Whether there are samples, and not only prompts or nothing."""
        return True

    @property
    def is_encoded(self) -> bool:
        """Whether the samples are latents already."""
        return False

    @property
    def has_videos(self) -> bool:
        """Whether the samples are videos."""
        return False

    @property
    def has_images(self) -> bool:
        """Whether the samples are images or videos, which an autoencoder can encode."""
        return self.has_samples and not self.is_encoded and not self.has_points

    @property
    def has_points(self) -> bool:
        """Whether the samples are points in the plane."""
        return False

    @property
    def has_captions(self) -> bool:
        """Whether the labels of the samples are numbers of prompts instead of class ids."""
        return False

    @property
    def has_prompts(self) -> bool:
        """Whether there are prompts: captions of samples, or prompts without samples."""
        return self.has_captions

    @property
    def has_classes(self) -> bool:
        """Whether the labels of the samples are class ids."""
        return False

    @property
    def label_field(self) -> str | None:
        """The field that says where the class ids are; None: this kind has no such field."""
        return None

    @property
    def side_lengths(self) -> list[int]:
        """The heights and widths of images in pixels; empty if they are not known before the data is read."""
        return []

    @property
    def in_buckets(self) -> bool:
        """Whether the samples have several sizes."""
        return False

    @property
    def crops_randomly(self) -> bool:
        """Whether each epoch crops the images at another position."""
        return False

    @property
    def is_mirrored(self) -> bool:
        """Whether samples are mirrored with probability 1/2 by the field `flip`."""
        return False

    @property
    def is_streamed(self) -> bool:
        """Whether rows are read when they are used, from files that may be remote."""
        return False

    @property
    def is_downloaded(self) -> bool:
        """Whether the data is given by hub id, and downloaded before jobs run."""
        return False

    @property
    def remote(self) -> str | None:
        """The hub id or URL that is read while training; None if the data is on this machine by then."""
        return self.place if self.is_streamed and self.place is not None and not Path(self.place).exists() else None

    @property
    def identity(self) -> list[object]:
        """What distinguishes the index of this data from the indexes of other data. It can be written as JSON."""
        return [self.name]

    @property
    def index_file(self) -> Path:
        """The path of the index of the data, relative to a store or a run. InputError as by `refuse_hidden_place`."""
        self.refuse_hidden_place()
        return Path("indexes", f"{hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:32]}.safetensors")

    @property
    def visible_place(self) -> str | None:
        """The path, or the folder of a pattern, of which it must be possible to find out whether it exists."""
        return self.place

    def refuse_hidden_place(self) -> None:
        """Raise InputError if it cannot be found out whether the path exists, as without permission."""
        if self.visible_place is None:
            return
        try:
            Path(self.visible_place).exists()
        except OSError as error:
            raise InputError(
                f"data.path={printable(self.visible_place)[:300]} cannot be read: {error.strerror}; give another path"
            ) from error

    def located(self, absolute: Absolute) -> Self:
        """The same data with other paths."""
        return self if self.place is None else self.model_copy(update={"path": absolute(self.place)})

    def in_one_size(self) -> Self:
        """The data without buckets: all samples have the size `data.size`, as evaluations need it."""
        return self

    def mistakes(self) -> Iterator[str]:
        """The mistakes that can be found without reading the data."""
        yield from ()

    def unused(self, samples: bool, prompts: bool) -> Iterator[str]:
        """The mistake that no stage uses the data. samples, prompts: what the stages of the spec use."""
        if self.has_samples and not samples:
            yield "data: no stage uses it, so it has no effect; remove it"


def local_place(path: str) -> str:
    """A local path as an absolute one; a hub id or URL as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path


class ImageOptions(DataKind):
    """How images become tensors in [-1, 1]."""

    path: str
    """folder, file or hub id of the images"""
    size: ImageSize
    """N or [height, width] in pixels; images are resized so that they just cover this size, then cropped"""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB; images are converted to it"""
    crop: Literal["center", "random"] = "center"
    """position of the crop; random: depends only on seed, epoch and image, not on the number of processes"""
    flip: bool = False
    """flip images horizontally with probability 1/2"""
    max_unreadable: int = Field(0, ge=0)
    """how many images that cannot be decoded may be skipped (with a warning); with more, the run stops"""
    background: Background = None
    """colour behind transparent pixels: white, black or [red, green, blue]; null: no image may have an alpha channel"""
    buckets: FittingBuckets = None
    """train on images of several aspect ratios, with 0.9 to 1 times the area of size; null: all have this size"""

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of a sample in pixels; with buckets, of one in the bucket of `size`."""
        return sides(self.size)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of the samples of each bucket, from the widest to the highest; without buckets, one size."""
        if self.buckets is None:
            return [self.height_width]
        return bucketing.sizes(self.height_width, self.buckets.step, self.buckets.max_aspect)

    @property
    def place(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def side_lengths(self) -> list[int]:
        return list(dict.fromkeys(side for size in self.sizes for side in size))

    @property
    def in_buckets(self) -> bool:
        return self.buckets is not None

    @property
    def crops_randomly(self) -> bool:
        return self.crop == "random"

    @property
    def is_mirrored(self) -> bool:
        return self.flip

    @property
    def identity(self) -> list[object]:
        return [self.model_dump()["kind"], local_place(self.path), WITHOUT_BACKGROUND]

    def in_one_size(self) -> Self:
        return self.model_copy(update={"buckets": None})
