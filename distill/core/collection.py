"""Garbage collection while modules are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Import large packages in this block: without garbage collection, which never looks at their objects later either.

    torch and diffusers create a million objects that live as long as the process. Collecting among them takes a
    seventh of the time of the import, and half a second for each full collection afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
