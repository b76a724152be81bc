"""An external package adds a teacher architecture, a condition, a solver and a recipe, without changes in distill/."""

import configparser
import math
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.execution import preflight, stages
from distill.flow.draws import sample_noise
from distill.pairs import PairSet
from distill.runs.results import load_results
from distill.runs.run_store import RunPaths
from distill.spec import checks
from distill.spec.model import CheckpointTeacher, RunSpec
from distill.teachers import architectures, load_teacher

HERE, CPU, POINTS = Path(__file__).parent, torch.device("cpu"), 4
PAIRS = {"kind": "pairs", "count": 512, "block": 128, "shard": 256, "solver": "midpoint", "steps": 16}
TRAIN = {
    "kind": "train", "recipe": "outside/critic", "pairs": "solve", "network": {"kind": "mlp", "width": 48, "depth": 2},
    "images": 38400, "batch_size": 128, "optimizer": {"lr": 0.003, "decay": "cosine"},
}  # fmt: skip


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package as pip would leave it on the path, and its teacher in a folder."""
    site = tmp_path / "site"
    shutil.copytree(HERE / "outside", site)
    project = tomllib.loads((site / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = configparser.ConfigParser()
    points.optionxform = str
    points.read_dict(project["entry-points"])
    with (info / "entry_points.txt").open("w") as file:
        points.write(file)
    monkeypatch.syspath_prepend(str(site))
    architectures.known.cache_clear()
    yield site
    architectures.known.cache_clear()
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


@pytest.fixture
def teacher(package, tmp_path):
    from outside_architecture import Circle

    Circle(POINTS).save_pretrained(tmp_path / "circle", safe_serialization=True)
    return tmp_path / "circle"


def given(path, **launch):
    content = {"name": "r", "teacher": {"kind": "diffusers", "path": str(path), "prediction": "velocity"}}
    evaluation = {"kind": "evaluate", "students": {"one": [1]}, "samples": 1000, "block": 250, "guidance_scale": 1}
    return RunSpec.model_validate(
        {**content, "stages": {"solve": PAIRS, "one": TRAIN, "evaluate": evaluation}, "launch": launch}
    )


def test_its_teacher_is_called_as_it_says(teacher):
    found = load_teacher(CheckpointTeacher(path=str(teacher), prediction="velocity"), CPU)
    assert (found.shape, found.num_classes, found.layers) == ((2,), POINTS, ["centred", "scaled"])
    indices, noise = torch.arange(8) % POINTS, sample_noise(0, range(8), (2,))
    cond = found.conditioning.collate(indices)
    # At t = 1 the data are their mean, wherever the noise is: v = noise - mean.
    torch.testing.assert_close(found.field(noise, torch.ones(8), cond), noise - cond["direction"])
    nowhere = found.guided(0.0)(noise, torch.ones(8), cond)  # the unconditional call alone
    torch.testing.assert_close(nowhere, noise)
    centred, scaled = found.features(noise, torch.full((8,), 0.5), cond, ["centred", "scaled"])
    torch.testing.assert_close(centred, noise - 0.5 * cond["direction"])
    assert torch.equal(scaled, found.field(noise, torch.full((8,), 0.5), cond))


def test_what_a_teacher_does_not_have_is_refused(teacher):
    found = load_teacher(CheckpointTeacher(path=str(teacher), prediction="velocity"), CPU)
    with pytest.raises(InputError, match="Circle from circle has no layer mid_block; valid: centred, scaled"):
        found.features(sample_noise(0, [0], (2,)), torch.ones(1), {}, ["mid_block"])
    config = teacher / "config.json"
    config.write_text(config.read_text().replace('"points": 4', '"points": "four"'))
    with pytest.raises(InputError, match=r"config.json: points='four'; valid: a whole number from 1 on"):
        load_teacher(CheckpointTeacher(path=str(teacher), prediction="velocity"), CPU)


def test_a_student_cannot_be_a_network_that_is_not_shipped(teacher, tmp_path):
    spec = given(teacher)
    fresh = spec.model_copy(
        update={"stages": {**spec.stages, "one": spec.stages["one"].model_copy(update={"network": None})}}
    )
    with pytest.raises(InputError, match="exporting a student of class Circle is not supported; use a new `network`"):
        preflight.check(checks.check(fresh, tmp_path))


@pytest.mark.train
def test_its_recipe_distils_its_teacher(teacher, tmp_path):
    """With a discriminator on the teacher's features: one step of the student beats one of the teacher."""
    spec = given(teacher)
    preflight.check(checks.check(spec, tmp_path))
    run = RunPaths(tmp_path / "r")
    run.root.mkdir()
    stages.run(run, spec, list(spec.stages), StopRequest())
    pairs = PairSet.open(run.stage("solve").pairs, None)
    assert (pairs.manifest.solver, pairs.manifest.nfe) == ("midpoint", 32)
    ends = torch.stack([pairs.load(0).data[pairs.load(0).labels == k].mean(0) for k in range(POINTS)])
    angles = torch.arange(POINTS) * 2 * math.pi / POINTS
    torch.testing.assert_close(ends, torch.stack([angles.cos(), angles.sin()], 1), atol=0.08, rtol=0)
    found = load_results(run.stage("evaluate"))
    assert found.row("one", 1).rms < 0.5 * found.row("teacher", 1).rms
