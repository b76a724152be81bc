"""Short trainings on a device, for the parts of the GPU smoke test."""

import os
import socket
import tempfile
from pathlib import Path

import torch

from distill.testing import Subject
from distill.testing.training import train
from distill.training.world import World
from tests.gpu.parts import Part

MOVES = 5  # updates of the student


def losses(subject: Subject, part: Part, **options: object) -> list[float]:
    """The losses of all networks in each step of a training."""
    with tempfile.TemporaryDirectory() as folder:
        options.setdefault("device", part.device)
        _, steps = train(subject, Path(folder), moves=MOVES, **options)
    return [value for step in steps for name, value in sorted(step.items()) if name.split(".")[-1] == "loss"]


def one_rank(device: torch.device) -> World:
    """A group of one process, which DeepSpeed needs; with a GPU, over NCCL."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    return World.join(device, 2.0, 0, print)
