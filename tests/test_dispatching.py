"""A teacher that is larger than its memory limit: pairs and results are the same, and no temporary files are left."""

import pytest
import torch
from checkpoints import load, unet, write
from diffusers import DDIMScheduler
from runs import folder_bytes

from distill import pairs
from distill.core.stop import StopRequest
from distill.execution import stages
from distill.runs import results
from distill.runs.progress import Progress
from distill.runs.run_store import RunPaths
from distill.spec.model import CheckpointTeacher, PairsStage, RunSpec
from distill.teachers import dispatching
from distill.teachers.dispatching import dispatched

CPU = torch.device("cpu")
SPEC = RunSpec.model_validate({
    "name": "r",
    "stages": {
        "pairs": {"kind": "pairs", "count": 8, "block": 4, "shard": 4, "steps": 2},
        "evaluate": {"kind": "evaluate", "samples": 16, "block": 16, "teacher_steps": [1], "fine_steps": 2,
                     "students": {}, "baselines": []},
    },
})  # fmt: skip


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


@pytest.mark.long
def test_stages_of_a_run_give_the_same_with_half_the_memory(folder, tmp_path, monkeypatch):
    """Pairs and evaluation; their teacher's other half is on the disk while they are computed."""
    given = SPEC.model_copy(update={"teacher": CheckpointTeacher(path=str(folder))})
    asked, free, found = [], dispatching._free, {}

    def half(place, total):
        asked.append(place)
        return {place: total // 2}

    for name, limits in (("whole", free), ("half", half)):
        monkeypatch.setattr(dispatching, "_free", limits)
        run = RunPaths(tmp_path / name / "run")
        run.root.mkdir(parents=True)
        stages.run(run, given, ["pairs", "evaluate"], StopRequest())
        rows = [vars(row) for row in results.load_results(run.stage("evaluate")).rows]
        rows = [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]
        found[name] = (
            rows,
            folder_bytes(run.stage("pairs").pairs),
            folder_bytes(run.stage("evaluate").root / "pictures"),
        )
        assert not list(run.root.rglob("*offload*"))
    assert asked == ["cpu", "cpu"]
    assert found["whole"][1] and found["whole"][2]
    assert found["whole"] == found["half"]


def test_a_teacher_that_fits_is_not_touched(folder, tmp_path):
    teacher = load(folder)
    before = {name: p.data_ptr() for name, p in teacher.network.named_parameters()}
    with dispatched(teacher.network, CPU, tmp_path / "offload", {"cpu": 2 * size(teacher.network)}):
        assert {name: p.data_ptr() for name, p in teacher.network.named_parameters()} == before
        assert not list(tmp_path.iterdir())
