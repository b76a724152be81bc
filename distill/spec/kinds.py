"""The known samplers and kinds of student with their properties, and types of fields that hold such a name.

The code of samplers and students is in `students.samplers` and `networks`, under the same names. The properties of a
solver are in its own file in `distill.solvers`. Other code uses these properties and does not compare names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from distill.core.errors import InputError
from distill.solvers import find_solver, solver_names

ADAPTIVE = "dopri5"  # the solver with a tolerance instead of a number of steps, in flow/dopri5.py


def _as_many(steps: int) -> int:
    return steps


@dataclass(frozen=True)
class SamplerFacts:
    """Properties of a sampler. Its code is in the file of the same name in students/samplers."""

    student: str
    """the kind of student that it samples, a key of `STUDENTS`"""
    words: str
    """its description in the model card"""
    calls: Callable[[int], int] = _as_many
    """number of steps -> network calls per sample"""
    is_fitted: bool = False
    """whether it needs weights that were fitted to the network, for each number of steps"""


@dataclass(frozen=True)
class StudentKind:
    """A kind of student: what its network computes."""

    words: str
    """its description, which follows "is" in messages"""
    samplers: tuple[str, ...]
    """its samplers; the first is the default"""
    is_field: bool = False
    """whether it is a velocity field; only these can be a teacher, or initialise a student of another kind"""


BASELINE = "best baseline"  # the teacher's best value at no more network calls; in a card followed by its quantity
AUTO, FITTED = "auto", "bns"  # names in place of a solver of the pairs: the cheapest; fitted to the teacher

# The first sampler of each kind of student is its default.
SAMPLERS: Mapping[str, SamplerFacts] = {
    "euler": SamplerFacts("velocity", "Euler, x_s = x_t + (s - t) v(x_t, t)"),
    "same_noise": SamplerFacts(
        "velocity", "data = x_t - t v(x_t, t), x_s = (1 - s) data + s noise, with the noise that it began from"
    ),
    FITTED: SamplerFacts(
        "velocity",
        "x_{i+1} = a_i noise + sum_j b_ij v(x_j, t_j), with times and weights that were fitted to the network",
        is_fitted=True,
    ),
    "jump": SamplerFacts("flow_map", "jumps x_s = x_t + (s - t) u(x_t, t, s)"),
    "renoise": SamplerFacts(
        "flow_map",
        "jumps to data = x_t - t u(x_t, t, 0), each but the last followed by x_s = (1 - s) data + s fresh noise",
    ),
    "accelerated": SamplerFacts(
        "acceleration",
        "v = v(noise, 1) once, then x_s = x_t + (s - t) (v + ((t + s) / 2 - 1) a(x_t, t, v)): N + 1 network calls in N "
        "steps",
        lambda steps: steps + 1,
    ),
}


def _samplers_of(student: str) -> tuple[str, ...]:
    return tuple(name for name, each in SAMPLERS.items() if each.student == student)


STUDENTS: Mapping[str, StudentKind] = {
    "velocity": StudentKind("a velocity field", _samplers_of("velocity"), is_field=True),
    "flow_map": StudentKind("a flow map", _samplers_of("flow_map")),
    "acceleration": StudentKind("a velocity with its acceleration", _samplers_of("acceleration")),
}


def ode_solvers() -> list[str]:
    """Names of the solvers without noise, which solve the ODE. Those whose module is invalid are not left out."""
    return [name for name in solver_names() if not _is_stochastic(name)]


def _is_stochastic(name: str) -> bool:
    try:
        return find_solver(name).noises is not None
    except InputError:
        return False


def inverting_solvers() -> list[str]:
    """Names of the solvers that can also solve from data to noise."""
    return [name for name in solver_names() if find_solver(name).calls_inverting is not None]


def reference_solvers() -> list[str]:
    """Names of the solvers with a number of steps whose end points can serve as the teacher's own samples."""
    return [name for name in solver_names() if is_reference(name)]


def is_reference(name: str) -> bool:
    """Whether there is a solver of this name, with a number of steps, whose end points can serve as the teacher's."""
    return name in solver_names() and find_solver(name).is_reference


def about_calls(tolerance: float) -> int:
    """About how many calls dopri5 makes per sample, from those for a mixture and for a teacher of digits."""
    return round(25 * max(1.0, 0.01 / tolerance) ** 0.18)


def network_calls(sampler: str, steps: int) -> int:
    """Network calls (NFE) per sample, for a sampler with this number of steps."""
    return SAMPLERS[sampler].calls(steps)


def per_velocity(guidance_scale: float) -> int:
    """Network calls for one velocity: two under classifier-free guidance."""
    return 1 if guidance_scale == 1 else 2


def either(names: Iterable[str]) -> str:
    """The names as text, like: a, b or c."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True)
class OneOf:
    """A field must hold one of these names. They are listed at each check, since installed packages may add names."""

    names: Callable[[], Iterable[str]]
    fits: Callable[[str], bool] | None = None
    """whether a name is valid, if that can be checked without listing all names"""

    def __get_pydantic_core_schema__(self, source: type, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, list[str]]:
        return {"enum": list(self.names())}

    def _checked(self, name: str) -> str:
        if not (name in self.names() if self.fits is None else self.fits(name)):
            expected = either(f"'{each}'" for each in self.names())
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name


SolverName = Annotated[str, OneOf(ode_solvers, lambda name: name in solver_names() and not _is_stochastic(name))]
PairsSolverName = Annotated[str, OneOf(lambda: [*ode_solvers(), AUTO, FITTED])]
AnySolverName = Annotated[str, OneOf(solver_names)]
ReferenceName = Annotated[
    str, OneOf(lambda: [*reference_solvers(), ADAPTIVE], lambda name: name == ADAPTIVE or is_reference(name))
]
SamplerName = Annotated[str, OneOf(lambda: SAMPLERS)]
StudentName = Annotated[str, OneOf(lambda: STUDENTS)]
