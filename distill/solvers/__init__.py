"""Solvers of the teacher's ODE dx/dt = v(x, t), one per file. Installed packages can add more.

A solver is a module: a file here, or an entry point of the group `distill.solvers`, with the name that specs use. It
must not import torch at the top level, because commands that only plan a run import solvers to compute costs, possibly
without torch. A solver module contains:

    ORDER = 2               the order of convergence
    IS_REFERENCE = True     whether it is accurate enough to make reference samples of the teacher
    calls(steps)            the number of network calls in `steps` steps from noise to data
    calls_inverting(steps)  the same from data to noise; set calls_inverting = None if the solver cannot do this
    look(ode, x, t)         evaluates the ODE at x and t: returns what `step` needs, the velocity or the data prediction
    step(ode, x, seen, at)  returns the state at the end of the step `at`; `seen` is the result of look(ode, x, at.t)

`look` and `step` may only add, subtract, multiply and divide x and what `look` returned. They must also work with a
number in place of x: that is how the network calls of guidance that is limited to an interval of times are counted.

A solver module also contains, if it is a multistep method or has a corrector,

    MEMORY = 1              the number of earlier steps whose `look` is kept in at.past
    correct(ode, x, seen, at, seen_next)    returns a better state at the end of the step `at`, which began at x;
                            `seen_next` is the result of `look` at the state that `step` returned. Not called for the
                            last step, so that it costs no network call.

A stochastic solver draws noise along the path, so it is only for sampling: not for references, not for pairs, and it
cannot invert. It contains

    noises(steps)           the number of noises that it uses in `steps` steps from noise to data, in addition to the
                            one that the path starts from; ode.noise(x, k) returns the k-th of them, counted from 0
    LEAST_STEPS = 5         the least number of steps with which it works; 1 if it is left out

Files whose name begins with an underscore are not solvers: several solvers share their code.
"""

import functools
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from distill.core.errors import InputError
from distill.core.importing import Importing
from distill.core.text import suggest

GROUP = "distill.solvers"
PARTS = {
    "look": ("ode", "x", "t"),
    "step": ("ode", "x", "seen", "at"),
    "correct": ("ode", "x", "seen", "at", "seen_next"),
}
FIRST = ["euler", "heun"]  # the order in lists; other solvers follow by name
Tensor = Any  # torch.Tensor; torch is not imported here


@runtime_checkable
class Ode(Protocol):
    """The ODE of one batch with its condition, as passed to a solver."""

    lowest: float
    """The lowest time at which the velocity is defined. The last step may go below it, to 0; make no call there."""
    highest: float
    """The highest time at which the velocity is defined."""

    def velocity(self, x: Tensor, t: float) -> Tensor: ...  # v [B, ...] at x [B, ...] and t
    def data(self, x: Tensor, t: float) -> Tensor: ...  # the data prediction [B, ...] at x and t
    def path(self, t: float) -> tuple[float, float]: ...  # (alpha, sigma) in x = alpha data + sigma noise
    def time(self, ratio: float) -> float: ...  # the time with this finite sigma/alpha
    def noise(self, x: Tensor, k: int) -> Tensor: ...  # standard normal noise like x; equal calls return equal noise


@dataclass(frozen=True)
class Step:
    """One step of a solver along a grid of times."""

    t: float
    t_next: float
    past: Sequence[tuple[Tensor, float]]
    """(result of `look`, time) of earlier steps of this path, the latest first; at most MEMORY"""
    left: int
    """number of steps to the end of the grid; 1: this is the last"""
    to_data: bool
    """whether the grid ends at data (sigma = 0)"""
    grid: Sequence[float] = ()
    """all times of the grid"""


class Solver(BaseModel):
    """The contents of a solver module, validated."""

    model_config = ConfigDict(frozen=True, strict=True)

    order: PositiveInt = Field(alias="ORDER")
    is_reference: bool = Field(alias="IS_REFERENCE")
    calls: Callable[[int], int]
    calls_inverting: Callable[[int], int] | None
    look: Callable[..., Any]
    step: Callable[..., Any]
    memory: NonNegativeInt = Field(default=0, alias="MEMORY")
    correct: Callable[..., Any] | None = None
    noises: Callable[[int], int] | None = None
    least_steps: PositiveInt = Field(default=1, alias="LEAST_STEPS")


def solver_names() -> list[str]:
    """The names of all available solvers. Does not import them."""
    files = sorted(_our_names(), key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return [*files, *sorted({point.name for point in _entry_points(tuple(sys.path))} - set(files))]


def find_solver(name: str) -> Solver:
    """Returns the solver called `name`. Raises InputError if there is none or its module is invalid."""
    return _read(name, tuple(sys.path))


@functools.cache
def _our_names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


@functools.cache
def _entry_points(path: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points of our group. path: sys.path, as the key of the cache; a search takes milliseconds."""
    return list(entry_points(group=GROUP))


@functools.cache
def _read(name: str, path: tuple[str, ...]) -> Solver:
    points = [point for point in _entry_points(path) if point.name == name]
    if name in _our_names():
        if points:
            raise InputError(
                f"{_title(points[0])}: distill has a solver with this name; rename yours, or uninstall the package"
            )
        return _checked(f"{__name__}.{name}", f"solver '{name}'", "")
    if not points:
        raise InputError(f"unknown solver '{name}': {suggest(name, solver_names())}")
    if len(points) > 1:
        raise InputError(
            f"{_title(points[0])}: {_package(points[1])} also has a solver with this name; uninstall one of the two"
        )
    return _checked(points[0].module, _title(points[0]), "; fix or uninstall the package")


def _checked(module: str, title: str, remedy: str) -> Solver:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent package is missing
        found = None
    if found is None or found.origin is None:
        raise InputError(f"{title}: its module {module} is not installed{remedy}")
    with Importing(title, Path(found.origin)):
        parts = vars(importlib.import_module(module))
    try:
        solver = Solver.model_validate(parts)
        said = [f"{name} must take ({', '.join(PARTS[name])})" for name in PARTS if not _fits(solver, name)]
        if solver.noises is not None and (solver.is_reference or solver.calls_inverting is not None):
            said.append("a solver with noises must set IS_REFERENCE = False and calls_inverting = None")
    except ValidationError as error:
        wrong = [(str(each["loc"][0]), each) for each in error.errors(include_url=False)]
        said = [f"{part} is missing" if each["type"] == "missing" else f"{part}: {each['msg']}" for part, each in wrong]
    if said:
        raise InputError(f"{title} ({found.origin}): {'; '.join(said)}{remedy}")
    return solver


def _fits(solver: Solver, name: str) -> bool:
    """Whether a function of a solver takes the arguments of PARTS."""
    function = getattr(solver, name)
    try:
        return function is None or inspect.signature(function).bind(*PARTS[name]) is not None
    except TypeError:
        return False


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist is not None else f"the module {point.module}"


def _title(point: EntryPoint) -> str:
    return f"solver '{point.name}' of {_package(point)}"
