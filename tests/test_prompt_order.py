"""Which prompts the samples of an evaluation have, and how they are shown."""

import io
from dataclasses import replace

import cached_runs
import numpy as np
import pytest
import torch
from cached_runs import content
from PIL import Image

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.evaluation import order, report_page
from distill.evaluation.metrics import features
from distill.execution import preflight, stages
from distill.flow.conditioning import ConditionTable, HeldRows
from distill.flow.draws import sample_noise
from distill.runs import results
from distill.runs.run_store import RunPaths
from distill.spec import checks, specfile
from distill.spec.samplingspec import EvaluateStage
from distill.students import sampling
from distill.testing import exact

CPU = torch.device("cpu")


def table(count, known=0):
    rows = HeldRows({"class_labels": torch.arange(1).expand(count) if count > 1000 else torch.arange(count)})
    return ConditionTable(rows, None, {}, prompts=[f"prompt {number}" for number in range(known)])


def used(count, samples, pictured=(), known=0, **options):
    teacher = replace(exact.teacher(exact.FIELD, (1, 8, 8)), given=table(count, known))
    stage = EvaluateStage(kind="evaluate", students={}, samples=samples, pictured=list(pictured), **options)
    return order.of_stage(stage, teacher, None)


def test_all_prompts_take_turns_or_some_are_spread_evenly():
    assert list(used(20, 16).numbers) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18]
    assert list(used(10, 16).numbers) == list(range(10)) and used(10, 16).digest == ""
    assert used(20, 16).digest != used(21, 16).digest != ""
    assert list(used(10**12, 16).numbers) == [i * 10**12 // 16 for i in range(16)], "no prompt costs memory"
    shown = used(20, 16, ["prompt 9", "prompt 4", "prompt 9"], known=10)
    assert list(shown.numbers[:4]) == [9, 4, 0, 1] and len(set(shown.numbers)) == 16
    assert list(used(3, 16, ["prompt 2"], known=3).numbers) == [2, 0, 1]
    assert shown.first_texts(2) == ["prompt 9", "prompt 4"] and shown.first_texts(16) == []
    with pytest.raises(InputError, match=r"'promt 9' is not one of the 10 known prompts; did you mean 'prompt 9'\?"):
        used(20, 16, ["promt 9"], known=10)
    for name, value in (("pictured", ["a"]), ("samples_per_prompt", 2)):
        stage = EvaluateStage(kind="evaluate", students={}, **{name: value})
        with pytest.raises(InputError, match=f"{name}: has no effect, because .* takes no prompts; remove it"):
            order.of_stage(stage, exact.teacher(exact.FIELD), None)


def test_several_samples_of_each_prompt():
    assert list(used(20, 16, samples_per_prompt=4).numbers) == [0, 5, 10, 15]
    assert list(used(20, 16, samples_per_prompt=5).numbers) == [0, 5, 10, 15], "a last one with fewer"
    assert list(used(3, 16, samples_per_prompt=2).numbers) == [0, 1, 2], "there are no more prompts"
    assert list(used(20, 16, ["prompt 9"], 10, samples_per_prompt=8).numbers) == [9, 0]


def test_a_sample_has_the_condition_of_its_place_in_the_order():
    teacher = replace(exact.teacher(exact.FIELD, (1, 8, 8)), given=table(5))
    seen = []

    def generate(noise, cond, fresh):
        seen.append(cond["class_labels"].tolist())
        return noise

    method = sampling.Method(generate, 1)
    found = sampling.blocks(method, teacher, seed=3, count=6, block=4, device=CPU, conditions=[4, 0, 2])
    samples = torch.cat([each.samples for each in found])
    assert seen == [[4, 0, 2, 4], [0, 2, 4, 0]]
    assert torch.equal(samples, sample_noise(3, range(6), (1, 8, 8)))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with 40 captioned images of one colour each: its folder, and these colours."""
    folder = tmp_path_factory.mktemp("captioned")
    colours = np.random.default_rng(0).integers(0, 256, (40, 3), np.uint8)
    (folder / "images").mkdir()
    for number, colour in enumerate(colours):
        Image.fromarray(np.tile(colour, (16, 16, 1))).save(folder / "images" / f"{number:02}.png")
        (folder / "images" / f"{number:02}.txt").write_text(f"colour <{number}>")
    data = {"kind": "images", "path": str(folder / "images"), "size": 16, "captions": True}
    measure = {
        "kind": "evaluate", "students": {}, "teacher_steps": [1], "baselines": [], "samples": 16, "block": 16,
        "fine_steps": 1, "pictured": ["colour <35>", "colour <3>"],
    }  # fmt: skip
    given = content(cached_runs.pipeline(folder / "sd3"), data, {"evaluate": measure})
    ready = checks.check(specfile.validate(given, "spec"), folder)
    preflight.check(ready)
    run = RunPaths(folder / "runs" / "run")
    run.root.mkdir(parents=True)
    run.spec.write_text(specfile.resolved(ready.spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TRAIN_IMAGES", 256)
        stages.run(run, ready.spec, ["cache", "evaluate"], StopRequest())
    return run, colours


def test_pictures_show_the_prompts_that_are_asked_for_beside_real_images(evaluated):
    run, colours = evaluated
    found = results.load_results(run.stage("evaluate"))
    first = [int(text.removeprefix("colour <").removesuffix(">")) for text in found.captions]
    others = [number for number in range(40) if number not in (35, 3)]
    assert first == [35, 3, *(others[i * 38 // 14] for i in range(14))]
    assert found.picture_columns == 12 and found.real_picture == "pictures/real.png"
    shown = np.asarray(Image.open(io.BytesIO(results.picture(run.stage("evaluate").root, found.real_picture))))
    pitch, side = 3 * 17, 3 * 16  # images of 16 pixels are magnified
    for place, number in enumerate(first):
        top, left = place // 12 * pitch, place % 12 * pitch
        tile = shown[top : top + side, left : left + side]
        assert (np.abs(tile.astype(int) - colours[number]) <= 1).all(), number
    page = report_page.write(run).read_text()
    assert page.index("colour &lt;35&gt;") < page.index("colour &lt;3&gt;") < page.index("Samples of real images")
