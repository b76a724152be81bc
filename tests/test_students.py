"""Networks of students: deterministic, of the right kind, and refused where they cannot work."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from choices import few
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from distill.core.errors import InputError
from distill.exchange.student_card import StudentCard
from distill.flow.draws import generator
from distill.flow.fields import Rescheduled
from distill.flow.interpolants import linear, vp
from distill.networks.architectures import build
from distill.networks.flow_map import FlowMapStudent
from distill.networks.flow_map_mlp import FlowMapMLP
from distill.networks.flow_map_unet import FlowMapUNet2DModel
from distill.networks.velocity import VelocityStudent
from distill.networks.velocity_mlp import VelocityMLP
from distill.networks.velocity_unet import VelocityUNet2DModel
from distill.spec.model import GaussianTeacher, MlpSpec, UNetSpec
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import LoadedStudent, load_student
from distill.teachers.analytic import gaussian_teacher
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, NetworkField, VeField

UNET = UNetSpec(kind="unet", channels=[8, 16], norm_groups=4, attention=True)
MLP = MlpSpec(kind="mlp", width=16, depth=2)


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small run tenfold slower on threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- fresh networks ---


@pytest.mark.parametrize(("spec", "shape"), [(UNET, (1, 8, 8)), (MLP, (3,))])
def test_weights_depend_on_spec_and_seed_alone(spec, shape):
    torch.manual_seed(1)
    first = build(spec, shape, 10, seed=5)
    after_first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_first)  # the global generator did not move
    assert equal(first, build(spec, shape, 10, seed=5))
    assert not equal(first, build(spec, shape, 10, seed=6))


def test_k_classes_give_k_plus_one_embeddings():
    assert build(UNET, (1, 8, 8), 10, 0).class_embedding.weight.shape[0] == 11
    assert build(MLP, (2,), 3, 0).class_embedding.weight.shape[0] == 4
    assert build(UNET, (1, 8, 8), None, 0).class_embedding is None


def test_attention_stands_at_the_coarsest_resolution_only():
    network = build(UNET, (1, 8, 8), None, 0)
    assert list(network.config.down_block_types) == ["DownBlock2D", "AttnDownBlock2D"]
    assert list(network.config.up_block_types) == ["AttnUpBlock2D", "UpBlock2D"]
    plain = build(UNET.model_copy(update={"attention": False}), (1, 8, 8), None, 0)
    assert not [name for name, _ in plain.named_modules() if "attentions.0." in name]


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (MLP, (1, 8, 8), "network.kind=mlp is for vectors, but samples have shape [1, 8, 8]; use network.kind=unet"),
        (UNET, (2,), "network.kind=unet is for images [channels, height, width], but samples have shape [2]"),
        (
            UNetSpec(kind="unet", channels=[12, 16], norm_groups=8),
            (1, 8, 8),
            "network.channels=[12, 16]: [12] are not multiples of norm_groups=8; change either",
        ),
        (
            UNetSpec(kind="unet", channels=[8, 8, 8]),
            (1, 10, 8),
            "network.channels=[8, 8, 8] halves the image 2 times, but 10x8 is not a multiple of 4",
        ),
        (UNetSpec(kind="unet", channels=[]), (1, 8, 8), "network.channels is empty"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(spec, shape, message):
    with pytest.raises(InputError) as error:
        build(spec, shape, None, 0)
    assert message in str(error.value)


# --- the student as a velocity field ---


def test_student_calls_the_network_with_thousand_t_and_keeps_the_dtype():
    network = build(UNET, (1, 8, 8), 10, 0).eval()
    student = VelocityStudent(network)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0, 9, 10])
    with torch.no_grad():
        v = student(x, t, {"class_labels": labels})
        assert torch.equal(v, network(x, torch.tensor([0.0, 250.0, 1000.0]), class_labels=labels).sample)
        with torch.autocast("cpu", torch.bfloat16):
            assert student(x, t, {"class_labels": labels}).dtype == torch.float32
    assert student.interpolant.name == "linear"
    assert student.t_range == (0.0, 1.0)


@pytest.mark.parametrize("t", [torch.tensor(0.5), torch.full((2, 1), 0.5), torch.full((3,), 0.5)])
def test_student_refuses_a_time_that_is_not_one_per_row(t):
    student = VelocityStudent(build(MLP, (2,), None, 0))
    with pytest.raises(ValueError, match=r"a time must have shape \[B\] = \[2\]"):
        student(torch.randn(2, 2), t, {})


def test_mlp_wants_labels_exactly_if_it_is_conditional():
    x, t = torch.randn(2, 2), torch.tensor([100.0, 900.0])
    with pytest.raises(ValueError, match="a class-conditional network needs class_labels"):
        build(MLP, (2,), 3, 0)(x, t)
    with pytest.raises(ValueError, match="class_labels were given to an unconditional network"):
        build(MLP, (2,), None, 0)(x, t, class_labels=torch.tensor([0, 1]))


def test_mlp_survives_save_and_load_bitwise(tmp_path):
    network = build(MLP, (2,), 3, 0).eval()
    network.save_pretrained(tmp_path)
    loaded = VelocityMLP.from_pretrained(tmp_path)
    x, t, labels = torch.randn(4, 2), torch.rand(4) * 1000, torch.tensor([0, 1, 2, 3])
    assert torch.equal(network(x, t, labels).sample, loaded(x, t, labels, return_dict=False)[0])


def test_mlp_time_features_are_smooth_and_tell_all_times_apart():
    network = VelocityMLP(dim=1, width=8, depth=1)
    with torch.no_grad():
        network.layers[0].weight.zero_()
        network.layers[0].weight[0, 1] = 1.0  # the slowest cosine: cos(pi/2 t), one to one on [0, 1]
        network.layers[0].bias.zero_()
        network.layers[2].weight.zero_()
        network.layers[2].weight[0, 0] = 1.0
        network.layers[2].bias.zero_()
        t = torch.tensor([0.0, 0.5, 1.0])
        out = network(torch.zeros(3, 1), 1000 * t).sample[:, 0]
    expected = torch.nn.functional.silu(torch.tensor([1.0, math.cos(math.pi / 4), 0.0]))
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


# --- where the weights come from ---


def test_a_fresh_network_is_the_same_at_every_call():
    init = StudentInit(None, UNET, (1, 8, 8), 10, seed=3)
    assert equal(init.velocity_field(), init.velocity_field())
    assert equal(init.velocity_field().network, build(UNET, (1, 8, 8), 10, 3))
    labels = torch.tensor([0, 4])
    assert torch.equal(init.null({"class_labels": labels})["class_labels"], torch.tensor([10, 10]))


def test_no_weights_to_start_from_is_refused():
    with pytest.raises(InputError, match="no teacher or init is given, so there are no weights .* `network`"):
        StudentInit(None, None, (2,), None, 0)
    field = VelocityStudent(build(MLP, (2,), None, 0))  # any field will do: it is the network that is missing
    closed_form = LoadedTeacher(field, (2,), None, None, "0" * 64, "the Gaussian teacher")
    with pytest.raises(InputError, match="the Gaussian teacher has no network, so there are no weights to start from"):
        StudentInit(closed_form, None, (2,), None, 0)


def test_a_network_of_other_classes_is_no_start():
    source = teacher("velocity")
    said = "has 3 classes, but the data has none; start from a network with the same classes, or from a new `network`"
    with pytest.raises(InputError, match=said):
        StudentInit(source, None, (1, 8, 8), None, 0)
    unknowing = dataclasses.replace(source, num_classes=None, null_class=None)
    with pytest.raises(InputError, match="has no classes, but the teacher has 3"):
        StudentInit(unknowing, None, (1, 8, 8), 3, 0, source)
    assert StudentInit(unknowing, None, (1, 8, 8), 3, 0).num_classes is None, "labels of data can be left out"
    assert StudentInit(None, UNET, (1, 8, 8), 3, 0, unknowing).num_classes is None, "fresh ones are as the teacher"


def test_null_of_an_unconditional_student_changes_nothing():
    assert StudentInit(None, MLP, (2,), None, 0).null({}) == {}


# --- teachers of other schedules, continued on the linear path ---

ALPHAS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


def teacher(kind: str) -> LoadedTeacher:
    network = build(UNET, (1, 8, 8), 3, seed=1).eval().requires_grad_(False)
    field = {
        "velocity": lambda: NetworkField(network, linear(), "velocity", 1000.0),
        "edm epsilon": lambda: EdmField(network, 0.6, 1, (0.002 / 1.002, 80 / 81)),
        "edm v_prediction": lambda: EdmField(network, 0.5, -1, (0.01 / 1.01, 20 / 21)),
        "ve": lambda: VeField(network, (0.02 / 1.02, 100 / 101)),
    }.get(kind, lambda: NetworkField(network, vp(ALPHAS), kind, 999.0))()
    return LoadedTeacher(field, (1, 8, 8), 3, 3, "0" * 64, "a teacher", network)


def started(kind: str) -> VelocityStudent:
    return StudentInit(teacher(kind), None, (1, 8, 8), 3, 0).velocity_field()


COND = {"class_labels": torch.tensor([0, 1, 2, 3, 0])}
WRAPPED = ["epsilon", "sample", "v_prediction", "edm epsilon", "edm v_prediction", "ve"]
STARTS = ["velocity", *WRAPPED]


def test_a_linear_teacher_is_continued_bitwise_and_apart():
    source = teacher("velocity")
    init = StudentInit(source, None, (1, 8, 8), 3, 0)
    student, x, t = init.velocity_field().eval(), torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5)
    assert torch.equal(student(x, t, COND), source.field(x, t, COND))
    assert (init.num_classes, init.null_class) == (3, 3)
    assert torch.equal(init.null(COND)["class_labels"], torch.full((5,), 3))
    assert student.network is not source.network
    assert all(p.requires_grad for p in student.parameters())
    assert init.velocity_field().training


@pytest.mark.parametrize("kind", WRAPPED)
def test_inside_its_range_a_wrapped_teacher_is_the_teacher(kind):
    source, student = teacher(kind), started(kind).eval()
    assert isinstance(student.network, VelocityUNet2DModel)
    assert equal(student.network, source.network)  # exactly the teacher's weights, under the same names
    reference = Rescheduled(source.field, linear())
    low, high = reference.t_range
    t = torch.tensor([low, 0.3, 0.5, 0.7, high], dtype=torch.float64)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        v = reference(x, t, COND)
        difference = (student(x, t, COND) - v).abs().amax((1, 2, 3)) / v.abs().amax((1, 2, 3)).clamp(min=1)
    assert difference.max() <= 1e-5


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_teacher_is_finite_and_continuous_up_to_both_ends(kind):
    student = started(kind)
    low, high = Rescheduled(teacher(kind).field, linear()).t_range
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(3)).expand(5, -1, -1, -1)
    for point in (0.0, low, 0.5, high, 1.0):
        near = [point + d for d in (-1e-3, -1e-6, 0.0, 1e-6, 1e-3)]
        t = torch.tensor(near, dtype=torch.float64).clamp(0, 1)
        v = student(x, t, {"class_labels": torch.zeros(5, dtype=torch.int64)})
        assert v.isfinite().all()
        scale = v.detach().abs().max()
        # a millionth of time moves v by less than a hundredth of its size: no jump, no pole
        assert (v[1] - v[2]).abs().max() <= 1e-2 * scale
        assert (v[3] - v[2]).abs().max() <= 1e-2 * scale
        student.zero_grad()
        v.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["v_prediction", "edm epsilon"])
def test_a_wrapped_teacher_survives_save_and_load_bitwise(kind, tmp_path):
    student = started(kind).eval()
    student.network.save_pretrained(tmp_path)
    loaded = VelocityStudent(VelocityUNet2DModel.from_pretrained(tmp_path))
    x, t = torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5)
    with torch.no_grad():
        assert torch.equal(student(x, t, COND), loaded(x, t, COND))
        number = student.network(x, 250, COND["class_labels"], return_dict=False)[0]  # as a pipeline calls it
        assert torch.equal(number, student(x, torch.full((5,), 0.25), COND))


@pytest.mark.parametrize("kind", few(STARTS, "epsilon"))
def test_a_student_has_the_dropout_that_it_is_given_and_the_weights_of_its_source(kind):
    def dropouts(module):
        """Of its residual blocks; attention has none."""
        return {each.dropout.p for each in module.modules() if isinstance(each, ResnetBlock2D)}

    source = teacher(kind)
    init = StudentInit(source, None, (1, 8, 8), 3, 0, source, 0.25)
    student, same = init.velocity_field(), started(kind)
    assert dropouts(student) == {0.25} == dropouts(init.flow_map()) and dropouts(init.critic()) == {0.0}
    assert student.network.config.dropout == 0.25  # and so it is exported
    assert equal(student.network, same.network) and student.training
    x, t = torch.randn(5, 1, 8, 8), torch.full((5,), 0.5)
    with torch.no_grad():
        assert not torch.equal(student(x, t, COND), student(x, t, COND))
        assert torch.equal(student.eval()(x, t, COND), same.eval()(x, t, COND))


def test_dropout_of_a_network_without_any_is_refused():
    network = build(MLP, (2,), None, seed=0)
    field = NetworkField(network, linear(), "velocity", 1000.0)
    source = LoadedTeacher(field, (2,), None, None, "0" * 64, "an mlp", network)
    with pytest.raises(
        InputError, match="dropout: an mlp is a network without dropout, so this has no effect; remove it"
    ):
        StudentInit(source, None, (2,), None, 0, None, 0.1).velocity_field()


# --- flow maps ---


def pairs_of_times(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """t over [0, 1], its ends too, and s <= t."""
    t = torch.linspace(0, 1, count)
    return t, t * torch.tensor([0.0, 1.0, 0.3, 0.9, 0.0])[:count]


# one that is continued as it is and one of each wrapper; the others differ in a formula that WRAPPED tests
@pytest.mark.parametrize("kind", few(STARTS, "velocity", "epsilon", "edm v_prediction"))
def test_a_flow_map_starts_as_the_velocity_whatever_s_and_stays_so_when_saved(kind, tmp_path):
    init = StudentInit(teacher(kind), None, (1, 8, 8), 3, 0)
    velocity, flow_map = init.velocity_field().eval(), init.flow_map()
    assert flow_map.training and all(p.requires_grad for p in flow_map.parameters())
    flow_map.eval().network.save_pretrained(tmp_path)
    loaded = FlowMapStudent(FlowMapUNet2DModel.from_pretrained(tmp_path))
    x, (t, s) = torch.randn(5, 1, 8, 8), pairs_of_times(5)
    with torch.no_grad():
        v, u = velocity(x, t, COND), flow_map(x, t, s, COND)
        assert (u - v).abs().max() <= 1e-6 * v.abs().max()
        assert torch.equal(loaded(x, t, s, COND), u)


@pytest.mark.parametrize("classes", [None, 3])
def test_a_flow_map_of_an_mlp_starts_as_the_velocity_whatever_s_and_stays_so_when_saved(classes, tmp_path):
    init = StudentInit(None, MLP, (2,), classes, 0)
    flow_map = init.flow_map().eval()
    flow_map.network.save_pretrained(tmp_path)
    loaded = FlowMapStudent(FlowMapMLP.from_pretrained(tmp_path))
    x, (t, s), cond = torch.randn(5, 2), pairs_of_times(5), COND if classes else {}
    with torch.no_grad():
        v, u = init.velocity_field().eval()(x, t, cond), flow_map(x, t, s, cond)
        assert (u - v).abs().max() <= 1e-6 * v.abs().max()
        assert torch.equal(loaded(x, t, s, cond), u)


def exported(student: FlowMapStudent, folder: Path, shape: tuple[int, ...], classes: int | None) -> LoadedStudent:
    """The student once its second time has moved, through its folder."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "gap." in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator("gap", name))
    card = StudentCard(
        name="s", recipe="r", spec_digest="0" * 64, teacher_digest=None, kind="flow_map", sampler="jump",
        num_classes=classes, null_class=classes, shape=shape, weights="raw", images=1,
    )  # fmt: skip
    export(student, folder, card)
    return load_student(folder, torch.device("cpu"))


