"""Plug-ins: the modules of one of our packages, and of installed packages by the entry point group of the same name.

No module is imported before it is used. Modules of our package whose name begins with an underscore are not plug-ins:
several plug-ins share their code.
"""

import functools
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from distill.core.errors import InputError
from distill.core.importing import TRAIN, Importing
from distill.core.text import suggest

Contents = TypeVar("Contents", bound=BaseModel)


@dataclass(frozen=True)
class Plugin:
    """An imported plug-in."""

    title: str
    """what it is, for messages, like: solver 'midpoint' of the package mine"""
    file: str
    remedy: str
    parts: Mapping[str, Any]
    """what its module defines, by name"""

    def read(self, model: type[Contents]) -> Contents:
        """The parts that a model describes, validated. InputError if one is missing or wrong."""
        try:
            return model.model_validate(self.parts)
        except ValidationError as error:
            wrong = [(str(each["loc"][0]), each) for each in error.errors(include_url=False)]
            said = [f"{part} is missing" if e["type"] == "missing" else f"{part}: {e['msg']}" for part, e in wrong]
            self.refuse(said)

    def refuse(self, mistakes: Sequence[str]) -> NoReturn:
        """Raise InputError with these mistakes of the module."""
        raise InputError(f"{self.title} ({self.file}): {'; '.join(mistakes)}{self.remedy}")


@dataclass(frozen=True)
class Plugins:
    """All plug-ins of one kind."""

    group: str
    """name of our package, and of the entry point group"""
    what: str
    """what a plug-in is, for messages, like: solver"""
    extra: str = TRAIN
    """how to install the packages that ours need, for messages, with {name} for the plug-in's name"""

    def ours(self) -> list[str]:
        """The names of the plug-ins of our package, sorted."""
        return _modules(self.group)

    def others(self) -> list[str]:
        """The names of the plug-ins of other packages, sorted."""
        return sorted({point.name for point in _points(self.group, tuple(sys.path))} - set(self.ours()))

    def load(self, name: str) -> Plugin:
        """Import a plug-in. InputError if there is none of this name, or more than one, or if it cannot be imported."""
        points = [point for point in _points(self.group, tuple(sys.path)) if point.name == name]
        if name in self.ours():
            if points:
                raise InputError(
                    f"{self._title(points[0])}: distill has a {self.what} with this name; rename yours, or uninstall "
                    "the package"
                )
            return _imported(f"{self.group}.{name}", f"{self.what} '{name}'", "", self.extra.format(name=name))
        if not points:
            raise InputError(f"unknown {self.what} '{name}': {suggest(name, [*self.ours(), *self.others()])}")
        if len(points) > 1:
            raise InputError(
                f"{self._title(points[0])}: {_package(points[1])} also has a {self.what} with this name; uninstall one "
                "of the two"
            )
        return _imported(points[0].module, self._title(points[0]), "; fix or uninstall the package", TRAIN)

    def _title(self, point: EntryPoint) -> str:
        return f"{self.what} '{point.name}' of {_package(point)}"


def takes(function: Callable[..., Any], arguments: Sequence[str]) -> bool:
    """Whether a function can be called with this many positional arguments."""
    try:
        return inspect.signature(function).bind(*arguments) is not None
    except TypeError:
        return False


@functools.cache
def _modules(package: str) -> list[str]:
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in found if not module.name.startswith("_"))


@functools.cache
def _points(group: str, path: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points of a group. path: sys.path, as the key of the cache; a search takes milliseconds."""
    return list(entry_points(group=group))


def _imported(module: str, title: str, remedy: str, extra: str) -> Plugin:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing
        found = None
    if found is None or found.origin is None:
        raise InputError(f"{title}: its module {module} is not installed{remedy}")
    with Importing(title, Path(found.origin), extra):
        return Plugin(title, found.origin, remedy, vars(importlib.import_module(module)))


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist is not None else f"the module {point.module}"
