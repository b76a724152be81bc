"""Files with latents that others have computed: which there are, and what their headers say."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from distill.core.errors import InputError
from distill.core.text import one_line, printable
from distill.flow.mapped import NPY, SAFETENSORS, MappedArray, arrays
from distill.spec.model import LatentsData

WHOLE_NUMBERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
ONE = (1, 3, 4)  # valid numbers of dimensions of a file with one sample: [d], [C, h, w], [C, F, h, w]
MANY = (2, 4, 5)  # of a file with many
SHOWN = 5  # maximum number of names in a message


@dataclass(frozen=True)
class FileFacts:
    """What is known about a file before its samples are read.

    shape: of one sample as it is stored. key: name of its tensor; empty in a .npy file. labels: [count], or None.
    """

    shape: tuple[int, ...]
    key: str
    count: int
    labels: NDArray[np.int64] | None


def listed(spec: LatentsData) -> tuple[list[str], NDArray[np.int64]]:
    """The files of a data set, relative to its folder and in order, and [F, 3]: size, mtime and ctime of each.

    If data.path is a file, its name is empty. InputError if there are no files, or files of both types.
    """
    spec.refuse_hidden_place()
    root = Path(spec.path)
    if not root.is_dir():
        if root.suffix not in (NPY, SAFETENSORS):
            raise InputError(f"data.path={printable(spec.path)} {_other(root)}")
        names = [""]
    else:
        labels = None if spec.label_file is None else os.path.realpath(spec.label_file)
        found = (name for name in _files(root) if labels is None or os.path.realpath(root / name) != labels)
        names = sorted(found, key=lambda name: name.split("/"))
    kinds = {Path(spec.path, name).suffix for name in names}
    if not names:
        raise InputError(
            f"data.path={printable(spec.path)} contains no {NPY} and no {SAFETENSORS} files; give a folder with files "
            "of one of these types"
        )
    if len(kinds) > 1:
        firsts = (next(name for name in names if name.endswith(kind)) for kind in (NPY, SAFETENSORS))
        raise InputError(
            f"data.path={printable(spec.path)} contains {NPY} and {SAFETENSORS} files ({printable(', '.join(firsts))}, "
            "...); give a folder with files of one type"
        )
    if kinds == {NPY}:
        _refuse_tensor_names(spec)
    return names, np.array([_state(root / name) for name in names], np.int64)


def _files(root: Path) -> Iterator[str]:
    """Relative paths of the files below a folder, also in folders that are links."""
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"data.path={printable(str(root))} cannot be read: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        found = Path(folder).stat()
        if (found.st_dev, found.st_ino) in seen:
            raise InputError(
                f"data.path={printable(str(root))}: two links lead to the folder {printable(folder)}, so its files "
                "would be used twice; remove one of them"
            )
        seen.add((found.st_dev, found.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(folder, root)
        for name in names:
            if name.endswith((NPY, SAFETENSORS)) and not name.startswith("."):
                yield name if below == "." else f"{below}/{name}"


def _state(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{printable(str(path))} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _other(path: Path) -> str:
    """Why a path that is neither a folder nor a file with latents is refused."""
    if not path.exists():
        return "does not exist; give a .npy or .safetensors file, or a folder of them"
    hints = {
        ".npz": "is an archive of arrays; save each with np.save",
        ".pt": "is a pickled file, which is never unpickled; save its tensors with safetensors.torch.save_file",
    }
    hints |= dict.fromkeys((".pth", ".pkl", ".bin"), hints[".pt"])
    return hints.get(path.suffix.lower(), "is not a .npy or .safetensors file; give one, or a folder of them")


def _refuse_tensor_names(spec: LatentsData) -> None:
    """InputError if the spec names tensors, which .npy files do not have."""
    labels = None if spec.label_file is not None else spec.labels
    for field, value in (("key", spec.key), ("mirrored_key", spec.mirrored_key), ("labels", labels)):
        if value is not None:
            todo = "give a .npy file with the class id of each sample" if field == "labels" else "remove it"
            raise InputError(
                f"data.{field}={printable(value)} is the name of a tensor, but data.path={printable(spec.path)} has "
                f".npy files, whose arrays have no names; {todo}"
            )


def facts_of(spec: LatentsData, name: str) -> FileFacts:
    """Reads the header of a file, and its labels. InputError if it cannot be used."""
    found = dict(arrays(Path(spec.path, name)))
    array = _array(spec, found, Path(spec.path, name))
    shape, count = _sample_shape(spec, array)
    if spec.mirrored_key is not None:
        mirrored = _named(found, spec.mirrored_key, "mirrored_key", Path(spec.path, name))
        if mirrored.shape != array.shape:
            raise InputError(
                f"{mirrored.shown} has shape {list(mirrored.shape)}, but {one_line(array.name)} "
                f"{list(array.shape)}; data.mirrored_key needs a mirrored one for each sample"
            )
        _refuse_numbers(mirrored)
    labels = None
    if spec.labels is not None and spec.label_file is None:
        labels = _ids(_named(found, spec.labels, "labels", Path(spec.path, name)), count)
    return FileFacts(shape, array.name, count, labels)


def _array(spec: LatentsData, found: dict[str, MappedArray], path: Path) -> MappedArray:
    """The array of the samples."""
    if spec.key is not None:
        return _named(found, spec.key, "key", path)
    others = [name for name in found if name not in (spec.mirrored_key, spec.labels)]
    if len(others) == 1:
        return found[others[0]]
    if "latents" in found:
        return found["latents"]
    names = one_line(", ".join(sorted(found)) or "none")
    raise InputError(f"{printable(str(path))} has the tensors {names}; name the latents in data.key")


def _named(found: dict[str, MappedArray], name: str, field: str, path: Path) -> MappedArray:
    if name not in found:
        raise InputError(
            f"data.{field}={one_line(name)}: {printable(str(path))} has no such tensor; valid: "
            f"{one_line(', '.join(sorted(found)) or 'none')}"
        )
    return found[name]


def _sample_shape(spec: LatentsData, array: MappedArray) -> tuple[tuple[int, ...], int]:
    """The stored shape of one sample, and the number of samples. InputError if the array is of another kind."""
    _refuse_numbers(array)
    dims = len(array.shape)
    one = spec.one_per_file if spec.one_per_file is not None else dims in (1, 3)
    if dims not in (ONE if one else MANY):
        valid = "[C, h, w], [C, F, h, w] or [d]" if one else "[N, C, h, w], [N, C, F, h, w] or [N, d]"
        which = "" if spec.one_per_file is None else f" with data.one_per_file: {str(one).lower()}"
        raise InputError(f"{array.shown} has shape {list(array.shape)}; valid{which}: {valid}")
    shape, count = (array.shape, 1) if one else (array.shape[1:], array.shape[0])
    if 0 in shape:
        raise InputError(f"{array.shown} has samples of shape {list(shape)}, which are empty; make it again")
    if spec.moments and shape[0] % 2:
        raise InputError(
            f"{array.shown} has samples of shape {list(shape)}; with data.moments: true, half of the channels is the "
            f"mean and half the log variance, so their number must be even"
        )
    if not one and not array.by_rows:
        raise InputError(
            f"{array.shown} is in Fortran order, so that reading one sample would read the whole file; save it with "
            "np.save(FILE, np.ascontiguousarray(ARRAY))"
        )
    return shape, count


def _refuse_numbers(array: MappedArray) -> None:
    if not array.dtype.is_floating_point:
        raise InputError(
            f"{array.shown} has the data type {str(array.dtype)[6:]}; latents are float16, bfloat16, float32 or float64"
        )


def labels_of_file(spec: LatentsData, samples: int) -> NDArray[np.int64] | None:
    """The class ids [samples] of the .npy file that the spec names; None if it names none."""
    if spec.label_file is None:
        return None
    return _ids(arrays(Path(spec.label_file))[""], samples)


def _ids(array: MappedArray, samples: int) -> NDArray[np.int64]:
    """InputError unless an array has one whole number for each sample."""
    if array.dtype not in WHOLE_NUMBERS:
        raise InputError(f"{array.shown} has the data type {str(array.dtype)[6:]}; class ids are whole numbers")
    if array.shape != (samples,) and not (samples == 1 and array.shape == ()):
        raise InputError(
            f"{array.shown} has shape {list(array.shape)}, but there are {samples} samples; give one class id for each "
            f"sample, in the order of the files: [{samples}]"
        )
    return array.whole().reshape(-1).to(torch.int64).numpy()
