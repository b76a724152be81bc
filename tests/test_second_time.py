"""Flow maps and accelerations of every network class of latent-space teachers: how they start, what they learn of the
second time, and that they are stored whole.
"""

import copy
import math

import pytest
import tiny
import torch
from diffusers import ModelMixin
from latent import CPU, conditions, normal

from distill.core.errors import InputError
from distill.exchange.student_card import StudentCard
from distill.spec.model import CheckpointTeacher
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import load_teacher
from distill.teachers.architectures import known, names_of
from distill.teachers.convention import Convention
from distill.training.blocks import recompute

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers about itself
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),  # torch, in bfloat16
]
T, S, LATER = torch.tensor([0.2, 0.6, 0.95]), torch.tensor([0.1, 0.0, 0.5]), torch.tensor([0.2, 0.3, 0.9])
SAMPLERS = {"velocity": "euler", "flow_map": "jump", "acceleration": "accelerated"}


@pytest.fixture(scope="module", params=tiny.TINY)
def place(request, tmp_path_factory):
    """A teacher as a spec names it."""
    return tiny.TINY[request.param].write(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(place):
    return teacher_on_linear_path(load_teacher(CheckpointTeacher(**place), CPU))


@pytest.fixture(scope="module")
def inputs(teacher):
    return normal(3, *teacher.shape), conditions(teacher, 3)


def made(teacher, kind):
    """A student of this kind, in evaluation mode."""
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    makers = {"velocity": init.velocity_field, "flow_map": init.flow_map, "acceleration": init.acceleration}
    return makers[kind]().eval()


def trained(student, amount=0.02):
    """The student with all weights changed, as after training."""
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter += amount * normal(*parameter.shape, seed=i)
    return student


def with_second_time(student):
    """The flow map, of which only the embedding of the second time has changed."""
    with torch.no_grad():
        for i, parameter in enumerate(student.network.gap.parameters()):
            parameter += 0.3 * normal(*parameter.shape, seed=i)
    return student


def test_every_class_is_tested():
    conventions = [each for each in known().values() if isinstance(each, Convention)]
    tested = {type(each.pipeline().components[_folder(each)]).__name__ for each in tiny.TINY.values()}
    assert tested == {name for each in conventions for name in names_of(each)}


def _folder(each):
    return "unet" if "unet" in each.pipeline().components else "transformer"


@torch.no_grad()
def test_a_student_starts_as_its_teacher(teacher, inputs):
    x, cond = inputs
    expected, given = teacher.field(x, T, cond), normal(*x.shape, seed=9)
    assert torch.equal(made(teacher, "velocity")(x, T, cond), expected)
    flow_map, acceleration = made(teacher, "flow_map"), made(teacher, "acceleration")
    for s in (S, LATER, T):
        assert (flow_map(x, T, s, cond) - expected).abs().max() <= 1e-6
    assert torch.equal(acceleration(x, T, None, cond), expected)
    assert (acceleration(x, T, given, cond) - expected).abs().max() <= 1e-6


@torch.no_grad()
def test_a_student_starts_as_its_teacher_in_bfloat16(teacher, inputs):
    """As `precision: bf16` calls it. An acceleration adds up twice as many channels, and rounds otherwise."""
    x, cond = inputs
    with torch.autocast("cpu", torch.bfloat16):
        expected = teacher.field(x, T, cond)
        assert torch.equal(made(teacher, "flow_map")(x, T, S, cond), expected)
        found = made(teacher, "acceleration")(x, T, x, cond)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


def embedding(network, t, s):
    """What a TwoTimes adds to the embeddings of the time, written out."""
    first, second = network.gap.hidden, network.gap.out
    angle = [(t - s) * k * math.pi / 2 for k in range(1, network.gap.config.waves + 1)]
    waves = torch.stack([each.cos() for each in angle] + [each.sin() for each in angle], dim=1)
    hidden = waves @ first.weight.T + first.bias
    return (hidden * hidden.sigmoid()) @ second.weight.T + second.bias


@torch.no_grad()
def test_the_second_time_is_added_to_the_embedding_of_the_first(teacher, inputs):
    """The flow map is the teacher, in which each embedding of the time is changed by one that depends on t - s."""
    (x, cond), student = inputs, with_second_time(made(teacher, "flow_map"))
    plain = made(teacher, "velocity")
    for s in (S, LATER):
        added = embedding(student.network, T, s)

        def add(module, _, output, added=added):
            rows = plain.network.rows[plain.network.now] if "rows" in vars(plain.network) else slice(None)
            return output + added[rows]

        hooks = [plain.network.get_submodule(name).register_forward_hook(add) for name in student.network.layers]
        expected = plain(x, T, cond)
        for hook in hooks:
            hook.remove()
        found = student(x, T, s, cond)
        assert (found - expected).abs().max() <= 2e-6 * max(1.0, expected.abs().max())
        assert (found - plain(x, T, cond)).abs().amax(dim=tuple(range(1, x.ndim))).min() > 1e-4, "every row changes"
    one = student(x, T, T - 0.1, cond)
    assert not torch.equal(one, student(x, T, T - 0.2, cond))


@pytest.mark.parametrize("kind", SAMPLERS)
@torch.no_grad()
def test_an_exported_student_is_read_again_bit_for_bit(tmp_path, place, teacher, inputs, kind):
    (x, cond), student = inputs, trained(made(teacher, kind))
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind=kind,
        sampler=SAMPLERS[kind], num_classes=None, null_class=None, shape=teacher.shape, weights="raw", images=1,
    )  # fmt: skip
    export(student, tmp_path / "s", card, init.packaging)
    read = load_student(tmp_path / "s", CPU, CheckpointTeacher(**place)).student
    given = {"velocity": (), "flow_map": (S,), "acceleration": (normal(*x.shape, seed=9),)}[kind]
    assert torch.equal(read(x, T, *given, cond), student(x, T, *given, cond))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(read(x, T, *given, cond), student(x, T, *given, cond))
    expected = {name: each for name, each in student.state_dict().items() if each.is_floating_point()}
    assert all(torch.equal(each, read.state_dict()[name]) for name, each in expected.items())


