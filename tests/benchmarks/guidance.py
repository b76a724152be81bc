"""Adaptive guidance and CADS, which are in this file only, against the guidance of `distill.flow.guidance`, on MNIST.

Adaptive guidance (Castillo et al. 2023, arXiv 2312.12487) stops guiding once the predictions with and without the
condition agree: when the cosine between them exceeds a limit. Deviation: the cosine of the velocities instead of the
noise predictions, which are both x at t = 1. Either all samples stop at the same time, found on 32 samples, or each
sample stops by itself.

CADS (Sadat et al. 2023, arXiv 2310.17347) adds noise to the condition, here the class embedding, at early times. The
mean and standard deviation are restored for each sample, not for the batch. The null embedding stays as it is.

All are measured with the same noises and classes. `python -m tests.benchmarks.guidance RUN [SEED]` uses the teachers of
an earlier run.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data import load_data
from distill.evaluation.metrics import features
from distill.evaluation.metrics.reference import of_images
from distill.flow.draws import generator, sample_labels, sample_noise
from distill.flow.fields import Counted
from distill.flow.guidance import cfg
from distill.flow.solvers import grid_of, on_linear_path, solve
from distill.protocols import Cond, VelocityField
from distill.spec import presets
from distill.spec.guidancespec import ALWAYS, FieldSettings, GuidanceSpec, Interval
from distill.spec.model import CheckpointTeacher, MnistData
from distill.teachers import LoadedTeacher, load_teacher

SOLVER, STEPS = "ab3", 12
SAMPLES, BLOCK, PROBE = 1000, 50, 32
SCALES = (2.0, 4.0)
INTERVAL = (0.1, 0.6)
LIMITS = (0.995, 0.998)  # of the cosine of two velocities
CADS = ((0.6, 0.9, 0.25), (0.8, 1.0, 0.1))  # (low, high, noise)
CLASSES = 10
CPU = torch.device("cpu")

TRAINED = {"teach": (38_400, 4000), "weak": (6_400, 1000)}  # stage -> images, half-life of the average in images


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine between a and b [B, ...] per sample, [B]."""
    return nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double(), dim=1)


class StopsItself:
    """Classifier-free guidance that stops for good, for each sample, once the cosine exceeds the limit.

    Has state: use one object per solve.
    """

    def __init__(self, teacher: LoadedTeacher, scale: float, limit: float) -> None:
        self.field, self.null, self.scale, self.limit = on_linear_path(teacher.field), teacher.null, scale, limit
        self.interpolant, self.t_range = self.field.interpolant, self.field.t_range
        self.stopped = torch.zeros(0, dtype=torch.bool)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if not len(self.stopped):
            self.stopped = torch.zeros(len(x_t), dtype=torch.bool)
        v, rows = self.field(x_t, t, cond), (~self.stopped).nonzero().squeeze(1)
        if not len(rows):
            return v
        null = {name: value[rows] for name, value in self.null(cond).items()}
        v_null = self.field(x_t[rows], t[rows], null)
        self.stopped[rows] = cosine(v[rows], v_null) > self.limit
        return v.index_copy(0, rows, cfg(x_t[rows], t[rows], v[rows], v_null, self.scale))


def cosines(teacher: LoadedTeacher, scale: float) -> dict[float, tuple[float, float, float]]:
    """Time -> mean cosine of the velocities, noise and data predictions on guided paths of 32 other samples."""
    found: dict[float, tuple[float, float, float]] = {}
    field = on_linear_path(teacher.field)

    class Watched:
        interpolant, t_range = field.interpolant, field.t_range

        def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            v, v_null = field(x_t, t, cond), field(x_t, t, teacher.null(cond))
            (d, e), (d_null, e_null) = (self.interpolant.split(x_t, each, t) for each in (v, v_null))
            pairs = ((v, v_null), (e, e_null), (d, d_null))
            found[t[0].item()] = tuple(cosine(*pair).mean().item() for pair in pairs)
            return cfg(x_t, t, v, v_null, scale)

    noise, cond = sample_noise(1, range(PROBE), teacher.shape), {"class_labels": sample_labels(range(PROBE), CLASSES)}
    solve(Watched(), noise, cond, solver=SOLVER, steps=STEPS)
    return found


