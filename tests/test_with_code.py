"""Complete pipelines with code of their own: flow maps of every network class, and times that no scheduler uses.

Every export compares its samples with those of plain diffusers, in a process that cannot import distill.
"""

import json

import pytest
import stock_pipelines
import test_stock
import test_whole
import torch
from commands import command
from diffusers import FlowMapEulerDiscreteScheduler
from latent import conditions, load, normal, write, write_conditions
from runs import CARD
from safetensors.torch import load_file
from test_whole import allow_missing, card_of
from torch import nn

from distill.core.errors import InputError
from distill.exchange import pulling
from distill.exchange.student_card import LoraFacts
from distill.flow.draws import sample_noise
from distill.networks.two_times import TwoNetworks
from distill.networks.velocity import VelocityStudent
from distill.protocols import Trained
from distill.spec.model import CheckpointTeacher
from distill.spec.rolespec import LoraSpec
from distill.students import adapting, isolated, packaged, with_code
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.linear_path_scheduler import LinearPathScheduler
from distill.students.sampling import by_sampler, usual_grid
from distill.students.stock import Stock
from distill.teachers.network_field import LinearCall


def whole(folder, subject, dtype="fp32"):
    """The complete pipeline of the student in a folder."""
    package = packaged.Package(dtype, CheckpointTeacher(path=str(folder / "pipeline"), **subject.fields))
    packaged.export(folder / "student", folder / "whole", package)
    return folder / "whole"


# Teachers of the linear path whose pipelines give the scheduler the number of steps alone: diffusers' scheduler of flow
# maps has the student's times, and makes its steps.
OF_DIFFUSERS = {"sd3", "aura flow", "sana", "wan 2.1", "wan 2.2", "wan 2.2 ti2v"}


@pytest.mark.long
@pytest.mark.parametrize("name", stock_pipelines.PIPELINES)
def test_the_pipeline_of_a_flow_map_makes_its_samples(tmp_path, monkeypatch, name):
    """For every class, schedule and way to embed the time. The second time changes the samples."""
    subject = stock_pipelines.PIPELINES[name]
    compared = allow_missing(subject, monkeypatch)
    student = test_stock.exported(tmp_path, subject, "flow_map", "jump")
    noise, cond = subject.noise, conditions(student, len(subject.noise))
    times = usual_grid(student.student, "jump", 2)
    before = by_sampler(student.student, "jump", noise, times, cond, [])
    with torch.no_grad():
        for each in student.network.gap.out.parameters():
            each.zero_()
    without = by_sampler(student.student, "jump", noise, times, cond, [])
    assert (before - without).abs().max() > 5e-4 * without.abs().max()
    folder = whole(tmp_path, subject)
    assert compared == [1, 2]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["flow_map_pipeline", f"FlowMap{type(subject.make()).__name__}"]
    assert index["second_time"] == ["second_time", "SecondTime"]
    stock = ["diffusers", "FlowMapEulerDiscreteScheduler"]
    assert index["scheduler"] == (stock if name in OF_DIFFUSERS else ["linear_path_scheduler", "LinearPathScheduler"])
    assert (folder / "scheduler" / "linear_path_scheduler.py").exists() == (name not in OF_DIFFUSERS)
    assert pulling.verify(folder) == card_of(folder), "its code is known"


@pytest.mark.long
@pytest.mark.parametrize("name", ["sdxl", "flux dev", "wan 2.2"])
def test_the_pipeline_of_a_flow_map_is_written_in_bfloat16(tmp_path, monkeypatch, name):
    subject = stock_pipelines.PIPELINES[name]
    compared = allow_missing(subject, monkeypatch)
    test_stock.exported(tmp_path, subject, "flow_map", "jump")
    folder = whole(tmp_path, subject, "bf16")
    assert compared == [1, 2] and card_of(folder).dtype == "bfloat16"


FAR = {2: [1.0, 0.4, 0.0], 3: [1.0, 0.7, 0.2, 0.0]}  # times that no scheduler of diffusers uses


