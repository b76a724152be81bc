"""Metrics of the user: functions of images and prompts, whose scores and features an evaluation shows."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import cached_runs
import pytest
import torch
from cached_runs import content
from latent import normal
from rich.console import Console
from test_evaluate import card, go

from distill.cli import arguments
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data import load_data
from distill.evaluation import judging, report_page
from distill.evaluation.metrics import features, own
from distill.evaluation.metrics.frechet import frechet
from distill.evaluation.tally import RowSums, SeenBlock
from distill.execution import preflight, stages
from distill.flow.conditioning import ConditionTable, HeldRows
from distill.flow.draws import permutation, sample_labels, sample_noise
from distill.flow.times import uniform_grid
from distill.networks.architectures import build
from distill.networks.velocity import VelocityStudent
from distill.runs import results
from distill.runs.run_store import RunPaths
from distill.spec import checks, specfile
from distill.spec.dataspec import DigitsData
from distill.spec.model import RunSpec, UNetSpec
from distill.spec.samplingspec import EvaluateStage
from distill.students import sampling
from distill.students.exporting import export
from distill.students.loaded import load_student
from distill.testing import exact

CPU = torch.device("cpu")
SOURCE = '''
import torch

def brightness(images, prompts):
    assert images.shape[1:] == (1, 8, 8) and images.abs().max() <= 1
    return images.mean((1, 2, 3))

def label(images, prompts):
    return torch.tensor([float(each) for each in prompts])

def halves(images, prompts):
    """The mean of the upper and of the lower half."""
    return torch.stack([images[:, 0, :4].mean((1, 2)), images[:, 0, 4:].mean((1, 2))], 1)

def length(images, prompts):
    return torch.tensor([float(len(each)) for each in prompts])

def whole(images, prompts):
    return torch.ones(len(images), dtype=torch.int64)

def infinite(images, prompts):
    return torch.full((len(images),), torch.inf)

def text(images, prompts):
    return "good"

number = 3
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with metrics."""
    (tmp_path / "some_metrics.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "some_metrics"
    sys.modules.pop("some_metrics", None)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run with untrained networks of digits, as teacher and as student."""
    run = RunPaths(tmp_path_factory.mktemp("images") / "r")
    for seed, name in enumerate(("teach", "student")):
        network = build(UNetSpec(kind="unet", channels=[8]), (1, 8, 8), 10, seed)
        export(VelocityStudent(network), run.student(name), card((1, 8, 8), 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "TRAIN_IMAGES", 256)
        yield run


def spec(*metrics, **changes) -> RunSpec:
    stage = {
        "kind": "evaluate", "teacher": "teach", "students": {"student": [1]}, "teacher_steps": [], "fine_steps": 2,
        "samples": 70, "block": 32, "baselines": [], "metrics": list(metrics), **changes,
    }  # fmt: skip
    return RunSpec.model_validate({"name": "r", "data": {"kind": "digits"}, "stages": {"evaluate": stage}})


def made(run, seed):
    """The student's samples."""
    student, numbers = load_student(run.student("student"), CPU), range(70)
    cond = {"class_labels": sample_labels(numbers, 10)}
    method = sampling.of_student(student, uniform_grid(1))
    with torch.no_grad():
        return method.generate(sample_noise(seed, numbers, (1, 8, 8)), cond, []).clamp(-1, 1)


def test_scores_are_averaged_and_features_compared_with_real_images(untrained, module):
    found = go(
        untrained,
        spec(*(f"{module}:{each}" for each in ("brightness", "label", "halves")), medians=[f"{module}:label"]),
    )
    row, data = found.row("student", 1), load_data(spec().data, 0)
    images = made(untrained, found.seed)
    order = permutation(len(data), "judged", data.digest)[:70].tolist()
    real, labels, _ = data.items(0, order)
    halves = sys.modules[module].halves
    assert row.metrics["brightness"] == pytest.approx(images.mean().item(), abs=1e-6)
    assert row.metrics["label"] == 4.5, "the classes 0 to 9, each 7 times"
    assert row.metrics["FD-halves"] == pytest.approx(frechet(halves(images, []), halves(real, [])), rel=1e-4)
    assert list(row.metrics) == [
        "brightness", "label", "FD-halves", "KID-halves", "precision-halves", "recall-halves", "diversity-halves",
    ]  # fmt: skip
    assert found.real == {
        "brightness": pytest.approx(real.mean().item(), abs=1e-6),
        "label": labels.double().quantile(0.5).item(),
    }

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results.table(found))
    text = console.export_text()
    assert f"Real images: brightness {found.real['brightness']:.4f}, label" in " ".join(text.split())
    assert "FD-halves" in text and f"{row.metrics['FD-halves']:.4f}" in text
    assert "KID-halves" not in text and "KID, precision and recall of your metrics are in the report" in text
    assert results.card_metrics(found, "student")["label@1"] == 4.5


