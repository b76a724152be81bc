"""Context managers that keep what libraries print out of the output of commands."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextmanager
def without_bars() -> Iterator[None]:
    """diffusers and transformers show no progress bars for each component."""
    kinds = (diffusers_logging, transformers_logging)
    for each in kinds:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in kinds:
            each.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """The same, and diffusers shows no warnings."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
