"""The guidance scale as an input of a student: its closed forms, how it starts, trains, is exported and sampled."""

import copy
import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from commands import command
from diffusers import DiffusionPipeline
from runs import CARD
from safetensors.torch import load_file
from test_guidance import FORMS, LABELS, MEANS, NULL, TEACHER, WIDTHS, name_of
from test_policies import vp_teacher

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.execution.batches import CollatedBatches
from distill.flow.conditioning import GUIDANCE_SCALE, ClassLabels, WithGuidance, between, guidance_of, with_guidance
from distill.flow.draws import Rows, StepDraw, generator, sample_noise
from distill.flow.guidance import Guided
from distill.flow.times import uniform_grid
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.protocols import Adapter, Batch, Copy, Init
from distill.spec import registry
from distill.spec.guidancespec import FieldSettings
from distill.spec.model import MlpSpec
from distill.students.init import StudentInit
from distill.students.loaded import load_student
from distill.students.sampling import by_sampler
from distill.teachers.analytic import GaussianField
from distill.teachers.architectures.mlp import ARCHITECTURE
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import NetworkField
from distill.testing import exact, subject
from distill.testing.closed_form import class_gaussian_teacher
from distill.training.engine import StepContext

RANGE = (1.5, 5.0)
SCALES = torch.tensor([1.5, 2.0, 5.0, 3.25, 4.0])
GUIDED = [
    "consistency/consistency",
    "consistency/scm",
    "consistency/tcm",
    "reflow/perflow",
    "reflow/proreflow",
    "reflow/rectified_diffusion",
    "shortcut/alphaflow",
    "shortcut/flow_map",
    "shortcut/meanflow",
    "shortcut/pdd",
    "shortcut/pi_flow",
    "shortcut/progressive",
    "shortcut/shortcut",
    "shortcut/soflow",
]


def noisy(count=5, shape=(3,), dtype=torch.float64):
    x, u = (torch.randn(count, *shape, generator=generator("input", name), dtype=dtype) for name in ("x", "u"))
    return x, torch.sigmoid(u.flatten(1)[:, 0]).float()


def given(scales=SCALES):
    return {"class_labels": torch.arange(5), GUIDANCE_SCALE: scales}


