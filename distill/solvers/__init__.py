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
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from distill.core.plugins import Plugins, takes

PLUGINS = Plugins(__name__, "solver")
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
    ours = sorted(PLUGINS.ours(), key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return [*ours, *PLUGINS.others()]


def find_solver(name: str) -> Solver:
    """Returns the solver called `name`. Raises InputError if there is none or its module is invalid."""
    return _read(name, tuple(sys.path))


@functools.cache
def _read(name: str, path: tuple[str, ...]) -> Solver:
    plugin = PLUGINS.load(name)
    solver = plugin.read(Solver)
    functions = {"look": solver.look, "step": solver.step, "correct": solver.correct}
    said = [
        f"{part} must take ({', '.join(PARTS[part])})"
        for part, function in functions.items()
        if function is not None and not takes(function, PARTS[part])
    ]
    if solver.noises is not None and (solver.is_reference or solver.calls_inverting is not None):
        said.append("a solver with noises must set IS_REFERENCE = False and calls_inverting = None")
    if said:
        plugin.refuse(said)
    return solver
