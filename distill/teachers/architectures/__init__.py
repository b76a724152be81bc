"""Architectures: how to read the config.json of a family of network classes, and how to call these networks.

Each module of this package, and each entry point of the group `distill.architectures`, defines `ARCHITECTURE`, which
implements `protocols.Architecture`. An architecture is found by the class name of the network.
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
    """Maps the name of each network class to its architecture.

    Raises InputError if an entry point has no valid `ARCHITECTURE`, or one for a class that another module describes.
    """
    ours = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    found: dict[str, Architecture] = {}
    for module in [*ours, *sorted(point.module for point in entry_points(group=GROUP))]:
        architecture = vars(importlib.import_module(module)).get("ARCHITECTURE")
        if not isinstance(architecture, Architecture):
            raise InputError(
                f"{module} (entry point {GROUP}) must define ARCHITECTURE, which implements "
                "distill.protocols.Architecture"
            )
        for each in architecture.classes:
            if each.__name__ in found:
                raise InputError(f"{module} describes the network {each.__name__}, which another module describes too")
            found[each.__name__] = architecture
    return found