@pytest.mark.parametrize("form", [None, *FORMS], ids=lambda form: "cfg" if form is None else name_of(form))
def test_each_sample_is_guided_with_its_own_scale(form):
    x, t = noisy()
    together = dataclasses.replace(TEACHER, form=form).guided(RANGE)(x, t, {**LABELS, GUIDANCE_SCALE: SCALES})
    for row, scale in enumerate(SCALES.tolist()):
        own = {name: each[row : row + 1] for name, each in LABELS.items()}
        alone = TEACHER.field_with(FieldSettings(scale, form))(x[row : row + 1], t[row : row + 1], own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def test_the_guided_velocity_is_that_of_the_shifted_gaussian_for_every_scale_in_a_batch():
    """With equal covariances, scale w moves the mean to null + w (mean - null): Meng et al. 2022, arXiv 2210.03142."""
    x, t = noisy()
    labels = LABELS["class_labels"]
    shifted = NULL + SCALES.double()[:, None] * (MEANS[labels] - NULL)
    rows = {"class_labels": torch.arange(5)}
    expected = GaussianField(shifted, WIDTHS, conditional=True)(x, t, rows)
    found = TEACHER.guided(RANGE)(x, t, {**LABELS, GUIDANCE_SCALE: SCALES})
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_two_calls_are_counted_and_the_field_does_not_see_the_scale():
    seen = []

    class Field:
        interpolant, t_range = TEACHER.field.interpolant, (0.0, 1.0)

        def __call__(self, x_t, t, cond):
            seen.append((len(x_t), sorted(cond)))
            return TEACHER.field(x_t, t, cond)

    x, t = noisy()
    field = Guided(Field(), TEACHER.null, None)
    field(x, t, {**LABELS, GUIDANCE_SCALE: SCALES})
    assert seen == [(10, ["class_labels"])]
    assert field.calls_at(t) == 2


def edm_teacher():
    torch.manual_seed(0)
    network = VelocityEdmUNet2DModel(
        design="song",
        sign=1,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        num_class_embeds=11,
        base_channels=8,
        channel_multipliers=(1,),
        layers_per_block=1,
        attention_sizes=(),
        dropout=0.0,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.data, std=0.1)
    network.eval()
    field = NetworkField(network, TEACHER.field.interpolant, "velocity", 1000.0)
    return LoadedTeacher(field, (1, 8, 8), 10, 10, "3" * 64, "a U-Net of EDM", network)


def inits(guidance_range=RANGE):
    made = {"linear": subject.unet_teacher(), "vp": vp_teacher(), "edm": edm_teacher()}
    found = {
        name: StudentInit(each, None, each.shape, 10, 0, each, guidance_range=guidance_range)
        for name, each in made.items()
    }
    found["new"] = StudentInit(None, subject.UNET, subject.SHAPE, 10, 0, guidance_range=guidance_range)
    found["mlp"] = StudentInit(None, MlpSpec(kind="mlp", width=16), (3,), 10, 0, guidance_range=guidance_range)
    return found


KINDS = ("velocity", "flow_map", "policy")


def network_of(init, kind):
    if kind == "policy":
        return init.policy("steps", 2, [1.0, 0.5, 0.0])
    return init.velocity_field() if kind == "velocity" else init.flow_map()


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in inits() for k in KINDS if (n, k) != ("edm", "policy")])
def test_a_network_starts_blind_to_the_scale_and_learns_it(name, kind):
    """At first it equals the network without this input, bit for bit; the scale's weights get gradients."""
    plain, guided = (network_of(inits(each)[name], kind) for each in (None, RANGE))
    shape = inits()[name].shape
    x, t = noisy(shape=shape, dtype=torch.float32)
    times = (t,) if kind == "velocity" else (t, t / 2)
    labels = {"class_labels": torch.arange(5)}
    with torch.no_grad():
        before = plain.eval()(x, *times, labels)
        assert torch.equal(guided.eval()(x, *times, given()), before)
    (guided(x, *times, given()) * x).sum().backward()
    moved = {key: each.grad for key, each in guided.named_parameters() if "guidance." in key}
    assert {key.rsplit(".", 2)[-2] for key in moved} == {"0", "2"}
    assert all(grad.any() for key, grad in moved.items() if ".2." in key)
    with torch.no_grad():
        for key, each in guided.named_parameters():
            if "guidance.2" in key:
                each.add_(0.1 * torch.randn(each.shape, generator=generator("moved", key)))
        outputs = [guided(x, *times, given(torch.full((5,), s))) for s in (1.5, 3.0, 5.0)]
        assert min((a - b).abs().max() for a, b in pairwise(outputs)) > 1e-4
        rows = guided(x, *times, given())
        assert torch.allclose(rows[2], outputs[2][2], atol=1e-6)  # the row whose scale is 5
        with pytest.raises(ValueError, match=r"this network needs guidance_scale, from 1\.5 to 5"):
            guided(x, *times, labels)
        with pytest.raises((TypeError, ValueError), match="guidance_scale"):
            plain(x, *times, given())


def loss_of(recipe, options, init, cond):
    """The loss of the student's turn at step 0, for 10 samples."""
    module = registry.load(recipe, None)
    config = registry.configure(recipe, module, options, recipe)
    made = module.Recipe(config, subject.unet_teacher())
    roles = made.networks(init)
    networks = {name: role.module for name, role in roles.items() if not isinstance(role, Copy | Adapter)}
    networks |= {name: networks[role.of] for name, role in roles.items() if isinstance(role, Copy)}
    rows = Rows(0, 10, 10)
    found = subject.Noise(10).batch(0, rows)
    (turn,) = [each for each in made.turns(0, 0) if each.network == "student"]
    context = StepContext(0, 0, StepDraw(0, 0, 0, rows), {})
    for each in networks.values():
        each.eval()
    with torch.no_grad():
        return turn.loss(networks, Batch(found.data, None, {**found.cond, **cond}), context).total