@pytest.mark.parametrize(("kind", "shape"), [("velocity", (1, 8, 8)), ("v_prediction", (1, 8, 8)), ("mlp", (2,))])
def test_a_trained_flow_map_is_continued_bitwise_and_as_nothing_else(kind, shape, tmp_path):
    first = StudentInit(None, MLP, shape, 3, 0) if kind == "mlp" else StudentInit(teacher(kind), None, shape, 3, 0)
    student = first.flow_map()
    source = exported(student, tmp_path / "s", shape, 3)
    init = StudentInit(source, None, shape, 3, seed=9)
    again = init.flow_map()
    assert (init.num_classes, init.null_class) == (3, 3)
    assert equal(again, student), "the second time too"
    assert again.training and all(p.requires_grad for p in again.parameters())
    assert again.network is not source.network
    x, (t, s) = torch.randn(5, *shape), pairs_of_times(5)
    with torch.no_grad():
        u = student.eval()(x, t, s, COND)
        assert torch.equal(again.eval()(x, t, s, COND), u)
        assert not torch.allclose(u, first.velocity_field().eval()(x, t, COND)), "t - s has an effect by now"
    with pytest.raises(
        InputError, match="from s is a flow map, and a velocity field cannot start from its weights; .* student"
    ):
        init.velocity_field()
    with pytest.raises(InputError, match="no weights for the critic: the teacher has no network"):
        init.critic()


