"""Guidance and epsilon scaling in specs: mistakes, plans, and what runs record of them."""

import dataclasses
import json
from pathlib import Path

import pytest
import test_evaluate
import torch
from commands import command
from test_pairs import make
from test_workflow import GAUSSIAN, PAIRS, TEACH, images, mistakes, vectors

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.execution import preflight
from distill.flow.fields import Counted
from distill.pairs import PairSet
from distill.pairs.manifest import Manifest, read
from distill.plans import comparison, planning, rounds
from distill.runs.run_store import RunPaths
from distill.spec import evalspec, presets, specfile
from distill.spec.guidancespec import UNCHANGED, FieldSettings, GuidanceSpec
from distill.spec.model import EvaluateStage, PairsStage, TrainStage
from distill.spec.resolved import resolve
from distill.students import step_times
from distill.students.exporting import export
from distill.teachers.analytic import GaussianField
from distill.testing.closed_form import class_gaussian_teacher

MEANS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
NULL = torch.tensor([-0.5, 1.0, 0.2], dtype=torch.float64)
WIDTHS = torch.full((3,), 0.5, dtype=torch.float64)
TEACHER = class_gaussian_teacher(MEANS, NULL, WIDTHS)

MISTAKES = {
    "no scale": (
        {"guidance": {"form": "apg"}, "guidance_scale": 1},
        "guidance: has no effect with guidance_scale: 1; remove it, or set another guidance_scale",
    ),
    "nothing": (
        {"guidance": {}},
        "guidance: has no effect, because it is classifier-free guidance at all times; remove it, or set a field",
    ),
    "no interval": (
        {"guidance": {"interval": [0.6, 0.2]}},
        "guidance.interval: [0.6, 0.2] given; the first time must be less than the second, like [0.2, 0.6]",
    ),
    "all times": (
        {"guidance": {"interval": [0, 1]}},
        "guidance.interval: has no effect, because [0, 1] are all times; remove it",
    ),
    "rescale": (
        {"guidance": {"form": "apg", "rescale": 0.5}},
        "guidance.rescale: has no effect with form: apg; remove it, or use form: rescaled",
    ),
    "norm_limit": (
        {"guidance": {"norm_limit": 5}},
        "guidance.norm_limit: has no effect with form: cfg; remove it, or use form: apg",
    ),
    "two weak": (
        {"guidance": {"weak": "t", "weak_path": "."}},
        "guidance: weak and weak_path are both given, but there is only one weak model; remove one",
    ),
    "auto and form": (
        {"guidance": {"weak": "t", "form": "apg"}},
        "guidance.form: apg cannot be combined with autoguidance; remove it, or remove weak",
    ),
    "auto and second": (
        {"guidance": {"weak": "t", "guidance_scale_2": 3}},
        "guidance.guidance_scale_2: 3 cannot be combined with autoguidance; remove it, or remove weak",
    ),
    "no stage": ({"guidance": {"weak": "u"}}, "guidance.weak: there is no stage 'u'; valid: t, t2"),
    "itself": (
        {"guidance": {"weak": "t2"}},
        "guidance.weak: 't2' is the teacher itself, so guidance has no effect; name another stage",
    ),
    "no folder": (
        {"guidance": {"weak_path": "nowhere"}},
        "guidance.weak_path: there is no folder nowhere; give a checkpoint's folder",
    ),
    "noise": (
        {"epsilon_scale": 1.01},
        "epsilon_scale: 1.01 given, but the student of 't2' is defined up to pure noise (t = 1), where the scaled "
        "velocity is infinite; remove it",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("kind", ["pairs", "evaluate"])
def test_settings_without_effect_are_named(case, kind):
    settings, said = MISTAKES[case]
    own = PAIRS if kind == "pairs" else {"kind": "evaluate", "students": {"t": [1]}}
    spec = images(t2=TEACH, s={**own, "teacher": "t2", "guidance_scale": 2, **settings})
    assert mistakes(spec) == [f"stages.s.{said}"]


@pytest.mark.parametrize("case", MISTAKES)
def test_the_guidance_of_a_train_stage_has_the_scale_of_its_options(case):
    """The other settings, and their mistakes, are those of pairs."""
    settings, said = MISTAKES[case]
    if settings.keys() - {"guidance", "guidance_scale"}:
        return
    options = {"guidance_scale": settings.get("guidance_scale", 2)}
    own = {"kind": "train", "recipe": "shortcut/shortcut", "teacher": "t2", "images": 128, "options": options}
    found = mistakes(images(t2=TEACH, s={**own, "guidance": settings.get("guidance")}))
    assert found == [
        f"stages.s.{said.replace('guidance_scale: 1', 'options.guidance_scale: 1')}".replace(
            "another guidance_scale", "another options.guidance_scale"
        )
    ]


def test_the_weak_model_is_a_velocity_field_of_an_earlier_stage():
    auto = {**PAIRS, "teacher": "t", "guidance_scale": 2.0, "guidance": {"weak": "w"}}
    assert mistakes(images(w=TEACH, p=auto)) == []
    reflow = {"kind": "train", "recipe": "reflow/reflow", "pairs": "q", "teacher": "t", "images": 1280}
    plain = {**PAIRS, "teacher": "t"}
    assert mistakes(images(w=TEACH, q=plain, r=reflow, p={**auto, "teacher": "r"})) == [], "it may be unconditional"
    flow_map = {"kind": "train", "recipe": "consistency/consistency", "teacher": "t", "images": 1280}
    assert mistakes(images(w=flow_map, p=auto)) == [
        "stages.p.guidance.weak: the student of 'w' is a flow map, but a weak model must be a velocity field; name a "
        "stage with a velocity student"
    ]


def test_pairs_to_train_on_are_made_with_equal_settings():
    two = {"kind": "train", "recipe": "reflow/reflow", "pairs": {"p": 0.5, "q": 0.5}, "teacher": "t", "images": 1280}
    pairs = {**PAIRS, "teacher": "t", "guidance_scale": 2.0}
    assert mistakes(images(p=pairs, q={**pairs, "guidance": {"form": "apg"}}, r=two)) == [
        "stages.r.pairs: the pairs stages have different guidance or epsilon_scale; use the same"
    ]


def test_paths_of_weak_models_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "weak").mkdir()
    monkeypatch.chdir(tmp_path)
    auto = {**PAIRS, "teacher": "t", "guidance_scale": 2.0, "guidance": {"weak_path": "weak"}}
    (tmp_path / "s.yaml").write_text(json.dumps(images(p=auto)))
    spec = specfile.load(tmp_path / "s.yaml").spec
    assert spec.stages["p"].guidance.weak_path == str(tmp_path / "weak")
    assert mistakes(spec.model_dump(mode="json")) == []


def test_words_say_what_differs():
    def words(scale, epsilon_scale=1.0, **given):
        return FieldSettings(scale, GuidanceSpec(**given) if given else None, epsilon_scale).words

    assert words(1.0) == "guidance 1" and words(2.5) == "guidance 2.5"
    assert words(4.0, guidance_scale_2=3) == "guidance 4 (3 for the second network)"
    assert words(2.0, interval=(0.2, 0.6), form="apg", norm_limit=5) == "guidance 2 (apg, norm limit 5, 0.2 < t <= 0.6)"
    assert words(2.0, weak="w") == "autoguidance 2" and words(1.0, 1.005) == "guidance 1, epsilon scale 1.005"
    assert words(3.0, form="rescaled", rescale=0.3) == "guidance 3 (rescaled, rescale 0.3)"


def test_plans_count_the_calls_of_an_interval():
    interval = {"guidance_scale": 2, "guidance": {"interval": [0.3, 0.7]}}
    pairs = {**PAIRS, "teacher": "t", "solver": "euler", "steps": 10, **interval}
    evaluation = {"kind": "evaluate", "teacher": "t", "students": {"t": [1]}, "fine_steps": 4, **interval}
    evaluation["times"] = {"teacher": ["optimal", [1, 0.5, 0.3, 0]]}
    spec = images(p=pairs, e={**evaluation, "teacher_steps": [2, 10]})
    _, solved, measured = planning.steps(resolve(specfile.validate(spec, "f"), Path()))
    assert solved.work == "100 pairs x about 14 network calls = about 1,400"
    assert solved.what == "euler, 10 steps, guidance 2 (0.3 < t <= 0.7)"
    # steps of 2 and 10: 3 + 14, twice; along the times: 4; Heun: 7 + 2, of times 1, .75, .75, .5, .5, .25, .25
    assert measured.network_calls == 2500 * (17 + 17 + 4 + 9 + 1 + 1), (
        "and one step of the teacher, without guidance at t = 1, as a baseline"
    )
    assert measured.work.endswith("samples; about 122,500 network calls")
    assert measured.what == "teacher at 2, 10 steps and heun 4; guidance 2 (0.3 < t <= 0.7)"
    forward = PairsStage(**{**PAIRS, **interval, "guidance": GuidanceSpec(interval=(0.3, 0.7)), "paths": "forward",
                            "solver": "euler", "steps": 10})  # fmt: skip
    assert forward.network_calls == 14
    stage = EvaluateStage(kind="evaluate", students={}, teacher_steps=[4], guidance_scale=2.0)
    assert evalspec.calls(stage, {}) == {"teacher": 2 * (4 + 31)}


def test_a_weak_checkpoint_is_loaded_before_the_run(tmp_path):
    export(test_evaluate.one_step_student(), tmp_path / "w", test_evaluate.card((2,), None))
    auto = {"guidance_scale": 2.0, "guidance": {"weak_path": str(tmp_path / "w")}}
    spec = specfile.validate(vectors(p=auto), "f")
    preflight.check(resolve(spec, tmp_path))
    other = specfile.validate(vectors(p=auto) | {"teacher": {**GAUSSIAN, "mean": [0, 0, 0], "std": [1, 1, 1]}}, "f")
    with pytest.raises(InputError, match=r"the weak model \(VelocityMLP .*\) makes samples of shape \[2\] with no"):
        preflight.check(resolve(other, tmp_path))
    noisy = specfile.validate(vectors(p={"epsilon_scale": 1.01}), "f")
    with pytest.raises(InputError, match=r"the teacher is defined up to pure noise \(t = 1\)"):
        preflight.check(resolve(noisy, tmp_path))


def test_a_weak_model_that_is_not_trained_yet_is_named(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    auto = {**PAIRS, "guidance_scale": 2.0, "guidance": {"weak": "r"}}
    (tmp_path / "s.yaml").write_text(json.dumps(vectors(q=auto)))
    done = command(capfd, "pairs", "s.yaml", "--stage", "q")
    assert done.code == 2
    said = "the weak model of stage 'q' is the student of stage 'r', which is not trained yet; train it with: distill"
    assert said in done.err


def test_a_model_card_says_how_pairs_were_guided():
    card = test_evaluate.card((2,), None)
    guided = card.model_copy(update={"guidance": "autoguidance 2 (0.1 < t <= 0.7)"})
    line = "| guidance | autoguidance 2 (0.1 &lt; t &lt;= 0.7), learned in training |\n"
    assert line in student_card.readme(guided) and "| guidance |" not in student_card.readme(card)


# --- pairs, step times, evaluations ---


def test_pairs_record_how_they_were_guided(tmp_path):
    guidance = GuidanceSpec(interval=(0.3, 0.8), form="zero_star")
    counted = dataclasses.replace(TEACHER, field=Counted(TEACHER.field))
    given = {"guidance_scale": 2.0, "guidance": guidance, "steps": 5, "count": 8, "block": 4, "shard": 8}
    make(tmp_path / "a", counted, **given)
    found = PairSet.open(tmp_path / "a", TEACHER.digest).manifest
    assert (found.guidance, found.weak_digest, found.epsilon_scale) == (guidance, None, 1.0)
    assert found.nfe == counted.field.rows / 8 == 9 + 6, "at .8, .6 and .4, twice each"
    with pytest.raises(InputError, match=r"guidance is .*zero_star.*, expected None; delete the folder"):
        make(tmp_path / "a", counted, **{**given, "guidance": None})
    weak = dataclasses.replace(TEACHER, digest="weak", field=GaussianField(NULL, 2 * WIDTHS))
    make(tmp_path / "b", dataclasses.replace(TEACHER, weak=weak), **{**given, "guidance": GuidanceSpec(weak="w")})
    found = read(tmp_path / "b")
    assert (found.guidance, found.weak_digest, found.nfe) == (GuidanceSpec(), "weak", 18)


def test_sets_of_earlier_versions_keep_their_digest(tmp_path):
    """It is among the inputs of a training, which may go on only with the same."""
    make(tmp_path)
    found = read(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_text())
    old = {name: value for name, value in content.items() if name not in ("guidance", "weak_digest", "epsilon_scale")}
    assert len(content) - len(old) == 3
    assert Manifest.model_validate_json(json.dumps(old), strict=True).digest == found.digest
    assert found.digest != found.model_copy(update={"epsilon_scale": 1.01}).digest


def test_step_times_are_those_of_the_guided_field(tmp_path):
    cpu = torch.device("cpu")

    def find(settings):
        return step_times.find(TEACHER, tmp_path, device=cpu, fine=4, samples=4, settings=settings)

    plain, scaled = find(FieldSettings(3.0)), find(FieldSettings(3.0, GuidanceSpec(interval=(0.2, 0.6))))
    assert plain.changes == "" and "interval" in scaled.changes
    assert plain.costs != scaled.costs and len(list((tmp_path / "schedules").iterdir())) == 2
    assert find(FieldSettings(3.0, GuidanceSpec(interval=(0.2, 0.6)))) == scaled


@pytest.mark.long
def test_an_evaluation_is_of_the_changed_field(tmp_path):
    """With the student of a stage as the weak model."""
    run = RunPaths(tmp_path / "r")
    export(test_evaluate.one_step_student(), run.student("exact"), test_evaluate.card((2,), None))

    def go(**given):
        return test_evaluate.go(run, test_evaluate.vector_spec(samples=16, block=16, **given))

    found = [
        go(),
        go(guidance_scale=2.0, guidance={"weak": "exact"}),
        go(guidance_scale=2.0, guidance={"weak": "exact", "interval": [0.0, 0.5]}),
    ]
    # Euler in 8 steps guides those from .5, .375, .25, .125; of Heun's 63 calls, 16 + 16 are at times of at most .5
    calls = [[row.nfe for row in each.rows] for each in found]
    assert calls == [[1, 8, 63, 1, 2], [2, 16, 126, 1, 2], [1, 12, 63 + 32, 1, 2]]
    assert [each.guidance for each in found] == ["", "autoguidance 2", "autoguidance 2 (0 < t <= 0.5)"]
    assert len({each.row("teacher", 8).straightness for each in found}) == 3, "rows of other settings are not reused"


def test_later_rounds_are_not_guided(tmp_path):
    source = specfile.load(presets.find("digits"))
    changes = {"guidance_scale": 2.0, "guidance": GuidanceSpec(form="apg")}
    stages = {
        n: s if isinstance(s, TrainStage) else s.model_copy(update=changes) for n, s in source.spec.stages.items()
    }
    spec = source.spec.model_copy(update={"stages": stages})
    found = rounds.expand(resolve(spec, source.base), rounds.RoundsPlan(rounds=2)).stages
    solved = {name: stage.field_settings for name, stage in found.items() if isinstance(stage, PairsStage)}
    assert solved == {"pairs-1": FieldSettings(2.0, changes["guidance"]), "pairs-2": UNCHANGED}


def test_a_comparison_trains_the_weak_model_once():
    auto = {**PAIRS, "teacher": "t", "guidance_scale": 2.0, "guidance": {"weak": "w"}}
    reflow = {"kind": "train", "recipe": "reflow/reflow", "pairs": "p", "teacher": "t", "images": 1280}
    evaluation = {"kind": "evaluate", "teacher": "t", "students": {"r": [1]}}
    spec = specfile.validate(images(w=TEACH, p=auto, r=reflow, e=evaluation), "f")
    planned = comparison.plan(resolve(spec, Path()), None)
    assert list(planned.shared) == ["t", "w", "p"]
    assert [list(chain.stages) for chain in planned.chains] == [["r"]]
