"""Stock pipelines of diffusers sample students as distill does: scheduler, times, guidance."""

import json
from pathlib import Path

import peft
import pytest
import torch
from choices import few
from diffusers import DDIMScheduler, LCMScheduler
from latent import CPU, conditions, edit, load, normal, same
from safetensors.torch import load_file, save_file
from stock_pipelines import PIPELINES, TinyPipeline

from distill.core.errors import InputError
from distill.exchange.student_card import LoraFacts, StudentCard, read
from distill.flow.fields import jump_to_data
from distill.flow.times import uniform_grid
from distill.networks.two_times import ToData, TwoTimes
from distill.protocols import Trained
from distill.spec.model import CheckpointTeacher
from distill.spec.rolespec import LoraSpec
from distill.students import adapting, native, stock
from distill.students.comfy_keys import key_list
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.students.lora_comfy import changed_layers, why_not_in_diffusers
from distill.students.lora_weights import from_network, needs_peft
from distill.students.sampling import by_sampler, num_fresh, times_of, usual_grid
from distill.teachers.network_field import LinearCall
from recipes.score import dmd2


def moved(network, amount=0.02):
    """The network with all weights changed, as after training."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter += amount * normal(*parameter.shape, seed=i)
    return network


def exported(folder: Path, subject: TinyPipeline, kind: str = "velocity", sampler: str = "euler", t_grids=None):
    """A student of the subject's teacher, exported and loaded again."""
    teacher = subject.teacher(folder)
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    student = init.velocity_field() if kind == "velocity" else init.flow_map(to_data=sampler == "renoise")
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind=kind, sampler=sampler,
        num_classes=init.num_classes if init.has_classes else None, null_class=init.null_class, shape=teacher.shape,
        weights="raw", images=1, t_grids=t_grids or {},
    )  # fmt: skip
    export(moved(student), folder / "student", card, init.packaging)
    spec = CheckpointTeacher(path=str(folder / "pipeline"), **subject.fields)
    if subject.rows:
        spec = spec.model_copy(update={"conditions": str(folder / "rows.safetensors")})
    return load_student(folder / "student", CPU, spec)


def how_of(student, steps=None):
    return stock.of(student.student, student.sampler, student.t_grids, student.packaging, steps)


def compare(folder, subject, student, steps, fresh_of=None):
    """Checks that the stock pipeline makes the samples of distill."""
    pipeline, how, noise = subject.pipeline(folder / "student"), how_of(student), subject.noise
    assert how.steps is None or steps in how.steps
    fresh = [] if fresh_of is None else fresh_of(pipeline, subject, num_fresh(student.sampler, steps))
    cond = conditions(student, len(noise))
    ours = by_sampler(student.student, student.sampler, noise, times_of(student, steps), cond, fresh)
    theirs = subject.call(pipeline, noise, subject.rows, num_inference_steps=steps, **how.arguments)
    assert theirs.isfinite().all()
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max(), steps


@pytest.mark.long
@pytest.mark.parametrize("name", PIPELINES)
def test_the_stock_pipeline_makes_the_samples_of_a_velocity(tmp_path, name):
    subject = PIPELINES[name]
    student = exported(tmp_path, subject)
    for steps in (1, 2, 4):
        if (fits := how_of(student).steps) is None or steps in fits:
            compare(tmp_path, subject, student, steps)
        else:
            assert name == "cogview4"


RENOISED = ["sd v", "sdxl", "dit", "sd3", "flux dev", "flux2 klein", "qwen image", "z image", "wan 2.1", "sana"]


@pytest.mark.long
@pytest.mark.parametrize("name", RENOISED)
def test_the_stock_pipeline_makes_the_samples_of_a_map_to_data(tmp_path, name):
    subject = PIPELINES[name]
    student = exported(tmp_path, subject, "flow_map", "renoise")
    assert not (tmp_path / "student" / "second_time").exists()
    for steps in (1, 2, 4):
        if (fits := how_of(student).steps) is None or steps in fits:
            compare(tmp_path, subject, student, steps, drawn)
        else:
            assert name in {"sd3", "wan 2.1", "sana"}