def test_rows_are_measured_again_if_the_function_changes(untrained, module, tmp_path):
    asked = spec(f"{module}:brightness")
    before = go(untrained, asked)
    sys.modules.pop(module)
    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text().replace("images.mean((1, 2, 3))", "2 * images.mean((1, 2, 3))"))
    after = go(untrained, asked)
    for row, other in zip(before.rows, after.rows, strict=True):
        assert other.metrics["brightness"] == pytest.approx(2 * row.metrics["brightness"], abs=1e-6)
    assert after.row("student", 1).rms == before.row("student", 1).rms


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("some_metrics:label2", "metrics: some_metrics:label2: .*some_metrics.py has no function label2; did you mean "
         "'label'?"),
        ("some_metrics:number", "has no function number; valid: brightness, "),
        ("other_metrics:f", "there is no file of a module other_metrics; install it, or put its folder .* PYTHONPATH"),
        ("other.metrics:f", "metrics: other.metrics:f: there is no file of a module other.metrics; install it"),
        ("time:sleep", "metrics: time:sleep: there is no file of a module time"),
    ],
)  # fmt: skip
def test_functions_that_cannot_be_loaded(untrained, module, function, message):
    with pytest.raises(InputError, match=message):
        go(untrained, spec(function))


def test_a_module_that_fails(untrained, tmp_path, monkeypatch):
    (tmp_path / "bad_metrics.py").write_text("x = 1\nraise ValueError('no weights')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"cannot be imported: .*bad_metrics.py, line 2: ValueError: no weights"):
        go(untrained, spec("bad_metrics:f"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole", r"whole returned a tensor \[64\] int64 for 64 images; it must return finite floating-point numbers, "
         r"a tensor \[64\] or \[64, D\]"),
        ("infinite", r"infinite returned a tensor \[64\] float32 with NaN or infinity for 64 images"),
        ("text", "text returned a str for 64 images"),
    ],
)  # fmt: skip
def test_functions_that_return_something_else(untrained, module, name, message):
    with pytest.raises(RunError, match=message):
        go(untrained, spec(f"{module}:{name}"))


@pytest.mark.parametrize("given", ["score", "a.b", ":f", "a:b:c", "a:b c", "../a:b", ""])
def test_what_is_no_function_is_refused(given):
    with pytest.raises(InputError) as caught:
        arguments.stage(EvaluateStage, {"kind": "evaluate", "students": {}, "metrics": [given]})
    assert str(caught.value) == f"--metrics.0: {given!r} given; must be a function as module:function"


def test_names_must_fit():
    twice = spec("a:score", "b.c:score")
    with pytest.raises(InputError, match="metrics: two functions are named 'score', which names their columns"):
        checks.check(twice, Path.cwd())
    with pytest.raises(InputError, match="medians: 'a:scor' is not in .*metrics; did you mean 'a:score'"):
        checks.check(spec("a:score", medians=["a:scor"]), Path.cwd())
    with pytest.raises(InputError, match="metrics: a column of every evaluation is named 'rms'; rename the function"):
        checks.check(spec("a:rms"), Path.cwd())


def stage(samples, *metrics):
    return EvaluateStage(kind="evaluate", students={}, samples=samples, metrics=list(metrics))


def test_prompts_are_passed_in_turn(module):
    """If they are not given, they are the captions in the file of conditions, if these are all, and whole."""
    teacher = exact.teacher(exact.FIELD, (1, 8, 8))

    def of(*captions, prompts=None, samples=70):
        table = ConditionTable(HeldRows({"states": torch.zeros(3, 2)}), None, {}, prompts=captions)
        asked = stage(samples, f"{module}:label")
        return judging.of_stage(asked, replace(teacher, given=table), None, prompts, CPU, StopRequest(), Path())[0]

    for judges in (of(prompts=["5", "6", "7"]), of("5", "6", "7")):
        assert judges.judge(torch.zeros(4, 1, 8, 8), 2)["label"].tolist() == [7, 5, 6, 7]
    for captions in ((), ("5", "6"), ("5", "6", "7" * 297 + "...")):
        with pytest.raises(InputError, match=r"metrics need the prompts of all samples, but only \d of 3 are known"):
            of(*captions)
    with pytest.raises(InputError, match=r"metrics: some_metrics:label has no effect: .* has no images"):
        judging.prepare(stage(70, f"{module}:label"), exact.teacher(exact.FIELD), None)


