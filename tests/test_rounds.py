"""Rounds of reflow: the spec that is made from one round, and the message for each mistake."""

import json
from itertools import pairwise

import pytest
from commands import command, snapshot
from runs import make_run

from distill.core.errors import InputError
from distill.plans import rounds
from distill.plans.rounds import RoundsPlan, expand
from distill.spec import checks, presets, specfile
from distill.spec.model import EvaluateStage, PairsStage, RunSpec, TrainStage
from distill.spec.resolved import resolve

PAIRS = {"kind": "pairs", "count": 64, "block": 16, "shard": 32}
MLP = {"kind": "mlp", "width": 16, "depth": 2}
REFLOW = {"kind": "train", "recipe": "reflow/reflow", "network": MLP, "pairs": "solve", "images": 128}
ONE_STEP = {"kind": "train", "recipe": "reflow/one_step", "init": "flow", "pairs": "solve", "images": 128}
GAUSSIAN = {"kind": "gaussian", "mean": [0, 1], "std": [1, 2]}


def spec(**stages) -> RunSpec:
    """A spec of one round over vectors; a stage that is None is left out."""
    content = {"solve": PAIRS, "flow": REFLOW, "one": ONE_STEP, **stages}
    found = {name: stage for name, stage in content.items() if stage is not None}
    return specfile.validate({"name": "x", "teacher": GAUSSIAN, "stages": found}, "f")


def preset(name):
    source = specfile.load(presets.find(name))
    return source.spec, source.base


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / "no-config"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# --- the spec of the rounds ---


@pytest.mark.parametrize("name", ["digits", "mnist", "mixture-2d"])
@pytest.mark.parametrize("plan", [RoundsPlan(), RoundsPlan(3), RoundsPlan(distill=True), RoundsPlan(2, distill=True)])
def test_presets_work_as_they_are(name, plan):
    one, base = preset(name)
    found = expand(resolve(one, base), plan)
    checks.check(found, base)
    assert specfile.validate(found.model_dump(mode="json"), "again") == found
    trained = {n: s for n, s in found.stages.items() if isinstance(s, TrainStage)}
    flows = [f"reflow-{i}" for i in range(1, plan.rounds + 1)]
    assert [n for n in trained if n != "teach"] == [*flows, *(["one_step"] if plan.distill else [])]
    for before, after in pairwise(flows):
        assert (trained[after].teacher, trained[after].init, trained[after].network) == (before, None, None)
        assert found.stages[trained[after].pairs].teacher == before
    first = one.stages["reflow"]
    assert trained["reflow-1"] == first.model_copy(update={"pairs": "pairs-1"})


def test_two_rounds_of_digits_and_one_step():
    one, base = preset("digits")
    found = expand(resolve(one, base), RoundsPlan(2, distill=True)).stages
    assert list(found) == [
        "teach", "pairs-1", "reflow-1", "evaluate-1", "pairs-2", "reflow-2", "evaluate-2", "pairs-distill", "one_step",
        "evaluate",
    ]  # fmt: skip
    assert found["teach"] == one.stages["teach"]
    assert [found[f"pairs-{i}"].teacher for i in (1, 2, "distill")] == ["teach", "reflow-1", "reflow-2"]
    last = found["one_step"]
    assert (last.teacher, last.init, last.pairs) == ("reflow-2", "reflow-2", "pairs-distill")
    for number, teacher in ((1, "teach"), (2, "reflow-1")):
        each = found[f"evaluate-{number}"]
        assert (each.teacher, each.students) == (teacher, {f"reflow-{number}": [1, 2, 4]})
        assert (each.fine_students, each.teacher_steps) == ([f"reflow-{number}"], [])
        assert (each.fine_solver, each.fine_steps) == ("dpm_solver_pp_2m", 24)
    whole = found["evaluate"]
    assert whole.students == {"one_step": [1], "reflow-1": [1, 2, 4], "reflow-2": [1, 2, 4]}
    assert (whole.teacher, whole.teacher_steps, whole.fine_students) == ("teach", [1, 2, 4, 8, 16], [])


def test_one_round_alone_has_one_evaluation():
    one, base = preset("digits")
    found = expand(resolve(one, base), RoundsPlan()).stages
    assert list(found) == ["teach", "pairs-1", "reflow-1", "evaluate-1"]
    assert found["evaluate-1"].teacher_steps == [1, 2, 4, 8, 16]
    measured = {"students": {"teach": [4], "reflow": [1]}, "fine_students": ["reflow"]}
    more = one.stages["evaluate"].model_copy(update=measured)
    found = expand(
        resolve(one.model_copy(update={"stages": {**one.stages, "evaluate": more}}), base), RoundsPlan()
    ).stages
    assert found["evaluate-1"].teacher_steps == [], "another student is measured, so there are two"
    assert (found["evaluate"].students, found["evaluate"].fine_students) == ({"reflow-1": [1], "teach": [4]}, [])


