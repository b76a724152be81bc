"""What a version of distill cannot resume, and which version can."""

from distill.guard import InputError

DRAWS = 2
"""version of the random numbers that training draws (`draws.StepDraw`): a training ends with those it began with"""

LAST_WITH = {1: "0.1.0"}  # the last version of distill that draws these


def require_same_draws(found: int, what: str) -> None:
    """InputError unless `what` was begun with the draws of this version."""
    if found != DRAWS:
        raise InputError(
            f"{what} was begun by a version of distill that draws other random numbers for training (version {found}; "
            f"this one has version {DRAWS}), so it would end in another student; resume it with distill "
            f"{LAST_WITH.get(found, 'of a newer version')}, or start another run"
        )