def test_recomputed_activations_give_the_same_gradients(teacher, inputs):
    """Each call has its own second time, also if the backward pass comes after other calls."""
    x, cond = inputs
    plain = trained(made(teacher, "flow_map"))
    again = copy.deepcopy(plain)
    if not any(each._supports_gradient_checkpointing for each in plain.modules() if isinstance(each, ModelMixin)):
        with pytest.raises(InputError, match="no network that recipe 'a recipe' trains has blocks that can be"):
            recompute("a recipe", [again])
        return
    recompute("a recipe", [again])
    for network in (plain, again):
        first, second = network(x, T, S, cond), network(x, T, LATER, cond)
        (first.square().sum() + second.sum()).backward()
    for (name, ours), theirs in zip(again.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * max(1.0, theirs.grad.abs().max()), name


@torch.no_grad()
def test_in_dit_the_second_time_changes_the_modulation_of_every_block(tmp_path):
    place = tiny.TINY["dit"].write(tmp_path)
    teacher = teacher_on_linear_path(load_teacher(CheckpointTeacher(**place), CPU))
    student, x, cond = with_second_time(made(teacher, "flow_map")), normal(3, *teacher.shape), conditions(teacher, 3)
    network, found = student.network.network, []
    for block in network.transformer_blocks:
        block.norm1.register_forward_hook(lambda module, inputs, output: found.append(output[1:]))
    blocks = len(network.transformer_blocks)
    for s in (S, LATER):
        student(x, T, s, cond)
    assert len(found) == 2 * blocks == 4
    for first, second in zip(found[:blocks], found[blocks:], strict=True):
        for one, other in zip(first, second, strict=True):  # gate, shift, scale, gate: [B, width] of each block
            assert ((one - other).abs().amax(dim=1) > 1e-3).all(), "in every row"
