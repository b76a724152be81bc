"""Features of images, from a small classifier that is trained on the run's own data. The distance is named "FD-<data>".

If the data has several classes, the classifier learns them. Otherwise it learns which of four rotations was applied to
an image (Gidaris et al. 2018, arXiv 1803.07728), or which of two if images are not square. Training runs on the CPU,
takes seconds and needs no download. It depends on the data alone, and the network is cached, so all runs on the same
data measure with the same network. Distances can be compared only with distances of the same name.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.atomic import write_atomic
from distill.core.printing import warn
from distill.core.regular_files import open_regular
from distill.data import DataSet
from distill.flow.draws import key, permutation

VERSION = 1  # of the network and its training; part of the key of the cache
DIM = 64
BATCH = 128
TRAIN_IMAGES = 40_000
HELD_OUT = 10  # every tenth image is held out, to measure the accuracy
MAX_HELD_OUT = 6_000
MAX_REFERENCE = 60_000
CHUNK, CHUNK_BYTES = 512, 1 << 29  # most images, and float32 pixels, that are read and passed to the network at once
LEARNING_RATE = 8e-3


class Classifier(nn.Module):
    """Convolutions until the longer side is at most 4, a layer of DIM features, and a linear layer of logits."""

    def __init__(self, channels: int, sides: tuple[int, int], classes: int) -> None:
        super().__init__()
        stride = 2 if max(sides) > 16 else 1
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, stride=stride, padding=1), nn.SiLU()]
        width, (height, length) = 32, (-(-side // stride) for side in sides)
        while max(height, length) > 4:
            layers += [nn.Conv2d(width, 64, 3, stride=2, padding=1), nn.SiLU()]
            width, height, length = 64, -(-height // 2), -(-length // 2)
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * height * length, DIM), nn.SiLU())
        self.head = nn.Linear(DIM, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> logits [B, classes]."""
        return self.head(self.trunk(images))


@dataclass(frozen=True)
class Features:
    """A trained feature network and the features of the real data."""

    name: str  # "FD-digits"
    digest: str  # of the data and of VERSION
    task: str  # "classes" | "rotations"
    accuracy: float  # of the classifier, on held-out images
    network: Classifier
    reference: Tensor  # [N, DIM] float32, shuffled: the first rows represent all

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, C, H, W], which are clamped to [-1, 1] like in a picture -> features [N, DIM] on the CPU."""
        return _features(self.network, images)


def prepare(data: DataSet, folder: Path) -> Features:
    """The feature network of `data`, read from `folder`, or trained and stored there."""
    digest = hashlib.sha256(f"{VERSION}/{data.digest}".encode()).hexdigest()[:16]
    path = folder / f"features-{digest}.safetensors"
    classes = _classes(data)
    channels, *sides = data.shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key("features", digest))
        network = Classifier(channels, (sides[0], sides[1]), classes or len(_turns(data)))
    kept = _kept(path, network, min(len(data), MAX_REFERENCE))
    if kept is not None:
        tensors, accuracy = kept
    else:
        accuracy = _train(network, data, digest)
        chunks = _chunks(permutation(len(data), "reference", digest)[:MAX_REFERENCE].tolist(), data.shape)
        reference = torch.cat([_features(network, data.items(0, indices)[0]) for indices in chunks])
        tensors = {**network.state_dict(), "reference": reference}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save(tensors, metadata={"accuracy": repr(accuracy)}))
    reference = tensors.pop("reference")
    network.load_state_dict(tensors)
    return Features(
        f"FD-{data.name}", digest, "classes" if classes else "rotations", accuracy, network.eval(), reference
    )


def _kept(path: Path, network: Classifier, rows: int) -> tuple[dict[str, Tensor], float] | None:
    """The tensors and the accuracy in a file; None if there is no file, or (with a warning) if it is damaged."""
    try:
        open_regular(path).close()
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            accuracy = float((file.metadata() or {}).get("accuracy", ""))
    except FileNotFoundError:
        return None
    except (OSError, safetensors.SafetensorError, ValueError):
        tensors, accuracy = {}, 0.0
    wanted = {name: each.shape for name, each in network.state_dict().items()} | {"reference": (rows, DIM)}
    fits = {name: each.shape for name, each in tensors.items()} == wanted and 0 <= accuracy <= 1
    if fits and all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in tensors.values()):
        return tensors, accuracy
    warn(f"{path} is damaged; its feature network is trained again")
    return None


def _features(network: Classifier, images: Tensor) -> Tensor:
    with torch.no_grad():
        parts = images.split(_chunk(tuple(images.shape[1:])))
        return torch.cat([network.trunk(rows.float().cpu().clamp(-1, 1)) for rows in parts])


def _chunk(shape: tuple[int, ...]) -> int:
    """How many images of this shape are read and passed to the network at once."""
    return max(1, min(CHUNK, CHUNK_BYTES // (4 * math.prod(shape))))


def _chunks(indices: list[int], shape: tuple[int, ...]) -> Iterator[list[int]]:
    size = _chunk(shape)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _train(network: Classifier, data: DataSet, digest: str) -> float:
    """Train in place. Returns the accuracy on the held-out images."""
    order = permutation(len(data), "features", digest)
    is_held_out = torch.arange(len(data)) % HELD_OUT == 0
    train, held_out = order[~is_held_out], order[is_held_out]
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    steps = TRAIN_IMAGES // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for images, labels in _stream(data, train, steps, digest):
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right = total = 0
    with torch.no_grad():
        for indices in _chunks(held_out[:MAX_HELD_OUT].tolist(), data.shape):
            images, labels = _with_task(data, 0, indices)
            right += int((network(images).argmax(1) == labels).sum())
            total += len(labels)
    return right / total


def _stream(data: DataSet, indices: Tensor, steps: int, digest: str) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` full batches from shuffled epochs of `indices`; a set smaller than a batch is one batch."""
    size = min(BATCH, len(indices))
    per_epoch = len(indices) // size
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            order = indices[permutation(len(indices), "features", digest, epoch)]
        yield _with_task(data, epoch, order[position * size : (position + 1) * size].tolist())


def _classes(data: DataSet) -> int | None:
    """The number of classes, or None if there is at most one. Prompts are not classes."""
    if data.prompts is not None:
        return None
    return data.num_classes if data.num_classes is not None and data.num_classes > 1 else None


def _with_task(data: DataSet, epoch: int, indices: list[int]) -> tuple[Tensor, Tensor]:
    images, labels, _ = data.items(epoch, indices)
    if labels is not None and _classes(data):
        return images, labels
    turns = _turns(data)
    which = torch.arange(len(images)) % len(turns)
    turned = [image.rot90(turns[int(k)], (1, 2)) for image, k in zip(images, which, strict=True)]
    return torch.stack(turned), which


def _turns(data: DataSet) -> tuple[int, ...]:
    """The rotations to classify, in quarter turns: those that keep the shape."""
    return (0, 1, 2, 3) if data.shape[1] == data.shape[2] else (0, 2)
