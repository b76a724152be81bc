"""A teacher that is larger than its memory limit: pairs and results are the same, and no temporary files are left."""

import pytest
import torch
from checkpoints import load, unet, write
from diffusers import DDIMScheduler
from runs import folder_bytes

from distill import pairs
from distill.core.stop import StopRequest
from distill.evaluation import measuring
from distill.runs.progress import Progress
from distill.spec.model import EvaluateStage, PairsStage
from distill.teachers.dispatching import dispatched

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("made") / "teacher", unet(classes=11), DDIMScheduler())


def size(network):
    return sum(p.numel() * p.element_size() for p in network.parameters())


def make(teacher, folder):
    stage = PairsStage(kind="pairs", count=8, block=4, shard=4, steps=2, guidance_scale=1.0)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        pairs.generate(teacher, stage, folder, seed=3, device=CPU, progress=progress, stop=StopRequest())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("part", [pytest.param(0.0, marks=pytest.mark.long), 0.5])
def test_pairs_of_a_teacher_on_the_disk_are_the_same_bytes(folder, tmp_path, part, capfd):
    expected = make(load(folder), tmp_path / "whole")
    teacher = load(folder)
    limit = int(part * size(teacher.network))
    with dispatched(teacher.network, CPU, tmp_path / "offload", {"cpu": limit}):
        kept = [p for p in teacher.network.parameters() if not p.is_meta]
        assert sum(p.numel() * p.element_size() for p in kept) <= limit
        (hidden,) = tmp_path.glob(".offload.tmp-*")
        assert any(hidden.glob("*.dat"))
        assert make(teacher, tmp_path / "dispatched") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "dispatched"}
    assert "meta device" not in capfd.readouterr().err


@pytest.mark.long  # pairs use the same teacher
def test_an_evaluation_of_a_teacher_on_the_disk_is_the_same(folder, tmp_path):
    stage = EvaluateStage(kind="evaluate", samples=16, block=16, teacher_steps=[1], fine_steps=2, students={})
    found = {}
    for name, limits in (("whole", None), ("dispatched", {"cpu": 0})):
        teacher = load(folder)
        with (
            dispatched(teacher.network, CPU, tmp_path / "offload", limits),
            Progress("e", 32, "samples", None) as progress,
        ):
            results = measuring.measure(
                tmp_path / name, "e", stage, teacher, {}, None, seed=1, device=CPU, progress=progress,
                stop=StopRequest(), store=tmp_path,
            )  # fmt: skip
        rows = [{key: value for key, value in vars(row).items() if key != "images_per_second"} for row in results.rows]
        found[name] = (rows, folder_bytes(tmp_path / name / "pictures"))
    assert found["whole"][1]
    assert found["whole"] == found["dispatched"]


def test_a_teacher_that_fits_is_not_touched(folder, tmp_path):
    teacher = load(folder)
    before = {name: p.data_ptr() for name, p in teacher.network.named_parameters()}
    with dispatched(teacher.network, CPU, tmp_path / "offload", {"cpu": 2 * size(teacher.network)}):
        assert {name: p.data_ptr() for name, p in teacher.network.named_parameters()} == before
        assert not list(tmp_path.iterdir())