def test_guidance_is_in_the_flow_after_the_first_round():
    one, base = preset("digits")
    guided = {name: stage.model_copy(update={"guidance_scale": 2.0}) for name, stage in one.stages.items()
              if isinstance(stage, PairsStage | EvaluateStage)}  # fmt: skip
    one = one.model_copy(update={"stages": {**one.stages, **guided}})
    found = expand(resolve(one, base), RoundsPlan(2, distill=True))
    checks.check(found, base)
    scales = {name: stage.guidance_scale for name, stage in found.stages.items() if not isinstance(stage, TrainStage)}
    assert scales == {
        "pairs-1": 2, "evaluate-1": 2, "pairs-2": 1, "evaluate-2": 1, "pairs-distill": 1, "evaluate": 2,
    }  # fmt: skip


def test_real_data_against_drift():
    one, base = preset("digits")
    found = expand(resolve(one, base), RoundsPlan(2, distill=True, forward=0.25)).stages
    assert list(found)[1:5] == ["pairs-1", "forward-1", "reflow-1", "evaluate-1"]
    for number, teacher in ((1, "teach"), (2, "reflow-1")):
        assert found[f"reflow-{number}"].pair_shares == {f"pairs-{number}": 0.75, f"forward-{number}": 0.25}
        inverted, solved = found[f"forward-{number}"], found[f"pairs-{number}"]
        assert (inverted.paths, inverted.teacher, inverted.solver) == ("forward", teacher, "heun")
        assert inverted.count == round(14000 / 3), "each pair is seen as often"
        again = {"paths": "backward", "count": solved.count, "solver": solved.solver}
        assert inverted.model_copy(update=again) == solved
    assert found["one_step"].pair_shares == {"pairs-distill": 1}
    weighed = expand(resolve(one, base), RoundsPlan(2, distill=True, forward=0.25, data_weight=0.1))
    checks.check(weighed, base)
    assert [weighed.stages[name].options for name in ("reflow-1", "reflow-2", "one_step")] == [
        {"data_weight": 0.1}, {"data_weight": 0.1}, {},
    ]  # fmt: skip


def test_inverted_paths_keep_their_ends_alone():
    """Whatever states the paths from noise have."""
    for states in ({"times": [1.0, 0.5, 0.0]}, {"optimal_times": 2}):
        paths = PAIRS | {"paths": "trajectories", "store_noise": True, **states}
        found = expand(resolve(spec(solve=paths), specfile.Path()), RoundsPlan(forward=0.25))
        checks.check(found, specfile.Path())
        inverted = found.stages["forward-1"]
        assert (inverted.paths, inverted.times, inverted.optimal_times) == ("forward", None, None)


def test_a_spec_without_an_evaluation_gets_one():
    found = expand(resolve(spec(one=None), specfile.Path()), RoundsPlan(2)).stages
    assert list(found) == ["solve-1", "flow-1", "evaluate-1", "solve-2", "flow-2", "evaluate-2", "evaluate"]
    each = found["evaluate-1"]
    assert (each.fine_solver, each.fine_steps, each.students) == ("heun", 16, {"flow-1": [1, 2, 4]})


def test_the_distillation_may_be_any_that_begins_with_the_flow():
    one = spec(one=ONE_STEP | {"init": None, "network": MLP | {"width": 8}})
    assert expand(resolve(one, specfile.Path()), RoundsPlan(distill=True)).stages["one"].network.width == 8
    digits, base = preset("digits")
    content = digits.model_dump(mode="json")
    content["stages"]["short"] = {
        "kind": "train", "recipe": "shortcut/shortcut", "teacher": "reflow", "init": "reflow", "images": 1280,
    }  # fmt: skip
    del content["stages"]["one_step"]
    content["stages"]["evaluate"] = None
    content["stages"] = {name: stage for name, stage in content["stages"].items() if stage}
    found = expand(resolve(specfile.validate(content, "f"), base), RoundsPlan(2, distill=True))
    checks.check(found, base)
    assert list(found.stages)[-2:] == ["short", "evaluate"], "it needs no pairs"
    assert (found.stages["short"].teacher, found.stages["short"].init) == ("reflow-2", "reflow-2")
    assert found.stages["evaluate"].students == {"short": [1], "reflow-1": [1, 2, 4], "reflow-2": [1, 2, 4]}


