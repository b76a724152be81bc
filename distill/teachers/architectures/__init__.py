"""How networks are described by their config.json and called: one file for each family of classes.

A module of this package, or of the entry points of the group `distill.architectures`, has `ARCHITECTURE`, which fits
`protocols.Architecture`. It is found by the name of the network's class.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from distill.core.errors import InputError
from distill.protocols import Architecture

GROUP = "distill.architectures"


@cache
def known() -> dict[str, Architecture]:
    """By the name of each class of networks; InputError for a package that gives none, or another's classes."""
    ours = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    found: dict[str, Architecture] = {}
    for module in [*ours, *sorted(point.module for point in entry_points(group=GROUP))]:
        architecture = vars(importlib.import_module(module)).get("ARCHITECTURE")
        if not isinstance(architecture, Architecture):
            raise InputError(f"{module} has no ARCHITECTURE that fits distill.protocols.Architecture; see {GROUP}")
        for each in architecture.classes:
            if each.__name__ in found:
                raise InputError(f"{module} describes the networks {each.__name__}, which are known already")
            found[each.__name__] = architecture
    return found
