"""What a version of distill cannot resume, and which version can."""

from distill.core.errors import InputError
from distill.core.text import short

DRAWS = 2
"""version of the random numbers that training draws (`draws.StepDraw`): a training ends with those it began with"""

LAST_WITH = {1: "0.1.0"}  # the last version of distill that draws these


def require_same_draws(found: object, what: str) -> None:
    """InputError unless `what` was begun with the draws of this version. found: as a file says."""
    if not isinstance(found, int) or found < 1:
        raise InputError(
            f"{what} says that its version of the training random numbers is {short(repr(found))}; valid: a whole "
            "number from 1 on. It is damaged; start another run"
        )
    if found != DRAWS:
        able = f"distill {LAST_WITH[found]}" if found in LAST_WITH else "a newer version of distill"
        raise InputError(
            f"{what} began with version {found} of the training random numbers; this distill draws version {DRAWS}, "
            f"and would train another student. Resume it with {able}, or start another run"
        )
