"""The code of recipes on a GPU that is only pretended: tensors there have no values.

A tensor on the CPU that meets one on the GPU is an error, and so is whatever waits for the GPU: reading a value, or a
copy to the CPU. Whether the numbers are right is tested on the CPU. The backward pass does not run on fake tensors.
"""

import copy
import importlib

import pytest
import torch
from test_conformance import ALL
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.flow import guidance, solvers
from distill.flow.draws import Rows, StepDraw
from distill.flow.interpolants import like, linear, vp
from distill.solvers import find_solver, solver_names
from distill.spec.guidancespec import GuidanceSpec
from distill.teachers.network_field import LinearCall
from distill.testing.subject import SHAPE, Noise, start
from distill.training.engine import StepContext

CUDA = torch.device("cuda:0")
ROWS = 4


class NoCopyToCpu(TorchDispatchMode):
    """Refuses copies from the GPU to the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if isinstance(found, torch.Tensor) and given is not None and given.device.type == "cuda":
            assert found.device.type != "cpu", f"{function} copies to the CPU"
        return found


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=True), NoCopyToCpu():
        yield


def moved(module: nn.Module) -> nn.Module:
    """The module with weights on the GPU."""
    for part in module.modules():
        for name, each in part._parameters.items():
            if each is not None:
                new = torch.empty(each.shape, dtype=each.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(new, requires_grad=each.requires_grad)
        for name, each in part._buffers.items():
            if each is not None:
                part._buffers[name] = torch.empty(each.shape, dtype=each.dtype, device=CUDA)
    return module


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


@pytest.fixture
def started(request):
    """(recipe, networks, teacher, batch) of a recipe, on the CPU."""
    subject = ALL[request.param]
    recipe, init, teacher = start(subject)
    roles = recipe.networks(init)
    nets = {name: role.module for name, role in roles.items() if hasattr(role, "module")}
    nets |= {name: copy.deepcopy(nets[role.of]) for name, role in roles.items() if name not in nets}
    return recipe, nets, teacher, Noise(ROWS, subject.times).batch(0, Rows(0, ROWS, ROWS))


@pytest.mark.parametrize("started", ALL, indirect=True)
def test_a_recipes_losses_stay_on_the_gpu(started, gpu):
    recipe, nets, teacher, batch = started
    for module in {*nets.values(), teacher.network}:
        moved(module)
    on_gpu = batch.map(lambda each: there(*each.shape, dtype=each.dtype))
    for step in range(2):
        carry = {}
        for index, turn in enumerate(recipe.turns(step, step * ROWS)):
            draw = StepDraw(0, step, index, Rows(0, ROWS, ROWS))
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = turn.loss(nets, on_gpu, StepContext(step, step * ROWS, draw, carry))
            assert {each.device for each in (loss.total, *loss.logs.values())} == {CUDA}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_tables_are_copied_to_the_gpu_once(prediction, request):
    table = torch.linspace(-4, 4, 100, dtype=torch.float64)
    path = vp(torch.sigmoid(-2 * table))
    request.getfixturevalue("gpu")
    x, t = there(ROWS, *SHAPE), there(ROWS, dtype=torch.float64)
    call = LinearCall(lambda network, x, time, cond: x, prediction, table)
    assert call(None, x, t, {}).device == CUDA
    assert path.convert(x, x, t, prediction, "velocity").device == CUDA
    assert path.time_of(path.ratio(t)).device == CUDA


def test_what_is_refused(gpu):
    x = there(3)
    with pytest.raises(AssertionError, match="copies to the CPU"):
        x.cpu()
    with pytest.raises(DataDependentOutputException):
        x.sum().item()
    with pytest.raises(FakeTensorDeviceMismatchError):
        x + torch.ones(3, device="cpu")


class OnlyGpu(FakeTensorMode):
    """Tensors on the GPU are pretended; those on the CPU are real, so that code may read a grid of times there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor | torch.device)]
        on_gpu = any((each if isinstance(each, torch.device) else each.device).type == "cuda" for each in given)
        if not on_gpu:
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


@pytest.fixture
def sampling():
    """Pretended GPU tensors without gradients, as in sampling."""
    with OnlyGpu(allow_non_fake_inputs=True), NoCopyToCpu(), torch.no_grad():
        yield


class Field:
    """A velocity field that needs a condition, on any path."""

    def __init__(self, interpolant, highest=1.0):
        self.interpolant, self.t_range = interpolant, (0.001, highest)

    def __call__(self, x_t, t, cond):
        assert {x_t.device, t.device, *(each.device for each in cond.values())} == {CUDA}
        return x_t * like(t, x_t).to(x_t.dtype) + like(cond["class_labels"], x_t)


PATHS = {
    "linear": lambda: Field(linear(), 0.999),
    "vp": lambda: Field(vp(torch.sigmoid(torch.linspace(8, -8, 100, dtype=torch.float64)))),
}


def of_class(count: int) -> dict[str, torch.Tensor]:
    return {"class_labels": there(count, dtype=torch.int64)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", solver_names())
def test_solvers_do_not_wait(solver, path, request):
    field, noises = PATHS[path](), find_solver(solver).noises
    request.getfixturevalue("sampling")
    noise = there(ROWS, *SHAPE)
    fresh = [torch.empty_like(noise) for _ in range(noises(16) if noises else 0)]
    assert solvers.solve(field, noise, of_class(ROWS), solver=solver, steps=16, fresh=fresh).device == CUDA


@pytest.mark.parametrize("form", ["cfg", "zero_star", "apg", "rescaled", "renormalised"])
def test_guidance_does_not_wait(form, request):
    field, weak = PATHS["linear"](), PATHS["linear"]()
    request.getfixturevalue("sampling")
    null = lambda cond: {"class_labels": torch.zeros_like(cond["class_labels"])}  # noqa: E731
    guided = guidance.Guided(field, null, 3.0, guidance.combination(GuidanceSpec(form=form)))
    for each in (guided, guidance.Autoguided(field, weak, 3.0), guidance.Scaled(field, 1.01)):
        x, t = there(ROWS, *SHAPE), there(ROWS, dtype=torch.float64)
        assert each(x, t, of_class(ROWS)).device == CUDA


@pytest.mark.parametrize("name", ["accelerated", "bns", "euler", "jump", "renoise", "same_noise"])
def test_samplers_do_not_wait(name, sampling):
    """The grid of times is on the CPU, as a card has it."""
    sampler = importlib.import_module(f"distill.students.samplers.{name}")
    noise, grid = there(ROWS, *SHAPE), torch.linspace(1, 0, 4, dtype=torch.float64)
    more = {"bns": [torch.ones(3, 4)], "renoise": [torch.empty_like(noise)] * 2}.get(name, [])

    def network(x_t, t, *others):
        assert {each.device for each in (x_t, t, *(each for each in others if isinstance(each, torch.Tensor)))} == {
            CUDA
        }
        return x_t * like(t, x_t).to(x_t.dtype)

    assert sampler.sample(network, noise, grid, {}, *more).device == CUDA
