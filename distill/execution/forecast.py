"""Predicts how long the stages of a run will take and how much they will write, before the run starts.

The time of a stage is its number of network calls times the time of one call, which is measured here. A training sample
costs three forward passes (its forward and backward pass), times the cost of the recipe in recipes/costs.json.
"""

import json
import math
import time
from dataclasses import dataclass, field

import torch

from distill.core.errors import InputError
from distill.execution import caching, devices
from distill.execution.building import Origin
from distill.execution.preflight import Ready
from distill.flow.draws import sample_noise
from distill.flow.times import uniform_grid
from distill.spec import evalspec, registry
from distill.spec.kinds import network_calls
from distill.spec.model import CacheStage, EvaluateStage, PairsStage, TrainStage
from distill.students.loaded import LoadedStudent
from distill.students.sampling import by_sampler, condition
from distill.training import memory
from distill.training.plain import PLAIN

PATIENCE, LONGEST = 0.2, 2.0  # seconds: how long a call is repeated; limit for the two calls at a larger batch size
FORWARDS = 3  # cost of a forward and a backward pass, in forward passes
LABEL = 8  # bytes of a class label


@dataclass(frozen=True)
class StageCost:
    """The predicted cost of a stage."""

    seconds: float
    bytes: int
    """on the disk after the stage"""


def forecast(ready: Ready, *, here: bool) -> dict[str, StageCost]:
    """The cost of each stage. Stages whose networks are not known yet are left out.

    here: the run will be on this machine, so calls are measured on its device; else on the CPU.
    """
    spec = ready.resolved.spec
    work = _Forecast(ready, devices.place(spec.launch, numerics=spec.numerics) if here else torch.device("cpu"))
    found = {}
    for name, stage in spec.stages.items():
        try:
            if isinstance(stage, TrainStage):
                found[name] = work.train(name, stage)
            elif isinstance(stage, CacheStage):
                found[name] = work.cache()
            else:
                found[name] = work.pairs(stage) if isinstance(stage, PairsStage) else work.evaluate(stage)
        except InputError:
            continue  # the stage itself will report the error
    return found


