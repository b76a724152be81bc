"""Encodes prompts by the text encoders of a teacher's pipeline. Its network is not loaded."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from distill.core.errors import InputError
from distill.flow.conditioning import HeldRows
from distill.spec.model import CheckpointTeacher
from distill.teachers import conditions, files, pipeline_index, quiet, weights
from distill.teachers.conditions import ConditionFile
from distill.teachers.convention import Asked, Convention
from distill.teachers.describe import Facts, describe
from distill.teachers.encoder_files import EncoderFiles
from distill.teachers.layout import INDEX
from distill.teachers.read import Config, parse, short

BATCH = 8  # prompts that `write` encodes together


@dataclass(frozen=True)
class UnloadedNetwork:
    """In place of the network: some pipelines read its config for the embeddings of a text encoder that is missing."""

    config: Config
    dtype: torch.dtype


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a pipeline, in a pipeline without network and autoencoder.

    digest: of their files; empty if it was not asked for.
    """

    pipeline: DiffusionPipeline
    convention: Convention
    facts: Facts
    digest: str = ""

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
        parts = [self.null(negative)]
        begun((len(prompts) + 1) * sum(each.nbytes for each in parts[0].values()))
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            parts.append(self.rows(some))
            done(start + len(some))
        joined = joined_rows(parts)
        for name, each in joined.items():
            if each.is_floating_point() and not each.isfinite().all():
                raise InputError(
                    f"{name}: the text encoders return NaN or infinity in {self.pipeline.dtype}; use --dtype float32"
                )
        rows, null = ({name: each[part] for name, each in joined.items()} for part in (slice(1, None), slice(1)))
        self.check(rows, null)
        return rows, null

    @torch.no_grad()
    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """A row of conditions for each prompt, [n, ...] by field, on the CPU, as long as the longest of them."""
        return self._moved(self.convention.encode(self.pipeline, list(prompts)), len(prompts))

    @torch.no_grad()
    def null(self, negative: str) -> dict[str, Tensor]:
        """The row of the unconditional call, or of a negative prompt: [1, ...] by field, on the CPU."""
        return self._moved(self.convention.encode_null(self.pipeline, negative), 1)

    def check(self, rows: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> None:
        """InputError if rows do not fit the network."""
        asked = Asked(self.facts.size)
        ConditionFile(self.facts.path.parent, HeldRows(rows), null, "").check(
            self.convention.fields(self.facts.content), self.convention.constants(self.facts.content, asked)
        )

    def _moved(self, found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
        """The rows on the CPU, in the data types that the network takes."""
        assert all(len(each) == count for each in found.values()), "a convention encodes one row per prompt"
        wanted = {name: field.dtype for name, field in self.convention.fields(self.facts.content).items()}
        return {name: each.to("cpu", wanted.get(name, each.dtype)) for name, each in found.items()}


def joined_rows(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows [n_i, ...] by field as one tensor for each field, with zeros at the ends of the shorter ones."""
    return {name: torch.cat(_of_one_shape([part[name] for part in parts])) for name in parts[0]}


def check(spec: CheckpointTeacher) -> tuple[Facts, EncoderFiles]:
    """The facts of a network, and its text encoders.

    InputError if it has no text encoder, or one with code of its own. None is loaded.
    """
    parts = files.find(spec, download=False, encoders=True)
    facts = describe(spec, parts, parts.student.kind)
    found = EncoderFiles.of(spec, parts, facts)
    index = parse(found.pipeline / INDEX)
    for name in found.names:
        pipeline_index.refuse_code(found.pipeline / name, *index[name])
    return facts, found


def write(spec: CheckpointTeacher, prompts: Sequence[str], path: Path, device: torch.device) -> None:
    """Writes the conditions of prompts to a file, for a use at once: the digest of the encoders is not in it.

    The encoders compute in the data type of the teacher, and their memory is free again when this returns. InputError
    as `load` and `TextEncoders.encode` raise it.
    """
    encoders = load(spec, device, getattr(torch, spec.dtype), identify=False)
    rows, null = encoders.encode(prompts, "", BATCH, lambda done: None)
    conditions.write(path, rows, null, prompts=prompts)
    encoders.pipeline.to("cpu")
    del encoders
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def load(spec: CheckpointTeacher, device: torch.device, dtype: torch.dtype, *, identify: bool = True) -> TextEncoders:
    """Loads tokenizers and text encoders of a pipeline folder by its class in diffusers.

    Only safetensors files are loaded, and no code from the folder is run. InputError if the pipeline has no text
    encoder, or if one cannot be loaded.

    identify: compute the digest of their files, for which all of them are read once more.
    """
    facts, found = check(spec)
    parts = files.find(spec, download=False, encoders=True)
    convention, loaded = facts.architecture, found.names
    assert isinstance(convention, Convention) and parts.pipeline is not None, "check refuses others"
    kept = [*loaded, *({"scheduler"} & set(parts.components))]
    pipeline_class = getattr(diffusers, parts.pipeline_class or convention.pipeline_of(facts.content))
    needed = [each.name for each in signature(pipeline_class).parameters.values() if each.default is Parameter.empty]
    left_out = {name: None for name in (*needed, *parts.components) if name not in kept}
    try:
        with quiet.without_bars(), pipeline_index.without_code(parts.pipeline) as folder:
            pipeline = pipeline_class.from_pretrained(
                folder,
                dtype=dtype,
                variant=found.variant,
                use_safetensors=True,
                local_files_only=True,
                **left_out,
            )
    except (OSError, ValueError, ImportError, AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise InputError(
            f"the text encoders of {parts.pipeline} cannot be loaded: {short(str(error), 300)}; copy or download the "
            "pipeline again"
        ) from error
    pipeline.to(device)
    network = weights.without_weights(parts.model, facts.content, facts.network_class)
    setattr(pipeline, parts.model.name, UnloadedNetwork(network.config, dtype))
    return TextEncoders(pipeline, convention, facts, found.digest if identify else "")


def _of_one_shape(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors [B_i, ...] with zeros at the ends of all dimensions but the first, so that their rows have one shape."""
    shape = [max(sides) for sides in zip(*(each.shape[1:] for each in tensors), strict=True)]
    padded = []
    for each in tensors:
        missing = [most - side for most, side in zip(shape, each.shape[1:], strict=True)]
        padded.append(torch.nn.functional.pad(each, [n for side in reversed(missing) for n in (0, side)]))
    return padded
