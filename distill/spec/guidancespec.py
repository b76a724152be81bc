"""How a stage changes the velocity field of its teacher: guidance, and scaling of the predicted noise. Without torch.

The fields themselves are in `flow.guidance`.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from distill.core.field_types import Fraction, FrozenModel, GuidanceRange, Line, Name
from distill.solvers import find_solver
from distill.spec import nfe
from distill.spec.kinds import per_velocity

ROUNDING = 1e-6  # a time may differ from a bound of an interval by this much, due to rounding in float32
RESCALE = 0.7  # default share of the rescaled velocity (Lin et al. 2023, arXiv 2305.08891, section 3.4)

Interval = tuple[float, float]
ALWAYS: Interval = (0.0, 1.0)
WEAK = "guidance.weak"  # the field of a stage that refers to the weak model's stage


def bounds(interval: Interval) -> Interval:
    """(low, high): guidance is applied at the times low < t <= high. With tolerance for rounding.

    The interval is open below (Kynkäänniemi et al. 2024, arXiv 2404.07724): a step that begins at its low end goes to
    times outside it. If it begins at 0, it includes 0.
    """
    low, high = interval
    return low + ROUNDING if low > 0 else -ROUNDING, high + ROUNDING


class GuidanceSpec(FrozenModel):
    """Guidance of another form than classifier-free guidance, or at some times only; guidance_scale is its strength."""

    form: Literal["cfg", "zero_star", "apg", "rescaled", "renormalised"] | None = None
    """cfg: classifier-free guidance; zero_star: CFG-Zero*; apg: adaptive projected guidance; rescaled, renormalised: to
    the standard deviation, or the norm, of the velocity with condition; null: as in the teacher's pipeline, or cfg"""
    interval: tuple[Fraction, Fraction] | None = None
    """[low, high]: guide at times low < t <= high only (1 is noise), with one network call at others; null: always"""
    rescale: Annotated[float, Field(gt=0, le=1)] | None = None
    """for rescaled: share of the rescaled velocity, greater than 0, at most 1; null: 0.7"""
    norm_limit: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """for apg: larger differences between the data predictions with and without condition are shortened to this norm;
    null: no limit"""
    guidance_scale_2: Annotated[float, Field(ge=0, le=10_000)] | None = None
    """for teachers with two networks, like Wan 2.2: the guidance scale at the times of the second one, which have less
    noise; null: guidance_scale at all times"""
    weak: Name | None = None
    """autoguidance: train stage whose student is called in place of the teacher without condition"""
    weak_path: Line | None = None
    """autoguidance with a checkpoint: its folder"""

    @property
    def is_auto(self) -> bool:
        """Whether it is guided away from a weak model, instead of away from the unconditional prediction."""
        return self.weak is not None or self.weak_path is not None

    @property
    def words(self) -> list[str]:
        """What differs from classifier-free guidance, in words."""
        found: list[str] = [] if self.form is None else [self.form]
        found += [] if self.rescale is None else [f"rescale {self.rescale:g}"]
        found += [] if self.norm_limit is None else [f"norm limit {self.norm_limit:g}"]
        found += [] if self.guidance_scale_2 is None else [f"{self.guidance_scale_2:g} for the second network"]
        return found + ([] if self.interval is None else [f"{self.interval[0]:g} < t <= {self.interval[1]:g}"])


@dataclass(frozen=True)
class FieldSettings:
    """Guidance and scaling of the predicted noise with which a stage calls its teacher."""

    guidance_scale: float = 1.0
    guidance: GuidanceSpec | None = None
    epsilon_scale: float = 1.0

    @property
    def form(self) -> GuidanceSpec:
        return self.guidance or GuidanceSpec()

    @property
    def interval(self) -> Interval:
        """The times at which guidance is applied; see `bounds`."""
        return self.form.interval or ALWAYS

    @property
    def varies(self) -> bool:
        """Whether the number of network calls per velocity depends on the time."""
        return self.guidance_scale != 1 and self.interval != ALWAYS

    @property
    def needs_null(self) -> bool:
        """Whether the teacher is also called without condition."""
        return self.guidance_scale != 1 and not self.form.is_auto

    @property
    def words(self) -> str:
        """The settings in a few words, like: guidance 2 (apg, 0.2 < t <= 0.6)."""
        name = "autoguidance" if self.form.is_auto else "guidance"
        more = f" ({', '.join(self.form.words)})" if self.form.words else ""
        scaled = "" if self.epsilon_scale == 1 else f", epsilon scale {self.epsilon_scale:g}"
        return f"{name} {self.guidance_scale:g}{more}{scaled}"

    @property
    def more_words(self) -> str:
        """`words`, or nothing if there is no more than `guidance_scale`."""
        return "" if self == FieldSettings(self.guidance_scale) else self.words

    @property
    def recorded(self) -> GuidanceSpec | None:
        """`guidance` without the place of the weak model, which must be identified by its digest."""
        return None if self.guidance is None else self.guidance.model_copy(update={"weak": None, "weak_path": None})

    def identity(self, weak_digest: str | None) -> str:
        """Text that is equal for equal settings; empty if there is nothing but `guidance_scale`."""
        if self.guidance is None and self.epsilon_scale == 1:
            return ""
        guidance = None if self.recorded is None else self.recorded.model_dump(mode="json", exclude_defaults=True)
        return json.dumps([guidance, weak_digest, self.epsilon_scale])

    def network_calls(self, solver: str, t_grid: Sequence[float]) -> int:
        """Network calls per sample of a solver along `t_grid`, in linear-path time. An increasing grid ends at noise.

        InputError if guidance has an interval and the calls of the solver cannot be counted; see `nfe`.
        """
        found = find_solver(solver)
        if self.varies:
            low, high = bounds(self.interval)
            times = nfe.times_of_calls(solver, t_grid)
            return len(times) + sum(low < t <= high for t in times)
        calls = found.calls if t_grid[0] > t_grid[-1] else found.calls_inverting
        assert calls is not None, "checks.check lets no such stage through"
        return per_velocity(self.guidance_scale) * calls(len(t_grid) - 1)