@pytest.mark.long
@pytest.mark.parametrize(("name", "t_grids"), [("sd v", FAR), ("sd zero snr", FAR), ("sd3", FAR), ("cogview4", {})])
def test_the_pipeline_of_a_velocity_uses_any_times(tmp_path, monkeypatch, name, t_grids):
    """Its class is the stock one. Without times of its own, it makes any number of steps."""
    subject = stock_pipelines.PIPELINES[name]
    compared = allow_missing(subject, monkeypatch)
    student = test_stock.exported(tmp_path, subject, "velocity", "euler", t_grids)
    how = with_code.of(student.student, "euler", student.t_grids, student.packaging)
    monkeypatch.setattr(packaged.stock, "of", lambda *given: Stock(reason="it cannot"))
    folder = whole(tmp_path, subject)
    assert compared == (sorted(t_grids) or [1, 2])
    assert card_of(folder).stock.steps == (sorted(t_grids) or None) and how.works
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == type(subject.make()).__name__
    assert index["scheduler"] == ["linear_path_scheduler", "LinearPathScheduler"]
    assert pulling.verify(folder) == card_of(folder)


@pytest.mark.parametrize("edm", [(1, 0.5, 0.002, 80.0), (-1, 1.0, 0.01, 20.0)])
def test_the_scheduler_steps_with_the_velocity_of_an_edm_network(edm):
    scheduler = LinearPathScheduler(edm=list(edm), t_grids={"3": [1.0, 0.7, 0.2, 0.0]})
    same_steps(scheduler, LinearCall(call=plain, prediction="epsilon", edm=edm), [1.0, 0.7, 0.2, 0.0])


@pytest.mark.parametrize("inverted", [False, True])
def test_the_scheduler_steps_with_the_velocity_of_a_network_of_the_linear_path(inverted):
    scheduler = LinearPathScheduler(num_train_timesteps=640, inverted=inverted)
    call = LinearCall(call=plain, prediction="velocity", time_scale=640, inverted=inverted)
    same_steps(scheduler, call, [1.0, 2 / 3, 1 / 3, 0.0])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_scheduler_steps_with_the_velocity_of_a_vp_network(prediction):
    table = torch.linspace(-4.6, 6.0, 1000, dtype=torch.float64)
    scheduler = LinearPathScheduler(log_sigmas=table.tolist(), prediction=prediction)
    same_steps(scheduler, LinearCall(call=plain, prediction=prediction, table=table), [1.0, 2 / 3, 1 / 3, 0.0])


def plain(network, x, time, cond):
    """A network that depends on x and on the time."""
    return torch.sin(x + 0.01 * time[:, None])


def same_steps(scheduler, call, times):
    """A loop as in a pipeline gives the states of x_s = x_t + (s - t) v."""
    x = theirs = normal(3, 5)
    scheduler.set_timesteps(3)
    assert scheduler.sigmas.tolist() == pytest.approx(times)
    for i, n in enumerate(scheduler.timesteps):
        assert scheduler.step_index == i
        output = plain(None, scheduler.scale_model_input(theirs, n), n.expand(3), {})
        theirs, data = scheduler.step(output, n, theirs, return_dict=False)
        v = call(None, x, torch.full((3,), times[i], dtype=torch.float64), {})
        torch.testing.assert_close(data, x - times[i] * v, rtol=1e-4, atol=1e-4)
        x = x + (times[i + 1] - times[i]) * v
        torch.testing.assert_close(theirs, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(theirs, data), "after the last step"


def test_a_number_of_steps_that_the_student_is_not_made_for_is_refused():
    scheduler = LinearPathScheduler(t_grids={"2": [1.0, 0.4, 0.0]})
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.sigmas.tolist() == [1.0, 0.4, 0.0]
    with pytest.raises(ValueError, match="num_inference_steps=3; this student is made for: 2"):
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="num_inference_steps=0; this student is made for: any number from 1"):
        LinearPathScheduler().set_timesteps(0)


PROMPTED = """
import diffusers

pipeline = diffusers.DiffusionPipeline.from_pretrained(arguments["folder"], trust_remote_code=True)
assert type(pipeline).__name__ == "FlowMapStableDiffusion3Pipeline" and pipeline.second_time is not None
pipeline.set_progress_bar_config(disable=True)
pipeline.enable_attention_slicing()
call = {"height": 16, "width": 24, "output_type": "latent", "num_inference_steps": 2}
outputs["guided"] = pipeline("a fox", latents=inputs["noise"], guidance_scale=3.0, **call).images
outputs["found"] = pipeline("a fox", latents=inputs["noise"], guidance_scale=1.0, **call).images
"""


