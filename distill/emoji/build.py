"""What the training of the emoji teacher begins with: images, an autoencoder, and a pipeline that is not trained."""

from pathlib import Path

from distill.core.stop import StopRequest
from distill.emoji import autoencoder, images, pipeline
from distill.runs import claims
from distill.runs.run_store import RunPaths

IMAGES, AUTOENCODER, UNTRAINED = "images", "autoencoder", "untrained"  # folders


def prepare(folder: Path, steps: int | None = None) -> None:
    """Makes what is missing in `folder`: images/, autoencoder/ and untrained/.

    InputError if a package is missing, and then nothing was written, or if another process does the same. Raises
    Stopped after a signal: the next call goes on. steps: of the autoencoder; None: as many as it needs.
    """
    for name in images.PACKAGES:
        images.package(name)
    folder.mkdir(parents=True, exist_ok=True)
    with claims.claim(RunPaths(folder)):
        _prepare(folder, autoencoder.STEPS if steps is None else steps)


def draw(folder: Path) -> None:
    """Makes images/ in `folder`, which is all that students of a finished teacher need. InputError as `prepare`."""
    for name in images.PACKAGES:
        images.package(name)
    with claims.claim(RunPaths(folder)):
        images.make(folder / IMAGES)


def _prepare(folder: Path, steps: int) -> None:
    if not (folder / IMAGES).exists():
        images.make(folder / IMAGES)
    if not (folder / AUTOENCODER).exists():
        with StopRequest() as stop:
            autoencoder.train(folder / AUTOENCODER, autoencoder.pixels(folder / IMAGES / images.PARTS[0]), stop, steps)
    if not (folder / UNTRAINED).exists():
        pipeline.write(folder / UNTRAINED, folder / AUTOENCODER, images.SIZE // autoencoder.FACTOR)