def test_changes_of_the_spec_and_of_its_rounds():
    early, late = rounds.split(["seed=5", "stages.flow.images=256", "stages.flow-2.images=512"], ["solve", "flow"])
    assert (early, late) == (["seed=5", "stages.flow.images=256"], ["stages.flow-2.images=512"])
    found = rounds.changed(expand(resolve(spec(), specfile.Path()), RoundsPlan(2)), late, ["solve", "flow", "one"], "f")
    assert [found.stages[f"flow-{i}"].images for i in (1, 2)] == [128, 512]


def test_other_times_follow_the_flows():
    one, base = preset("digits")
    times = {"teacher": ["optimal"], "reflow": ["optimal", [1.0, 0.6, 0.0]], "one_step": [[1.0, 0.0]]}
    asked = one.stages["evaluate"].model_copy(update={"times": times})
    one = one.model_copy(update={"stages": {**one.stages, "evaluate": asked}})
    checks.check(one, base)
    found = expand(resolve(one, base), RoundsPlan(2, distill=True))
    checks.check(found, base)
    each = {name: stage.times for name, stage in found.stages.items() if isinstance(stage, EvaluateStage)}
    assert each == {
        "evaluate-1": {"reflow-1": times["reflow"]},
        "evaluate-2": {"reflow-2": times["reflow"]},
        "evaluate": {**{f"reflow-{i}": times["reflow"] for i in (1, 2)}, "one_step": times["one_step"],
                     "teacher": ["optimal"]},
    }  # fmt: skip
    alone = expand(resolve(one, base), RoundsPlan())
    checks.check(alone, base)
    assert alone.stages["evaluate-1"].times == {"teacher": ["optimal"], "reflow-1": times["reflow"]}


# --- what does not fit ---