@pytest.mark.long
@pytest.mark.parametrize("shares", [False, True])
def test_a_flow_map_is_prompted_where_distill_cannot_be_imported(capfd, tmp_path, monkeypatch, shares):
    """A student with all weights, and a LoRA: `distill sample` makes the same from the same noise."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "teacher", test_whole.complete("sd3"))
    rows = write_conditions(tmp_path / "rows", test_whole.sd3.embeddings(2))
    teacher = teacher_on_linear_path(load(tmp_path / "teacher", size=[16, 24], conditions=rows))
    init = StudentInit(teacher, None, teacher.shape, None, 0, teacher, shares=shares)
    module, lora = init.flow_map(), {}
    if shares:
        lora = {"student": LoraFacts(rank=2, alpha=2.0, targets=[])}
        module = adapting.one("student", Trained(module), {"student": LoraSpec(rank=2)}, 0).module
    with torch.no_grad():
        for i, each in enumerate(each for each in module.eval().parameters() if each.requires_grad):
            each += 0.2 * normal(*each.shape, seed=i)
    card = CARD.model_copy(update={
        "kind": "flow_map", "sampler": "jump", "shape": teacher.shape, "lora": lora,
        "teacher_digest": teacher.digest, "base_digest": teacher.base_digest if shares else "",
    })  # fmt: skip
    export(module, tmp_path / "student", card, teacher.packaging)
    done = command(capfd, "export", "student", "--whole", "--teacher", "teacher", "--out", "whole")
    assert done.code == 0, done.err
    readme = (tmp_path / "whole" / "README.md").read_text()
    assert "dtype=torch.float32, trust_remote_code=True)" in readme
    assert "`num_inference_steps` may be any number." in readme
    assert "`trust_remote_code=True` runs code from this folder, which imports only torch and diffusers: " in readme
    done = command(capfd, "verify", "whole")
    assert done.code == 0, done.err
    given = ["--prompt", "a fox", "--steps", "2", "--seed", "7", "--out", "s.safetensors", "--device", "cpu"]
    for path in (["whole"], ["student", "--teacher", "{path: teacher, size: [16, 24]}"]):
        done = command(capfd, "sample", *path, *given)
        assert done.code == 0, done.err
        drawn = load_file("s.safetensors")["samples"]
        noise = sample_noise(7, [0], teacher.shape)
        found = isolated.run(PROMPTED, {"noise": noise}, {"folder": str(tmp_path / "whole")})
        assert (found["found"] - drawn).abs().max() <= 1e-4 * drawn.abs().max()
        assert (found["guided"] - found["found"]).abs().max() > 1e-3
    again = command(capfd, "export", "whole", "--whole", "--teacher", "teacher", "--out", "again", "--dtype", "bf16")
    assert again.code == 0, again.err
    (tmp_path / "whole" / "flow_map_pipeline.py").open("a").write("print(1)\n")
    with pytest.raises(InputError, match="flow_map_pipeline.py is damaged"):
        pulling.verify(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "t_grids", "shift"),
    [
        ("sd3", {}, 1.0),
        ("sd3", {2: [1.0, 0.75, 0.0], 4: [1.0, 0.9, 0.75, 0.5, 0.0]}, 3.0),
        ("sd3", {2: [1.0, 0.75, 0.0], 4: [1.0, 0.75, 0.5, 0.25, 0.0]}, None),
        ("flux dev", {}, None),
        ("sd", {}, None),
    ],
)
def test_the_scheduler_of_a_flow_map_is_that_of_diffusers_where_it_has_its_times(tmp_path, name, t_grids, shift):
    teacher = teacher_on_linear_path(stock_pipelines.PIPELINES[name].teacher(tmp_path))
    student = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher).flow_map()
    how = with_code.of(student, "jump", t_grids, teacher.packaging)
    assert how.works and how.steps == (tuple(t_grids) or None) and with_code.is_needed(how, student.network)
    assert with_code.has_scheduler(how) == (shift is None)
    if shift is not None:
        made = FlowMapEulerDiscreteScheduler.from_config(how.scheduler)
        for steps, times in (t_grids or {3: [1.0, 2 / 3, 1 / 3, 0.0]}).items():
            made.set_timesteps(steps)
            assert made.sigmas.tolist() == pytest.approx(times, abs=1e-12)
            assert made.timesteps.tolist() == pytest.approx([1000 * t for t in times[:-1]], abs=1e-9)


def test_what_no_pipeline_can_sample_is_told(tmp_path):
    network = VelocityStudent(TwoNetworks(nn.Linear(1, 1), nn.Linear(1, 1)))
    how = with_code.of(network, "accelerated", {}, None)
    assert not with_code.is_needed(how, network.network)
    assert how.reason == "it has a second network, of the acceleration, which the pipeline does not call"
