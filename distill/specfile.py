"""A run spec as a YAML file: read strictly, explained when wrong, written so that it reads back the same.

YAML here is version 1.2's core: 1e-3 is a number, yes and on are words, 012 is twelve, a key stands once.
"""

import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError

from distill import overrides, schema
from distill.guard import InputError
from distill.overrides import Override
from distill.spec import CheckpointTeacher, HfData, ImagesData, RunSpec
from distill.store import RunPaths

_SCALARS = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
]


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """Safe, and a key that stands twice is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                _refuse(key, f"key '{key.value}' stands twice")
            seen.add(str(key.value))
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what the loader would take for something else than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _whole(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, f"line {node.start_mark.line + 1}: {problem}")


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float | int:
    value = float(node.value.replace("_", ""))
    if math.isinf(value):
        _refuse(node, f"{node.value} is too large for a number")
    return int(value) if value.is_integer() and "." not in node.value else value  # 1e6 images are a whole number


for _tag, _pattern, _first in _SCALARS:
    for _user in (_Loader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


@dataclass(frozen=True)
class SpecSource:
    """A validated spec and where it came from."""

    spec: RunSpec
    base: Path
    """the folder that ./recipe.py and relative paths are looked up in"""
    source: str
    """as messages name it"""


def parse(text: str, source: str) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """The content of a YAML text; InputError with the line of the mistake."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"{source}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise InputError(f"{source}: not YAML:{where} {error.problem or error.context}") from None
    except yaml.YAMLError as error:  # e.g. a control character
        raise InputError(f"{source}: not YAML: {str(error).splitlines()[0]}") from None


def dump(content: Any) -> str:  # noqa: ANN401
    """YAML that `parse` reads back to the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def dump_line(content: Any) -> str:  # noqa: ANN401
    """The same on one line."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=float("inf"), default_flow_style=True).strip()


def change_from(text: str) -> Override:
    """An override from its text `a.b=c`."""
    path, equals, value = text.partition("=")
    if not equals or "" in path.split("."):
        raise InputError(f"'{text}' is not a change of the spec; write path=value, like stages.teach.images=64000")
    return Override(text, path.split("."), parse(value, text))


def read_text(path: Path) -> str:
    """A text file that a user named."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8); a spec is a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def validate(content: Any, source: str) -> RunSpec:  # noqa: ANN401
    """Content as a RunSpec, types taken strictly; InputError with one line per mistake."""
    if content is None:
        raise InputError(f"{source}: empty; `distill init` lists the presets to begin with")
    if not isinstance(content, dict):
        raise InputError(f"{source}: holds {schema.show(content)}, not a spec; a spec has name and stages")
    try:
        text = json.dumps(content)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{source}: a spec holds text, numbers, lists and mappings only, none inside itself") from None
    odd = [key for key in _keys(content) if not isinstance(key, str)]
    if odd:
        raise InputError(f"{source}: key {schema.show(odd[0])} is not text; write it in quotes")
    try:
        return RunSpec.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(join(source, schema.explain(error, RunSpec, content))) from None


def join(source: str, mistakes: Sequence[str]) -> str:
    """One message of one or several mistakes."""
    if len(mistakes) == 1:
        return f"{source}: {mistakes[0]}"
    return "\n  ".join([f"{source}: {len(mistakes)} mistakes", *mistakes])


def load(path: Path, changes: Sequence[str] = (), *, name: str | None = None, source: str | None = None) -> SpecSource:
    """The spec in a file, with overrides `a.b=c` applied and paths made absolute."""
    source = source or str(path)
    content = parse(read_text(path), source)
    if isinstance(content, dict):
        content = overrides.apply(content, [change_from(text) for text in changes])
        if name is not None:
            content["name"] = name
    base = path.parent.absolute()
    return SpecSource(_located(validate(content, source), [base, Path.cwd()]), base, source)


def load_run(run: RunPaths) -> RunSpec:
    """The spec of an existing run."""
    return validate(parse(read_text(run.spec), str(run.spec)), str(run.spec))


def resolved(spec: RunSpec) -> str:
    """The whole spec as YAML, every default written out; reads back to the same spec."""
    return dump(spec.model_dump(mode="json"))


def differences(old: RunSpec, new: RunSpec) -> list[str]:
    """The fields in which two specs differ, with both values: "stages.teach.images: 100 -> 200"."""
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


def _keys(content: object) -> list[object]:
    if isinstance(content, dict):
        return [key for k, v in content.items() for key in [k, *_keys(v)]]
    return [key for item in content for key in _keys(item)] if isinstance(content, list) else []


def absolute(path: str, folders: Sequence[Path]) -> str:
    """A path that exists below one of `folders`, absolute; anything else (a hub id, a missing file) as it is."""
    given = Path(path).expanduser()
    return next((str((folder / given).resolve()) for folder in folders if (folder / given).exists()), path)


def _located(spec: RunSpec, folders: Sequence[Path]) -> RunSpec:
    """Paths that exist beside the spec, or in the current folder, made absolute: a run may be resumed anywhere."""
    changed: dict[str, Any] = {}
    if isinstance(spec.teacher, CheckpointTeacher):
        update = {"path": absolute(spec.teacher.path, folders)}
        if spec.teacher.scheduler is not None:
            update["scheduler"] = absolute(spec.teacher.scheduler, folders)
        changed["teacher"] = spec.teacher.model_copy(update=update)
    if isinstance(spec.data, ImagesData | HfData):
        changed["data"] = spec.data.model_copy(update={"path": absolute(spec.data.path, folders)})
    return spec.model_copy(update=changed)
