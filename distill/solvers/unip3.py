"""UniP of order 3 (Zhao et al. 2023, arXiv 2302.04867): the predictor of `unipc3` without its corrector.

The predictor of order 2 is `dpm_solver_pp_2m`. On a mixture, the corrector reduces the error and costs no network call;
this solver is for comparisons.
"""

from distill.solvers import Ode, Tensor, _unipc

ORDER = 2
IS_REFERENCE = True
MEMORY = 2


def calls(steps: int) -> int:
    return steps


calls_inverting = None


def look(ode: Ode, x: Tensor, t: float) -> Tensor:
    return ode.data(x, t)


step = _unipc.predict