@pytest.mark.parametrize("recipe", GUIDED)
def test_the_loss_at_one_scale_is_that_of_a_training_with_this_scale(recipe):
    """Bit for bit, for a network that is still blind to the scale. Two scales have different losses."""
    plain, guided = (
        StudentInit(None, subject.UNET, subject.SHAPE, 10, 0, guidance_range=each) for each in (None, RANGE)
    )
    losses, more = [], {"form": "phased"} if recipe == "reflow/rectified_diffusion" else {}
    for scale in (2.0, 4.0):
        cond = {GUIDANCE_SCALE: torch.full((10,), scale)}
        losses.append(loss_of(recipe, {**more, "guidance_scale": [*RANGE]}, guided, cond))
        expected = loss_of(recipe, {**more, "guidance_scale": scale}, plain, {})
        torch.testing.assert_close(losses[-1], expected, rtol=1e-6, atol=1e-7)
    assert (losses[0] - losses[1]).abs() > 1e-4


def test_scales_are_drawn_for_each_sample_of_the_global_batch():
    """Uniform in the range, the same for any micro-batches, others in the next step and with another seed."""
    source = CollatedBatches.of(subject.Noise(1000), WithGuidance(ClassLabels(10, 10), RANGE), 3)
    whole = source.batch(7, Rows(0, 1000, 1000))
    parts = [source.batch(7, Rows(start, start + 250, 1000)).cond[GUIDANCE_SCALE] for start in range(0, 1000, 250)]
    scales = whole.cond[GUIDANCE_SCALE]
    assert torch.equal(scales, torch.cat(parts))
    assert torch.equal(scales, whole.data_cond[GUIDANCE_SCALE])
    low, high = RANGE
    assert low <= scales.min() < low + 0.1 and high - 0.1 < scales.max() < high
    uniform = ((scales - low) / (high - low)).sort().values
    assert (uniform - (torch.arange(1000) + 0.5) / 1000).abs().max() < 1.63 / 1000**0.5  # Kolmogorov-Smirnov, 1 %
    other = CollatedBatches.of(subject.Noise(1000), WithGuidance(ClassLabels(10, 10), RANGE), 4)
    for again in (source.batch(8, Rows(0, 1000, 1000)), other.batch(7, Rows(0, 1000, 1000))):
        assert not torch.equal(again.cond[GUIDANCE_SCALE], scales)


@pytest.mark.long
def test_one_student_learns_every_scale():
    """Of Gaussian classes: samples have the mean null + w (mean - null) for whichever scale w is asked for."""
    torch.set_num_threads(1)
    means, null, std = torch.tensor([[0.4, 0.2], [-0.3, 0.5]]), torch.tensor([-0.2, -0.2]), torch.tensor([0.5, 0.5])
    teacher, scales = class_gaussian_teacher(means, null, std), (1.0, 3.0)
    module = registry.load("shortcut/shortcut", None)
    options = {"base": "step", "guidance_scale": [*scales], "grid": 16, "target_decay": 0.99}
    config = registry.configure("shortcut/shortcut", module, options, "options")
    network = MlpSpec(kind="mlp", width=64, frequencies=5)
    init = StudentInit(None, network, (2,), 2, 0, teacher, guidance_range=scales)
    recipe, rows, conditioning = module.Recipe(config, teacher), Rows(0, 512, 512), init.conditioning
    student = recipe.networks(init)["student"].module
    networks = {"student": student, "target": copy.deepcopy(student).requires_grad_(False)}
    adam, steps = torch.optim.Adam(student.parameters(), lr=3e-3), 1500
    for step in range(steps):
        draw = StepDraw(0, step, 0, rows)
        unit = draw.normal("data", torch.empty(512, 2))
        labels = (draw.uniform("label", unit) < 0.5).long()
        cond = between(conditioning, conditioning.collate(labels), draw.uniform("scale", unit))
        batch = Batch(means[labels] + std * unit, None, cond)
        (turn,) = recipe.turns(step, 512 * step)
        adam.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        adam.zero_grad()
        turn.loss(networks, batch, StepContext(step, 512 * step, draw, {}, step / steps)).total.backward()
        adam.step()
        with torch.no_grad():
            for old, new in zip(networks["target"].parameters(), student.parameters(), strict=True):
                old.lerp_(new, 0.01)
    noise, labels = sample_noise(5, range(4000), (2,)), torch.arange(4000) % 2
    for scale in (1.0, 2.0, 3.0):
        cond = with_guidance(conditioning, scale, "scale").collate(labels)
        for steps in (1, 4):
            samples = by_sampler(student.eval(), "jump", noise, uniform_grid(steps), cond, [])
            for label in (0, 1):
                expected = null + scale * (means[label] - null)
                assert (samples[labels == label].mean(0) - expected).abs().max() < 0.15, (scale, steps)
                assert (samples[labels == label].std(0) - std).abs().max() < 0.1, (scale, steps)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([3, 2], "two numbers"),
        ([0.5, 2], "two numbers"),
        ([2, 2], "two numbers"),
        ([1, 2, 3], "guidance_scale"),
        (-1, "at least 0"),
        ("high", "guidance_scale"),
    ],
)
def test_a_wrong_scale_is_refused(value, message):
    module = registry.load("shortcut/shortcut", None)
    with pytest.raises(InputError, match=message):
        registry.configure("shortcut/shortcut", module, {"guidance_scale": value}, "options")