@pytest.mark.parametrize("kind", few([*STARTS, "mlp"], "velocity", "mlp"))
def test_an_acceleration_starts_beside_its_velocity_and_blind_to_it(kind, tmp_path):
    shape = (2,) if kind == "mlp" else (1, 8, 8)
    init = StudentInit(None, MLP, shape, 3, 0) if kind == "mlp" else StudentInit(teacher(kind), None, shape, 3, 0)
    velocity, student = init.velocity_field().eval(), init.acceleration()
    assert student.training and all(p.requires_grad for p in student.parameters())
    x, v, t = torch.randn(5, *shape), torch.randn(5, *shape), torch.linspace(0, 1, 5)
    with torch.no_grad():
        assert torch.equal(student.eval()(x, t, None, COND), velocity(x, t, COND))
        a = student(x, t, v, COND)
        assert torch.equal(student(x, t, 2 * v, COND), a)
        if kind in ("velocity", "mlp"):  # of the linear path: the very same numbers
            assert torch.allclose(a, velocity(x, t, COND), atol=1e-6)
        first = "given.weight" if kind == "mlp" else "acceleration.conv_in.weight"
        student.network.get_parameter(first)[:, -1] += 1.0
        a = student(x, t, v, COND)
        assert not torch.allclose(student(x, t, 2 * v, COND), a)
        assert torch.equal(student(x, t, None, COND), velocity(x, t, COND)), "of other weights"
    card = StudentCard(
        name="s", recipe="r", spec_digest="0" * 64, teacher_digest=None, kind="acceleration", sampler="accelerated",
        num_classes=3, null_class=3, shape=shape, weights="raw", images=1,
    )  # fmt: skip
    export(student, tmp_path / "s", card)
    again = StudentInit(load_student(tmp_path / "s", torch.device("cpu")), None, shape, 3, seed=9)
    assert equal(again.acceleration(), student)
    for start, what in ((again.velocity_field, "velocity field"), (again.flow_map, "flow map")):
        with pytest.raises(InputError, match=f"from s is a velocity with its acceleration, and a {what} cannot start"):
            start()
    with pytest.raises(InputError, match="no weights for the critic: the teacher has no network"):
        again.critic()


