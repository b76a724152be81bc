"""About how long the stages of a run will take, and what they will write, before anything runs.

Time is a number of network calls; one is measured here, on a network that is built and deleted. A training sample costs
the three forward passes of its own forward and backward pass, times what its recipe costs in recipes/costs.json.
"""

import json
import math
import time
from dataclasses import dataclass, field

import torch

from distill.core.errors import InputError
from distill.execution import devices
from distill.execution.preflight import Ready, Student
from distill.flow.draws import sample_noise
from distill.flow.times import uniform_grid
from distill.spec import evalspec, registry
from distill.spec.kinds import network_calls
from distill.spec.model import EvaluateStage, PairsStage, TrainStage
from distill.students.loaded import LoadedStudent
from distill.students.sampling import by_sampler, condition
from distill.training import memory
from distill.training.plain import PLAIN

PATIENCE, LONGEST = 0.2, 2.0  # seconds for a measurement, and of a call in it
FORWARDS = 3  # of a forward and a backward pass
LABEL = 8  # bytes


@dataclass(frozen=True)
class StageCost:
    """Of one stage."""

    seconds: float
    bytes: int
    """on the disk once it is done"""


def forecast(ready: Ready, *, here: bool) -> dict[str, StageCost]:
    """The costs of each stage. here: it is to run on this machine, on the device that it will have.

    A stage is left out where its networks are not known yet.
    """
    spec = ready.resolved.spec
    work = _Forecast(ready, devices.place(spec.launch) if here else torch.device("cpu"))
    found = {}
    for name, stage in spec.stages.items():
        try:
            if isinstance(stage, TrainStage):
                found[name] = work.train(name, stage)
            else:
                found[name] = work.pairs(stage) if isinstance(stage, PairsStage) else work.evaluate(stage)
        except InputError:
            continue  # the stage itself will say so
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
        # Processes on one machine's CPUs share what one alone would have.
        together = launch.world_size if self.device.type == "cuda" or launch.slurm.gpus_per_node else launch.nodes
        batch = launch.known_micro_batch or stage.batch_size // launch.world_size
        seconds = stage.images * FORWARDS * cost * self._seconds(student, batch) / together
        averages, still = len(stage.ema_half_lives), built.still["student"]
        kept = memory.predict(built.sizes, built.copies, averages, 1, PLAIN, built.still)
        checkpoint = kept["parameters"] + kept["optimizer"] + kept["ema"] + memory.FLOAT * averages * sum(still)
        exported = memory.FLOAT * built.exported
        return StageCost(seconds, exported + stage.checkpoint.keep * checkpoint)

    def pairs(self, stage: PairsStage) -> StageCost:
        teacher = self._teacher(stage.teacher)
        seconds = stage.count * stage.network_calls * self._seconds(teacher, stage.block)
        label = LABEL if teacher.num_classes is not None else 0
        return StageCost(seconds, stage.count * (stage.bytes_per_pair(teacher.shape) + label))

    def evaluate(self, stage: EvaluateStage) -> StageCost:
        teacher = self._teacher(stage.teacher)
        calls = evalspec.calls(stage, self.ready.resolved.samplers(stage))
        networks = {"teacher": teacher, **{name: self.ready.student(name) for name in stage.students}}
        seconds = sum(calls[name] * self._seconds(network, stage.block) for name, network in networks.items())
        endpoint = stage.samples * math.prod(teacher.shape) * memory.FLOAT
        return StageCost(stage.samples * seconds, endpoint)

    def _teacher(self, stage: str | None) -> Student:
        if stage is not None:
            return self.ready.student(stage)
        assert self.ready.teacher is not None, "checks.check lets no such stage through"
        return self.ready.teacher

    def _seconds(self, network: Student, batch: int) -> float:
        """Of one call, for one sample of a batch; measured once for networks that are built alike."""
        module = network.network
        kind = network.description if module is None else f"{type(module).__name__} {json.dumps(dict(module.config))}"
        key = f"{kind} {network.shape} {batch}"
        if key not in self.measured:
            self.measured[key] = _fastest(network, batch, self.device)
        return self.measured[key]


def _fastest(network: Student, batch: int, device: torch.device) -> float:
    """By one thread or all of them: beside others that compute, threads wait for each other longer than for work."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _measure(network, batch, device)
    finally:
        torch.set_num_threads(threads)
    return alone if threads == 1 or device.type != "cpu" else min(alone, _measure(network, batch, device))


def _measure(network: Student, batch: int, device: torch.device) -> float:
    """In batches that grow up to the one that is meant, or as far as a call may take; a larger one costs in proportion
    to its samples, beyond what a call costs in any case.
    """
    if network.network is not None:
        network.network.to(device)
    _call(network, 1, device)  # allocations, choice of kernels
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


def _call(network: Student, size: int, device: torch.device) -> float:
    """Seconds of one call for `size` samples."""
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
