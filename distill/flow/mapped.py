"""Arrays in .npy and safetensors files, mapped into memory: only the rows that are used are read from the disk."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import one_line, printable

NPY, SAFETENSORS = ".npy", ".safetensors"
# What NumPy raises for a header that is damaged; most of them are ValueErrors.
DAMAGED = (ValueError, TypeError, OverflowError, SyntaxError, TokenError, RecursionError, MemoryError)
TYPES = {  # by kind and size in bytes of NumPy's types
    ("f", 2): torch.float16,
    ("f", 4): torch.float32,
    ("f", 8): torch.float64,
    ("b", 1): torch.bool,
    ("u", 1): torch.uint8,
    ("i", 1): torch.int8,
    ("i", 2): torch.int16,
    ("i", 4): torch.int32,
    ("i", 8): torch.int64,
}


@dataclass(frozen=True)
class MappedArray:
    """An array [N, ...] in a file.

    name: of the tensor in a safetensors file; empty in a .npy file. by_rows: whether a row is contiguous in the file;
    False: the array is in Fortran order, so that reading a row reads the whole file.
    """

    path: Path
    name: str
    values: NDArray[np.generic] | Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        if isinstance(self.values, Tensor):
            return self.values.dtype
        return TYPES[self.values.dtype.kind, self.values.dtype.itemsize]

    @property
    def bytes(self) -> int:
        """The size of the array in the file."""
        return self.values.nbytes

    @property
    def by_rows(self) -> bool:
        return isinstance(self.values, Tensor) or bool(self.values.flags.c_contiguous) or self.shape[0] == 1

    @property
    def shown(self) -> str:
        """The file, and the name of the tensor, for messages."""
        return printable(str(self.path)) + (f", tensor {one_line(self.name)}" if self.name else "")

    def __reduce__(self) -> tuple[Callable[[Path, str], "MappedArray"], tuple[Path, str]]:
        """Another process opens the file again; otherwise, the whole array would be sent to it."""
        return _reopened, (self.path, self.name)

    def take(self, rows: Sequence[int]) -> Tensor:
        """A copy of these rows, [n, ...] in the data type of the file."""
        if isinstance(self.values, Tensor):
            return self.values[torch.tensor(rows, dtype=torch.int64)]
        return _copied(self.values[np.array(rows, np.int64)])

    def whole(self) -> Tensor:
        """A copy of the array, in the data type of the file."""
        return self.values.clone() if isinstance(self.values, Tensor) else _copied(self.values)


def _reopened(path: Path, name: str) -> MappedArray:
    return arrays(path)[name]


def _copied(values: NDArray[np.generic]) -> Tensor:
    """A copy in C order and in the byte order of this machine."""
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C", copy=True))


def arrays(path: Path) -> Mapping[str, MappedArray]:
    """The arrays of a .npy or safetensors file by name; that of a .npy file has the name "". Reads its header only.

    Files without the ending .npy are safetensors files.

    InputError if the file cannot be read, is damaged or cut, or has Python objects or a data type that is not known.
    """
    try:
        with open_regular(path, follow=True) as file:
            size = file.seek(0, 2)
        if path.suffix != NPY:
            return {name: MappedArray(path, name, each) for name, each in load_file(path).items()}
        found = np.lib.format.open_memmap(path, mode="r") if size else None
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise InputError(
            f"{printable(str(path))} is not a safetensors file, or is damaged or cut ({one_line(str(error))}); copy or "
            "make it again"
        ) from error
    except DAMAGED as error:
        if "Python objects" in str(error):
            raise InputError(
                f"{printable(str(path))} contains Python objects, which are never unpickled; save an array of numbers: "
                "np.save(FILE, np.stack(LIST))"
            ) from error
        raise InputError(
            f"{printable(str(path))} is not a .npy file, or is damaged or cut ({one_line(str(error))}); copy or "
            "make it again"
        ) from error
    if found is None or found.offset + found.nbytes != size:
        wanted = "" if found is None else f", but its header says {found.offset + found.nbytes:,}"
        raise InputError(
            f"{printable(str(path))} has {size:,} bytes{wanted}: it is damaged or cut; copy or make it again"
        )
    if (found.dtype.kind, found.dtype.itemsize) not in TYPES:
        raise InputError(
            f"{printable(str(path))} has the data type {found.dtype.str}; valid: float16, float32, float64, bool and "
            "whole numbers (bfloat16 only in safetensors files)"
        )
    return {"": MappedArray(path, "", found)}


@dataclass(frozen=True)
class MappedRows:
    """Rows of a table of conditions in files: [count, ...] by field. Implements `conditioning.ConditionRows`.

    Only the rows that are taken are read. InputError if they have values that are not finite.
    """

    arrays: Mapping[str, MappedArray]

    @property
    def fields(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (each.shape[1:], each.dtype) for name, each in self.arrays.items()}

    def __len__(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        rows = indices.tolist()
        found = {name: each.take(rows) for name, each in self.arrays.items()}
        for name, each in found.items():
            if each.is_floating_point() and not each.isfinite().all():
                row = rows[int((~each.isfinite().flatten(1).all(1)).nonzero()[0])]
                raise InputError(
                    f"{self.arrays[name].shown} contains NaN or infinity in row {row} (rows count from 0); make it "
                    "again"
                )
        return found