def test_no_acceleration_starts_from_a_flow_map(tmp_path):
    source = exported(StudentInit(None, MLP, (2,), 3, 0).flow_map(), tmp_path / "s", (2,), 3)
    with pytest.raises(InputError, match="from s is a flow map, and a velocity with its acceleration cannot start"):
        StudentInit(source, None, (2,), 3, 0).acceleration()


def test_the_critic_starts_as_the_teacher_whatever_the_student_starts_as(tmp_path):
    """And its head is its own, the same for the same seed."""
    given, spec = teacher("velocity"), UNetSpec(kind="unet", channels=[8], norm_groups=4)
    flow_map = exported(StudentInit(given, None, (1, 8, 8), 3, 0).flow_map(), tmp_path / "s", (1, 8, 8), 3)
    x, t = torch.randn(5, 1, 8, 8), torch.linspace(0.1, 1, 5)
    starts = [
        StudentInit(source, network, (1, 8, 8), 3, 0, given) for source, network in ((flow_map, None), (None, spec))
    ]
    with torch.no_grad():
        expected = given.field(x, t, COND)
        for init in starts:
            (velocity, logit), (_, again) = (init.critic().eval()(x, t, COND) for _ in range(2))
            assert torch.allclose(velocity, expected, atol=1e-6) and torch.equal(logit, again)
            assert logit.shape == (5,) and logit.std() > 0
        fresh = StudentInit(None, spec, (1, 8, 8), 3, 0)  # a teacher in closed form has nothing to start from
        assert torch.equal(fresh.critic().eval()(x, t, COND)[0], fresh.velocity_field().eval()(x, t, COND))
    critic = starts[0].critic()
    assert critic.training and all(parameter.requires_grad for parameter in critic.parameters())
    assert not any(parameter.requires_grad for parameter in given.network.parameters())


