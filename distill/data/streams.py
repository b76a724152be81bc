"""Streams of parquet files: which files there are, how they are opened, and the index of their rows.

Files are opened with fsspec: those of a hub id by the URLs of a commit, others by their path or URL. Nothing is
downloaded beforehand. Requests are of exactly the bytes that are needed.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import datasets
import fsspec
import numpy as np
import pyarrow as pa
from fsspec.core import url_to_fs
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers
from numpy.typing import NDArray
from pyarrow import parquet

from distill import hub
from distill.core import printing
from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import printable, suggest
from distill.data import streamindex
from distill.data.facts import THREADS
from distill.data.prompts import Captions
from distill.data.streamindex import StreamIndex
from distill.spec.imagefolder import count_classes
from distill.spec.model import HfData

T = TypeVar("T")

FAILED = (*hub.UNREACHABLE, aiohttp.ClientError, pa.ArrowException)
PAUSES = (1, 5, 20, 60)  # seconds before each new attempt to read from a server
SHOWN = 3  # names in a message


def read_again(once: Callable[[], T], what: str) -> T:
    """Calls `once`, which reads from a server. If the connection fails, it is called again after a pause, some times.

    what: what is read, for the warning.
    """
    for pause in PAUSES:
        try:
            return once()
        except (hub.HTTPError, OSError, aiohttp.ClientError) as error:
            if not _is_passing(error):
                raise
            printing.warn(f"{what} could not be read ({reason(error)}); trying again in {pause} s")
            time.sleep(pause)
    return once()


def _is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in (408, 429) or error.status >= 500
    return not isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)


def reason(error: Exception) -> str:
    """Why a source cannot be read, in one line. The URL is left out, because it may contain a key."""
    if isinstance(error, aiohttp.ClientResponseError):
        return printable(f"the server answers {error.status} {error.message}")[:300]
    if isinstance(error, FileNotFoundError):  # fsspec raises it also if the server does not answer
        return "there is no such file, or its server cannot be reached"
    return printable(hub.reason(error))[:300]


# --- files ---


@dataclass(frozen=True)
class StreamFiles:
    """The files of a stream. commit: of a hub id; None: the path is no hub id."""

    spec: HfData
    commit: str | None

    def listed(self) -> list[tuple[str, int]]:
        """(name, bytes) of each file of the split, in order. InputError if there are none that can be streamed."""
        if self.commit is None:
            names = self._of_path()
            return [(name, _size(name)) for name in names]
        builder = datasets.load_dataset_builder(self.spec.path, revision=self.commit)
        names = [name.partition(f"@{self.commit}/")[2] for name in self._of_split(builder.config.data_files)]
        sizes = {file.name: file.bytes for file in hub.files("dataset", self.spec.path, self.commit)}
        return [(name, sizes[name]) for name in names]

    def again(self, once: Callable[[], T], what: str) -> T:
        """Like `read_again`, but local files are read once."""
        is_local = self.commit is None and "://" not in self.spec.path
        return once() if is_local else read_again(once, what)

    def open(self, name: str, size: int) -> Any:
        """Opens a file for reading in any order, without a request."""
        if self.commit is None and "://" not in name:
            return open_regular(Path(name), follow=True)
        if self.commit is None:
            system, place = url_to_fs(name)
            return system.open(place, "rb", size=size, cache_type="none")
        url = hf_hub_url(self.spec.path, name, repo_type="dataset", revision=self.commit)
        system = fsspec.filesystem("http", headers=build_hf_headers(), client_kwargs={"trust_env": True})
        return system.open(url, "rb", size=size, cache_type="none")

    def _of_path(self) -> list[str]:
        path = self.spec.path
        if "://" in path:
            system, place = url_to_fs(path)
            names = sorted(system.glob(place)) if "*" in place else [place]
            return self._parquet([str(system.unstrip_protocol(name)) for name in names])
        if Path(path).is_file():
            return self._parquet([str(Path(path).absolute())])
        if not any(Path(path).rglob("*.parquet")):
            return self._parquet([])
        found = datasets.load_dataset_builder("parquet", data_dir=path).config.data_files
        return self._parquet(self._of_split(found))

    def _of_split(self, found: Any) -> list[str]:
        """The files of the split that the spec names. found: names by split, from the `datasets` library."""
        if not found or self.spec.split not in found:
            raise InputError(
                f"data.split={self.spec.split}: no such split; {suggest(self.spec.split, map(str, found or []))}"
            )
        return self._parquet([str(name) for name in found[self.spec.split]])

    def _parquet(self, names: list[str]) -> list[str]:
        others = [name for name in names if not name.endswith(".parquet")]
        if others or not names:
            what = f"like {printable(others[0].rpartition('/')[2])}" if others else "of other formats"
            raise InputError(
                f"data.path={self.spec.path} has no parquet files but files {what}, which cannot be streamed; use "
                "data.stream=false"
            )
        return names


def _size(name: str) -> int:
    if "://" not in name:
        return Path(name).stat().st_size
    system, place = url_to_fs(name)
    size = system.info(place)["size"]
    if size is None:
        raise ValueError(f"the server does not say how large {printable(name)[:300]} is")
    return int(size)


# --- the index ---


@dataclass(frozen=True)
class _FileContent:
    """What is read from one file for the index."""

    number: int
    """position of the file in the list of files"""
    groups: list[int]
    """rows of each row group"""
    content: str
    """identifies the row groups"""
    num_classes: int | None
    """number of the names of the classes, if the file lists them"""
    values: list[Any]
    """the column of labels or captions; empty: none is used"""


def make(spec: HfData, old: StreamIndex | None) -> StreamIndex:
    """Makes the index of a stream; returns `old` if it is that of the newest commit.

    Raises InputError if there is no such stream, it has not enough rows, or its columns do not fit.
    """
    at = f" at revision {spec.revision}" if spec.revision else ""
    try:
        if spec.is_of_hub and Path(spec.path).is_absolute():
            raise ValueError("there is no such file or folder")
        if constants.HF_HUB_OFFLINE and spec.is_of_hub:
            raise ValueError("HF_HUB_OFFLINE=1 forbids it, but a stream needs the network")
        commit = hub.commit("dataset", spec.path, spec.revision) if spec.is_of_hub else None
        if old is not None and commit is not None and old.head.commit == commit:
            return old
        files = StreamFiles(spec, commit)
        return _made(spec, files, files.listed())
    except InputError:
        raise
    except (*FAILED, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"data.path={printable(spec.path)}{at} (split '{spec.split}') cannot be streamed: "
            f"{reason(error)}; valid: a hub id that can be reached, or a file, folder or URL of parquet"
        ) from error


def _made(spec: HfData, files: StreamFiles, listed: Sequence[tuple[str, int]]) -> StreamIndex:
    read: list[_FileContent] = []

    def values() -> Iterator[Any]:
        rows = 0
        for each in _contents(spec, files, listed):
            used = sum(each.groups) if spec.limit is None else min(sum(each.groups), spec.limit - rows)
            read.append(each)
            rows += used
            yield from each.values[:used]
            each.values.clear()
            if rows == spec.limit:
                return

    captions = labels = num_classes = None
    if spec.caption_column is not None:
        captions = Captions.of(values())
        if len(captions.labels) and not len(captions.prompts):
            raise InputError(
                f"data.caption_column={spec.caption_column}: none of the {len(captions.labels)} rows has a caption "
                "that can be used; give another column"
            )
    else:
        ids = np.fromiter((-1 if value is None else value for value in values()), np.int64)
        labels, num_classes = (None, None) if spec.label_column is None else _class_ids(spec, ids, read[0].num_classes)
    groups = [(each.number, g, rows) for each in read for g, rows in enumerate(each.groups) if rows]
    total = sum(rows for _, _, rows in groups)
    if total < (spec.limit or 1):
        limit = f"data.limit={spec.limit}, but " if spec.limit else ""
        raise InputError(
            f"{limit}data.path={printable(spec.path)} (split '{spec.split}') has {total} rows; "
            + ("lower the limit, or remove it" if spec.limit else "give a data set with rows")
        )
    used = listed[: len(read)]
    content = hashlib.sha256("".join(each.content for each in read).encode()).hexdigest()
    head = streamindex.head(files.commit, num_classes, spec.limit or total, content)
    return streamindex.of(
        head, used, groups, labels if captions is None else captions.labels, captions.prompts if captions else None
    )


def _contents(spec: HfData, files: StreamFiles, listed: Sequence[tuple[str, int]]) -> Iterator[_FileContent]:
    """Reads the files by several threads, in order, and not many more than are asked for."""
    numbered = [(number, name, size) for number, (name, size) in enumerate(listed)]
    first = 1 if spec.limit else THREADS  # with a limit, the first file is often enough
    with ThreadPoolExecutor(THREADS) as pool:
        for start, stop in pairwise([0, *range(first, len(numbered), THREADS), len(numbered)]):
            yield from pool.map(lambda file: _content(spec, files, *file), numbered[start:stop])


def _content(spec: HfData, files: StreamFiles, number: int, name: str, size: int) -> _FileContent:
    return files.again(lambda: _content_once(spec, files, number, name, size), printable(name))


def _content_once(spec: HfData, files: StreamFiles, number: int, name: str, size: int) -> _FileContent:
    with files.open(name, size) as file, parquet.ParquetFile(file) as opened:
        facts, schema = opened.metadata, opened.schema_arrow
        _check_columns(spec, schema)
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        if spec.image_column in schema.names and _are_paths(spec.image_column, groups):
            raise InputError(
                f"data.image_column={spec.image_column}: {printable(name)} has the paths of images, not the images, so "
                "it cannot be streamed; write the images themselves into the files, or use data.stream=false"
            )
        content = f"{size} {facts.serialized_size} {[(each.num_rows, each.total_byte_size) for each in groups]}"
        column, values, names = spec.label_column or spec.caption_column, [], None
        if column is not None:
            kind = pa.int64() if spec.label_column is not None else pa.large_binary()  # texts may be invalid UTF-8
            values = opened.read([column], use_threads=False).column(0).cast(kind).to_pylist()
            feature = datasets.Features.from_arrow_schema(schema)[column]
            names = feature.num_classes if isinstance(feature, datasets.ClassLabel) else None
        return _FileContent(number, [each.num_rows for each in groups], content, names, values)


def _check_columns(spec: HfData, schema: pa.Schema) -> None:
    named = {
        "image_column": spec.image_column,
        "label_column": spec.label_column,
        "caption_column": spec.caption_column,
    }
    for field, column in named.items():
        if column is not None and column not in schema.names:
            raise InputError(f"data.{field}={column}: no such column; {suggest(column, schema.names)}")
    kind = schema.field(spec.image_column).type
    if not is_encoded(kind):
        raise InputError(
            f"data.image_column={spec.image_column} contains {printable(str(kind))[:300]}; valid for a stream: columns "
            "of encoded images"
        )
    if spec.label_column is not None and not pa.types.is_integer(schema.field(spec.label_column).type):
        raise InputError(
            f"data.label_column={spec.label_column} contains {schema.field(spec.label_column).type}, valid: class ids "
            f"0, 1, 2 ...; convert names with class_encode_column('{spec.label_column}')"
        )
    text = None if spec.caption_column is None else schema.field(spec.caption_column).type
    if text is not None and not (pa.types.is_string(text) or pa.types.is_large_string(text)):
        raise InputError(f"data.caption_column={spec.caption_column} contains {text}; valid: a column of texts")


def _are_paths(column: str, groups: Sequence[Any]) -> bool:
    """Whether a column {"bytes", "path"} has no bytes at all, as the statistics of its row groups say."""
    filled = [each for each in groups if each.num_rows]
    for group in filled:
        chunks = [group.column(i) for i in range(group.num_columns)]
        of_bytes = next((each for each in chunks if each.path_in_schema == f"{column}.bytes"), None)
        if of_bytes is None or of_bytes.statistics is None or of_bytes.statistics.null_count != group.num_rows:
            return False
    return bool(filled)


def is_encoded(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images: bytes, or {"bytes", "path"} as `datasets` writes them."""
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_ids(spec: HfData, ids: NDArray[np.int64], named: int | None) -> tuple[NDArray[np.int64], int]:
    """The class ids and the number of classes. InputError if some are not valid. named: the number of names."""
    num_classes = named or int(ids.max(initial=0)) + 1
    wrong = np.flatnonzero((ids < 0) | (ids >= num_classes))
    if len(wrong):
        raise InputError(
            f"data.label_column={spec.label_column}: {len(wrong)} rows have no valid class id (the first is row "
            f"{wrong[0]}), valid: 0 to {num_classes - 1}; remove them"
        )
    if named is None:
        count_classes(ids.data, f"data.label_column={spec.label_column}")
    return ids, num_classes
