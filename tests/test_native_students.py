"""Students that keep the network class of a latent-space pipeline: how they start, and how they are stored."""

import copy
import json
import shutil

import pytest
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_unet_condition as sd
import test_teacher_wan as wan
import torch
from diffusers import FluxTransformer2DModel
from latent import CPU, conditions, ddim, load, normal, write, write_conditions
from latent_runs import content, images

from distill.core.errors import InputError
from distill.exchange.student_card import StudentCard
from distill.execution import forecast, preflight
from distill.networks.experts import Experts
from distill.spec import checks, specfile
from distill.spec.model import CheckpointTeacher, UNetSpec
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.training.blocks import recompute

X, T, S = normal(3, 4, 8, 12), torch.tensor([0.2, 0.6, 1.0]), torch.tensor([0.1, 0.0, 0.5])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A FLUX.1 teacher as a spec names it."""
    folder = tmp_path_factory.mktemp("flux")
    given = write_conditions(folder / "conditions.safetensors", flux.embeddings(2))
    path = write(folder / "teacher", flux.pipeline(guidance_embeds=True))
    return {"folder": path, "size": [16, 24], "conditions": given}


@pytest.fixture(scope="module")
def teacher(place):
    return teacher_on_linear_path(load(**place))


def init(teacher, **options):
    return StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher, **options)


@torch.no_grad()
def test_every_student_starts_as_its_teacher(teacher):
    cond, expected = conditions(teacher, 3), None
    expected = teacher.field(X, T, cond)
    assert torch.equal(init(teacher).velocity_field().eval()(X, T, cond), expected)
    assert torch.equal(init(teacher).critic().eval()(X, T, cond)[0], expected)
    flow_map, acceleration = init(teacher).flow_map().eval(), init(teacher).acceleration().eval()
    assert torch.equal(flow_map(X, T, S, cond), expected)
    assert torch.equal(acceleration(X, T, None, cond), expected)
    assert (acceleration(X, T, normal(3, 4, 8, 12, seed=9), cond) - expected).abs().max() <= 1e-6


def test_a_second_time_and_a_velocity_are_learnt(teacher):
    cond = conditions(teacher, 3)
    for network, inputs in (
        (init(teacher).flow_map(), (X, T, S, cond)),
        (init(teacher).acceleration(), (X, T, normal(3, 4, 8, 12, seed=9), cond)),
    ):
        network(*inputs).square().sum().backward()
        new = {name: p for name, p in network.named_parameters() if "gap.2" in name or "x_embedder" in name}
        assert all(p.grad.abs().sum() > 0 for name, p in new.items() if not name.startswith("network.velocity")), new


@torch.no_grad()
def test_an_acceleration_of_a_network_whose_config_leaves_out_options(tmp_path, place):
    """The configs of FLUX.1 have no out_channels: these are the same as in_channels."""
    path = shutil.copytree(place["folder"], tmp_path / "teacher")
    config = path / "transformer" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "out_channels"}))
    given = teacher_on_linear_path(load(path, size=place["size"], conditions=place["conditions"]))
    cond, student = conditions(given, 3), init(given).acceleration().eval()
    assert (student(X, T, X, cond) - given.field(X, T, cond)).abs().max() <= 1e-6


def test_what_a_class_freezes_stays_frozen(tmp_path):
    """The frequencies of the time are parameters in U-Nets with time_embedding_type fourier, but never trained."""
    rows = write_conditions(tmp_path / "conditions.safetensors", sd.embeddings(2, xl=False))
    stock = sd.pipeline(ddim(**sd.SD), time_embedding_type="fourier")
    given = teacher_on_linear_path(load(write(tmp_path / "sd", stock), size=[16, 24], conditions=rows))
    made = init(given)
    for network in (made.velocity_field(), made.flow_map(), made.acceleration(), made.critic()):
        frozen = [name for name, each in network.named_parameters() if not each.requires_grad]
        assert frozen
        assert all(name.endswith("time_proj.weight") for name in frozen)


def moved(network, amount=0.02):
    """The network with all weights changed, as after training."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += amount * normal(*parameter.shape, seed=i)
    return network


