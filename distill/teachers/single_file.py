"""Loads a network from a single file, in the layout of its original authors or in that of diffusers.

diffusers converts the names and shapes of the weights, as in `from_single_file`. No config is ever downloaded: it is
that of a folder. The weights are then checked and loaded like those of a folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.loaders import single_file_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.core.errors import InputError
from distill.teachers import weights
from distill.teachers.read import Config, short, unreadable

# Files of whole pipelines also contain other networks, under names that begin like this.
OTHERS = (
    "vae.",
    "audio_vae.",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "text_encoder",
    "text_model.",
    "vocoder.",
)
CONVERSION = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError)  # errors of diffusers


def network(
    file: Path, folder: Path, config: Config, network_class: type[ModelMixin], dtype: torch.dtype
) -> tuple[ModelMixin, list[str]]:
    """Loads a network on the CPU from a file. Returns it with the SHA-256 of the file.

    config: the validated config.json of `folder`. dtype: see `weights.network`. Raises InputError if diffusers cannot
    convert files of this network, or if the file does not fit the config.
    """
    convert = _conversion(file, network_class)
    for each in weights.stored([file]):
        if each.dtype not in weights.WHOLE_NUMBERS:
            weights.refuse_quantized(file, each.name, each.dtype)
    shapes = weights.shapes(folder, config, network_class)
    made = weights.unfilled(folder, config, network_class, dtype)
    computed = {name for name, _ in made.named_buffers()}  # these may be missing
    try:
        tensors = dict(load_file(file))
        digest = weights.digest_of(file)
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise weights.damaged(file, error) from error
    if tensors.keys() != shapes.keys():
        tensors = _converted(file, tensors, config, network_class, convert)
    _check(file, folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes, computed)
    broken = [name for name in shapes if name in tensors and not weights.place(made, name, tensors.pop(name), dtype)]
    if broken:
        raise weights.not_finite(file, broken, dtype)
    return made, [digest]


def _conversion(file: Path, network_class: type[ModelMixin]) -> Callable[..., dict[str, Tensor]]:
    """diffusers' function that converts the weights of a single file. InputError if there is none for this class."""
    name = single_file_model._get_single_file_loadable_mapping_class(network_class)
    if name is None:
        raise InputError(
            f"teacher.path={file}: a {network_class.__name__} cannot be read from a single file; save it with "
            "save_pretrained and give that folder"
        )
    found: Callable[..., dict[str, Tensor]] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name][
        "checkpoint_mapping_fn"
    ]
    return found


def _converted(
    file: Path,
    tensors: dict[str, Tensor],
    config: Config,
    network_class: type[ModelMixin],
    convert: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    try:
        return convert(checkpoint=tensors, config=dict(config))
    except CONVERSION as error:
        raise InputError(
            f"teacher.path={file} is not a file of a {network_class.__name__} like the one of teacher.config, or is in "
            f"an unknown layout ({type(error).__name__}: {short(str(error))}); give a folder in diffusers' format"
        ) from error


def _check(
    file: Path,
    folder: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    computed: set[str],
) -> None:
    """InputError if weights are missing or unknown, or have a wrong shape. computed: names that may be missing."""
    wrong = {
        "missing weights": [name for name in expected if name not in found and name not in computed],
        "unknown weights": [name for name in found if name not in expected and not name.startswith(OTHERS)],
    }
    for what, names in wrong.items():
        if names:
            raise InputError(
                f"{file} does not match config.json of teacher.config={folder}: {what}: {weights.some(names)}"
            )
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            raise InputError(
                f"{file} does not match config.json of teacher.config={folder}: {short(name)} has shape {list(shape)} "
                f"in the file, but config.json implies {list(expected[name])}"
            )
