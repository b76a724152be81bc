"""The user's metrics of an evaluation: what they say of samples and of real images."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from distill.core.atomic import write_atomic
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.evaluation import order
from distill.evaluation.metrics import own
from distill.evaluation.metrics.own import OwnMetric
from distill.evaluation.metrics.reference import Reference, frechet_of
from distill.evaluation.order import PromptOrder
from distill.evaluation.tally import RowSums
from distill.flow.draws import permutation
from distill.flow.tensor_bytes import in_safetensors
from distill.runs.progress import Progress
from distill.spec.samplingspec import RARE, EvaluateStage
from distill.teachers import LoadedTeacher
from distill.teachers.conditions import CAPTION

CHUNK = 64  # images that a function gets at once
MOST_COMPARED = 1000  # images whose distances from each other are measured: of one prompt, or real ones
REAL = "real.safetensors"  # in the folder of the results
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
    groups: Mapping[str, frozenset[int]] = field(default_factory=dict)  # the numbers of the texts, by name of the group

    def judge(self, images: Tensor, first: int) -> dict[str, Tensor]:
        """What each metric says of consecutive samples [N, C, H, W]. first: the number of the first of them."""
        texts = [self.texts[(first + i) % len(self.texts)] for i in range(len(images))]
        return judged(self.metrics, self.device, [(images, texts)])

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The metrics whose features of real images are known, and these."""
        return {
            name: Reference(name, "", lambda features: features, values, frechet_of)
            for name, values in self.real.items()
            if values.ndim > 1
        }

    def summary(self, found: RowSums) -> dict[str, float]:
        """The numbers of a row by the names of their columns."""
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            if metric.name in found.scores:
                numbers[metric.name] = _statistic(metric, torch.cat(found.scores[metric.name]))
            elif metric.name not in self.references:
                raise RunError(
                    f"the metric {metric.name} returned features, but there are no real images to compare them with; "
                    "evaluate with data that has images, or return one score for each image"
                )
            else:
                measured = self.references[metric.name].measure(found.embedded[metric.name])
                numbers |= {f"{COLUMNS[name]}-{metric.name}": each for name, each in measured.items()}
                numbers |= self._diversity(metric.name, found)
        for name, number in numbers.items():
            if not math.isfinite(number):
                raise RunError(f"{name} is {number}; its function returned values that cannot be compared")
        return numbers

    def by_group(self, found: RowSums) -> dict[str, dict[str, float]]:
        """The scores of the samples whose prompts are in a group: group -> metric -> number."""
        numbers: dict[str, dict[str, float]] = {}
        for group, members in self.groups.items():
            for metric in self.metrics:
                if metric.name not in found.scores:
                    continue
                values = torch.cat(found.scores[metric.name])
                rows = [number for number in range(len(values)) if number % len(self.texts) in members]
                if rows:
                    numbers.setdefault(group, {})[metric.name] = _statistic(metric, values[rows])
        return numbers

    def _diversity(self, name: str, found: RowSums) -> dict[str, float]:
        """The mean distance of two samples of one prompt, divided by that of two real images."""
        repeated = found.by_text(name)
        if not repeated:
            return {}  # there is one sample of each prompt
        within = torch.cat([torch.pdist(each[:MOST_COMPARED]) for each in repeated])
        apart = torch.pdist(self.real[name][:MOST_COMPARED]).mean()
        return {f"diversity-{name}": (within.mean() / apart).item()} if apart > 0 else {}

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
    for name, each in found.items():
        if len(shapes := {tuple(values.shape[1:]) for values in each}) > 1:
            raise RunError(f"the metric {name} returned rows of different shapes: {sorted(map(list, shapes))}")
    return {name: torch.cat(each) for name, each in found.items()}


@dataclass(frozen=True)
class Prepared:
    """What a stage asks for, as far as it is known before there are samples. See `Judges`."""

    metrics: Sequence[OwnMetric]
    order: PromptOrder | None
    texts: Sequence[str] = ()
    groups: Mapping[str, frozenset[int]] = field(default_factory=dict)


def prepare(stage: EvaluateStage, teacher: LoadedTeacher, prompts: Sequence[str] | None) -> Prepared:
    """Loads the metrics of a stage and orders its prompts. InputError if one of them cannot be used.

    prompts: of the teacher's conditions, in their order; None: only their captions are known.
    """
    used = order.of_stage(stage, teacher, prompts)
    if not stage.metrics:
        return Prepared([], used)
    metrics = [own.load(each, stage.medians) for each in stage.metrics]
    if len(teacher.codec.pixels(teacher.shape)) != 3:
        raise InputError(f"metrics: {stage.metrics[0]} has no effect: {teacher.description} has no images")
    texts = _texts(teacher, used, are_captions=prompts is None)
    return Prepared(metrics, used, texts, _groups(stage, texts, texts if used is None else used.texts))


