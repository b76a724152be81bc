"""YAML text: read strictly, written so that it reads back the same.

It is version 1.2's core: 1e-3 is a number, yes and on are words, 012 is twelve, and a key stands once.
"""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from distill.guard import InputError

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


def _whole(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, f"line {node.start_mark.line + 1}: {problem}")


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    value = float(node.value.replace("_", ""))
    if math.isinf(value):
        _refuse(node, f"{node.value} is too large for a number")
    return int(value) if value.is_integer() and "." not in node.value else value  # 1e6 images are a whole number


for _tag, _pattern, _first in _SCALARS:
    for _user in (_Loader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


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
    except yaml.reader.ReaderError as error:
        raise InputError(f"{source}: not YAML: character {error.character:#x} cannot stand in it") from None


def dump(content: Any) -> str:  # noqa: ANN401
    """YAML that `parse` reads back to the same content."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def dump_line(content: Any) -> str:  # noqa: ANN401
    """The same on one line."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=float("inf"), default_flow_style=True).strip()


def read(path: Path) -> str:
    """A text file that a user named."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8); a spec is a YAML file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
