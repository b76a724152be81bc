"""Which runs this version of distill can resume, and which version can resume the others."""

from distill.core.errors import InputError
from distill.core.text import short

DRAWS = 3
"""Version of the random numbers in training (`draws.StepDraw`). A training must use one version from start to end."""

LAST_WITH = {1: "0.1.0", 2: "0.2.0"}  # version of the random numbers -> the last version of distill that uses it


def require_same_draws(found: object, what: str) -> None:
    """Raise InputError unless `what` was started with the random numbers of this version.

    found: the version that its file records.
    """
    if not isinstance(found, int) or found < 1:
        raise InputError(
            f"{what} is damaged: its version of the random numbers for training is {short(repr(found))}, but must be a "
            "whole number, at least 1; start another run"
        )
    if found != DRAWS:
        able = f"distill {LAST_WITH[found]}" if found in LAST_WITH else "a newer version of distill"
        raise InputError(
            f"{what} was started with version {found} of the random numbers for training, but this distill uses "
            f"version {DRAWS} and would train a different student. Resume it with {able}, or start another run"
        )
