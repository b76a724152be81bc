"""Overrides from the command line: `stages.teach.images=64000`, `data={kind: none}`, `stages.a.steps.0=2`."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distill.core.errors import InputError
from distill.core.text import short, suggest, whole_number
from distill.spec import schema
from distill.spec.model import RunSpec


@dataclass(frozen=True)
class Override:
    """One override `a.b=c`. The value is parsed as YAML."""

    text: str
    """the override as shown in messages"""
    path: list[str]
    value: Any


def apply(content: dict[str, Any], changes: Sequence[Override]) -> dict[str, Any]:
    """A copy of a spec's content with the overrides applied in order.

    Raises InputError for an unknown path, with the most similar name.
    """
    content = copy.deepcopy(content)
    for change in changes:
        content = _set(content, RunSpec, change, 0)
    return content


def _set(here: schema.Content, annotation: schema.Annotation, change: Override, depth: int) -> schema.Content:
    """A copy of `here` with the override applied. here: the content at the first `depth` parts of the path."""
    if depth == len(change.path):
        return change.value
    key, where = change.path[depth], schema.dotted(change.path[:depth]) or "the spec"
    if isinstance(here, list):
        at = whole_number(key)
        if at is None or at >= len(here):
            raise InputError(
                f"{change.text}: {where} has {len(here)} items; '{short(key)}' must be one of 0 to {len(here) - 1}"
            )
        inner = schema.value_type(annotation, list)
        return [_set(item, inner, change, depth + 1) if i == at else item for i, item in enumerate(here)]
    if here is not None and not isinstance(here, dict):
        raise InputError(f"{change.text}: {where} is {schema.show(here)}, which has no key '{key}'")
    here = here or {}
    if schema.models(annotation):
        field = _field(annotation, here, key, f"{change.text}: {where}")
        below, inner = here.get(key, _default(field)), field.annotation
    else:  # names of stages or students, or anything inside a recipe's options
        below, inner = here.get(key), schema.value_type(annotation, dict)
        if key not in here and depth + 1 < len(change.path) and schema.models(inner):
            raise InputError(f"{change.text}: {where} has no '{short(key)}'; {suggest(key, here)}")
    return {**here, key: _set(below, inner, change, depth + 1)}


def _field(annotation: schema.Annotation, here: dict[str, Any], key: str, where: str) -> FieldInfo:
    """The field `key` of the model of `here`; if its kind is not known yet, of any model that it may be."""
    chosen = schema.model_at(annotation, here)
    fields: dict[str, FieldInfo] = {}
    for model in [chosen] if chosen is not None else schema.models(annotation):
        fields |= model.model_fields
    if key not in fields:
        raise InputError(f"{where} has no '{short(key)}'; {suggest(key, fields)}")
    return fields[key]


def _default(field: FieldInfo) -> schema.Content:
    """The default of a field that is not in the file, so that a part of it can be overridden."""
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
