"""Weights & Biases: one W&B run for a run, in which each stage has metrics STAGE/NAME over its own STAGE/images.

W&B reads its settings from its own environment variables and files: WANDB_MODE=offline writes to the tracker's folder
and needs neither a network nor an account; WANDB_PROJECT names the project, which is otherwise called distill.
"""

import io
from collections.abc import Mapping

import wandb

from distill.trackers import TrackedMoment, TrackedRun

VIEW = "see the run's page at W&B; if it was written offline, upload it first: wandb sync {folder}/wandb/offline-run-*"


def start(run: TrackedRun) -> "WeightsAndBiases":
    return WeightsAndBiases(run)


class WeightsAndBiases:
    """Logs to a W&B run. Tracking again replaces that run, which has the same id each time."""

    def __init__(self, run: TrackedRun) -> None:
        # This process is not the training: its output and its use of the machine say nothing about the run.
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        self._run = wandb.init(
            dir=str(run.folder),
            project=wandb.setup().settings.project or "distill",
            id=run.key,
            name=run.name,
            config=dict(run.spec),
            settings=settings,
        )
        self._known: set[str] = set()

    def metrics(self, at: TrackedMoment, values: Mapping[str, float]) -> None:
        self._log(at, values)

    def rewind(self, at: TrackedMoment) -> None:
        """W&B cannot remove points: a curve then goes back, and continues from there."""

    def note(self, at: TrackedMoment, text: str) -> None:
        self._run.log({f"{at.stage}/notes": text})

    def picture(self, at: TrackedMoment, name: str, png: bytes) -> None:
        from PIL import Image  # only now, since most commands do without it

        self._log(at, {name: wandb.Image(Image.open(io.BytesIO(png)))})

    def flush(self) -> None: ...  # it sends everything by itself

    def close(self) -> None:
        self._run.finish()

    def _log(self, at: TrackedMoment, values: Mapping[str, object]) -> None:
        axis = f"{at.stage}/{at.unit}"
        named = {f"{at.stage}/{name}": value for name, value in values.items()}
        for name in named.keys() - self._known:
            self._run.define_metric(name, step_metric=axis)
        self._known |= named.keys()
        self._run.log({axis: at.done, **named})
