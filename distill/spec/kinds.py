"""What solvers, samplers and kinds of student there are, and the facts of each that need no tensors.

Their code is in `solvers`, `samplers` and `students`, under the same names. Code that asks whether a solver can go from
data to noise, or what a sampler costs, asks the record: no other place compares names.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError


def _as_many(steps: int) -> int:
    return steps


@dataclass(frozen=True)
class SolverFacts:
    """A numerical solver of the teacher's ODE."""

    calls: Callable[[int], int] = _as_many
    """network calls for so many steps from noise to data"""
    calls_inverting: Callable[[int], int] | None = None
    """the same from data to noise; None: it cannot go there"""
    is_reference: bool = True
    """accurate enough for its endpoint to count as the teacher's own"""


@dataclass(frozen=True)
class SamplerFacts:
    """A way to make samples from a student."""

    words: str
    """in the model card"""
    calls: Callable[[int], int] = _as_many
    """network calls for a sample in so many steps"""


@dataclass(frozen=True)
class StudentKind:
    """What the network of a student computes."""

    words: str
    """after "is", in messages"""
    samplers: tuple[str, ...]
    """those that fit; the first is the usual one"""
    is_field: bool = False
    """whether it is a velocity field: only then can it be a teacher, or what a student of another kind starts from"""


# Of Heun's steps to data the last is Euler's, as no call is made at t = 0; the other way none ends there.
SOLVERS: Mapping[str, SolverFacts] = {
    "euler": SolverFacts(calls_inverting=_as_many, is_reference=False),
    "heun": SolverFacts(lambda steps: 2 * steps - 1, lambda steps: 2 * steps),
    "dpm_solver_pp_2m": SolverFacts(),
}
SAMPLERS: Mapping[str, SamplerFacts] = {
    "euler": SamplerFacts("Euler, x_s = x_t + (s - t) v(x_t, t)"),
    "same_noise": SamplerFacts(
        "data = x_t - t v(x_t, t), x_s = (1 - s) data + s noise, with the noise that it began from"
    ),
    "jump": SamplerFacts("jumps x_s = x_t + (s - t) u(x_t, t, s)"),
    "renoise": SamplerFacts(
        "jumps to data = x_t - t u(x_t, t, 0), each but the last followed by x_s = (1 - s) data + s fresh noise"
    ),
    "accelerated": SamplerFacts(
        "v = v(noise, 1) once, then x_s = x_t + (s - t) (v + ((t + s) / 2 - 1) a(x_t, t, v)): N + 1 network calls in N "
        "steps",
        lambda steps: steps + 1,
    ),
}
STUDENTS: Mapping[str, StudentKind] = {
    "velocity": StudentKind("a velocity field", ("euler", "same_noise"), is_field=True),
    "flow_map": StudentKind("a flow map", ("jump", "renoise")),
    "acceleration": StudentKind("a velocity with its acceleration", ("accelerated",)),
}
INVERTING = [name for name, solver in SOLVERS.items() if solver.calls_inverting is not None]
REFERENCES = [name for name, solver in SOLVERS.items() if solver.is_reference]


def network_calls(method: str, steps: int) -> int:
    """Network calls (NFE) for a sample in so many steps by a solver or a sampler. Guidance: `per_velocity`."""
    found = SOLVERS[method] if method in SOLVERS else SAMPLERS[method]
    return found.calls(steps)


def per_velocity(guidance_scale: float) -> int:
    """Network calls for one velocity: two under classifier-free guidance."""
    return 1 if guidance_scale == 1 else 2


def either(names: Iterable[str]) -> str:
    """a, b or c"""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def _one_of(names: list[str]) -> tuple[AfterValidator, WithJsonSchema]:
    """Validators of a field that holds one of these names."""
    expected = either(f"'{name}'" for name in names)

    def check(name: str) -> str:
        if name not in names:
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name

    return AfterValidator(check), WithJsonSchema({"enum": names})


SolverName = Annotated[str, *_one_of(list(SOLVERS))]
ReferenceName = Annotated[str, *_one_of(REFERENCES)]
SamplerName = Annotated[str, *_one_of(list(SAMPLERS))]
StudentName = Annotated[str, *_one_of(list(STUDENTS))]
