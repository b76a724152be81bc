"""UniPC of order 2 (Zhao et al. 2023, arXiv 2302.04867): multistep prediction and correction in ln(alpha/sigma).

The weights are those called "bh2". The first step from noise, the second, and the last to data use fewer predictions.
With the corrector the order is 3 where all predictions are used, at one network call per step.
"""

from distill.solvers import Ode, Tensor, _unipc

ORDER = 2
IS_REFERENCE = True
MEMORY = 1


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


step = _unipc.predict
correct = _unipc.correct