@dataclass(frozen=True)
class _Forecast:
    ready: Ready
    device: torch.device
    measured: dict[str, float] = field(default_factory=dict)

    def train(self, name: str, stage: TrainStage) -> StageCost:
        launch, student = self.ready.resolved.spec.launch, self.ready.student(name)
        built = self.ready.built[name]
        cost = registry.describe(stage.recipe, self.ready.resolved.base).cost or 1.0
        batch = launch.known_micro_batch or stage.batch_size // launch.world_size
        seconds = stage.images * FORWARDS * cost * self._seconds(student, batch) / self._together
        averages, still = len(stage.averages), built.still["student"]
        kept = memory.predict(built.sizes, built.copies, averages, 1, PLAIN, built.still, built.moments)
        checkpoint = kept["parameters"] + kept["optimizer"] + kept["ema"] + memory.FLOAT * averages * sum(still)
        exported = memory.FLOAT * built.exported
        snapshots = 0
        if stage.ema_snapshots is not None:
            each = memory.FLOAT * len(stage.ema_lengths) * (sum(built.sizes["student"]) + sum(still))
            snapshots = math.ceil(stage.images / stage.ema_snapshots) * each
        return StageCost(seconds, exported + snapshots + stage.checkpoint.keep * checkpoint)

    def cache(self) -> StageCost:
        """The cost of making all caches. Those that the store has already are not taken into account."""
        seconds, count = caching.measure(self.ready.resolved, self.device)
        return StageCost(seconds / self._together, count)

    def pairs(self, stage: PairsStage) -> StageCost:
        teacher = self._teacher(stage.teacher)
        seconds = stage.count * stage.network_calls * self._seconds(teacher, stage.block)
        label = LABEL if teacher.num_classes is not None else 0
        return StageCost(seconds / self._together, stage.count * (stage.bytes_per_pair(teacher.shape) + label))

    def evaluate(self, stage: EvaluateStage) -> StageCost:
        teacher = self._teacher(stage.teacher)
        calls = evalspec.calls(stage, self.ready.resolved.samplers(stage))
        networks = {"teacher": teacher, **{name: self.ready.student(name) for name in stage.students}}
        seconds = sum(calls[name] * self._seconds(network, stage.block) for name, network in networks.items())
        endpoint = stage.samples * math.prod(teacher.shape) * memory.FLOAT
        return StageCost(stage.samples * seconds / self._together, endpoint)

    @property
    def _together(self) -> int:
        """How much faster all processes are than one: those on the CPUs of one machine share them."""
        launch = self.ready.resolved.spec.launch
        return launch.world_size if self.device.type == "cuda" or launch.slurm.gpus_per_node else launch.nodes

    def _teacher(self, stage: str | None) -> Origin:
        if stage is not None:
            return self.ready.student(stage)
        assert self.ready.teacher is not None, "checks.check lets no such stage through"
        return self.ready.teacher

    def _seconds(self, network: Origin, batch: int) -> float:
        """Seconds of a network call per sample of a batch. It is measured once for networks with the same config."""
        module, teacher = network.network, self.ready.teacher
        if module is not None and next(module.parameters()).is_meta:  # it has no values: see preflight
            assert teacher is not None and teacher.network is not None, "only copies of the teacher are made like this"
            sizes = [sum(p.numel() for p in each.parameters()) for each in (module, teacher.network)]
            return self._seconds(teacher, batch) * sizes[0] / sizes[1]
        kind = network.description if module is None else f"{type(module).__name__} {json.dumps(dict(module.config))}"
        key = f"{kind} {network.shape} {batch}"
        if key not in self.measured:
            self.measured[key] = _fastest(network, batch, self.device)
        return self.measured[key]


def _fastest(network: Origin, batch: int, device: torch.device) -> float:
    """The smaller of the times with one thread and with all threads.

    If other processes are computing, several threads can be slower than one, because they wait for each other.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _measure(network, batch, device)
    finally:
        torch.set_num_threads(threads)
    return alone if threads == 1 or device.type != "cpu" else min(alone, _measure(network, batch, device))


def _measure(network: Origin, batch: int, device: torch.device) -> float:
    """Seconds of a call per sample, for batches of size `batch`.

    Batches of increasing size are measured, up to `batch` or until a call takes too long. The time of a larger batch is
    extrapolated: the time of a call with one sample, plus a constant time for each further sample.
    """
    if network.network is not None:
        network.network.to(device)
    _call(network, 1, device)  # warm-up
    size, one = 1, min(_call(network, 1, device) for _ in range(2))
    taken, each = one, one
    while size < batch and taken + 3 * size * each * (size > 1) < LONGEST / 2:
        size = min(4 * size, batch)
        taken = min(_call(network, size, device) for _ in range(2))
        each = max(0.0, taken - one) / (size - 1)
    end = time.perf_counter() + PATIENCE
    while time.perf_counter() < end:
        taken = min(taken, _call(network, size, device))
    return (taken + each * (batch - size)) / batch


def _call(network: Origin, size: int, device: torch.device) -> float:
    """Seconds of one network call for `size` samples."""
    x = sample_noise(0, range(size), network.shape).to(device)
    t = torch.full((size,), 0.5, dtype=torch.float64, device=device)
    cond = condition(network, range(size), device)
    _wait(device)
    before = time.perf_counter()
    with torch.no_grad():
        if isinstance(network, LoadedStudent):
            by_sampler(network.student, network.sampler, x, uniform_grid(1), cond, [])
        else:
            network.field(x, t, cond)
    _wait(device)
    calls = network_calls(network.sampler, 1) if isinstance(network, LoadedStudent) else 1
    return (time.perf_counter() - before) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
