"""Encodes prompts by the text encoders of a teacher's pipeline, for `distill encode`. Its network is not loaded."""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from distill.core.errors import InputError
from distill.flow.conditioning import HeldRows
from distill.spec.model import CheckpointTeacher
from distill.teachers import files, weights
from distill.teachers.conditions import ConditionFile
from distill.teachers.convention import Asked, Convention
from distill.teachers.describe import Facts, describe
from distill.teachers.layout import INDEX
from distill.teachers.read import Config, parse, short

LOADED = ("text_encoder", "tokenizer")  # what the names of the components begin with that are loaded
LIBRARIES = ("diffusers", "transformers")
WEIGHTS = re.compile(r"model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class UnloadedNetwork:
    """In place of the network: some pipelines read its config for the embeddings of a text encoder that is missing."""

    config: Config
    dtype: torch.dtype


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a pipeline, in a pipeline without network and autoencoder."""

    pipeline: DiffusionPipeline
    convention: Convention
    facts: Facts

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        negative: str,
        batch: int,
        done: Callable[[int], None],
        begun: Callable[[int], None] = lambda size: None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(a row of conditions for each prompt, the row of the unconditional call). All rows have one shape.

        done: called with the number of prompts that are encoded. begun: called before the first of them, with about the
        number of bytes of all rows; it is larger if prompts have more tokens than the unconditional call. InputError if
        the rows do not fit the network.
        """
        parts = [self._moved(self.convention.encode_null(self.pipeline, negative), 1)]
        begun((len(prompts) + 1) * sum(each.nbytes for each in parts[0].values()))
        for start in range(0, len(prompts), batch):
            some = list(prompts[start : start + batch])
            parts.append(self._moved(self.convention.encode(self.pipeline, some), len(some)))
            done(start + len(some))
        joined = {name: torch.cat(_of_one_shape([part[name] for part in parts])) for name in parts[0]}
        for name, each in joined.items():
            if each.is_floating_point() and not each.isfinite().all():
                raise InputError(
                    f"{name}: the text encoders return NaN or infinity in {self.pipeline.dtype}; use --dtype float32"
                )
        rows, null = ({name: each[part] for name, each in joined.items()} for part in (slice(1, None), slice(1)))
        asked = Asked(self.facts.size)
        ConditionFile(self.facts.path.parent, HeldRows(rows), null, "").check(
            self.convention.fields(self.facts.content), self.convention.constants(self.facts.content, asked)
        )
        return rows, null

    def _moved(self, found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The rows on the CPU, in the data types that the network takes."""
        assert all(len(each) == count for each in found.values()), "a convention encodes one row per prompt"
        wanted = {name: field.dtype for name, field in self.convention.fields(self.facts.content).items()}
        return {name: each.to("cpu", wanted.get(name, each.dtype)) for name, each in found.items()}


def load(spec: CheckpointTeacher, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """Loads tokenizers and text encoders of a pipeline folder by its class in diffusers.

    Only safetensors files are loaded, and no code from the folder is run. InputError if the pipeline has no text
    encoder, or if one cannot be loaded.
    """
    parts = files.find(spec, download=False)
    facts = describe(spec, parts, "velocity")
    convention = facts.architecture
    if not isinstance(convention, Convention) or not convention.fields(facts.content):
        raise InputError(f"{facts.path}: this network is not conditioned on prompts, so there is nothing to encode")
    loaded = [name for name in parts.components if name.startswith(LOADED)]
    if parts.pipeline is None or not any(name.startswith(LOADED[0]) for name in loaded):
        raise InputError(
            f"teacher.path={spec.path} has no text encoder; give the folder of a whole pipeline "
            f"({', '.join(convention.pipelines)}) with its text encoders and tokenizers"
        )
    index = parse(parts.pipeline / INDEX)
    for name in loaded:
        _refuse(spec, parts.pipeline, name, *index[name])
    kept = [*loaded, *({"scheduler"} & set(parts.components))]
    pipeline_class = getattr(diffusers, parts.pipeline_class or convention.pipeline_of(facts.content))
    variant = _variant(parts.pipeline, loaded, spec.variant)
    needed = [each.name for each in signature(pipeline_class).parameters.values() if each.default is Parameter.empty]
    left_out = {name: None for name in (*needed, *parts.components) if name not in kept}
    try:
        with _without_bars():
            pipeline = pipeline_class.from_pretrained(
                parts.pipeline, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True, **left_out
            )
    except (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"the text encoders of {parts.pipeline} cannot be loaded: {short(str(error), 300)}; copy or download the "
            "pipeline again"
        ) from error
    pipeline.to(device)
    network = weights.without_weights(parts.model, facts.content, facts.network_class)
    setattr(pipeline, parts.model.name, UnloadedNetwork(network.config, dtype))
    return TextEncoders(pipeline, convention, facts)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Context manager: the libraries show no progress bars for each component."""
    kinds = (diffusers_logging, transformers_logging)
    for each in kinds:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in kinds:
            each.enable_progress_bar()


def _refuse(spec: CheckpointTeacher, pipeline: Path, name: str, library: str, class_name: str) -> None:
    """InputError if a component is missing, or has code of its own."""
    folder, module = pipeline / name, f"diffusers.pipelines.{library}"
    if not folder.is_dir():
        how = f": hf download {spec.path}" if spec.is_of_hub else ""
        raise InputError(f"{pipeline} has no folder {name}; copy or download the whole pipeline{how}")
    ours = library in LIBRARIES or (library.isidentifier() and importlib.util.find_spec(module) is not None)
    if not ours or any(folder.glob("*.py")):
        raise InputError(
            f"{pipeline}: its {short(name)} is a {short(class_name)} of {short(library)} with code of its own, which "
            f"is not run; valid: classes of {' and '.join(LIBRARIES)}"
        )


def _variant(pipeline: Path, loaded: Sequence[str], wanted: str | None) -> str | None:
    """The variant of the weights: the wanted one, or any if a text encoder has none without a variant."""
    for name in loaded:
        found = [match for path in (pipeline / name).iterdir() if (match := WEIGHTS.fullmatch(path.name)) is not None]
        variants = [match["variant"] for match in found]
        if variants and (wanted in variants or None not in variants):
            return wanted if wanted in variants else variants[0]
    return None


def _of_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B_i, ...] with zeros at the ends of all dimensions but the first, so that their rows have one shape."""
    shape = [max(sides) for sides in zip(*(each.shape[1:] for each in tensors), strict=True)]
    padded = []
    for each in tensors:
        missing = [most - side for most, side in zip(shape, each.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(each, [n for side in reversed(missing) for n in (0, side)]))
    return padded
