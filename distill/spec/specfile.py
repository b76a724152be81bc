"""Reading and writing of spec files: strict validation, clear errors, and output that reads back as the same spec."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.core import yamltext
from distill.core.errors import InputError
from distill.core.text import expanded, is_text, printable, short
from distill.spec import overrides, schema
from distill.spec.model import (
    CacheStage,
    CheckpointTeacher,
    RunSpec,
    Stage,
    TrainStage,
)
from distill.spec.overrides import Override

MOST_SHOWN = 20  # mistakes that one message lists


@dataclass(frozen=True)
class SpecSource:
    """A validated spec and its origin."""

    spec: RunSpec
    base: Path
    """folder of ./recipe.py files and relative paths"""
    source: str
    """name of the file in messages"""


def change_from(text: str) -> Override:
    """Parse an override `a.b=c`. InputError if it is malformed."""
    if not is_text(text):
        raise InputError(
            f"{short(ascii(text))} is not a change of the spec: it contains a control character, or bytes that are not "
            "UTF-8"
        )
    path, equals, value = text.partition("=")
    if not equals or "" in path.split("."):
        raise InputError(
            f"'{short(text)}' is not a change of the spec; write path=value, like stages.teach.images=64000"
        )
    parts = path.split(".")
    if len(parts) > yamltext.MAX_DEPTH:
        raise InputError(
            f"'{short(text)}' is not a change of the spec: its path has {len(parts):,} parts; valid: at most "
            f"{yamltext.MAX_DEPTH}"
        )
    return Override(short(text), parts, yamltext.parse(value, short(text)))


def validate(content: Any, source: str) -> RunSpec:  # noqa: ANN401
    """Validate content strictly as a RunSpec. InputError with one line per mistake."""
    if content is None:
        raise InputError(f"{source}: empty; `distill init` lists the presets to start from")
    if not isinstance(content, dict):
        raise InputError(f"{source}: contains {schema.show(content)}, not a spec; a spec has name and stages")
    teacher = content.get("teacher")
    if isinstance(teacher, dict) and "path" in teacher and "kind" not in teacher:
        content = {**content, "teacher": {"kind": "diffusers", **teacher}}
    try:
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError):
        raise InputError(
            f"{source}: a spec may contain only text, numbers, lists and mappings, and no list or mapping may contain "
            "itself"
        ) from None
    words = list(_words(content))
    odd = [word for _, word in words if not isinstance(word, str)]
    if odd:
        raise InputError(f"{source}: key {schema.show(odd[0])} is not text; write it in quotes")
    if unreadable := [(path, word) for path, word in words if isinstance(word, str) and not is_text(word)]:
        path, word = unreadable[0]
        raise InputError(
            f"{source}: {f'{printable(path)}: ' if path else ''}{short(ascii(word))} contains a control character, or "
            "bytes that are not UTF-8"
        )
    try:
        return RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(join(source, schema.explain(error, RunSpec, content))) from None


def join(source: str, mistakes: Sequence[str]) -> str:
    """One message for one or more mistakes; at most `MOST_SHOWN` are listed."""
    if len(mistakes) == 1:
        return f"{source}: {mistakes[0]}"
    more = [f"and {len(mistakes) - MOST_SHOWN:,} more"] if len(mistakes) > MOST_SHOWN else []
    return "\n  ".join([f"{source}: {len(mistakes):,} mistakes", *mistakes[:MOST_SHOWN], *more])


def load(path: Path, changes: Sequence[str] = (), *, name: str | None = None, source: str | None = None) -> SpecSource:
    """Read a spec file, apply overrides `a.b=c` and make paths absolute. InputError if the result is not valid.

    name: replaces the name of the run. source: name of the file in messages.
    """
    source = source or str(path)
    content = yamltext.parse(yamltext.read(path), source)
    if isinstance(content, dict):
        content = overrides.apply(content, [change_from(text) for text in changes])
        if name is not None:
            content["name"] = name
    base = path.parent.absolute()
    return SpecSource(located(validate(content, source), [base, Path.cwd()]), base, source)


def resolved(spec: RunSpec) -> str:
    """The whole spec as YAML with all defaults; it reads back as the same spec."""
    return yamltext.dump(spec.model_dump(mode="json"))


def differences(old: RunSpec, new: RunSpec) -> list[str]:
    """The fields in which two specs differ, like "stages.teach.images: 100 -> 200"."""
    return [
        f"{path}: {schema.show(before)} -> {schema.show(after)}"
        for path, before, after in _differences("", old.model_dump(mode="json"), new.model_dump(mode="json"))
    ]


def _differences(path: str, old: object, new: object) -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            found += _differences(f"{path}.{key}" if path else str(key), old.get(key), new.get(key))
        return found
    return [] if old == new else [(path, old, new)]


def _words(content: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, key or text) for every key and every text value."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield path, key
            yield from _words(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list):
        for number, item in enumerate(content):
            yield from _words(item, f"{path}.{number}")
    elif isinstance(content, str):
        yield path, content


def absolute(path: str, folders: Sequence[Path], holds: str = "") -> str:
    """The absolute path if `path` exists in one of `folders`; anything else (a hub id, a missing file) is unchanged.

    holds: a path below `path`. Of several folders, the first one that has it is taken; if none has, the first one.
    """
    given = expanded(path)
    places = [folder / given for folder in folders if (folder / given).exists()]
    place = next((each for each in places if os.path.exists(each / holds)), next(iter(places), None))  # noqa: PTH110
    found = path if place is None else str(place.resolve())
    if not is_text(found):
        raise InputError(
            f"{ascii(found)} contains a control character, or bytes that are not UTF-8; rename that folder"
        )
    return found


def located(spec: RunSpec, folders: Sequence[Path]) -> RunSpec:
    """The spec with paths that exist in one of `folders` made absolute, since a run may be resumed from any folder."""
    changed: dict[str, Any] = {"data": spec.data.located(lambda path, holds="": absolute(path, folders, holds))}
    if isinstance(spec.teacher, CheckpointTeacher):
        named = {"path", "scheduler", "conditions", "vae", "config", "lora"}
        paths = spec.teacher.model_dump(include=named, exclude_none=True)
        update = {name: absolute(path, folders) for name, path in paths.items()}
        changed["teacher"] = spec.teacher.model_copy(update=update)
    changed["stages"] = {name: _located_stage(stage, folders) for name, stage in spec.stages.items()}
    return spec.model_copy(update=changed)


def _located_stage(stage: Stage, folders: Sequence[Path]) -> Stage:
    """The stage with absolute paths of its weak model, and of the LoRAs that adapters start from."""
    if isinstance(stage, TrainStage):
        paths = {role: lora.path for role, lora in stage.lora.items() if lora.path is not None}
        changed = {role: {"path": absolute(path, folders)} for role, path in paths.items()}
        lora = {role: each.model_copy(update=changed.get(role, {})) for role, each in stage.lora.items()}
        stage = stage.model_copy(update={"lora": lora})
    if isinstance(stage, CacheStage) or stage.guidance is None or stage.guidance.weak_path is None:
        return stage
    guidance = stage.guidance.model_copy(update={"weak_path": absolute(stage.guidance.weak_path, folders)})
    return stage.model_copy(update={"guidance": guidance})
