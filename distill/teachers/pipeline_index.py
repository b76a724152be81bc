"""model_index.json: the components and options of a pipeline of diffusers."""

import importlib.util
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from distill.core.errors import InputError
from distill.exchange import own_code
from distill.teachers import layout, schedulers
from distill.teachers.by_id import ENCODERS
from distill.teachers.read import Config, components, parse, short

LIBRARIES = ("diffusers", "transformers")
NOTHING = [None, None]  # in place of the library and class of a component that is not there


def class_of(name: str) -> type[DiffusionPipeline] | None:
    """The pipeline class of this name in diffusers; None if there is none."""
    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def components_of(pipeline: type[DiffusionPipeline]) -> dict[str, bool]:
    """The components of a pipeline class, and whether each is needed for prompts and pixels."""
    optional = {name for name in pipeline._optional_components if not name.startswith(ENCODERS)}
    return {
        name: each.default is Parameter.empty and name not in optional
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


@contextmanager
def without_code(folder: Path) -> Iterator[Path]:
    """Context manager: the folder of a pipeline, or if it is a student with code of ours: a temporary one without.

    That has the stock pipeline class, the scheduler of the student's teacher, and links to the other components.
    """
    index = parse(folder / layout.INDEX)
    own = {name for name, entry in own_code.COMPONENTS.items() if index.get(name) == list(entry)}
    if not own and isinstance(index.get("_class_name"), str):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="distill-") as temporary:
        new = Path(temporary)
        found = {name: value for name, value in index.items() if name not in own}
        found["_class_name"] = own_code.stock_class(index.get("_class_name"))
        for name in components(folder / layout.INDEX):
            if name not in own:
                (new / name).symlink_to((folder / name).absolute())
        if "scheduler" in own:
            teacher = schedulers.described(folder / "scheduler" / layout.SCHEDULER)
            found["scheduler"] = ["diffusers", teacher.get("_class_name")]
            (new / "scheduler").mkdir()
            (new / "scheduler" / layout.SCHEDULER).write_text(json.dumps(teacher))
        (new / layout.INDEX).write_text(json.dumps(found))
        yield new


def refuse_code(folder: Path, library: str, class_name: str) -> None:
    """InputError if the component of a pipeline in this folder has code of its own. library, class_name: its entry."""
    module = f"diffusers.pipelines.{library}"
    ours = library in LIBRARIES or (library.isidentifier() and importlib.util.find_spec(module) is not None)
    if not ours or any(folder.glob("*.py")):
        raise InputError(
            f"{folder.parent}: its {short(folder.name)} is a {short(class_name)} of {short(library)} with code of its "
            f"own, which is not run; valid: classes of {' and '.join(LIBRARIES)}"
        )
