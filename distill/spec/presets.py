"""The presets, and the output of a spec as commented YAML: every field, its value and its description."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distill.core import yamltext
from distill.core.errors import InputError
from distill.core.text import suggest
from distill.spec import registry, schema
from distill.spec.model import RunSpec

WIDTH = 110


def folder() -> Path:
    """The folder of the presets."""
    return registry.package_folder() / "presets"


def names() -> list[str]:
    """The names of the presets, in alphabetical order."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a preset. InputError if there is no such preset."""
    if name not in names():
        raise InputError(f"there is no preset '{name}'; {suggest(name, names())}")
    return folder() / f"{name}.yaml"


def head(name: str) -> list[str]:
    """The lines of the comment at the top of a preset: the command, a paragraph that says what it makes, and then,
    after an empty line, what else there is to know about it, if there is more.
    """
    lines = []
    for line in yamltext.read(find(name)).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def summary(name: str) -> str:
    """The first paragraph of the comment at the top of a preset."""
    lines = [*head(name)[1:], ""]
    return " ".join(lines[: lines.index("")])


def notes(name: str) -> dict[str, str]:
    """The other comments of a preset, by the path of the field that they belong to, like stages.reflow.optimizer.lr.

    A comment belongs to the field on its line, or else on the next line with a field. Presets are written as YAML
    blocks; a comment on a line with a flow mapping, {a: 1, b: 2}, belongs to its key.
    """
    lines = yamltext.read(find(name)).splitlines()[len(head(name)) :]
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []  # (indent, key) of the fields that contain the current line
    above: list[str] = []
    for line in lines:
        content, _, comment = re.sub(r"(^|\s)#\s?", r"\1\0", line, count=1).partition("\0")
        if (key := re.match(r"( *)([\w.-]+):", content)) is not None:
            indent = len(key[1])
            path = [*((outer, each) for outer, each in path if outer < indent), (indent, key[2])]
            if text := " ".join([*above, comment.strip()]).strip():
                found[".".join(each for _, each in path)] = text
            above = []
        elif comment:
            above.append(comment.strip())
    return found


def annotated(spec: RunSpec, base: Path, notes: Mapping[str, str] | None = None) -> str:
    """A spec as YAML with all fields and defaults, with comments; it reads back as the same spec.

    base: folder of the user's own recipes. notes: further comments on fields, see `notes`.
    """
    return "\n".join(_fields(spec, "", base, _Notes(notes or {}))) + "\n"


class _Notes:
    """Comments on fields, by their path below `at`."""

    def __init__(self, by_path: Mapping[str, str], at: str = "") -> None:
        self.by_path, self.at = by_path, at

    def below(self, name: str) -> "_Notes":
        return _Notes(self.by_path, f"{self.at}{name}.")

    def lines(self, name: str, indent: str) -> list[str]:
        """The comment on a field, as lines of YAML."""
        text = self.by_path.get(f"{self.at}{name}")
        return [] if text is None else _comment(text, indent)


def _fields(model: BaseModel, indent: str, base: Path, notes: _Notes) -> list[str]:
    lines = []
    for name, field in type(model).model_fields.items():
        value: object = dict(model)[name]
        if name != "kind":
            lines += notes.lines(name, indent)
        below = notes.below(name)
        meaning = _with_choices(" ".join((field.description or "").split()), schema.choices(field))
        if name == "options" and isinstance(value, dict):
            lines += _options(value, str(dict(model)["recipe"]), indent, base, below)
        elif isinstance(value, BaseModel):
            lines += _comment(meaning or (type(value).__doc__ or ""), indent)
            kinds = _kind(field.annotation, value, indent)
            lines += [f"{indent}{name}:", *kinds, *_fields(value, indent + "  ", base, below)]
        elif name == "kind":
            continue
        elif isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
            lines += ["", *_comment(meaning, indent), f"{indent}{name}:"]
            for key, item in value.items():
                if isinstance(item, BaseModel):
                    lines += ["", *_comment(type(item).__doc__ or "", indent + "  "), *below.lines(key, indent + "  ")]
                    kinds = _kind(schema.value_type(field.annotation, dict), item, indent + "  ")
                    inside = _fields(item, indent + "    ", base, below.below(key))
                    lines += [f"{indent}  {_plain(key)}:", *kinds, *inside]
        else:
            lines += _line(f"{indent}{name}: {_plain(model.model_dump(mode='json')[name])}", meaning, indent)
    return lines


def _kind(annotation: schema.Annotation, value: BaseModel, indent: str) -> list[str]:
    """The line `kind: ...` that selects a model in its union, with a comment that lists the other kinds."""
    kinds = [str(schema.kind_of(model)) for model in schema.models(annotation)]
    kind = schema.kind_of(type(value))
    return [] if kind is None else _line(f"{indent}  kind: {kind}", _with_choices("", kinds), indent + "  ")


def _with_choices(meaning: str, choices: Sequence[str]) -> str:
    words = f"one of {', '.join(choices)}" if len(choices) > 1 else ""
    return "; ".join(part for part in (meaning, words) if part)


def _options(given: Mapping[str, Any], recipe: str, indent: str, base: Path, notes: _Notes) -> list[str]:
    """The options of a recipe: the given ones, then the others as comments with their defaults."""
    meanings = {option.name: option for option in registry.describe(recipe, base).options}
    lines = [f"{indent}options:"]
    if not given:
        lines = _line(f"{indent}options: {{}}", "recipe options; to set one, remove {} and the # before it", indent)
    for name, value in given.items():
        meaning = meanings[name].meaning if name in meanings else ""
        lines += [
            *notes.lines(name, indent + "  "),
            *_line(f"{indent}  {name}: {_plain(value)}", meaning, indent + "  "),
        ]
    for option in meanings.values():
        if option.name not in given:
            default = _plain(option.default)
            lines += _line(
                f"{indent}  # {option.name}: {default}", _with_choices(option.meaning, option.choices), indent + "  "
            )
    return lines


def _plain(value: object) -> str:
    """A value as YAML on one line."""
    text = yamltext.dump_line(value)
    return text.removesuffix("...").strip()


def _line(line: str, meaning: str, indent: str) -> list[str]:
    """A field with its description as a comment: at the end of the line, or above it if that would be too long."""
    if not meaning:
        return [line]
    beside = f"{line:<38}  # {meaning}"
    return [beside] if len(beside) <= WIDTH else [*_comment(meaning, indent), line]


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False)]