def test_a_velocity_student_is_continued_bitwise(tmp_path):
    student = StudentInit(teacher("epsilon"), None, (1, 8, 8), 3, 0).velocity_field()
    card = StudentCard(
        name="s", recipe="r", spec_digest="0" * 64, teacher_digest=None, num_classes=3, null_class=3, shape=(1, 8, 8),
        weights="raw", images=1,
    )  # fmt: skip
    export(student, tmp_path / "s", card)
    init = StudentInit(load_student(tmp_path / "s", torch.device("cpu")), None, (1, 8, 8), 3, 0)
    x, t = torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5)
    with torch.no_grad():
        v = student.eval()(x, t, COND)
        assert torch.equal(init.velocity_field().eval()(x, t, COND), v)
        u = init.flow_map().eval()(x, t, 0 * t, COND)
        assert (u - v).abs().max() <= 1e-6 * v.abs().max()


# --- a recipe's teacher ---


@pytest.mark.parametrize("kind", few(WRAPPED, "epsilon", "edm v_prediction"))
def test_a_recipes_teacher_is_on_the_linear_path_with_the_very_same_weights(kind):
    source = teacher(kind)
    given = teacher_on_linear_path(source)
    assert (given.digest, given.description, given.shape) == (source.digest, source.description, source.shape)
    assert (given.field.interpolant.name, given.field.t_range) == ("linear", (0.0, 1.0))
    assert given.field.network is given.network
    assert not given.network.training
    weights = dict(given.network.named_parameters())
    for name, parameter in source.network.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr(), "no second copy"
        assert not weights[name].requires_grad
    reference = Rescheduled(source.field, linear())
    low, high = reference.t_range
    t = torch.tensor([low, 0.3, 0.5, 0.7, high], dtype=torch.float64)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for scale in (1.0, 2.0):
            v = Rescheduled(source.guided(scale), linear())(x, t, COND)
            difference = (given.guided(scale)(x, t, COND) - v).abs().amax((1, 2, 3)) / v.abs().amax((1, 2, 3)).clamp(
                min=1
            )
            assert difference.max() <= 1e-5
        assert given.field(x, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), COND).isfinite().all()
    student = StudentInit(given, None, (1, 8, 8), 3, 0).velocity_field()
    assert equal(student, started(kind))
    assert student.network.config.alphas_cumprod == started(kind).network.config.alphas_cumprod


