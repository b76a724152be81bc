"""Garbage collection while modules are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Context manager for the import of large packages: turns garbage collection off, and lets it skip their objects.

    torch and diffusers create a million objects that live as long as the process. Otherwise garbage collection would
    take a seventh of the import time, and each full collection afterwards half a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
