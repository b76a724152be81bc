"""What the training of the emoji teacher begins with: images, an autoencoder, and a pipeline that is not trained."""

from pathlib import Path

from distill.core.stop import StopRequest
from distill.emoji import autoencoder, images, pipeline

IMAGES, AUTOENCODER, UNTRAINED = "images", "autoencoder", "untrained"  # folders


def prepare(folder: Path) -> None:
    """Makes what is missing in `folder`: images/, autoencoder/ and untrained/.

    InputError if a package is missing; then nothing was written. Raises Stopped after a signal: the next call goes on.
    """
    for name in images.PACKAGES:
        images.package(name)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / IMAGES).exists():
        images.make(folder / IMAGES)
    if not (folder / AUTOENCODER).exists():
        with StopRequest() as stop:
            autoencoder.train(folder / AUTOENCODER, autoencoder.pixels(folder / IMAGES / images.PARTS[0]), stop)
    if not (folder / UNTRAINED).exists():
        pipeline.write(folder / UNTRAINED, folder / AUTOENCODER, images.SIZE // autoencoder.FACTOR)