def stop_interval(times: list[float], found: list[float], limit: float) -> Interval:
    """The times at which to guide: up to the first one at which the cosine exceeds the limit, and at this one.

    found: the cosine at each of the decreasing times, without the last one, which is 0.
    """
    first = next((i for i, value in enumerate(found) if value > limit), len(found) - 1)
    return (times[first + 1], 1.0)


def gamma(t: Tensor, low: float, high: float) -> Tensor:
    """The share of the condition's variance that is kept at t [B]: 1 up to `low`, 0 from `high` on."""
    return ((high - t) / (high - low)).clamp(0, 1)


def annealed(y: Tensor, noise: Tensor, kept: Tensor, scale: float) -> Tensor:
    """sqrt(kept) y + scale sqrt(1 - kept) noise, with the mean and standard deviation of y per sample; y [B, D]."""
    mixed = kept.sqrt()[:, None] * y + scale * (1 - kept).sqrt()[:, None] * noise
    unit = (mixed - mixed.mean(1, keepdim=True)) / mixed.std(1, keepdim=True)
    return unit * y.std(1, keepdim=True) + y.mean(1, keepdim=True)


class NoisyEmbedding(nn.Module):
    """A class embedding with noise, at the times `t` [B]. The noise depends on the order of the calls."""

    def __init__(self, embedding: nn.Module, null_class: int, low: float, high: float, scale: float) -> None:
        super().__init__()
        self.embedding, self.null_class, self.scale = embedding, null_class, scale
        self.low, self.high, self.t, self.random = low, high, torch.zeros(0), generator("cads")

    def forward(self, labels: Tensor) -> Tensor:
        y = self.embedding(labels)
        kept = gamma(self.t, self.low, self.high).to(y.dtype)
        changed = annealed(y, torch.randn(y.shape, generator=self.random), kept, self.scale)
        return torch.where(((labels == self.null_class) | (kept == 1))[:, None], y, changed)


class CadsField:
    """The field of a network whose class embedding is replaced during each call."""

    def __init__(self, teacher: LoadedTeacher, embedding: NoisyEmbedding) -> None:
        self.field, self.network, self.embedding = teacher.field, teacher.network, embedding
        self.interpolant, self.t_range = teacher.field.interpolant, teacher.field.t_range

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.embedding.t, self.network.class_embedding = t, self.embedding
        try:
            return self.field(x_t, t, cond)
        finally:
            self.network.class_embedding = self.embedding.embedding


def cads(teacher: LoadedTeacher, scale: float, low: float, high: float, noise: float) -> VelocityField:
    embedding = NoisyEmbedding(teacher.network.class_embedding, teacher.null_class, low, high, noise)
    return replace(teacher, field=CadsField(teacher, embedding)).guided(scale)


@dataclass(frozen=True)
class Row:
    name: str
    scale: float
    field: Callable[[], VelocityField]  # makes the field for one solve


def rows(teacher: LoadedTeacher) -> Iterator[Row]:
    """The fields that are compared, those of each guidance scale together."""
    yield built(teacher, "no guidance", 1.0)
    yield from noisy(teacher, 1.0)
    for scale in SCALES:
        yield built(teacher, "cfg", scale)
        yield built(teacher, "interval {:g} {:g}".format(*INTERVAL), scale, GuidanceSpec(interval=INTERVAL))
        for form in ("zero_star", "apg", "rescaled", "renormalised"):
            yield built(teacher, form, scale, GuidanceSpec(form=form))
        yield built(teacher, "autoguidance", scale, GuidanceSpec(weak="weak"))
        yield from adaptive(teacher, scale)
        yield from noisy(teacher, scale)


def built(teacher: LoadedTeacher, name: str, scale: float, guidance: GuidanceSpec | None = None) -> Row:
    """Guidance of `distill.flow.guidance`."""
    return Row(name, scale, lambda: teacher.field_with(FieldSettings(scale, guidance)))


