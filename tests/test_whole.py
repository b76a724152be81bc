"""Students as complete pipelines of plain diffusers."""

import json

import pytest
import test_teacher_flux as flux
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import torch
from diffusers import DiffusionPipeline
from latent import ddim, load, write, write_conditions

from distill.exchange.student_card import StudentCard
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path

STOCK = {
    "sd3": (sd3.pipeline, lambda: sd3.embeddings(2)),
    "sdxl": (lambda: sd.pipeline(ddim(**sd.SD), xl=True), lambda: sd.embeddings(2, xl=True)),
    "flux": (lambda: flux.pipeline(guidance_embeds=False), lambda: flux.embeddings(2)),
}


def student_of(teacher, folder):
    """The light folder of a student with the weights of a teacher."""
    teacher = teacher_on_linear_path(teacher)
    made = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind="velocity",
        sampler="euler", num_classes=None, null_class=None, shape=teacher.shape, weights="raw", images=1,
    )  # fmt: skip
    export(made.velocity_field(), folder, card, made.packaging)
    return folder


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_pipeline_takes_what_a_light_folder_lacks(tmp_path, name):
    make, rows = STOCK[name]
    stock = make()
    conditions = write_conditions(tmp_path / "conditions.safetensors", rows())
    folder = write(tmp_path / "teacher", stock)
    student = student_of(load(folder, size=[16, 24], conditions=conditions), tmp_path / "student")
    index = json.loads((student / "model_index.json").read_text())
    network = "unet" if name == "sdxl" else "transformer"
    assert index.keys() == json.loads((folder / "model_index.json").read_text()).keys()
    assert {key for key, each in index.items() if isinstance(each, list) and each != [None, None]} == {
        network, "scheduler"
    }  # fmt: skip
    assert index.get("force_zeros_for_empty_prompt") == (True if name == "sdxl" else None)
    missing = {key: getattr(stock, key) for key, each in index.items() if each == [None, None]}
    for pipeline_class in (type(stock), DiffusionPipeline):
        found = pipeline_class.from_pretrained(student, **missing)
        assert type(found) is type(stock) and found.vae is stock.vae
        read = getattr(found, network).state_dict()
        assert all(torch.equal(read[key], each) for key, each in getattr(stock, network).state_dict().items())