@pytest.mark.parametrize("value", [["1.5", "5"], [True, 5], [2, 1], [0.5, 2], [1, 2, 3], 3])
def test_a_wrong_range_in_a_file_is_refused(value):
    """Of a student's card, and of the config of its network."""
    card = CARD.model_dump(mode="json")
    with pytest.raises(InputError, match="guidance_range"):
        student_card.parse(json.dumps({**card, "guidance_range": value}).encode(), "distill.json")
    config = {"dim": 3, "num_class_embeds": 3, "guidance_range": value}
    with pytest.raises(InputError, match="guidance_range"):
        ARCHITECTURE.conditioning(config, Path("config.json"), 2)


def test_networks_that_cannot_take_it_are_refused():
    teacher = subject.unet_teacher()
    init = StudentInit(teacher, None, teacher.shape, 10, 0, teacher, guidance_range=RANGE)
    assert isinstance(init, Init)
    for make, what in ((init.critic, "a critic"), (init.acceleration, "a network with an acceleration")):
        with pytest.raises(InputError, match=f"{what} cannot take the guidance scale as an input"):
            make()
    with pytest.raises(InputError, match=r"guidance_scale: \[1\.5, 5\] has no effect on networks without classes"):
        StudentInit(None, MlpSpec(kind="mlp"), (3,), None, 0, guidance_range=RANGE)
    with pytest.raises(InputError, match="cannot be called|has no class id|no condition|no classes"):
        exact.teacher(exact.FIELD).guided(RANGE)


SPEC = """
name: r
data: {kind: digits}
stages:
  teach: {kind: train, recipe: pretrain/flow_matching, options: {label_dropout: 0.2},
          network: {kind: unet, channels: [8], norm_groups: 4},
          images: 64, batch_size: 32, ema_half_lives: [], export: raw}
  first: {kind: train, recipe: shortcut/progressive, teacher: teach, options: {steps: 2, guidance_scale: [1.5, 5]},
          images: 64, batch_size: 32, checkpoint: {images: 32}, ema_half_lives: [], export: raw}
  second: {kind: train, recipe: shortcut/progressive, teacher: first, init: first, options: {steps: 1},
           images: 64, batch_size: 32, ema_half_lives: [], export: raw}
  map: {kind: train, recipe: shortcut/shortcut, teacher: teach, options: {guidance_scale: [1.5, 5]},
        images: 64, batch_size: 32, ema_half_lives: [], export: raw}
  weak: {kind: train, recipe: pretrain/flow_matching, network: {kind: unet, channels: [4], norm_groups: 4},
         images: 64, batch_size: 32, ema_half_lives: [], export: raw}
  auto: {kind: train, recipe: shortcut/flow_map, teacher: teach, options: {law: progressive, guidance_scale: [1.5, 5]},
         guidance: {weak: weak, interval: [0.2, 1]}, images: 64, batch_size: 32, ema_half_lives: [], export: raw}
  e: {kind: evaluate, teacher: teach, students: {second: [1], map: [1, 2]}, samples: 20, block: 10,
      teacher_steps: [1], baselines: []}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The store of the run above."""
    here = tmp_path_factory.mktemp("guided")
    (here / "spec.yaml").write_text(SPEC)
    return here


