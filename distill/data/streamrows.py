"""Reading rows of a stream: the row groups that were used last are kept in memory, and no others."""

import os
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from distill.core.errors import RunError
from distill.core.text import printable
from distill.data.streamindex import StreamIndex
from distill.data.streams import FAILED, StreamFiles, reason
from distill.shards.order import GROUP
from distill.spec.model import HfData

MAX_GROUPS = GROUP + 1  # row groups that a process keeps: those of one group of shards, and one for a replaced image


class StreamRows:
    """The encoded images of a stream. A process that was forked reads its own row groups."""

    def __init__(self, spec: HfData, index: StreamIndex) -> None:
        self._spec, self._index, self._files = spec, index, StreamFiles(spec, index.head.commit)
        self._names = index.files
        self._process = os.getpid()
        self._groups: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._open: OrderedDict[int, Any] = OrderedDict()  # by number of the file: its ParquetFile

    def name(self, row: int) -> str:
        """The row number and the file."""
        file = self._names[int(self._index.groups[self._group_of(row), 0])]
        return f"row {row} ({printable(file)})"

    def read(self, row: int) -> bytes | None:
        """The encoded image; None if the row has none. Raises RunError if the source cannot be read any more."""
        if self._process != os.getpid():
            self._groups, self._open, self._process = OrderedDict(), OrderedDict(), os.getpid()
        group = self._group_of(row)
        if group not in self._groups:
            while len(self._groups) >= MAX_GROUPS:  # before the next one is read
                self._groups.popitem(last=False)
            self._groups[group] = self._load(group)
        self._groups.move_to_end(group)
        start = int(self._index.stops[group - 1]) if group else 0
        value = self._groups[group][row - start].as_py()
        found: bytes | None = value["bytes"] if isinstance(value, dict) else value
        return found

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._index.stops, row, "right"))

    def _load(self, group: int) -> pa.ChunkedArray:
        file, number = self._index.groups[group].tolist()
        first, last = int(self._index.stops[group - 1]) if group else 0, int(self._index.stops[group])
        name = self._names[file]
        where = f"data.path={printable(self._spec.path)}: rows {first} to {last - 1} ({printable(name)})"
        try:
            column = self._files.again(lambda: self._column(file, number, where), where)
        except FAILED as error:
            raise RunError(
                f"{where} cannot be read any more: {reason(error)}; once the source can be reached, resume the run"
            ) from error
        if len(column) != last - first:
            raise _changed(where, f"there are now {len(column)} rows")
        return column

    def _column(self, file: int, number: int, where: str) -> pa.ChunkedArray:
        """The column of images of a row group. The file is opened again after an error."""
        opened = self._open.pop(file, None)
        if opened is None:
            while len(self._open) >= MAX_GROUPS:
                self._open.popitem(last=False)[1].close()
            size = int(self._index.sizes[file])
            source = self._files.open(self._names[file], size)
            if (now := source.seek(0, os.SEEK_END)) != size:  # only local files; of others, the end would not be found
                raise _changed(where, f"the file had {size:,} bytes and has {now:,}")
            opened = parquet.ParquetFile(source, pre_buffer=True)
        if number >= opened.metadata.num_row_groups:
            return pa.chunked_array([], pa.binary())
        column = self._spec.image_column
        kind = opened.schema_arrow.field(column).type
        wanted = f"{column}.bytes" if pa.types.is_struct(kind) else column
        found = opened.read_row_group(number, columns=[wanted], use_threads=False).column(0)
        self._open[file] = opened
        return found


def _changed(where: str, how: str) -> RunError:
    return RunError(f"{where}: the source has changed since the run began, {how}; start a new run")
