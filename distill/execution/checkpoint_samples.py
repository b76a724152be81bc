"""Draws samples of a train stage's student from one of its checkpoints, always from the same noise."""

import tempfile
from pathlib import Path

import torch

from distill.core.errors import InputError
from distill.evaluation.sample import write_samples
from distill.exchange import student_card
from distill.execution import train_stage
from distill.runs import cached
from distill.runs.run_store import RunPaths
from distill.spec.model import RunSpec, TrainStage
from distill.training.checkpoint_files import complete, step_of

SEED = 0


def draw(
    run: RunPaths, spec: RunSpec, stage: str, step: int, *, count: int, device: torch.device
) -> tuple[int, bytes] | None:
    """(images that the checkpoint was trained with, picture of `count` samples as PNG).

    None if the checkpoint no longer exists, or if the stage does not train. The student has the weights that the stage
    exports, and is sampled in the fewest steps that it supports. InputError if it cannot be sampled, for example
    because there are no prompts.
    """
    trained, checkpoints = spec.stages.get(stage), run.stage(stage).checkpoints
    if not isinstance(trained, TrainStage) or not _exists(checkpoints, step):
        return None
    with tempfile.TemporaryDirectory(prefix="distill-") as temporary:
        folder, picture = Path(temporary) / "student", Path(temporary) / "samples.png"
        try:
            train_stage.export_checkpoint(run, spec, stage, trained.export, folder, step)
        except InputError:
            if _exists(checkpoints, step):
                raise
            return None  # the training has deleted it meanwhile
        card = student_card.read(folder)
        like = cached.with_conditions(spec, run).teacher
        steps = card.fewest_steps
        write_samples(folder, picture, steps=steps, seed=SEED, count=count, labels=None, device=device, like=like)
        return card.images, picture.read_bytes()


def _exists(checkpoints: Path, step: int) -> bool:
    return step in map(step_of, complete(checkpoints))