def added(judges, values):
    """The sums of a row of which the metrics say these values, in blocks of 16 samples."""
    total = len(next(iter(values.values())))
    like = {name: each.sums.like() for name, each in judges.references.items()}
    sums = RowSums(total, texts=len(judges.texts), real=like)
    for start in range(0, total, 16):
        judged = {name: each[start : start + 16] for name, each in values.items()}
        sums.add(SeenBlock(min(16, total - start), 0, None, None, judged, 0.0, 0.0, 0.0, None))
    return sums


def test_numbers_that_cannot_be_compared(module):
    """Features need real images; all rows have one shape; numbers are finite also after the conversion to float32."""
    halves, images = own.load(f"{module}:halves"), torch.zeros(70, 1, 8, 8)
    judges = judging.Judges([halves], ["a"], CPU, {}, "")
    with pytest.raises(RunError, match="halves returned features, but there are no real images to compare them with"):
        judges.summary(added(judges, judges.judge(images, 0)))
    real = judging.Judges([halves], ["a"], CPU, {"halves": torch.zeros(70, 2)}, "")
    with pytest.raises(RunError, match="-halves is nan; its function returned values that cannot be compared"):
        real.summary(added(real, real.judge(images, 0)))

    def metric(function):
        return own.OwnMetric("f", "mean", function, "")

    with pytest.raises(RunError, match=r"the metric f returned rows of different shapes: \[\[\], \[3\]\]"):
        judging.judged([metric(lambda x, _: torch.zeros(len(x), *[3] * (len(x) < 64)))], CPU, [(images, ["a"] * 70)])
    with pytest.raises(RunError, match="with NaN or infinity"):
        metric(lambda x, _: torch.full((len(x),), 1e300, dtype=torch.float64))(images, [])
    with pytest.raises(RunError, match="returned 5,000 features for each image; at most 4,096 can be compared"):
        metric(lambda x, _: torch.zeros(len(x), 5000))(images, [])


def test_the_example_of_the_documentation():
    """`colourfulness` of an image whose channels are -1, 0 and 1 is 1; `thumbnails` are means of squares of 8 x 8."""
    text = (Path(__file__).parent.parent / "recipes" / "README.md").read_text()
    source = text.split("in a file `my_metrics.py`:\n\n```python\n")[1].split("```")[0]
    found = {}
    exec(compile(source, "my_metrics.py", "exec"), found)
    images = torch.tensor([-1.0, 0.0, 1.0])[None, :, None, None].expand(2, 3, 16, 24)
    assert found["colourfulness"](images, ["", ""]).tolist() == [1, 1]
    assert found["thumbnails"](images, ["", ""]).tolist() == [[-1] * 6 + [0] * 6 + [1] * 6] * 2


def test_scores_of_groups_of_prompts(untrained, module):
    groups = {"small": ["0", "1"], "five": ["5"]}
    found = go(untrained, spec(f"{module}:label", f"{module}:brightness", prompt_groups=groups))
    row, images = found.row("student", 1), made(untrained, found.seed)
    fives = images[5::10].mean().item()
    assert row.groups == {
        "small": {"label": 0.5, "brightness": pytest.approx(torch.cat([images[::10], images[1::10]]).mean().item())},
        "five": {"label": 5, "brightness": pytest.approx(fives)},
    }
    page = report_page.write(untrained).read_text()
    assert "<th>five: brightness</th>" in page and f"<td>{results.number(fives)}</td>" in page
    with pytest.raises(InputError, match=r"prompt_groups.x: none of the 10 prompts has one of the words \['12'\]"):
        go(untrained, spec(f"{module}:label", prompt_groups={"x": ["12"]}))
    with pytest.raises(InputError, match="prompt_groups: has no effect, because all metrics return features"):
        go(untrained, spec(f"{module}:halves", prompt_groups=groups))
    with pytest.raises(InputError, match="prompt_groups: has no effect without metrics"):
        checks.check(spec(prompt_groups=groups), Path.cwd())
    with pytest.raises(InputError, match=r"prompt_groups.x: \[\] given; must be words, like \[red, blue\]"):
        checks.check(spec("a:b", prompt_groups={"x": []}), Path.cwd())