def drawn(pipeline, subject, count):
    """Further noises as a pipeline draws them after torch.manual_seed(3): those of the global generator."""
    like = subject.to_loop(pipeline, subject.noise)
    torch.manual_seed(3)
    noises = [torch.randn(like.shape) for _ in range(count)]
    torch.manual_seed(3)
    return [subject.from_loop(pipeline, each) for each in noises]


def test_the_stock_pipeline_is_not_guided_and_takes_the_steps_of_distill(tmp_path):
    """One class in `make test`, as an example: its U-Net has a layer that turns guidance off."""
    subject = PIPELINES["sdxl"]
    student = exported(tmp_path, subject)
    assert how_of(student).arguments == {}
    assert how_of(student).steps[:6] == (1, 2, 4, 5, 8, 10)
    compare(tmp_path, subject, student, 2)
    folder = tmp_path / "student"
    assert json.loads((folder / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 4
    # The layer is gone in a network that is loaded, and is refused if it has an effect.
    assert student.network.config.time_cond_proj_dim is None
    assert not [name for name in student.network.state_dict() if "cond_proj" in name]
    again = load(folder, conditions=str(tmp_path / "rows.safetensors"))
    x, t, cond = subject.noise, torch.tensor([0.2, 0.6, 0.9]), conditions(again, 3)
    with torch.no_grad():
        found, expected = teacher_on_linear_path(again).field(x, t, cond), student.student(x, t, cond)
    assert torch.equal(found, expected)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["time_embedding.cond_proj.weight"][0, 0] = 1e-3
    save_file(tensors, weights)
    with pytest.raises(InputError, match="time_cond_proj_dim=4: the network takes the guidance scale as an input, as"):
        load(folder, conditions=str(tmp_path / "rows.safetensors"))
    edit(folder / "unet" / "config.json", time_cond_proj_dim=256)
    with pytest.raises(InputError, match="time_cond_proj_dim=256: the network takes the guidance scale"):
        load(folder, conditions=str(tmp_path / "rows.safetensors"))


@pytest.mark.parametrize(("beta_schedule", "steps"), [("scaled_linear", 1000), ("linear", 640)])
def test_the_times_of_a_table_are_those_at_which_its_schedulers_call_the_network(beta_schedule, steps):
    options = {"beta_schedule": beta_schedule, "num_train_timesteps": steps}
    ddim = DDIMScheduler(timestep_spacing="trailing", **options)
    lcm = LCMScheduler(original_inference_steps=steps, beta_start=0.0001, beta_end=0.02, **options)
    left = ddim.alphas_cumprod.double()
    call = LinearCall(lambda network, x, time, cond: x, "epsilon", 0.5 * torch.log((1 - left) / left))
    for count in (1, 2, 4, 5, 7):
        lcm.set_timesteps(count)
        ddim.set_timesteps(count)
        assert steps % count or torch.equal(ddim.timesteps, lcm.timesteps)
        sigma, alpha = (1 - left[lcm.timesteps]).sqrt(), left[lcm.timesteps].sqrt()
        expected = torch.cat([sigma / (alpha + sigma), torch.zeros(1)])
        assert (call.t_grid(count) - expected).abs().max() <= 1e-12
    assert torch.equal(call.t_grid(steps + 1), uniform_grid(steps + 1))


def test_why_a_stock_pipeline_cannot_sample_a_student(tmp_path):
    sd, flux = PIPELINES["sd"].teacher(tmp_path / "sd"), PIPELINES["flux schnell"].teacher(tmp_path / "flux")

    def how(teacher, kind, sampler, t_grids=None):
        init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
        return stock.of(getattr(init, kind)(), sampler, t_grids or {}, init.packaging)

    assert (
        how(flux, "flow_map", "jump").reason == "its network takes a second time, which the pipeline does not give it"
    )
    assert how(flux, "acceleration", "accelerated").reason == (
        "it has a second network, of the acceleration, which the pipeline does not call"
    )
    windows = {4: [1.0, 0.75, 0.5, 0.25, 0.0], 5: [1.0, 0.875, 0.75, 0.5, 0.25, 0.0]}
    assert how(sd, "velocity_field", "euler", windows).reason == "no scheduler uses its times (for 4, 5 steps)"
    assert how(sd, "velocity_field", "euler", {1: [1.0, 0.0]}).steps == (1,)
    assert how(sd, "velocity_field", "same_noise").steps == (1,)
    assert how(flux, "velocity_field", "same_noise").steps == (1, 2)
    assert how(flux, "velocity_field", "euler", windows).steps == (4,)
    found = how(flux, "velocity_field", "euler", {2: [1.0, 0.75, 0.0], 1: [1.0, 0.0]})
    assert (found.steps, found.scheduler["shift"]) == ((1, 2), 3.0)
    assert how(flux, "velocity_field", "euler", {2: [1.0, 0.75, 0.0], 3: [1.0, 0.4, 0.2, 0.0]}).steps == (2,)


def test_a_map_to_data_has_no_second_time(tmp_path):
    subject = PIPELINES["flux schnell"]
    student = exported(tmp_path, subject, "flow_map", "renoise")
    assert isinstance(student.network, ToData)
    assert [path.name for path in (tmp_path / "student").glob("*.safetensors")] == []
    x, t, cond = subject.noise, torch.tensor([0.2, 0.6, 1.0]), conditions(student, 3)
    with torch.no_grad():
        expected = student.student(x, t, 0 * t, cond)
        for to_data, kind in ((True, ToData), (False, TwoTimes)):
            init = StudentInit(student, None, student.shape, 3, 0)
            made = init.flow_map(to_data=to_data).eval()
            assert isinstance(made.network, kind)
            assert torch.equal(made(x, t, t / 2, cond), expected)
    with pytest.raises(InputError, match="is a flow map, and a velocity field cannot start from its weights"):
        StudentInit(student, None, student.shape, 3, 0).velocity_field()


def test_students_of_several_steps_are_trained_at_the_times_at_which_they_are_sampled(tmp_path):
    for name, expected in (("sd", [1.0, 0.8032, 0.6173, 0.4094, 0.0]), ("flux schnell", [1.0, 0.75, 0.5, 0.25, 0.0])):
        teacher = PIPELINES[name].teacher(tmp_path / name)
        init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
        recipe = dmd2.Recipe(dmd2.Config(steps=4), None)
        student = recipe.networks(init)["student"].module
        assert recipe.t_grid == pytest.approx(expected, abs=1e-4)
        assert recipe.t_grid[1:] == usual_grid(student, "renoise", 4).tolist()[1:]
        noise, cond = normal(3, *teacher.shape), conditions(teacher, 3)
        with torch.no_grad():  # the jump from the noise at t = 1 is that from the first time
            first = by_sampler(student, "renoise", noise, usual_grid(student, "renoise", 1), cond, [])
            expected = jump_to_data(student, noise, torch.ones(3), cond)
            assert (first - expected).abs().max() <= 1e-5 * expected.abs().max()


def with_lora(folder: Path, subject: TinyPipeline, sampler: str, amount: float = 0.05):
    """A LoRA student of two steps of the subject's teacher, exported and loaded again."""
    teacher = subject.teacher(folder)
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher, shares=True)
    made = init.velocity_field() if sampler == "euler" else init.flow_map(to_data=True)
    module = adapting.one("student", Trained(made), {"student": LoraSpec(rank=2)}, 0).module.eval()
    with torch.no_grad():
        for i, each in enumerate(p for p in module.parameters() if p.requires_grad):
            each += amount * normal(*each.shape, seed=i)
    card = StudentCard(
        name="s", recipe="score/dmd2", spec_digest="", teacher_digest=teacher.digest, sampler=sampler,
        kind="velocity" if sampler == "euler" else "flow_map", shape=teacher.shape, weights="raw", images=1,
        num_classes=init.num_classes if init.has_classes else None, null_class=init.null_class, trained_steps=2,
        lora={"student": LoraFacts(rank=2, alpha=2.0, targets=[])}, base_digest=teacher.base_digest,
    )  # fmt: skip
    export(module, folder / "student", card, teacher.packaging)
    rows = {"conditions": str(folder / "rows.safetensors")} if subject.rows else {}
    spec = CheckpointTeacher(path=str(folder / "pipeline"), **rows, **subject.fields)
    return load_student(folder / "student", CPU, spec)


@pytest.mark.long
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_the_pipeline_of_the_teacher_samples_a_lora_with_the_students_scheduler(tmp_path, name):
    subject = PIPELINES[name]
    student, written = with_lora(tmp_path, subject, "renoise"), read(tmp_path / "student")
    assert isinstance(student.network, ToData)
    assert written.stock.arguments == {"guidance_scale": 1}
    assert written.stock.steps == ([2] if name == "sd3" else None)
    assert written.fewest_steps == 2

    pipeline = subject.pipeline(tmp_path / "student")
    pipeline.load_lora_weights(tmp_path / "student")
    noise, fresh = subject.noise, drawn(pipeline, subject, 1)
    ours = by_sampler(student.student, "renoise", noise, times_of(student, 2), conditions(student, 3), fresh)
    theirs = subject.call(pipeline, noise, subject.rows, num_inference_steps=2, guidance_scale=1)
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
    text = (tmp_path / "student" / "README.md").read_text()
    steps = " of 2" if name == "sd3" else ""
    assert f"Call it with `num_inference_steps`{steps} and `guidance_scale=1` |" in text


def loaded_by(pipeline, folder, network):
    """Loads the LoRA of a student into a pipeline from one kind of files after the other, and takes it out again."""
    weights = from_network(native.base_of(network))
    (component,) = {weights.component} - {"transformer_2"}
    if needs_peft(weights.network):
        yield peft.PeftModel.from_pretrained(getattr(pipeline, component), folder)
        return
    files = [sorted(folder.glob("pytorch_lora_weights*.safetensors"))]
    layers = changed_layers(weights, native.base_of(network)).values()
    keys = key_list(weights.network)
    if keys is not None and not any(why_not_in_diffusers(each, keys, rows) for each, rows in layers):
        files.append(sorted((folder / "comfyui").glob("*.safetensors"), key=lambda path: "low" in path.stem))
    for first, *second in files:
        pipeline.load_lora_weights(first)
        for path in second:
            pipeline.load_lora_weights(path, load_into_transformer_2=True)
        yield first
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("name", few(PIPELINES, "sdxl"))
def test_the_pipeline_of_the_teacher_makes_the_samples_of_a_lora(tmp_path, name):
    """With the file for diffusers, and with the one for ComfyUI where diffusers reads it."""
    subject = PIPELINES[name]
    amount = 2.0 if name == "aura flow" else 0.3  # attention changes the output of this tiny network little
    student, folder = with_lora(tmp_path, subject, "euler", amount), tmp_path / "student"
    how, noise, steps = read(folder).stock, subject.noise, 1 if name == "cogview4" else 2
    assert how.steps is None or steps in how.steps
    times, cond = times_of(student, steps), conditions(student, len(noise))
    expected = by_sampler(student.student, "euler", noise, times, cond, [])
    pipeline = subject.pipeline(folder)

    def sampled():
        return subject.call(pipeline, noise, subject.rows, num_inference_steps=steps, **how.arguments)

    without = sampled()
    assert (without - expected).abs().max() > 1e-3 * expected.abs().max()
    for _ in loaded_by(pipeline, folder, student.network):
        same(sampled(), expected)
    assert needs_peft(type(native.base_of(student.network)).__name__) or torch.equal(sampled(), without)
