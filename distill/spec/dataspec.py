"""The `data` of a run spec: real data, and how images are converted to samples.

There is one class for each kind. It knows what can be said about the data without reading it, so that other code asks
it, instead of distinguishing kinds. How a kind is found, indexed and loaded is in a module of `distill.data`, whose
`__init__.py` has the table of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from distill.spec import braces, imagefolder
from distill.spec.builtindata import CheckerboardData, DigitsData, MnistData, NoData
from distill.spec.datakind import WITHOUT_BACKGROUND, Absolute, DataKind, ImageOptions, local_place
from distill.spec.imagefields import Background, VideoSize, key_of


class ImagesData(ImageOptions):
    """A folder of images. Classes are the labels of its dataset.json (EDM's format), else its sub-folders in
    alphabetical order, if any."""

    kind: Literal["images"]
    captions: bool = False
    """whether the images have captions: files NAME.txt or NAME.caption beside them, or a metadata.jsonl, .csv or
    .parquet with the columns file_name and text or caption; sub-folders are not classes then"""
    split: Annotated[str, Field(min_length=1)] | None = None
    """sub-folder of `path` to use, if that has one for each split, like train and val; null: `path` is one split"""

    @property
    def folder(self) -> Path:
        """The folder with the images of the split."""
        return Path(self.path) if self.split is None else Path(self.path) / self.split

    @property
    def name(self) -> str:
        return Path(self.path).name + ("" if self.split is None else f"-{self.split}")

    @property
    def has_captions(self) -> bool:
        return self.captions

    @property
    def has_classes(self) -> bool:
        return not self.captions and (not self.folder.is_dir() or imagefolder.has_classes(self.folder))

    @property
    def identity(self) -> list[object]:
        place = local_place(str(self.folder)) if self.folder.exists() else self.path
        parts = [self.kind, place, WITHOUT_BACKGROUND]
        return [*parts, "captions"] if self.captions else parts


class TarsData(ImageOptions):
    """Tars as WebDataset writes them. A sample is one image, and files with the same name and other endings: .txt
    (caption), .cls (class id), .json (fields). `path` is a .tar file, a folder of them, or a pattern like
    shards/{00000..00127}.tar; images are read inside the tars, which must not be compressed."""

    kind: Literal["tars"]
    caption_key: Annotated[str, key_of("txt")] | None = None
    """where captions are: txt, or json.FIELD for a field of the JSON; null: no captions"""
    label_key: Annotated[str, key_of("cls")] | None = None
    """where class ids are: cls, or json.FIELD for a field of the JSON; null: no classes"""

    @property
    def pattern(self) -> str | None:
        """The part of the path from the first folder or file with braces; None: there are no braces."""
        folder, brace, rest = self.path.partition("{")
        if not brace or os.path.exists(self.path):  # noqa: PTH110  (Path.exists fails for a pattern of many letters)
            return None
        return folder.rpartition("/")[2] + brace + rest

    @property
    def folder(self) -> str:
        """The folder that contains the tars, or whose sub-folders do."""
        if self.pattern is not None:
            above = self.path.removesuffix(self.pattern)
            return above if above in ("", "/") else above.rstrip("/")
        return str(Path(self.path).parent) if Path(self.path).is_file() else self.path

    @property
    def has_captions(self) -> bool:
        return self.caption_key is not None

    @property
    def has_classes(self) -> bool:
        return self.label_key is not None

    @property
    def label_field(self) -> str:
        return "label_key"

    @property
    def identity(self) -> list[object]:
        place = local_place(self.path) if self.pattern is None else self.path
        return [self.kind, place, WITHOUT_BACKGROUND, self.caption_key, self.label_key]

    @property
    def visible_place(self) -> str:
        return self.path if self.pattern is None else self.folder or "."

    def located(self, absolute: Absolute) -> Self:
        """The folder of a pattern is the one that has the first tar of the pattern, if there is such a folder."""
        if self.pattern is None:
            return self.model_copy(update={"path": absolute(self.path)})
        first = "" if Path(self.path).is_absolute() else braces.expanded(self.pattern)[0]
        folder = absolute(self.folder or ".", first).rstrip("/")
        return self.model_copy(update={"path": f"{folder}/{self.pattern}"})

    def mistakes(self) -> Iterator[str]:
        if self.caption_key is not None and self.label_key is not None:
            yield (
                "data: caption_key and label_key are both given; samples have captions or classes, so remove one of "
                "them"
            )


class HfData(ImageOptions):
    """A data set of the `datasets` library: a hub id, a folder or file of parquet, or a folder saved to disk."""

    kind: Literal["hf"]
    revision: str | None = None
    """branch, tag or commit of a hub id; null: the newest"""
    split: str = "train"
    """split of the data set"""
    image_column: str = "image"
    """column of the images"""
    label_column: str | None = None
    """column of class ids; null: no classes"""
    caption_column: str | None = None
    """column of captions; null: no captions"""
    stream: bool = False
    """read the rows from the parquet files of the hub, or of a path or URL, when they are used, instead of downloading
    them first; training needs the network then"""
    limit: Annotated[int, Field(ge=1, lt=2**40)] | None = None
    """for stream: use only the first rows, this many; null: all rows"""

    @property
    def is_of_hub(self) -> bool:
        """Whether the path is a hub id, that is, neither a URL nor a local path that exists."""
        return "://" not in self.path and not Path(self.path).exists()

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def has_captions(self) -> bool:
        return self.caption_column is not None

    @property
    def has_classes(self) -> bool:
        return self.label_column is not None

    @property
    def label_field(self) -> str:
        return "label_column"

    @property
    def is_streamed(self) -> bool:
        return self.stream

    @property
    def is_downloaded(self) -> bool:
        return self.is_of_hub and not self.stream

    @property
    def identity(self) -> list[object]:
        place, rows = local_place(self.path), [self.revision, self.split, self.image_column, self.label_column]
        if self.stream:
            return ["stream", place, *rows, self.caption_column, self.limit]
        captions = [] if self.caption_column is None else [self.caption_column]
        return [self.kind, place, WITHOUT_BACKGROUND, *rows, *captions]

    def mistakes(self) -> Iterator[str]:
        if self.caption_column is not None and self.label_column is not None:
            yield (
                "data: caption_column and label_column are both given; images have captions or classes, so remove one "
                "of them"
            )
        if self.limit is not None and not self.stream:
            yield f"data.limit={self.limit} has no effect without data.stream=true; add that, or remove the limit"
        if self.stream and self.buckets is not None:
            yield (
                "data.buckets: the sizes of streamed images are not known beforehand; remove data.buckets, or use "
                "data.stream=false"
            )
        if "://" in self.path and not self.stream:
            yield "data.path is a URL, which can only be streamed; add data.stream=true, or download the files"
        if self.stream and self.revision is not None and not self.is_of_hub:
            yield f"data.revision={self.revision} has no effect: {self.path} is not a hub id; remove data.revision"


class LatentsData(DataKind):
    """Latents that others have computed, or any other samples as a network takes them: .npy or .safetensors files. A
    file holds one sample ([C, h, w]; [C, F, h, w] for video; [d] for vectors), or many ([N, C, h, w] ...)."""

    kind: Literal["latents"]
    path: str
    """file, or folder of .npy or of .safetensors files; files in its sub-folders are read too"""
    scaled: bool
    """whether they are scaled as the network takes them; false: as the teacher's autoencoder returns them"""
    key: str | None = None
    """name of the tensor in safetensors files; null: `latents`, or the only tensor"""
    mirrored_key: str | None = None
    """tensor with the latents of the mirrored images, which replace the others with probability 1/2"""
    labels: str | None = None
    """class ids: a .npy file with one for each sample, or the name of a tensor in the safetensors files; null: none"""
    moments: bool = False
    """whether the first half of the channels is the mean and the second half the log variance; each epoch takes
    another sample"""
    one_per_file: bool | None = None
    """whether each file holds one sample; null: yes for arrays of 1 or 3 dimensions, no for 2, 4 or 5"""

    @property
    def label_file(self) -> str | None:
        """The .npy file with the class ids; None: they are in a tensor of the safetensors files, or there are none."""
        return self.labels if self.labels is not None and self.labels.endswith(".npy") else None

    @property
    def place(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return Path(self.path).stem

    @property
    def is_encoded(self) -> bool:
        return True

    @property
    def has_classes(self) -> bool:
        return self.labels is not None

    @property
    def label_field(self) -> str:
        return "labels"

    @property
    def identity(self) -> list[object]:
        own = [self.key, self.mirrored_key, self.labels, self.moments, self.one_per_file]
        return [self.kind, str(Path(self.path).absolute()), *own]

    def located(self, absolute: Absolute) -> Self:
        labels = self.labels if self.label_file is None else absolute(self.label_file)
        return self.model_copy(update={"path": absolute(self.path), "labels": labels})


class PromptsData(DataKind):
    """Prompts without images, for pairs from noise and recipes that need no real data: a text file with one prompt on
    each line, a .jsonl or .parquet file, or a folder of parquet files."""

    kind: Literal["prompts"]
    path: str
    """file, or folder of parquet files"""
    column: str | None = None
    """column, or key of the JSON objects, with the prompts; null: the only one with texts"""
    max_unreadable: int = Field(0, ge=0)
    """how many lines or rows without a usable prompt may be skipped (with a warning); with more, the run stops"""

    @property
    def place(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def has_samples(self) -> bool:
        return False

    @property
    def has_prompts(self) -> bool:
        return True

    @property
    def identity(self) -> list[object]:
        return [self.kind, str(Path(self.path).absolute()), self.column]

    def unused(self, samples: bool, prompts: bool) -> Iterator[str]:
        if not prompts:
            yield "data: no stage uses a teacher that takes prompts, so they have no effect; remove it"


class VideosData(DataKind):
    """Videos as folders of images: each folder below `path` that has images is a video, and these are its frames, in
    the order of the numbers in their names."""

    kind: Literal["videos"]
    path: str
    """folder with one sub-folder for each video"""
    size: VideoSize
    """[frames, height, width]; frames are resized so that they just cover height and width, then cropped"""
    stride: Annotated[int, Field(ge=1, le=1000)] = 1
    """take every n-th frame"""
    channels: Literal[1, 3] = 3
    """1: grey, 3: RGB; frames are converted to it"""
    crop: Literal["center", "random"] = "center"
    """position of the crop, the same for all frames, and of the first frame in the video; random: depends only on seed,
    epoch and video, not on the number of processes"""
    flip: bool = False
    """flip all frames horizontally with probability 1/2"""
    captions: bool = False
    """whether the videos have captions: NAME.txt beside the folder NAME"""
    max_unreadable: int = Field(0, ge=0)
    """how many videos that cannot be used may be skipped (with a warning); with more, the run stops"""
    background: Background = None
    """colour behind transparent pixels: white, black or [red, green, blue]; null: no frame may have an alpha channel"""

    @property
    def span(self) -> int:
        """How many frames of a video lie from the first to the last one of a sample, both included."""
        return (self.size[0] - 1) * self.stride + 1

    @property
    def place(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def has_videos(self) -> bool:
        return True

    @property
    def has_captions(self) -> bool:
        return self.captions

    @property
    def crops_randomly(self) -> bool:
        return self.crop == "random"

    @property
    def is_mirrored(self) -> bool:
        return self.flip

    @property
    def identity(self) -> list[object]:
        parts = [self.kind, local_place(self.path), WITHOUT_BACKGROUND]
        return [*parts, "captions"] if self.captions else parts


DataSpec = Annotated[
    NoData
    | DigitsData
    | MnistData
    | CheckerboardData
    | ImagesData
    | TarsData
    | HfData
    | LatentsData
    | VideosData
    | PromptsData,
    Field(discriminator="kind"),
]
