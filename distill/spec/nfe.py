"""The times at which a solver calls the network, found by running it on numbers. Does not import torch."""

from collections.abc import Sequence
from itertools import pairwise

from distill.core.errors import InputError
from distill.solvers import Step, Tensor, find_solver


class _Recorder:
    """An ODE of one number on the linear path, dx/dt = 0, that records the times of its calls. Implements `Ode`."""

    def __init__(self, lowest: float, highest: float) -> None:
        self.lowest, self.highest, self.times = lowest, highest, list[float]()

    def velocity(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return 0.0 * x

    def data(self, x: Tensor, t: float) -> Tensor:
        self.times.append(t)
        return x

    def time(self, ratio: float) -> float:
        return ratio / (1 + ratio)

    def noise(self, x: Tensor, k: int) -> Tensor:
        return 0.0 * x

    def path(self, t: float) -> tuple[float, float]:
        return 1 - t, t


def times_of_calls(solver: str, t_grid: Sequence[float]) -> list[float]:
    """The times of the network calls of one solve along `t_grid`, in linear-path time, in the order of the calls.

    InputError if the solver's functions cannot be called with numbers in place of tensors.
    """
    found, ode, steps = find_solver(solver), _Recorder(min(t for t in t_grid if t > 0), max(t_grid)), len(t_grid) - 1
    past: tuple[tuple[Tensor, float], ...] = ()
    whole = tuple(t_grid)
    try:
        for i, (t, t_next) in enumerate(pairwise(t_grid)):
            seen = found.look(ode, 0.0, t)
            found.step(ode, 0.0, seen, Step(t, t_next, past, steps - i, t_grid[-1] == 0, whole))
            past = ((seen, t), *past)[: found.memory]
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"solver '{solver}' cannot be used with guidance.interval: to count its network calls, its step is run on "
            f"numbers in place of tensors, which fails ({error}); remove the interval, or use another solver"
        ) from error
    return ode.times