@pytest.mark.process
def test_a_chain_is_trained_exported_and_sampled_at_any_scale(run, capfd, monkeypatch):
    """Progressive stages carry the scale on; plain diffusers makes the same samples; other scales are refused."""
    monkeypatch.chdir(run)
    done = command(capfd, "run", "spec.yaml", "--store", "store")
    assert done.code == 0, done.err
    for name in ("second", "map", "auto"):
        folder = run / "store/r/students" / name
        card = json.loads((folder / "distill.json").read_text())
        assert (card["guidance_range"], card["guidance_scale"]) == ([1.5, 5.0], 3.25)
        said = "`--guidance` of `distill sample`, `guidance_scale` of the pipeline; 3.25 unless another is given"
        assert f"any scale from 1.5 to 5, an input of the network: {said}" in (folder / "README.md").read_text()
        assert guidance_of(load_student(folder, torch.device("cpu")).conditioning) == RANGE
        out = {}
        for scale in (None, 3.25, 5.0):
            option = [] if scale is None else ["--guidance", str(scale)]
            done = command(
                capfd, "sample", f"r/{name}", "--out", "a.safetensors", "--count", "4", *option, "--store", "store"
            )
            assert (done.code, done.err) == (0, ""), done.err
            out[scale] = load_file("a.safetensors")
        assert torch.equal(out[None]["samples"], out[3.25]["samples"])
        assert not torch.equal(out[5.0]["samples"], out[3.25]["samples"])
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        call = {"class_labels": out[5.0]["class_labels"], "latents": out[5.0]["latents"], "output_type": "pt"}
        made = pipeline(1, guidance_scale=5.0, **call).images
        torch.testing.assert_close(made, out[5.0]["samples"], rtol=0, atol=1e-5)
        assert torch.equal(pipeline(1, **call).images, pipeline(1, guidance_scale=3.25, **call).images)
        with pytest.raises(ValueError, match=r"guidance_scale=7; this student knows 1\.5 to 5"):
            pipeline(1, guidance_scale=7, **call)
        done = command(capfd, "sample", f"r/{name}", "--out", "b.png", "--guidance", "7", "--store", "store")
        assert done.code == 2
        assert "--guidance 7: this student was trained for guidance scales from 1.5 to 5" in done.err
        assert not (run / "b.png").exists()
    assert card["guidance"] == "autoguidance 3.25 (0.2 < t <= 1)"
    done = command(capfd, "sample", "r/teach", "--out", "b.png", "--guidance", "2", "--store", "store")
    assert (done.code, "this student does not take a guidance scale; leave it out" in done.err) == (2, True)


@pytest.mark.process
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"map.init": "first"},
            r"stages.map: guidance_scale: \[1, 5\] given, .* scales from 1.5 to 5; give the same range",
        ),
        ({"map.init": "first", "map.options": {}}, r"stages.map: .* set options.guidance_scale to \[1.5, 5\]"),
        ({"second.init": "teach"}, "stages.second: the teacher takes guidance scales .* start from the teacher"),
        ({"map.recipe": "score/dmd2"}, "guidance_scale"),
    ],
)
def test_stages_that_do_not_fit_are_refused(run, capfd, monkeypatch, change, message):
    monkeypatch.chdir(run)
    spec = yaml.safe_load(SPEC)
    spec["name"], spec["stages"]["e"]["students"] = "other", {"second": [1]}
    spec["stages"]["map"]["options"] = {"guidance_scale": [1, 5]}
    for name, value in change.items():
        stage, field = name.split(".")
        spec["stages"][stage][field] = value
    (run / "other.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    done = command(capfd, "run", "other.yaml", "--store", "store")
    assert done.code == 2 and re.search(message, done.err), done.err
