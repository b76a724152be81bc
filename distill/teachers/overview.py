"""The supported teachers: what the conventions and architectures say about themselves, for tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from distill.flow.guidance import cfg
from distill.networks.architectures import NETWORKS
from distill.protocols import Architecture
from distill.teachers import architectures
from distill.teachers.convention import Convention


@runtime_checkable
class Described(Protocol):
    """What an architecture may say about itself in addition, for tables."""

    @property
    def title(self) -> str: ...  # the models that it is for
    @property
    def pipelines(self) -> Sequence[str]: ...
    @property
    def prediction(self) -> str: ...
    @property
    def conditions(self) -> str: ...
    @property
    def guidance(self) -> str: ...


@dataclass(frozen=True)
class SupportedTeacher:
    """One row of the table: the networks that are called in the same way."""

    title: str
    networks: Sequence[str]
    pipelines: Sequence[str]
    prediction: str
    conditions: str
    guidance: str

    @property
    def cells(self) -> list[str]:
        """The row as text, in the order of `HEADERS`."""
        shown = (self.title, ", ".join(self.networks), ", ".join(self.pipelines))
        return [*shown, self.prediction, self.conditions, self.guidance]


HEADERS = ("models", "networks", "pipelines", "prediction", "conditions", "guidance")


def supported() -> list[SupportedTeacher]:
    """All conventions and architectures, also those of installed packages; networks in pixel space first."""
    found = {id(each): each for each in architectures.known().values()}
    rows = [_row(each) for each in found.values()]
    return sorted(rows, key=lambda row: ("UNet2DModel" not in row.networks, row.title.lower()))


def _row(found: Architecture | Convention) -> SupportedTeacher:
    if isinstance(found, Convention):
        return SupportedTeacher(
            found.title,
            found.networks,
            found.pipelines,
            found.prediction,
            found.conditions,
            guidance(found, found.guidance_scale, found.embedded_guidance),
        )
    others = {each.__name__ for kind, members in NETWORKS.items() if kind != "velocity" for each in members}
    names = [name for name in architectures.names_of(found) if name not in others]  # students, which are no teachers
    if isinstance(found, Described):
        return SupportedTeacher(found.title, names, found.pipelines, found.prediction, found.conditions, found.guidance)
    return SupportedTeacher(", ".join(names), names, (), "", "", "")


def guidance(convention: Convention, scale: float, embedded: float | None) -> str:
    """How the pipelines of a convention are guided by default, in words.

    scale: in u + scale (c - u). embedded: the scale that the network takes as an input; None: it takes none.
    """
    found = []
    if embedded is not None:
        found.append(f"embedded scale {embedded:g}")
    if scale != 1:
        name = getattr(convention.combine, "__name__", "a form of its own").replace("_", " ")
        form = "" if convention.combine is cfg else f", {name}"
        found.append(f"second call, scale {scale:g}{form}")
    return "; ".join(found) or "none"
