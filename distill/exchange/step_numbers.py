"""The numbers of steps of a student: which are possible, and for which it was trained."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distill.core.text import short

if TYPE_CHECKING:
    from distill.exchange.student_card import StudentCard

FEW = (1, 2, 4)  # steps that students are made for if any number is possible
LISTED = 10  # numbers of steps that a model card lists
StepNumber = Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)]
MOST = 100  # numbers of steps that a student is trained for
# one number as it is, which earlier versions can read, and several as a list
TrainedSteps = StepNumber | Annotated[list[StepNumber], Field(min_length=2, max_length=MOST)]


def compact(numbers: Collection[int]) -> int | list[int] | None:
    """Numbers of steps as a card has them: None, one number, or a list."""
    return min(numbers, default=None) if len(numbers) < 2 else sorted(numbers)


def listed(trained: int | list[int] | None) -> list[int]:
    """The inverse of `compact`."""
    return [] if trained is None else [trained] if isinstance(trained, int) else trained


def refuse_trained(trained: list[int], possible: Collection[int]) -> None:
    """Raise ValueError unless the numbers increase, and are among the possible ones. possible: empty: any."""
    if trained != sorted({*trained}) or len(trained) > MOST:
        raise ValueError(f"trained_steps: {short(str(trained))} given; valid: at most {MOST} numbers, which increase")
    if impossible := [steps for steps in trained if possible and steps not in possible]:
        raise ValueError(f"trained_steps: {impossible[0]} given; valid, by t_grids: {in_words(possible)}")


def in_words(numbers: Iterable[int]) -> str:
    """Numbers of steps, like: 1, 2 and 4 steps."""
    *others, last = map(str, sorted(numbers))
    return f"{', '.join(others)} and {last} steps" if others else f"{last} step{'s' if last != '1' else ''}"


def untrained(card: "StudentCard", asked: Collection[int]) -> str:
    """A warning that a student is sampled in numbers of steps for which it was not trained; empty: it is not."""
    other = {*asked} - {*card.trained_for} if card.trained_for else set()
    if not other:
        return ""
    return (
        f"this student was trained for {in_words(card.trained_for)}, and is sampled in {in_words(other)}; that is "
        "possible, but its training did not aim at it"
    )


def to_measure(card: "StudentCard") -> list[int]:
    """The numbers of steps in which a student is measured by default."""
    few = [steps for steps in FEW if not card.trained_for or steps in card.trained_for]
    return sorted(card.t_grids) or few or card.trained_for


def supported(card: "StudentCard") -> str:
    """The numbers of steps for which the pipeline of the student's class samples it as distill does, in words."""
    found = None if card.stock is None else card.stock.steps
    if found is None:
        return ", ".join(map(str, sorted(card.t_grids))) or "any number"
    few = found[:LISTED]
    return ", ".join(map(str, few)) + (", and others" if few != found else "")


def of_call(card: "StudentCard") -> int:
    """A number of steps for the example of a call of the pipeline."""
    found = None if card.stock is None else card.stock.steps
    return min({*found} & {*card.made_for} or {found[0]}) if found else card.fewest_steps
