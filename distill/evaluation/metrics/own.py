"""Metrics of the user: a function of images and their prompts, which a spec names as module:function.

    def brightness(images, prompts):
        return images.mean((1, 2, 3))

images: [B, 3, H, W] float32 in [-1, 1], on the device of the evaluation. prompts: B texts; of networks with classes,
the class ids as text; of others, empty. It returns one score for each image, [B], or features of each, [B, D]. Of
scores, the mean or the median is shown. Features are compared with those of real images.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from torch import Tensor

from distill.core.errors import InputError, RunError
from distill.core.importing import Importing
from distill.core.text import suggest

MOST_FEATURES = 4096


@dataclass(frozen=True)
class OwnMetric:
    """A function of the user. name: of its columns in tables. digest: SHA-256 of the file with the function."""

    name: str
    statistic: Literal["mean", "median"]
    function: Callable[[Tensor, Sequence[str]], Tensor]
    digest: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, C, H, W] -> [B] scores or [B, D] features, on the CPU. RunError if they are something else."""
        found: object = self.function(images, prompts)
        if isinstance(found, Tensor):
            fits = found.ndim in (1, 2) and len(found) == len(images) and found.is_floating_point()
            values = found.detach().float().cpu()
            if fits and values.ndim == 2 and values.shape[1] > MOST_FEATURES:
                raise RunError(
                    f"the metric {self.name} returned {values.shape[1]:,} features for each image; at most "
                    f"{MOST_FEATURES:,} can be compared, since the time grows with the third power of their number"
                )
            if fits and bool(values.isfinite().all()):
                return values
            what = f"a tensor {list(found.shape)} {str(found.dtype).removeprefix('torch.')}"
            what += " with NaN or infinity" if fits else ""
        else:
            what = f"a {type(found).__name__}"
        raise RunError(
            f"the metric {self.name} returned {what} for {len(images)} images; it must return finite floating-point "
            f"numbers, a tensor [{len(images)}] or [{len(images)}, D]"
        )


def _find(name: str) -> ModuleSpec | None:
    """Where a module is; None if it, or a package that should contain it, is not installed."""
    try:
        return find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def load(asked: str, medians: Sequence[str] = ()) -> OwnMetric:
    """Imports module:function. InputError if the module cannot be imported, or has no such function.

    medians: those of whose scores the median is shown.
    """
    module_name, _, name = asked.partition(":")
    what = f"metrics: {asked}"
    with Importing(what, Path(f"{module_name.replace('.', '/')}.py")):
        found = _find(module_name)
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise InputError(
            f"{what}: there is no file of a module {module_name}; install it, or put its folder into the environment "
            "variable PYTHONPATH"
        )
    path = Path(found.origin)
    with Importing(what, path):
        module = importlib.import_module(module_name)
    function = vars(module).get(name)
    if not callable(function):
        functions = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise InputError(f"{what}: {path} has no function {name}; {suggest(name, functions)}")
    return OwnMetric(name, "median" if asked in medians else "mean", function, sha256(path.read_bytes()).hexdigest())