def test_prompts_with_rare_words():
    known = ["red heart", "red book", "Crab", "crab and book", "1.5"]
    stage = EvaluateStage(kind="evaluate", students={}, rare_words=1, samples=16)
    assert judging._groups(stage, known, known) == {"rare words": {0, 3, 4}}, "heart, and, 1"
    assert judging._groups(stage, known[3:], known) == {"rare words": {0, 1}}, "they are counted in all that are known"
    with pytest.raises(InputError, match="none of the 1 prompts has a word that at most 1 of the 5 known prompts have"):
        judging._groups(stage, ["red crab"], known)
    with pytest.raises(InputError, match="rare_words: has no effect without metrics"):
        checks.check(spec(rare_words=1), Path.cwd())


def test_values_of_real_images_are_kept(untrained, module):
    """They are read again, unless the images or the metrics are others, or the file is damaged."""
    data, asked = load_data(DigitsData(kind="digits"), 0), stage(70, f"{module}:brightness")
    seen = []

    class Counted:
        name, shape, digest, prompts = data.name, data.shape, "d", None

        def __len__(self):
            return len(data)

        def items(self, epoch, indices):
            seen.extend(indices)
            return data.items(epoch, indices)

    def real(samples=70):
        changed = asked.model_copy(update={"samples": samples})
        judges, _ = judging.of_stage(
            changed, exact.teacher(exact.FIELD, (1, 8, 8)), Counted(), None, CPU, StopRequest(), folder
        )
        return judges.real["brightness"]

    folder = untrained.root
    first = real()
    assert len(seen) == 70 and torch.equal(real(), first) and len(seen) == 70
    assert len(real(71)) == 71 and len(seen) == 141
    (folder / judging.REAL).write_bytes(b"damaged")
    assert torch.equal(real(), first) and len(seen) == 211


def test_diversity_is_the_distance_within_a_prompt(untrained, module):
    """With labels as features, all samples of a prompt are equal; with noise, they differ as much as any two."""
    images = normal(40, 1, 8, 8, seed=3).clamp(-1, 1)
    real = {"halves": torch.cat([images.mean((1, 2, 3))[:, None], images[:, 0, 0, :1]], 1)}
    metric = own.load(f"{module}:halves")
    judges = judging.Judges([metric], ["a", "b", "c"], CPU, real, "")
    same_of_each = torch.arange(40)[:, None].remainder(3).float().repeat(1, 2)
    assert judges.summary(added(judges, {"halves": same_of_each}))["diversity-halves"] == 0
    assert judges.summary(added(judges, real))["diversity-halves"] == pytest.approx(1, abs=0.1)
    assert judges.summary(added(judges, {"halves": 2 * real["halves"]}))["diversity-halves"] == pytest.approx(
        2, abs=0.2
    )
    one_each = judging.Judges([metric], ["a"] * 40, CPU, real, "")
    assert "diversity-halves" not in one_each.summary(added(one_each, real))


def test_a_run_gives_the_whole_prompts_of_its_cache(tmp_path, module):
    """Captions of pictures are cut at 300 characters; metrics get the prompts of the data, and the plan checks them."""
    prompts = ["a cat", "a dog " * 60, "rain"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    measure = {
        "kind": "evaluate", "students": {}, "teacher_steps": [], "baselines": [], "samples": 16, "block": 16,
        "fine_steps": 1, "metrics": [f"{module}:length"], "prompt_groups": {"cats": ["cat"]},
    }  # fmt: skip
    data = {"kind": "prompts", "path": str(tmp_path / "prompts.txt")}

    def found(**changes):
        given = content(cached_runs.pipeline(tmp_path / "sd3"), data, {"evaluate": {**measure, **changes}})
        return checks.check(specfile.validate(given, "spec"), tmp_path)

    ready = found()
    preflight.check(ready)
    run = RunPaths(tmp_path / "runs" / "run")
    run.root.mkdir(parents=True)
    run.spec.write_text(specfile.resolved(ready.spec))
    stages.run(run, ready.spec, ["cache", "evaluate"], StopRequest())
    (row,) = results.load_results(run.stage("evaluate")).rows
    lengths = [len(prompts[number % 3].strip()) for number in range(16)]
    assert row.metrics["length"] == pytest.approx(sum(lengths) / 16)
    assert row.groups == {"cats": {"length": 5}}
    with pytest.raises(InputError, match=r"prompt_groups.snow: none of the 3 prompts has one of the words \['snow'\]"):
        preflight.check(found(prompt_groups={"snow": ["snow"]}))