def adaptive(teacher: LoadedTeacher, scale: float) -> Iterator[Row]:
    """Adaptive guidance, once with a time for all samples, once with a time for each."""
    found, times = cosines(teacher, scale), grid_of(teacher.field, STEPS)
    said = ", ".join(f"{t:.2f}: {v:.4f} {e:.4f} {d:.4f}" for t, (v, e, d) in found.items())
    print(f"w = {scale:g}, t: cosine of velocities, noise, data: {said}", flush=True)
    for limit in LIMITS:
        interval = stop_interval(times, [v for v, _, _ in found.values()], limit)
        if interval != ALWAYS:
            name = f"adaptive {limit:g}, t > {interval[0]:.2f}"
            yield built(teacher, name, scale, GuidanceSpec(interval=interval))
        yield Row(f"adaptive {limit:g}, each", scale, partial(StopsItself, teacher, scale, limit))


def noisy(teacher: LoadedTeacher, scale: float) -> Iterator[Row]:
    for settings in CADS:
        yield Row("cads {:g} {:g} {:g}".format(*settings), scale, partial(cads, teacher, scale, *settings))


def trained(folder: Path) -> Path:
    """A run below `folder` with a small class-conditional teacher of MNIST, and the weak model of autoguidance."""
    head, _, rest = (presets.folder() / "mnist.yaml").read_text().partition("  teach:\n")
    stage = rest.partition("  pairs:\n")[0]
    (folder / "guidance.yaml").write_text(head + "".join(f"  {name}:\n{stage}" for name in TRAINED))
    command = [sys.executable, "-m", "distill", "run", "guidance.yaml", "--name", "guidance", "--store", "runs"]
    for name, (images, half_life) in TRAINED.items():
        changes = {"network": "{kind: unet, channels: [16, 32, 64]}", "images": images, "export": half_life}
        changes |= {"ema_half_lives": [half_life], "optimizer.warmup_images": images // 20}
        command += [f"stages.{name}.{key}={value}" for key, value in changes.items()]
    subprocess.run([*command, f"launch.threads={torch.get_num_threads()}"], cwd=folder, check=True)
    return folder / "runs" / "guidance"


def measure(run: Path, seed: int = 0) -> None:
    """Prints a line for each field: network calls per sample, and the metrics of its samples."""
    paths = (str(run / "students" / name) for name in TRAINED)
    teacher, weak = (load_teacher(CheckpointTeacher(path=path), CPU) for path in paths)
    counters = [Counted(each.field) for each in (teacher, weak)]
    teacher = replace(teacher, field=counters[0], weak=replace(weak, field=counters[1]))
    data = load_data(MnistData(kind="mnist"), 0)
    reference, classifier = of_images(data, run), features.prepare(data, run).network
    print(f"{'':27s}{'w':>3s}{'calls':>7s}{'FD':>8s}{'precision':>11s}{'recall':>8s}{'class':>8s}", flush=True)
    for row in rows(teacher):
        for each in counters:
            each.rows = 0
        parts = []
        for start in range(0, SAMPLES, BLOCK):
            indices = range(start, start + BLOCK)
            noise, cond = sample_noise(seed, indices, teacher.shape), {"class_labels": sample_labels(indices, CLASSES)}
            parts.append(solve(row.field(), noise, cond, solver=SOLVER, steps=STEPS))
        samples, calls = torch.cat(parts), sum(each.rows for each in counters) / SAMPLES
        found = reference.measure(samples)
        with torch.no_grad():
            right = classifier(samples.clamp(-1, 1)).argmax(1) == sample_labels(range(SAMPLES), CLASSES)
        values = f"{found['distance']:8.2f}{found['precision']:11.3f}{found['recall']:8.3f}{right.double().mean():8.3f}"
        print(f"{row.name:27s}{row.scale:3g}{calls:7.1f}{values}", flush=True)


def bench_guidance() -> str:
    """Trains the teacher and the weak model of autoguidance first."""
    with tempfile.TemporaryDirectory() as folder:
        measure(trained(Path(folder)))
    return (
        f"guidance: {SAMPLES} samples, {STEPS} {SOLVER} steps; class: share that the classifier of FD-mnist finds right"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(Path(sys.argv[1]), *map(int, sys.argv[2:]))
