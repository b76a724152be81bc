"""The text encoders and tokenizers in the folder of a pipeline: which files they are, and their digest.

No text encoder is loaded here, and the library that could load them is not imported.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.core import file_checksums
from distill.core.errors import InputError
from distill.spec.model import CheckpointTeacher
from distill.teachers import files
from distill.teachers.by_id import ENCODER_FILES as READ
from distill.teachers.by_id import ENCODER_WEIGHTS as WEIGHTS
from distill.teachers.by_id import ENCODERS as LOADED
from distill.teachers.convention import Convention
from distill.teachers.describe import Facts, describe
from distill.teachers.files import Parts
from distill.teachers.layout import CONFIG
from distill.teachers.read import lasting, parse, unreadable

INDEX_OF_WEIGHTS = ".safetensors.index."


@dataclass(frozen=True)
class EncoderFiles:
    """Text encoders and tokenizers: their folders in the folder of a pipeline, and the variant of their weights."""

    pipeline: Path
    names: Sequence[str]
    variant: str | None

    @classmethod
    def of(cls, spec: CheckpointTeacher, parts: Parts, facts: Facts) -> "EncoderFiles":
        """InputError if the network is not conditioned on prompts, or if the checkpoint has no text encoder."""
        convention = facts.architecture
        if not isinstance(convention, Convention) or not convention.fields(facts.content):
            raise InputError(f"{facts.path}: this network is not conditioned on prompts, so there is nothing to encode")
        names = [name for name in parts.components if name.startswith(LOADED)]
        if parts.pipeline is None or not any(name.startswith(LOADED[0]) for name in names):
            raise InputError(
                f"teacher.path={spec.path} has no text encoder; give the folder of a whole pipeline "
                f"({', '.join(convention.pipelines)}) with its text encoders and tokenizers"
            )
        for name in names:
            if not (parts.pipeline / name).is_dir():
                how = f": hf download {spec.path}" if spec.is_of_hub else ""
                raise InputError(f"{parts.pipeline} has no folder {name}; copy or download the whole pipeline{how}")
        return cls(parts.pipeline, names, _variant(parts.pipeline, names, spec.variant))

    @property
    def digest(self) -> str:
        """SHA-256 over the configs and weights of the text encoders, and over the files of the tokenizers.

        Names of weights do not count. Files are read if they have not been read before in this process. InputError if
        one cannot be read, or if a text encoder has no weights.
        """
        found: list[tuple[str, object]] = []
        for name in self.names:
            folder = self.pipeline / name
            for path in sorted(folder.iterdir()):
                if name.startswith(LOADED[0]) and path.name == CONFIG:
                    found.append((f"{name}/{path.name}", lasting(parse(path))))
                elif path.suffix in READ and INDEX_OF_WEIGHTS not in path.name and path.is_file():
                    found.append((f"{name}/{path.name}", _digest_of(path)))
            if name.startswith(LOADED[0]):
                found += [(f"{name} weights", _digest_of(path)) for path in self._weights(folder)]
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    @property
    def paths(self) -> list[Path]:
        """The files with the weights of the text encoders. InputError if one has none."""
        return [
            path for name in self.names if name.startswith(LOADED[0]) for path in self._weights(self.pipeline / name)
        ]

    def _weights(self, folder: Path) -> list[Path]:
        """The files with weights of the variant, or of none if the folder has no such variant."""
        found = {path: match["variant"] for path in folder.iterdir() if (match := WEIGHTS.fullmatch(path.name))}
        chosen = self.variant if self.variant in found.values() else None
        files = sorted(path for path, variant in found.items() if variant == chosen)
        if not files:
            raise InputError(f"{folder} has no weights (model.safetensors); copy or download the whole pipeline")
        return files


def find(spec: CheckpointTeacher) -> EncoderFiles:
    """The text encoders of a teacher's pipeline. InputError if there are none."""
    parts = files.find(spec, download=False, encoders=True)
    return EncoderFiles.of(spec, parts, describe(spec, parts, parts.student.kind))


def digest(spec: CheckpointTeacher) -> str:
    """The digest of the text encoders of a teacher's pipeline. InputError if there are none."""
    return find(spec).digest


def refuse_other(spec: CheckpointTeacher, encoder: str | None) -> None:
    """InputError if the conditions of a spec were made by other text encoders than those in the teacher's folder.

    encoder: digest of the text encoders that made them. Nothing is checked if it is not known, or if the teacher's
    folder has no text encoders.
    """
    if encoder is None:
        return
    try:
        ours = find(spec)
        found = ours.digest
    except InputError:
        return
    if found != encoder:
        raise InputError(
            f"teacher.conditions={spec.conditions} was made by other text encoders (digest {encoder[:12]}) than those "
            f"in {ours.pipeline} ({found[:12]}); make it again with this teacher, e.g. distill encode {spec.path} "
            "PROMPTS.txt"
        )


def _digest_of(path: Path) -> str:
    try:
        return file_checksums.sha256(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _variant(pipeline: Path, names: Sequence[str], wanted: str | None) -> str | None:
    """The variant of the weights: the wanted one, or any if a text encoder has none without a variant."""
    for name in names:
        found = [match for path in (pipeline / name).iterdir() if (match := WEIGHTS.fullmatch(path.name)) is not None]
        variants = [match["variant"] for match in found]
        if variants and (wanted in variants or None not in variants):
            return wanted if wanted in variants else min(filter(None, variants))
    return None
