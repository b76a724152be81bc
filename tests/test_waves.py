"""The waves of the second time of flow maps: few in new ones, and 16 in students whose configs do not say how many."""

import json
import math

import pytest
import tiny
import torch
from latent import CPU, conditions, normal

from distill.exchange.student_card import StudentCard
from distill.networks import architectures
from distill.networks.architectures import two_times
from distill.networks.flow_map import SECOND_TIME_WAVES, FlowMapStudent
from distill.networks.flow_map_edm import FlowMapEdmUNet2DModel
from distill.networks.flow_map_unet import Conditions
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.spec.model import CheckpointTeacher, UNetSpec
from distill.students import native
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import load_teacher

T, S = torch.tensor([0.2, 0.6, 0.95]), torch.tensor([0.1, 0.0, 0.5])
LABELS = {"class_labels": torch.tensor([0, 2, 3])}
OLD = 16


def changed(student):
    """The student with all its weights away from zero."""
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=i)
    return student.eval()


def forget(config, name):
    """Writes a config.json as older versions did, without the number of waves."""
    content = json.loads(config.read_text())
    assert content.pop(name) == OLD
    config.write_text(json.dumps(content))


def exported(student, init, shape, classes, teacher_digest, folder):
    card = StudentCard(
        name="s", recipe="shortcut/meanflow", spec_digest="", teacher_digest=teacher_digest, kind="flow_map",
        sampler="jump", num_classes=classes, null_class=classes, shape=shape, weights="raw", images=1,
    )  # fmt: skip
    export(student, folder, card, init.packaging)


def test_the_unet_sees_cosines_and_sines_of_the_difference_of_its_times():
    part, gap = Conditions(None, 4, waves=3), torch.tensor([0.0, 0.25, 1.0])
    seen = []
    part.gap[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    part((None, gap))
    angles = [[k * math.pi / 2 * each for k in (1, 2, 3)] for each in gap.tolist()]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    assert torch.allclose(seen[0], torch.tensor(expected), atol=1e-6)


def test_an_old_student_of_a_unet_keeps_its_waves(tmp_path, monkeypatch):
    init = StudentInit(None, UNetSpec(kind="unet", channels=[8], norm_groups=4), (1, 8, 8), 3, seed=0)
    assert init.flow_map().network.config.second_time_waves == SECOND_TIME_WAVES == 5
    monkeypatch.setattr(architectures, "SECOND_TIME_WAVES", OLD)
    old, x = changed(init.flow_map()), normal(3, 1, 8, 8)
    exported(old, init, (1, 8, 8), 3, None, tmp_path / "old")
    monkeypatch.undo()
    forget(tmp_path / "old/unet/config.json", "second_time_waves")
    found = load_student(tmp_path / "old", CPU)
    further = StudentInit(found, None, (1, 8, 8), 3, seed=0).flow_map().eval()  # a later stage continues it
    for student in (found.student, further):
        assert student.network.config.second_time_waves == OLD
        assert torch.equal(student(x, T, S, LABELS), old(x, T, S, LABELS))


def test_an_old_student_of_edm_keeps_its_waves(tmp_path, monkeypatch):
    network = VelocityEdmUNet2DModel(
        design="song", sign=1, sigma_data=0.5, sigma_min=0.002, sigma_max=80.0, sample_size=8, in_channels=1,
        out_channels=1, num_class_embeds=4, base_channels=8, channel_multipliers=(1,), layers_per_block=1,
        attention_sizes=(),
    )  # fmt: skip
    assert two_times(network, 0).config.second_time_waves == SECOND_TIME_WAVES
    monkeypatch.setattr(architectures, "SECOND_TIME_WAVES", OLD)
    old, x = changed(FlowMapStudent(two_times(network, 0))), normal(3, 1, 8, 8)
    old.network.save_pretrained(tmp_path)
    monkeypatch.undo()
    forget(tmp_path / "config.json", "second_time_waves")
    found = FlowMapStudent(FlowMapEdmUNet2DModel.from_pretrained(tmp_path)).eval()
    assert torch.equal(found(x, T, S, LABELS), old(x, T, S, LABELS))


@pytest.mark.parametrize("waves", [OLD, 3])
def test_an_old_student_of_a_transformer_keeps_its_waves(tmp_path, waves):
    place = tiny.TINY["dit"].write(tmp_path / "teacher")
    teacher = teacher_on_linear_path(load_teacher(CheckpointTeacher(**place), CPU))
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    assert init.flow_map().network.gap.config.waves == SECOND_TIME_WAVES
    call = native.in_float32(native.call_of(teacher))
    old = changed(native.flow_map(native.copied(teacher.network, None), call, 0, waves=waves))
    exported(old, init, teacher.shape, None, teacher.digest, tmp_path / "old")
    if waves == OLD:
        forget(tmp_path / "old/second_time/config.json", "waves")
    found = load_student(tmp_path / "old", CPU, CheckpointTeacher(**place)).student
    x, cond = normal(3, *teacher.shape), conditions(teacher, 3)
    assert found.network.gap.config.waves == waves
    assert torch.equal(found(x, T, S, cond), old(x, T, S, cond))
