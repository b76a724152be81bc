"""Looks up models and fields of the spec by a path like stages.teach.images, and explains validation errors."""

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distill.core.text import suggest
from distill.spec.kinds import OneOf

Annotation = Any  # the type annotation of a field
Content = Any  # the content of a YAML file at some path

NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text (in quotes if it looks like a number)",
    "bool": "true or false",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "model_attributes": "a mapping",
    "mapping": "a mapping",
}
BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def alternatives(annotation: Annotation) -> list[Annotation]:
    """The members of a union without Annotated and None; for another annotation, the annotation alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in alternatives(part)]
    return [] if annotation is type(None) else [annotation]


def models(annotation: Annotation) -> list[type[BaseModel]]:
    """The pydantic models that an annotation allows."""
    return [member for member in alternatives(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]


def kind_of(model: type[BaseModel]) -> str | None:
    """The value of `kind` that selects this model in its union; None if the model has no `kind`."""
    field = model.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def model_at(annotation: Annotation, content: Content) -> type[BaseModel] | None:
    """The model of `content`, selected by its `kind`; None if there is no model or the kind is unknown."""
    candidates = models(annotation)
    if len(candidates) == 1:
        return candidates[0]
    kind = content.get("kind") if isinstance(content, Mapping) else None
    return next((model for model in candidates if kind_of(model) == kind), None)


def value_type(annotation: Annotation, origin: type) -> Annotation | None:
    """The type of the values of a dict or of the items of a list; None if the annotation has no such member.

    origin: dict, list or tuple.
    """
    for member in alternatives(annotation):
        if get_origin(member) is origin:
            return get_args(member)[-1]
    return None


def declared(model: type[BaseModel], path: Sequence[str | int], content: Content) -> tuple[Annotation, str]:
    """The annotation and the description of the field at `path`.

    content: the content of the whole file, not validated yet. model: the model that it should be.
    """
    annotation: Annotation = model
    meaning = ""
    for key in path:
        owner = model_at(annotation, content)
        if owner is None:
            annotation, meaning = value_type(annotation, list if isinstance(key, int) else dict), ""
        else:
            field = owner.model_fields.get(str(key))
            annotation, meaning = (None, "") if field is None else (field.annotation, field.description or "")
        content = below(content, key)
    return annotation, meaning


def below(content: Content, key: str | int) -> Content:
    """content[key], or None if there is no such entry."""
    if isinstance(content, Mapping):
        return content.get(key)
    if isinstance(content, list) and isinstance(key, int) and key < len(content):
        return content[key]
    return None


def choices(field: FieldInfo) -> list[str]:
    """The valid values of a field that is a choice (Literal or `OneOf`); else an empty list."""
    named = [each.names() for each in field.metadata if isinstance(each, OneOf)]
    found = [member for member in alternatives(field.annotation) if get_origin(member) is Literal]
    return [str(word) for words in [*map(get_args, found), *named] for word in words]


def valid(described: Mapping[str, Any]) -> str:
    """The valid values of a field as text. described: the field's part of `model_json_schema()`."""
    if "anyOf" in described:
        return " or ".join(valid(member) for member in described["anyOf"])
    if "enum" in described or "const" in described:
        return ", ".join(map(str, described.get("enum", [described.get("const")])))
    if described.get("format") == "file-path":
        return "a file"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "array": "a list",
    }
    kind = str(described.get("type"))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {_bound(described[bound])}" for bound, sign in signs.items() if bound in described]
    return ", ".join([words.get(kind, kind), *bounds])


def _bound(number: int | float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def dotted(path: Sequence[str | int]) -> str:
    """A path as text, like stages.teach.images."""
    return ".".join(str(part) for part in path)


def show(value: Content) -> str:
    """A value as text for a message, shortened; null and booleans as in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def explain(error: ValidationError, model: type[BaseModel], content: Content, prefix: str = "") -> list[str]:
    """One line per mistake: path of the field, the given value, what is valid, the most similar name."""
    merged: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for entry in error.errors(include_url=False):
        path, owner = _locate(entry["loc"], model, content)
        where = dotted([prefix, *path] if prefix else path) or "the file"
        text, is_rule = _one(entry["type"], entry, path, owner, model, content)
        rules = merged.setdefault(where, [])
        if is_rule:
            given[where] = show(entry["input"])
        if text not in rules:
            rules.append(text)
    return [
        f"{where}: {given[where]} given; must be {' or '.join(rules)}"
        if where in given
        else f"{where}: {'; '.join(rules)}"
        for where, rules in merged.items()
    ]


def _locate(
    loc: Sequence[str | int], model: type[BaseModel], content: Content
) -> tuple[list[str | int], type[BaseModel] | None]:
    """(path, model) of a pydantic location.

    The path has no labels of union members. The model is the one that has the last part of the path as a field.
    """
    path: list[str | int] = []
    annotation: Annotation = model
    owner: type[BaseModel] | None = None
    for part in loc:
        if part == "[key]":
            continue
        candidates = models(annotation)
        chosen = model_at(annotation, content)
        if len(candidates) > 1 and part in [kind_of(candidate) for candidate in candidates]:
            annotation = next(candidate for candidate in candidates if kind_of(candidate) == part)
            continue
        if chosen is not None:
            owner = chosen
            field = chosen.model_fields.get(str(part))
            annotation = None if field is None else field.annotation
        else:
            inner = value_type(annotation, list if isinstance(part, int) else dict)
            if inner is None and value_type(annotation, tuple) is None:
                continue  # the label of a member of a plain union
            owner, annotation = None, inner
        path.append(part)
        content = below(content, part)
    return path, owner


def _one(
    kind: str,
    entry: Mapping[str, Any],
    path: Sequence[str | int],
    owner: type[BaseModel] | None,
    model: type[BaseModel],
    content: Content,
) -> tuple[str, bool]:
    """(text, is a rule) of one mistake. A rule completes "must be ..."; any other text is a whole message."""
    context = entry.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {suggest(str(path[-1]), owner.model_fields if owner else [])}", False
    if kind == "missing":
        _, meaning = declared(model, path, content)
        return f"missing ({meaning})" if meaning else "missing", False
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = [str(kind_of(member)) for member in models(declared(model, path, content)[0])]
        if kind == "union_tag_not_found":
            return f"kind is missing; valid: {', '.join(sorted(tags))}", False
        return f"kind is '{context['tag']}'; {suggest(str(context['tag']), tags)}", False
    if kind == "literal_error":
        return context["expected"], True
    if kind in BOUNDS:
        words, bound = BOUNDS[kind]
        return f"{words} {_bound(context[bound])}", True
    if kind == "string_pattern_mismatch":
        return NAME_RULE, True
    if kind == "other_form":  # raised by a validator that knows what is valid
        return context["valid"], True
    if kind == "not_one_line":
        return "one line of text without control characters", True
    if kind == "int_from_float":
        return KINDS["int"], True
    if kind in ("too_short", "too_long"):
        length = context.get("min_length", context.get("max_length"))
        return f"a list of {'at least' if kind == 'too_short' else 'at most'} {length}", True
    if kind == "value_error":
        return str(context["error"]), False
    for suffix in ("_type", "_parsing"):
        if kind.endswith(suffix) and kind.removesuffix(suffix) in KINDS:
            return KINDS[kind.removesuffix(suffix)], True
    return entry["msg"], False
