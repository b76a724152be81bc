"""Strict YAML reading, and writing that reads back as the same content.

Values follow the core schema of YAML 1.2: 1e-3 is a number, yes and on are text, 012 is twelve. A repeated key is an
error.
"""

import math
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from distill.core.errors import InputError

MAX_BYTES = 16 * 1024 * 1024  # size of a file
MAX_DEPTH = 64  # nesting of lists and mappings
MAX_NODES = 200_000  # values; the values of an alias are counted each time that it is used
OPEN = (0, 0)  # marks a node whose measurement has begun but not ended, see `_measure`
MAX_DIGITS = 300  # digits of an integer
_SCALARS = [
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("merge", r"^<<$", ["<"]),
]


_PATTERNS = {f"tag:yaml.org,2002:{tag}": re.compile(pattern) for tag, pattern, _ in _SCALARS}


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):  # type: ignore[misc]
    """A safe loader for which a repeated key is an error."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    yaml_constructors: dict[str | None, Any] = {}

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if str(key.value) in seen:
                _refuse(key, f"key '{key.value}' appears twice")
            seen.add(str(key.value))
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes exactly those texts that the loader would read as another type."""

    yaml_implicit_resolvers: dict[str, Any] = {}


def _refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, f"line {node.start_mark.line + 1}: {problem}")


def _scalar(node: yaml.Node, what: str) -> str:
    """The text of a scalar. Refuses one that does not match its tag, as in `!!int abc`."""
    if not isinstance(node, yaml.ScalarNode):
        _refuse(node, f"a list or mapping is not a {what}")
    if not _PATTERNS[node.tag].match(node.value):
        _refuse(node, f"'{node.value}' is not a {what}")
    return node.value


def _whole(loader: _Loader, node: yaml.Node) -> int:
    text = _scalar(node, "whole number").replace("_", "")
    if len(text) > MAX_DIGITS:
        _refuse(node, f"a number of {len(text)} digits; valid: at most {MAX_DIGITS}")
    return int(text)


def _number(loader: _Loader, node: yaml.Node) -> float | int:
    value = float(_scalar(node, "number").replace("_", ""))
    if math.isinf(value):
        _refuse(node, f"{node.value} is beyond the largest floating-point number")
    return int(value) if value.is_integer() and "." not in node.value else value  # 1e6 is read as an integer


def _truth(loader: _Loader, node: yaml.Node) -> bool:
    return _scalar(node, "bool (true or false)").lower() == "true"


def _nothing(loader: _Loader, node: yaml.Node) -> None:
    _scalar(node, "null value")


def _unknown(loader: _Loader, node: yaml.Node) -> NoReturn:
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    _refuse(node, f"the tag {tag} is not supported; valid: !!str, !!int, !!float, !!bool, !!null, !!seq, !!map")


for _tag, _pattern, _first in _SCALARS:
    for _user in (_Loader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
for _name, _constructor in {
    "null": _nothing,
    "bool": _truth,
    "int": _whole,
    "float": _number,
    "str": yaml.SafeLoader.construct_yaml_str,
    "seq": yaml.SafeLoader.construct_yaml_seq,
    "map": yaml.SafeLoader.construct_yaml_map,
}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _constructor)
_Loader.add_constructor(None, _unknown)


def parse(text: str, source: str) -> Any:  # noqa: ANN401  (whatever YAML holds)
    """The content of a YAML text.

    Raises InputError, with the line of the mistake, if it is not valid YAML, or is larger or more deeply nested than
    the limits of this module.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{source}: not text: it contains bytes that are not UTF-8") from None
    try:
        return _parse(text)
    except yaml.constructor.ConstructorError as error:
        raise InputError(f"{source}: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise InputError(f"{source}: not YAML:{where} {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{source}: not YAML: character {error.character:#x} is not allowed") from None


def _parse(text: str) -> Any:  # noqa: ANN401
    _refuse_deep(text)
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        count, depth = _measure(node, {})
        for found, most, what in ((count, MAX_NODES, "values"), (depth, MAX_DEPTH, "nested lists or mappings")):
            if found > most:
                _refuse(node, f"contains more than {most:,} {what}, counting those that aliases repeat")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_deep(text: str) -> None:
    """Refuse a text that is too deeply nested or too long, before any recursive function reads it."""
    depth = count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent):
            count += 1
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH or count > MAX_NODES:
            limit = f"{MAX_DEPTH} nested lists or mappings" if depth > MAX_DEPTH else f"{MAX_NODES:,} values"
            mark = event.start_mark
            line = f"line {mark.line + 1}: " if mark else ""
            raise yaml.constructor.ConstructorError(None, None, f"{line}contains more than {limit}")


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(number of values, nesting depth) of a node, with aliases expanded.

    known: the results so far, by id of the node.
    """
    if id(node) in known:
        if known[id(node)] == OPEN:
            _refuse(node, "a value contains itself")
        return known[id(node)]
    known[id(node)] = OPEN
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    inside = [_measure(part, known) for part in below]
    count = 1 + sum(count for count, _ in inside)
    depth = max((depth for _, depth in inside), default=0) + isinstance(node, yaml.CollectionNode)
    known[id(node)] = count, depth
    return count, depth


def dump(content: Any) -> str:  # noqa: ANN401
    """The content as YAML, which `parse` reads back unchanged."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def dump_line(content: Any) -> str:  # noqa: ANN401
    """Like `dump`, on one line."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=float("inf"), default_flow_style=True).strip()


def read(path: Path) -> str:
    """The text of a file that the user named. InputError if it cannot be read, is too large or is not UTF-8."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: contains more than {MAX_BYTES // 2**20} MiB; a spec is a short YAML file")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file (UTF-8); a spec is a YAML file") from None