def test_a_teacher_of_the_linear_path_is_given_as_it_is():
    source = teacher("velocity")
    assert teacher_on_linear_path(source) is source
    closed_form = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.0], std=[1.0]))
    assert teacher_on_linear_path(closed_form) is closed_form


def test_wrapped_networks_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match="path=vp, prediction=velocity: valid .*; vp alone has alphas_cumprod"):
        VelocityUNet2DModel("vp", "velocity", alphas_cumprod=[0.9, 0.1])
    with pytest.raises(ValueError, match="vp alone has alphas_cumprod"):
        VelocityUNet2DModel("edm", "epsilon", alphas_cumprod=[0.9, 0.1])


def test_a_field_of_another_kind_cannot_be_continued():
    source = teacher("velocity")
    foreign = LoadedTeacher(VelocityStudent(source.network), (1, 8, 8), 3, 3, "0" * 64, "a foreign one", source.network)
    with pytest.raises(
        InputError,
        match="neither a student nor a critic can start from the weights of a foreign one; use a new `network`",
    ):
        StudentInit(foreign, None, (1, 8, 8), 3, 0).velocity_field()


def test_what_a_network_class_keeps_frozen_stays_frozen():
    # diffusers' Fourier embedding has fixed frequencies as a Parameter: a student must not train them.
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1}
    network = UNet2DModel(**size, time_embedding_type="fourier", add_attention=False, **options, **blocks)
    network.eval().requires_grad_(False)
    field = NetworkField(network, linear(), "velocity", 1000.0)  # one that takes log(0), and so is never loaded
    teacher = LoadedTeacher(field, (1, 8, 8), None, None, "", "a teacher", network)
    student = StudentInit(teacher, None, (1, 8, 8), None, 0).velocity_field().network
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"time_proj.weight"}
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), network.state_dict().values(), strict=True)
    )