UNCHANGED = FieldSettings()


def input_mistake(
    wanted: GuidanceRange | None, own: GuidanceRange | None, teacher: GuidanceRange | None, needs: Collection[str]
) -> str | None:
    """What is wrong with the guidance scale as an input of a train stage's student; None: nothing.

    wanted: the range in the options of its recipe. own: that of the network it starts from. teacher: that of its
    teacher. needs: of the recipe.
    """
    if wanted is not None:
        if own in (None, wanted):
            return None
        return (
            f"guidance_scale: {_listed(wanted)} given, but the network that this stage starts from takes scales from "
            f"{own[0]:g} to {own[1]:g}; give the same range"
        )
    if own is None:
        if teacher is None or "teacher" not in needs or "pairs" in needs:
            return None
        return (
            f"the teacher takes guidance scales from {teacher[0]:g} to {teacher[1]:g} as an input, but the network "
            "that this stage starts from takes none; start from the teacher"
        )
    given = f"the network that this stage starts from takes guidance scales from {own[0]:g} to {own[1]:g}, but"
    if "pairs" in needs:
        return f"{given} the pairs that it is trained on have one scale; start from another network"
    if "teacher" in needs and teacher == own:
        return None
    return (
        f"{given} what it is trained on does not depend on them; set options.guidance_scale to {_listed(own)}, or name "
        "as the teacher a student that takes the same scales"
    )


def _listed(guidance_range: GuidanceRange) -> str:
    return "[{:g}, {:g}]".format(*guidance_range)


def mistakes(settings: FieldSettings, prefix: str, scale: str = "guidance_scale") -> Iterator[str]:
    """The mistakes in the settings of a stage that can be found without the rest of the spec. scale: its name."""
    guidance, where = settings.guidance, f"{prefix}guidance"
    if guidance is None:
        return
    if settings.guidance_scale == 1:
        yield f"{where}: has no effect with {scale}: 1; remove it, or set another {scale}"
    if guidance == GuidanceSpec():
        yield f"{where}: has no effect, because it is classifier-free guidance at all times; remove it, or set a field"
    if guidance.interval is not None:
        low, high = guidance.interval
        if not low < high:
            yield f"{where}.interval: {[low, high]} given; the first time must be less than the second, like [0.2, 0.6]"
        elif guidance.interval == ALWAYS:
            yield f"{where}.interval: has no effect, because [0, 1] are all times; remove it"
    if guidance.rescale is not None and guidance.form != "rescaled":
        yield f"{where}.rescale: has no effect with form: {guidance.form or 'cfg'}; remove it, or use form: rescaled"
    if guidance.norm_limit is not None and guidance.form != "apg":
        yield f"{where}.norm_limit: has no effect with form: {guidance.form or 'cfg'}; remove it, or use form: apg"
    if guidance.guidance_scale_2 is not None and guidance.is_auto:
        yield (
            f"{where}.guidance_scale_2: {guidance.guidance_scale_2:g} cannot be combined with autoguidance; remove it, "
            f"or remove {'weak' if guidance.weak is not None else 'weak_path'}"
        )
    if guidance.weak is not None and guidance.weak_path is not None:
        yield f"{where}: weak and weak_path are both given, but there is only one weak model; remove one"
    if guidance.is_auto and guidance.form is not None:
        yield (
            f"{where}.form: {guidance.form} cannot be combined with autoguidance; remove it, or remove "
            f"{'weak' if guidance.weak is not None else 'weak_path'}"
        )