@pytest.mark.parametrize("kind", ["velocity", "flow_map", "acceleration"])
def test_an_exported_student_is_read_again_bit_for_bit(tmp_path, place, teacher, kind):
    made = init(teacher)
    make = {"velocity": made.velocity_field, "flow_map": made.flow_map, "acceleration": made.acceleration}[kind]
    student = moved(make())
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind=kind,
        sampler={"velocity": "euler", "flow_map": "jump", "acceleration": "accelerated"}[kind],
        num_classes=3, null_class=None, shape=teacher.shape, weights="raw", images=1,
    )  # fmt: skip
    export(student, tmp_path / "s", card, made.packaging)
    spec = CheckpointTeacher(path=str(place["folder"]), size=place["size"], conditions=place["conditions"])
    read, cond = load_student(tmp_path / "s", CPU, spec), conditions(teacher, 3)
    inputs = {"velocity": (X, T, cond), "flow_map": (X, T, S, cond), "acceleration": (X, T, X, cond)}[kind]
    with torch.no_grad():
        assert torch.equal(read.student(*inputs), student.eval()(*inputs))
    plain = FluxTransformer2DModel.from_pretrained(tmp_path / "s" / "transformer")
    assert plain.config.guidance_embeds
    if kind == "velocity":  # it is a teacher, too
        again = load(tmp_path / "s", conditions=place["conditions"])  # its card has the shape
        with torch.no_grad():
            assert torch.equal(again.field(X, T, cond), read.student(X, T, cond))


def test_a_new_network_cannot_take_prompts(teacher):
    with pytest.raises(InputError, match="conditioned on more than class labels, which a new network does not take"):
        StudentInit(teacher, UNetSpec(kind="unet", channels=[8]), teacher.shape, 3, 0, teacher)


@torch.no_grad()
def test_rows_of_a_batch_may_belong_to_either_of_two_networks(tmp_path):
    stock = wan.pipeline(transformer_2=wan.network(1), boundary_ratio=0.6)
    teacher = teacher_on_linear_path(wan.load_with_prompts(tmp_path, stock))
    assert isinstance(teacher.network, Experts)
    x, cond = normal(3, *wan.NOISE.shape[1:]), conditions(teacher, 3)
    critic, flow_map = init(teacher).critic().eval(), moved(init(teacher).flow_map()).eval()
    for times in ([0.9, 0.2, 0.7], [0.1, 0.9, 0.3], [0.9, 0.8, 0.7]):
        t = torch.tensor(times)
        s, single = t / 2, [slice(i, i + 1) for i in range(3)]
        parts = [(x[i], t[i], {name: each[i] for name, each in cond.items()}) for i in single]
        together = teacher.field(x, t, cond)
        assert (together - torch.cat([teacher.field(*part) for part in parts])).abs().max() <= 1e-5
        expected = [critic(*part) for part in parts]
        velocity, logit = critic(x, t, cond)
        assert (velocity - torch.cat([each[0] for each in expected])).abs().max() <= 1e-5
        assert (logit - torch.cat([each[1] for each in expected])).abs().max() <= 1e-5
        mapped = [flow_map(*part[:2], s[i], part[2]) for i, part in zip(single, parts, strict=True)]
        assert (flow_map(x, t, s, cond) - torch.cat(mapped)).abs().max() <= 1e-5


def test_recomputed_activations_have_the_second_time_of_their_own_call(tmp_path):
    """DiT embeds the time in its blocks, which are called again in the backward pass: after other calls, too."""
    teacher = teacher_on_linear_path(load(write(tmp_path / "dit", dit.pipeline(num_embeds_ada_norm=3))))
    x, cond = normal(3, 4, 8, 8), conditions(teacher, 3)
    plain = moved(init(teacher).flow_map())
    recomputing = copy.deepcopy(plain)
    recompute("a recipe", [recomputing])
    for network in (plain, recomputing):
        first, second = network(x, T, S, cond), network(x, T, 0 * S, cond)
        (first.square().sum() + second.sum()).backward()
    for (name, ours), theirs in zip(recomputing.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5), name


def test_the_checks_before_a_run_copy_no_weights(place, teacher, tmp_path):
    given = {"path": str(place["folder"]), "size": place["size"], "conditions": place["conditions"]}
    recipes = ["reflow/reflow", "reflow/caf", "shortcut/shortcut"]
    spec = specfile.validate(content(given, images(tmp_path / "data", 3, 16, 24), recipes), "spec")
    ready = preflight.check(checks.check(spec, tmp_path))
    assert [*ready.built] == ["reflow", "caf", "shortcut"]
    for each in ready.built.values():
        assert all(p.is_meta for p in each.student.network.parameters())
    assert not any(p.is_meta for p in ready.teacher.network.parameters())
    size = sum(p.numel() for p in teacher.network.parameters())
    assert sum(ready.built["reflow"].sizes["student"]) == size
    assert size < sum(ready.built["shortcut"].sizes["student"]) < 2 * size < sum(ready.built["caf"].sizes["student"])
    # A call of a student takes as long as one of the teacher, for each parameter.
    seconds = {name: cost.seconds for name, cost in forecast.forecast(ready, here=False).items()}
    assert seconds.keys() == {"pairs", *ready.built} and all(each > 0 for each in seconds.values())
