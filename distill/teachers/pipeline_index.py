"""model_index.json: the components and options of a pipeline of diffusers."""

from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from distill.teachers.read import Config

NOTHING = [None, None]  # in place of the library and class of a component that is not there


def class_of(name: str) -> type[DiffusionPipeline] | None:
    """The pipeline class of this name in diffusers; None if there is none."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def components_of(pipeline: type[DiffusionPipeline]) -> dict[str, bool]:
    """The components of a pipeline class, and whether each is needed; the others may be left out."""
    return {
        name: each.default is Parameter.empty and name not in pipeline._optional_components
        for name, each in signature(pipeline).parameters.items()
        if each.default is Parameter.empty or name in pipeline._optional_components
    }


def options_of(name: str, index: Config) -> Config:
    """The options in a model_index.json that the pipeline class of this name takes, besides its components."""
    pipeline = class_of(name)
    known = () if pipeline is None else signature(pipeline).parameters.keys() - components_of(pipeline).keys()
    return {key: index[key] for key in sorted(known) if key in index}


def index_of(name: str, components: Mapping[str, list[str]], options: Mapping[str, Any]) -> Config:
    """The content of model_index.json of the pipeline class of this name.

    components: library and class of each. The further ones of the class are listed as missing, so that
    `from_pretrained` takes them as arguments, as `vae=...`.
    """
    pipeline = class_of(name)
    known = () if pipeline is None else components_of(pipeline)
    return {
        "_class_name": name,
        "_diffusers_version": diffusers.__version__,
        **dict.fromkeys(known, NOTHING),
        **options,
        **components,
    }
