"""Architectures: how to read the config.json of a family of network classes, and how to call these networks.

Each module of this package, and each entry point of the group `distill.architectures`, defines `ARCHITECTURE`, which
implements `protocols.Architecture`. An architecture is found by the class name of the network.
"""

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from torch import nn

from distill.core.errors import InputError
from distill.networks.experts import Experts
from distill.protocols import Architecture
from distill.teachers.convention import Convention
from distill.teachers.read import Config

GROUP = "distill.architectures"

# Diffusers has split this class into two, by the option norm_type. Old checkpoints still name it.
OLD_CLASS = "Transformer2DModel"
REPLACED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


@cache
def known() -> dict[str, Architecture | Convention]:
    """Maps the name of each network class to its architecture.

    Raises InputError if an entry point has no valid `ARCHITECTURE`, or one for a class that another module describes.
    """
    ours = [f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)]
    found: dict[str, Architecture | Convention] = {}
    for module in [*ours, *sorted(point.module for point in entry_points(group=GROUP))]:
        architecture = vars(importlib.import_module(module)).get("ARCHITECTURE")
        if not isinstance(architecture, Architecture | Convention):
            raise InputError(
                f"{module} (entry point {GROUP}) must define ARCHITECTURE, which implements "
                "distill.protocols.Architecture"
            )
        for name in names_of(architecture):
            if name in found:
                raise InputError(f"{module} describes the network {name}, which another module describes too")
            found[name] = architecture
    return found


def names_of(architecture: Architecture | Convention) -> list[str]:
    """The names of the network classes of an architecture. Networks of diffusers are not imported for this."""
    if isinstance(architecture, Convention):
        return list(architecture.networks)
    return [each.__name__ for each in architecture.classes]


def class_name(config: Config) -> object:
    """The name of a network class in its config.json, or of the class that diffusers has replaced it by."""
    name = config.get("_class_name")
    return REPLACED.get(str(config.get("norm_type")), name) if name == OLD_CLASS else name


def class_of(name: str) -> type[nn.Module]:
    """The network class of this name, which is one of `known`."""
    return next(each for each in known()[name].classes if each.__name__ == name)


def convention_of(network: nn.Module) -> Convention | None:
    """The convention by which a network is called; None if it is not a network of a latent-space pipeline."""
    first = network.transformer if isinstance(network, Experts) else network
    found = known().get(type(first).__name__)
    return found if isinstance(found, Convention) else None