FITS = rounds.FITS
UNFIT = {
    "no pairs": ({"solve": None, "flow": None, "one": None}, RoundsPlan(), f"spec 'x' has no pairs stage; {FITS}"),
    "two pairs stages": (
        {"more": PAIRS},
        RoundsPlan(),
        f"spec 'x' has more than one pairs stage (solve, more); {FITS}",
    ),
    "no flow": (
        {"flow": None, "one": ONE_STEP | {"init": None, "network": MLP}},
        RoundsPlan(),
        f"spec 'x' has no train stage for the next teacher on the pairs of 'solve'; {FITS}",
    ),
    "two flows": (
        {"other": REFLOW},
        RoundsPlan(),
        f"spec 'x' has more than one train stage for the next teacher on the pairs of 'solve' (flow, other); {FITS}",
    ),
    "two distillations": (
        {"two": ONE_STEP},
        RoundsPlan(),
        f"spec 'x' has more than one distillation (one, two); {FITS}",
    ),
    "more stages": (
        {"e": {"kind": "evaluate", "students": {"one": [1]}}, "e2": {"kind": "evaluate", "students": {"flow": [1]}}},
        RoundsPlan(),
        f"spec 'x' has other stages after its pairs: e2; {FITS}",
    ),
    "nothing to distil": (
        {"one": None},
        RoundsPlan(distill=True),
        "--distill: spec 'x' has no distillation stage; add a train stage with reflow/one_step on the pairs of "
        "'solve', or remove --distill",
    ),
    "no data to invert": (
        {"solve": PAIRS | {"teacher": "t"}, "flow": REFLOW | {"teacher": "t"}},
        RoundsPlan(forward=0.2),
        "--forward needs real data, but spec 'x' has none; add data, e.g. data={kind: digits}, or remove --forward",
    ),
    "no data to weigh": (
        {},
        RoundsPlan(data_weight=0.1),
        "--data-weight needs real data, but spec 'x' has none; add data, e.g. data={kind: digits}, or remove "
        "--data-weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_specs_that_do_not_fit(case):
    stages, plan, said = UNFIT[case]
    one = spec(**stages)
    if case == "no data to invert":
        one = one.model_copy(update={"teacher": None})
    with pytest.raises(InputError) as caught:
        expand(resolve(one, specfile.Path()), plan)
    assert str(caught.value) == said


def test_a_stage_before_the_pairs_with_a_name_of_the_rounds():
    content = preset("digits")[0].model_dump(mode="json")
    content["stages"] = {name.replace("teach", "reflow-2"): stage for name, stage in content["stages"].items()}
    text = json.dumps(content).replace('"teach"', '"reflow-2"')
    with pytest.raises(InputError) as caught:
        expand(resolve(specfile.validate(json.loads(text), "f"), specfile.Path()), RoundsPlan(2))
    assert str(caught.value) == "stages.reflow-2: the rounds also create a stage with this name; rename this one"


REFUSED = {
    "no rounds": (["digits", "--rounds", "0"], "--rounds 0: must be at least 1"),
    "no part": (
        ["digits", "--forward", "1"],
        "--forward 1: must be a fraction between 0 and 1, like 0.2",
    ),
    "no number": (
        ["digits", "--forward", "nan"],
        "--forward nan: must be a fraction between 0 and 1, like 0.2",
    ),
    "less than a pair": (
        ["digits", "--forward", "0.001"],
        "spec 'digits': stages.reflow-1.pairs: the fraction 0.001 of batch_size=128 is less than one pair per batch; "
        "increase batch_size or this fraction",
    ),
    "an endless weight": (
        ["digits", "--data-weight", "inf"],
        "--data-weight inf: must be greater than 0, like 0.1",
    ),
    "no weight": (["digits", "--data-weight", "0"], "--data-weight 0: must be greater than 0, like 0.1"),
    "a recipe without such an option": (
        ["digits", "--data-weight", "0.1", "stages.reflow.recipe=./mine.py"],
        "--data-weight: ./mine.py has no option data_weight; remove it, or use reflow/reflow",
    ),
    "inverted already": (
        ["digits", "--forward", "0.1", "stages.pairs.paths=forward", "stages.pairs.solver=heun"],
        "--forward: 'pairs' already generates forward pairs; remove --forward",
    ),
    "options of submit": (
        ["digits", "--partition", "low"],
        "--partition has no effect without --slurm; leave it out, or add --slurm",
    ),
    "no GPUs of submit": (
        ["digits", "--gpus-per-node", "0"],
        "--gpus-per-node has no effect without --slurm; leave it out, or add --slurm",
    ),
    "the code": (["digits", "--code", "now"], "--code now: valid: current, run"),
    "nothing to go on with": (
        ["digits", "--resume"],
        "there is no run 'digits' in runs to resume; start it without --resume",
    ),
    "neither new nor old": (
        ["digits", "--resume", "--dry-run"],
        "--dry-run describes a new run and cannot be combined with --resume; remove --resume",
    ),
    "a change of the spec": (
        ["digits", "stages.reflow.images=10000"],
        "spec 'digits': stages.reflow.images: 10000 is not a multiple of batch_size (128); nearest: 9984",
    ),
    "a change of a round": (
        ["digits", "--rounds", "2", "stages.reflow-2.images=10000"],
        "spec 'digits': stages.reflow-2.images: 10000 is not a multiple of batch_size (128); nearest: 9984",
    ),
    "a change of a field that is not there": (
        ["digits", "stages.reflow-1.imges=5"],
        "stages.reflow-1.imges=5: stages.reflow-1 has no 'imges'; did you mean 'images'? valid: "
        + ", ".join(sorted(TrainStage.model_fields)),
    ),
    "a change of a round that is not there": (
        ["digits", "stages.reflow-2.images=128"],
        "stages.reflow-2.images=128: neither the spec nor its rounds have a stage 'reflow-2'; did you mean 'reflow-1'? "
        "valid: evaluate, evaluate-1, one_step, pairs, pairs-1, reflow, reflow-1, teach",
    ),
    "a wrong spec": (
        ["digitz"],
        f"there is no spec file and no preset 'digitz'; did you mean 'digits'? valid: {', '.join(presets.names())}",
    ),
    "a preset of something else": (
        ["digits-recipes"],
        "spec 'digits-recipes' has other stages after its pairs: consistency, shortcut, meanflow, dmd2; " + FITS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_commands_that_are_refused(capfd, tmp_path, case):
    (tmp_path / "mine.py").write_text(
        (presets.folder().parent / "reflow" / "reflow.py").read_text().replace("data_weight", "other_weight")
    )
    arguments, said = REFUSED[case]
    if "./mine.py" in said:
        (tmp_path / "digits").write_text((presets.folder() / "digits.yaml").read_text())
    before = snapshot(tmp_path)
    done = command(capfd, "reflow", *arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err == f"error: {said}\n"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", [["--rounds", "2"], ["--distill"], ["--forward", "0.1"], ["--data-weight", "0.1"]])
def test_a_run_that_goes_on_has_its_rounds(capfd, tmp_path, option):
    make_run(tmp_path / "runs", "one")
    done = command(capfd, "reflow", "one", "--resume", *option)
    assert done.code == 2
    assert done.err == f"error: {option[0]} has no effect when run 'one' is resumed; leave it out\n"


def test_other_rounds_are_no_way_to_go_on(capfd, tmp_path):
    """Where a spec and a run have the same name, the spec is meant: a run that goes on has its rounds."""
    make_run(tmp_path / "runs", "digits")
    done = command(capfd, "reflow", "digits", "--resume", "--rounds", "2")
    assert done.code == 2
    assert done.err.startswith(
        "error: run 'digits' cannot be resumed with a changed spec (only launch and data.max_unreadable may change):\n"
    )
    assert "\n  stages.reflow-2: " in done.err
