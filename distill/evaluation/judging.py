"""The user's metrics of an evaluation: what they say of samples and of real images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.errors import InputError
from distill.data import DataSet
from distill.evaluation.metrics import own
from distill.evaluation.metrics.frechet import frechet
from distill.evaluation.metrics.own import OwnMetric
from distill.evaluation.metrics.reference import Reference
from distill.flow.conditioning import ConditionTable
from distill.flow.draws import permutation
from distill.spec.samplingspec import EvaluateStage
from distill.teachers import LoadedTeacher

CHUNK = 64  # images that a function gets at once
COLUMNS = {"distance": "FD", "kid": "KID", "precision": "precision", "recall": "recall"}  # of a metric's features


@dataclass(frozen=True)
class Judges:
    """The metrics of an evaluation.

    texts: the prompts, which samples use in turn. real: what the metrics say of real images, by name; empty: there are
    none. identity: text that differs if the metrics or the real images do.
    """

    metrics: Sequence[OwnMetric]
    texts: Sequence[str]
    device: torch.device
    real: Mapping[str, Tensor]
    identity: str

    def judge(self, images: Tensor, first: int) -> dict[str, Tensor]:
        """What each metric says of consecutive samples [N, C, H, W]. first: the number of the first of them."""
        texts = [self.texts[(first + i) % len(self.texts)] for i in range(len(images))]
        return judged(self.metrics, self.device, [(images, texts)])

    def summary(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers of a row by the names of their columns. found: what each metric says of all its samples."""
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            values = found[metric.name]
            if values.ndim == 1:
                numbers[metric.name] = _statistic(metric, values)
            elif metric.name in self.real:
                real = Reference(metric.name, "", lambda features: features, self.real[metric.name], frechet)
                numbers |= {f"{COLUMNS[name]}-{metric.name}": each for name, each in real.measure(values).items()}
        return numbers

    def of_real(self) -> dict[str, float]:
        """The scores of real images."""
        scores = {metric: self.real[metric.name] for metric in self.metrics if metric.name in self.real}
        return {metric.name: _statistic(metric, each) for metric, each in scores.items() if each.ndim == 1}


def _statistic(metric: OwnMetric, scores: Tensor) -> float:
    return (scores.double().quantile(0.5) if metric.statistic == "median" else scores.double().mean()).item()


@torch.no_grad()
def judged(
    metrics: Sequence[OwnMetric], device: torch.device, parts: Iterable[tuple[Tensor, Sequence[str]]]
) -> dict[str, Tensor]:
    """What each metric says of images, given as ([N, C, H, W] in any range, their N texts)."""
    found: dict[str, list[Tensor]] = {metric.name: [] for metric in metrics}
    for images, texts in parts:
        for start in range(0, len(images), CHUNK):
            shown = images[start : start + CHUNK].to(device).float().clamp(-1, 1)
            for metric in metrics:
                found[metric.name].append(metric(shown, texts[start : start + CHUNK]))
    return {name: torch.cat(each) for name, each in found.items()}


def of_stage(
    stage: EvaluateStage,
    teacher: LoadedTeacher,
    pixels: DataSet | None,
    prompts: Sequence[str] | None,
    device: torch.device,
) -> Judges | None:
    """The metrics that a stage asks for; None if it asks for none. InputError if they cannot be loaded or used.

    pixels: the real images. prompts: of the teacher's conditions, in their order; None: not known.
    """
    if not stage.metrics:
        return None
    metrics = [own.load(each, stage.medians) for each in stage.metrics]
    if len(teacher.codec.pixels(teacher.shape)) != 3:
        raise InputError(f"metrics: {stage.metrics[0]} has no effect: {teacher.description} has no images")
    texts = _texts(stage, teacher, prompts)
    identity = [[each.name, each.statistic, each.digest] for each in metrics]
    if pixels is None:
        return Judges(metrics, texts, device, {}, json.dumps(identity))
    order = permutation(len(pixels), "judged", pixels.digest)[: stage.samples].tolist()
    real = judged(metrics, device, (_real(pixels, order[i : i + CHUNK]) for i in range(0, len(order), CHUNK)))
    return Judges(metrics, texts, device, real, json.dumps([*identity, pixels.digest]))


def _texts(stage: EvaluateStage, teacher: LoadedTeacher, prompts: Sequence[str] | None) -> Sequence[str]:
    """The text of each condition. InputError if prompts that are used are not known."""
    if not isinstance(teacher.given, ConditionTable):
        return [str(number) for number in range(teacher.num_classes or 0)] or [""]
    count = teacher.given.count
    known = prompts if prompts is not None and len(prompts) == count else teacher.given.prompts
    if len(known) < min(count, stage.samples):
        raise InputError(
            f"metrics need the prompts of all samples, but only the first {len(known)} of {count} are known; give them "
            "to `distill eval --prompts`, or use data with captions and a cache stage"
        )
    return known


def _real(pixels: DataSet, indices: list[int]) -> tuple[Tensor, Sequence[str]]:
    """Real images, and their prompts or class ids."""
    images, labels, _ = pixels.items(0, indices)
    if labels is None:
        return images, [""] * len(images)
    return images, [str(each) if pixels.prompts is None else pixels.prompts[each] for each in labels.tolist()]