def of_stage(
    stage: EvaluateStage,
    teacher: LoadedTeacher,
    pixels: DataSet | None,
    prompts: Sequence[str] | None,
    device: torch.device,
    stop: StopRequest,
    folder: Path,
) -> tuple[Judges | None, PromptOrder | None]:
    """The metrics of a stage, with what they say of real images, and the order of its prompts; None without them.

    pixels: the real images; None: there are none. folder: where the values of real images are kept. Prompts and errors:
    see `prepare`.
    """
    found = prepare(stage, teacher, prompts)
    return (_with_real(found, stage, pixels, device, stop, folder) if found.metrics else None), found.order


def _with_real(
    found: Prepared,
    stage: EvaluateStage,
    pixels: DataSet | None,
    device: torch.device,
    stop: StopRequest,
    folder: Path,
) -> Judges:
    identity: list[object] = [[each.name, each.statistic, each.digest] for each in found.metrics]
    identity += [stage.prompt_groups, stage.rare_words] if found.groups else []
    if pixels is None:
        return Judges(found.metrics, found.texts, device, {}, json.dumps(identity), found.groups)
    identity.append(pixels.digest)
    path, key = folder / REAL, sha256(json.dumps([identity, stage.samples, device.type]).encode()).hexdigest()
    if (real := _kept(path, key)) is None:
        order = permutation(len(pixels), "judged", pixels.digest)[: stage.samples].tolist()
        real = judged(found.metrics, device, _real(pixels, order, stop))
        with suppress(OSError):  # without it, they are computed again
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, in_safetensors(real, {"key": key}))
    if found.groups and all(each.ndim > 1 for each in real.values()):
        raise InputError(
            "prompt_groups: has no effect, because all metrics return features, and groups show scores; remove it, or "
            "add a metric that returns a score for each image"
        )
    return Judges(found.metrics, found.texts, device, real, json.dumps(identity), found.groups)


def _kept(path: Path, key: str) -> dict[str, Tensor] | None:
    """The values of real images from an earlier process; None if there are none, or if others were asked for."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def _groups(stage: EvaluateStage, texts: Sequence[str], known: Sequence[str]) -> dict[str, frozenset[int]]:
    """The prompts with a word of each group. InputError for a group without samples.

    texts: the prompts that samples use. known: those of the data, in which words are counted.
    """
    used, found = texts[: stage.samples], {}
    for name, words in stage.prompt_groups.items():
        pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
        found[name] = frozenset(number for number, text in enumerate(used) if pattern.search(text))
        if not found[name]:
            raise InputError(f"prompt_groups.{name}: none of the {len(used)} prompts has one of the words {words}")
    if (most := stage.rare_words) is not None:
        counts = Counter(word for text in known for word in _words(text))
        found[RARE] = frozenset(
            number for number, text in enumerate(used) if any(counts[word] <= most for word in _words(text))
        )
        if not found[RARE]:
            raise InputError(
                f"rare_words: none of the {len(used)} prompts has a word that at most {most} of the {len(known)} known "
                "prompts have"
            )
    return found


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _texts(teacher: LoadedTeacher, used: PromptOrder | None, *, are_captions: bool) -> Sequence[str]:
    """The texts that samples use in turn. InputError if prompts that are used are not known.

    are_captions: whether long texts were cut.
    """
    if used is None:
        return [str(number) for number in range(teacher.num_classes or 0)] or [""]
    known = used.texts
    if are_captions:
        known = list(takewhile(lambda text: len(text) < CAPTION, known))
    if max(used.numbers) >= len(known):
        raise InputError(
            f"metrics need the prompts of all samples, but only {len(known)} of {used.count} are known; give them to "
            " `distill eval --prompts`, or use prompts or captions of the spec's data with a cache stage"
        )
    return [known[number] for number in used.numbers]


def _real(pixels: DataSet, order: list[int], stop: StopRequest) -> Iterator[tuple[Tensor, Sequence[str]]]:
    """Real images, and their prompts or class ids."""
    with Progress("real images", len(order), "images", None) as progress:
        for start in range(0, len(order), CHUNK):
            stop.raise_if_requested("the finished rows of the evaluation")
            images, labels, _ = pixels.items(0, order[start : start + CHUNK])
            numbers = [] if labels is None else labels.tolist()
            texts = [str(each) if pixels.prompts is None else pixels.prompts[each] for each in numbers]
            yield images, texts or [""] * len(images)
            progress.update(start + len(images), {})
