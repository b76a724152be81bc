"""A mixture in the plane is recovered with the real training engine, from stored pairs: by reflow, then in one step."""

import dataclasses
import functools
import math

import pytest
import torch

from distill.core.stop import StopRequest
from distill.evaluation.metrics.wasserstein import sliced_wasserstein
from distill.flow import draws, solvers
from distill.flow.distances import Lpips
from distill.flow.interpolants import linear
from distill.flow.times import uniform_grid
from distill.pairs import PairSet, PairSource, generate
from distill.runs.progress import Progress
from distill.runs.run_store import StagePaths
from distill.spec.model import MixtureTeacher, MlpSpec, OptimizerSpec, PairsStage, TrainStage, UNetSpec
from distill.students.init import StudentInit
from distill.students.samplers import euler
from distill.teachers.analytic import mixture_teacher
from distill.teachers.network_field import NetworkField
from distill.testing.closed_form import class_gaussian_teacher
from distill.training.engine import train
from recipes.reflow import one_step, reflow

pytestmark = pytest.mark.train

CPU = torch.device("cpu")
RING = [[3 * math.cos(k * math.pi / 4), 3 * math.sin(k * math.pi / 4)] for k in range(8)]
TEACHER = mixture_teacher(MixtureTeacher(kind="mixture", means=RING, std=0.2))
NETWORK = MlpSpec(kind="mlp", width=96, depth=3)
HELD_OUT = range(100_000, 108_192)  # indices of no pair
NOISE = draws.sample_noise(1, HELD_OUT, (2,))


@functools.cache
def truth():
    return TEACHER.exact_data(2, range(8192))


@functools.cache
def floor():
    """How far apart two samples of the mixture itself are."""
    return sliced_wasserstein(TEACHER.exact_data(3, range(8192)), truth())


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices: a second thread only waits, and beside other processes it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def excess(samples):
    """Sliced Wasserstein-2 to the mixture, less what two samples of the mixture itself are apart."""
    return sliced_wasserstein(samples, truth()) - floor()


def run(recipe, source, init, folder, *, images, batch_size, lr):
    """The student that the engine trains."""
    optimizer = OptimizerSpec(lr=lr, warmup_images=images // 30, decay="cosine")
    stage = TrainStage(kind="train", recipe="any", images=images, batch_size=batch_size, optimizer=optimizer)
    with Progress("train", images, "images", None) as progress:
        result = train(
            recipe,
            init,
            source,
            stage,
            seed=0,
            device=CPU,
            micro_batch=batch_size,
            paths=StagePaths(folder),
            progress=progress,
            stop=StopRequest(),
        )
    return result.roles.networks["student"].eval()


def fresh():
    return StudentInit(None, NETWORK, (2,), None, seed=0)


def jump(student):
    """One Euler step from the held-out noise."""
    with torch.no_grad():
        return euler.sample(student, NOISE, uniform_grid(1), {})


@pytest.mark.long  # test_conformance trains each of them on the ring, from pairs in memory
def test_reflow_and_one_step_recover_a_ring(tmp_path):
    stage = PairsStage(kind="pairs", count=16384, solver="heun", steps=24, block=2048, shard=2048)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(TEACHER, stage, tmp_path / "pairs", seed=4, device=CPU, progress=progress, stop=StopRequest())
    pairs = PairSet.open(tmp_path / "pairs", TEACHER.digest)

    recipe = reflow.Recipe(reflow.Config(), TEACHER)
    source = PairSource(pairs, 512, 5)
    straight = run(recipe, source, fresh(), tmp_path / "reflow", images=768_000, batch_size=512, lr=3e-3)
    field = NetworkField(straight.network, linear(), "velocity", 1000.0)
    init = StudentInit(dataclasses.replace(TEACHER, field=field, network=straight.network), None, (2,), None, seed=0)
    recipe = one_step.Recipe(one_step.Config(), TEACHER)
    source = PairSource(pairs, 512, 6)
    student = run(recipe, source, init, tmp_path / "one_step", images=512_000, batch_size=512, lr=1e-3)

    fine = solvers.solve(TEACHER.field, NOISE, {}, solver="heun", steps=64)
    jumps = {
        "teacher": solvers.solve(TEACHER.field, NOISE, {}, solver="euler", steps=1),
        "reflow": jump(straight),
        "one_step": jump(student),
    }
    far = {name: excess(samples) for name, samples in jumps.items()}
    rms = {name: (samples - fine).square().mean().sqrt().item() for name, samples in jumps.items()}
    print(f"floor {floor():.3f}, excess {far}, RMS to the teacher's endpoint {rms}")
    assert far["teacher"] > 1.5  # the teacher's one step is the mean of the data: it knows nothing of the ring
    assert far["one_step"] <= 0.15 * far["teacher"]
    assert rms["one_step"] < rms["reflow"] < 0.15 * rms["teacher"]
    bent, straightened = (solvers.straightness(f, NOISE[:2048], {}, 32) for f in (TEACHER.field, straight))
    assert straightened < 0.02 * bent


@pytest.mark.long
def test_lpips_trains_through_the_engine(tmp_path, lpips_options):
    """Images towards their pairs by a frozen network, which is no part of the checkpoints."""
    means = torch.linspace(-0.8, 0.8, 64).reshape(1, 1, 8, 8)
    teacher = class_gaussian_teacher(torch.cat([means, -means]), torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.05))
    stage = PairsStage(kind="pairs", count=64, solver="heun", steps=4, block=32, shard=32)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(teacher, stage, tmp_path / "pairs", seed=4, device=CPU, progress=progress, stop=StopRequest())
    source = PairSource(PairSet.open(tmp_path / "pairs", teacher.digest), 16, 5)
    network = UNetSpec(kind="unet", channels=[16, 16], norm_groups=8)
    init = StudentInit(None, network, (1, 8, 8), 2, seed=0)
    recipe = one_step.Recipe(one_step.Config(distance="lpips", **lpips_options, lpips_resize="to_64"), teacher)
    student = run(recipe, source, init, tmp_path, images=16 * 60, batch_size=16, lr=3e-3)

    batch = source.batch(1000, draws.Rows(0, 16, 16))
    metric = Lpips("squeeze", lpips_options["lpips_path"])

    def distance(field):
        with torch.no_grad():
            images = euler.sample(field.eval(), batch.pairs.noise, uniform_grid(1), batch.cond)
            return metric(images, batch.pairs.data).mean().item()

    before, after = distance(init.velocity_field()), distance(student)
    print(f"LPIPS {before:.4f} -> {after:.4f}")
    assert after < 0.5 * before
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if "lpips" in path.name]
