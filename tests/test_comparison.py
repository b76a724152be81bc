"""Comparisons of recipes: their spec, lengths, table and figure, and the message for each mistake."""

import json
import math
import re

import pytest
import torch
from commands import command, snapshot
from rich.console import Console
from runs import make_run
from test_report import Page, measured_row

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.evaluation import charts, report_page
from distill.evaluation.pictures import images_png
from distill.plans import budget, comparison, planning
from distill.reports import comparison_table
from distill.reports.comparison_table import ComparedRecipe, Comparison, Measured, TrainedPart
from distill.runs.results import FILE_NAME, Results
from distill.runs.run_store import CREATED, RunPaths, append_event
from distill.spec import checks, presets, registry, specfile
from distill.spec.model import EvaluateStage, TrainStage
from distill.spec.resolved import resolve

MLP = {"kind": "mlp", "width": 16, "depth": 2}
GAUSSIAN = {"kind": "gaussian", "mean": [0, 1], "std": [1, 2]}
PAIRS = {"kind": "pairs", "count": 64, "block": 16, "shard": 32}
REFLOW = {"kind": "train", "recipe": "reflow/reflow", "network": MLP, "pairs": "solve", "images": 128}
EVALUATE = {"kind": "evaluate", "students": {}}


def preset(name):
    source = specfile.load(presets.find(name))
    return source.spec, source.base


def vectors(**stages):
    """A spec over vectors; a stage that is None is left out."""
    content = {"solve": PAIRS, "flow": REFLOW, "evaluate": EVALUATE, **stages}
    found = {name: stage for name, stage in content.items() if stage is not None}
    return specfile.validate({"name": "x", "teacher": GAUSSIAN, "stages": found}, "f")


def planned(name, *recipes):
    spec, base = preset(name)
    return comparison.plan(resolve(spec, base), recipes or None), base


def timed(seconds=0.001, **changes):
    content = {"seconds_per_image": seconds, "memory": 1000, "teacher_calls": 0, "steps": []}
    return Measured.model_validate({**content, **changes})


def alike(plan, **changes):
    return {name: timed(**changes) for chain in plan.chains for name in chain.trained}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / "no-config"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


# --- what is compared ---


def test_a_stage_of_two_chains_is_made_for_each():
    plan, base = planned("digits")
    spec = plan.spec()
    checks.check(spec, base)
    assert specfile.validate(spec.model_dump(mode="json"), "again") == spec
    assert list(spec.stages) == ["teach", "pairs", "reflow", "one_step-reflow", "one_step", "evaluate"]
    given = plan.given.stages
    assert {name: spec.stages[name] for name in ("teach", "pairs", "reflow")} == {
        name: given[name] for name in ("teach", "pairs", "reflow")
    }
    assert spec.stages["one_step-reflow"] == given["reflow"]
    assert spec.stages["one_step"] == given["one_step"].model_copy(update={"init": "one_step-reflow"})
    assert spec.stages["evaluate"].students == {"reflow": [1, 2, 4], "one_step": [1]}


def test_a_chain_that_is_alone_keeps_its_names():
    plan, base = planned("digits", "one_step")
    assert list(plan.spec().stages) == ["teach", "pairs", "reflow", "one_step", "evaluate"]
    assert [chain.name for chain in plan.chains] == ["one_step"]
    assert plan.spec().stages["evaluate"].students == {"one_step": [1]}


def test_what_nobody_compared_needs_is_left_out():
    plan, base = planned("digits-recipes", "meanflow", "dmd2")
    checks.check(plan.spec(), base)
    assert list(plan.spec().stages) == ["teach", "meanflow", "dmd2", "evaluate"]


def test_chains_of_the_family():
    plan, base = planned("digits-family")
    checks.check(plan.spec(), base)
    chains = {chain.name: list(chain.stages) for chain in plan.chains}
    assert chains["slimflow"] == ["anneal", "slimflow"]
    assert chains["proreflow"] == ["proreflow8", "proreflow4", "proreflow"]
    assert chains["one_step"] == ["one_step-reflow", "one_step"]
    assert chains["one_step_pp"] == ["one_step_pp-rf_plus_plus", "one_step_pp"]
    assert chains["boss"] == ["boss"]
    assert list(plan.shared) == ["teach", "pairs", "quarters", "best"]
    compared_stages = {name for name, stage in plan.given.stages.items() if isinstance(stage, TrainStage)}
    assert compared_stages - {"teach", "anneal", "proreflow8", "proreflow4"} == set(chains)


def test_a_chain_with_a_teacher_and_pairs_of_its_own():
    """Two rounds: the flow of the first solves the pairs of the second."""
    second = {"teacher": "flow", "network": None}
    spec = vectors(
        again=PAIRS | {"teacher": "flow", "count": 32},
        second=REFLOW | second | {"pairs": {"again": 0.5, "more": 0.5}},
        more=None,
    )
    content = spec.model_dump(mode="json")
    stages = content["stages"]
    stages["more"] = PAIRS | {"teacher": "flow", "count": 48}
    order = ["solve", "flow", "again", "more", "second", "evaluate"]
    spec = specfile.validate({**content, "stages": {name: stages[name] for name in order}}, "f")
    plan = comparison.plan(resolve(spec, specfile.Path()), None)
    (chain,) = plan.chains
    assert (chain.name, list(chain.stages)) == ("second", ["flow", "again", "more", "second"])
    assert list(plan.shared) == ["solve"]
    one_step = {"kind": "train", "recipe": "reflow/one_step", "init": "second", "images": 128}
    stages["one"] = one_step | {"teacher": "flow", "pairs": {"again": 0.5, "more": 0.5}}
    order.insert(-1, "one")
    spec = specfile.validate({**content, "stages": {name: stages[name] for name in order}}, "f")
    plan = comparison.plan(resolve(spec, specfile.Path()), None)
    checks.check(plan.spec(), specfile.Path())
    chain = plan.chains[-1]
    assert list(chain.stages) == ["one-flow", "one-again", "one-more", "one-second", "one"]
    assert chain.stages["one-more"].teacher == "one-flow"
    last = chain.stages["one"]
    assert (last.teacher, last.init) == ("one-flow", "one-second")
    assert last.pairs == {"one-again": 0.5, "one-more": 0.5}
    _, found = budget.frozen(plan, alike(plan), 1.0, "c")
    calls = 31  # heun 16
    assert [entry.pair_calls for entry in found.entries] == [calls * (64 + 32 + 48)] * 2


def test_a_recipe_that_the_spec_lacks_is_like_its_first():
    plan, base = planned("digits", "shortcut/meanflow", "rf_plus_plus")
    checks.check(plan.spec(), base)
    first, found = plan.given.stages["reflow"], plan.spec().stages["meanflow"]
    same = ["teacher", "images", "batch_size", "optimizer", "ema_half_lives", "export", "checkpoint"]
    assert [getattr(found, name) for name in same] == [getattr(first, name) for name in same]
    assert (found.recipe, found.options, found.init, found.network, found.pairs) == (
        "shortcut/meanflow", {}, None, None, None,
    )  # fmt: skip
    assert plan.spec().stages["rf_plus_plus"].pairs == "pairs"


def test_a_network_is_taken_over_where_the_teacher_has_no_weights():
    plan = comparison.plan(resolve(vectors(), specfile.Path()), ["one_step"])
    checks.check(plan.spec(), specfile.Path())
    assert plan.spec().stages["one_step"].network == plan.given.stages["flow"].network


@pytest.mark.parametrize("recipe", [name for name in registry.names() if not name.startswith("pretrain/")])
def test_every_recipe_can_be_compared(recipe):
    spec, base = preset("digits-family")
    checks.check(comparison.plan(resolve(spec, base), [recipe]).spec(), base)


def test_states_are_found_among_the_pairs():
    states = PAIRS | {"paths": "trajectories", "times": [1, 0.5, 0]}
    plan = comparison.plan(resolve(vectors(solve=PAIRS, path=states, evaluate=EVALUATE), specfile.Path()), ["seqrf"])
    assert plan.spec().stages["seqrf"].pairs == "path"


def test_trajectories_are_paths_too_and_segments_are_none():
    states = PAIRS | {"paths": "trajectories", "times": [1, 0.5, 0]}
    segments = PAIRS | {"paths": "segments", "times": [1, 0.5, 0]}
    flow = REFLOW | {"recipe": "reflow/seqrf", "pairs": "parts"}
    spec = vectors(solve=None, flow=None, evaluate=None, parts=segments, whole=states, one=flow, last=EVALUATE)
    plan = comparison.plan(resolve(spec, specfile.Path()), ["reflow"])
    assert plan.spec().stages["reflow"].pairs == "whole"


def test_the_last_evaluation_measures_all():
    plan = comparison.plan(resolve(vectors(last=EVALUATE | {"samples": 99, "fine_students": ["flow"],
                                                   "students": {"flow": [3]}}), specfile.Path()), None)  # fmt: skip
    stages = plan.spec().stages
    assert [name for name, stage in stages.items() if isinstance(stage, EvaluateStage)] == ["last"]
    assert (stages["last"].samples, stages["last"].students) == (99, {"flow": [3]})
    assert stages["last"].fine_students == ["flow"]
    other = comparison.plan(resolve(plan.given, specfile.Path()), ["one_step"]).spec().stages["last"]
    assert (other.students, other.fine_students) == ({}, []), "its steps are not known before the rehearsal"


def test_times_of_those_that_are_not_compared_are_left_out():
    plan, base = planned("digits", "one_step")
    times = {"teacher": ["optimal"], "reflow": ["optimal"], "one_step": [[1.0, 0.5, 0.0]]}
    asked = plan.given.stages["evaluate"].model_copy(update={"times": times})
    spec = plan.given.model_copy(update={"stages": {**plan.given.stages, "evaluate": asked}})
    checks.check(spec, base)
    plan = comparison.plan(resolve(spec, base), ["one_step"])
    checks.check(plan.spec(), base)
    kept = {"teacher": times["teacher"], "one_step": times["one_step"]}
    assert plan.spec().stages["evaluate"].times == kept
    assert budget.frozen(plan, alike(plan), 1.0, "c")[0].stages["evaluate"].times == kept


# --- lengths ---


def test_a_chain_takes_the_minutes():
    plan, base = planned("digits-family", "slimflow", "proreflow", "reflow")
    seconds = {"anneal": 0.0011, "slimflow": 0.0023, "proreflow8": 0.003, "proreflow4": 0.0041, "proreflow": 0.005,
               "reflow": 0.00077}  # fmt: skip
    found, record = budget.frozen(plan, {name: timed(each) for name, each in seconds.items()}, 1.5, "distill c")
    checks.check(found, base)
    for entry in record.entries:
        total = sum(part.images * seconds[part.stage] for part in entry.parts)
        assert total == pytest.approx(sum(part.seconds for part in entry.parts))
        slack = sum(128 * seconds[part.stage] for part in entry.parts)
        assert 90 - slack <= total <= 90
    given, stages = plan.given.stages, found.stages
    length = given["anneal"].images
    factor = 90 / (length * 0.0011 + given["slimflow"].images * 0.0023)
    assert stages["anneal"].images == math.floor(factor * length / 128) * 128
    share, annealed = stages["anneal"].images / length, given["anneal"].options["anneal_images"]
    assert stages["anneal"].options == {"phase": "anneal", "anneal_images": round(share * annealed)}
    assert stages["anneal"].optimizer.warmup_images == math.floor(share * 2560)
    for name in seconds:
        assert (stages[name].ema_half_lives, stages[name].export) == (given[name].ema_half_lives, given[name].export)
    assert {name: found.stages[name] for name in ("teach", "pairs")} == {n: given[n] for n in ("teach", "pairs")}


@pytest.mark.parametrize("images", [128, 256, 384])
def test_a_warm_up_ends_before_a_short_training_does(images):
    length = {"images": 2560, "batch_size": 128, "optimizer": {"warmup_images": 2559}}
    plan = comparison.plan(resolve(vectors(flow=REFLOW | length), specfile.Path()), None)
    found, _ = budget.frozen(plan, alike(plan), (images + 127) * 0.001 / 60, "c")
    checks.check(found, specfile.Path())
    flow = found.stages["flow"]
    assert (flow.images, flow.optimizer.warmup_images) == (images, images - 1)
    annealing = {"recipe": "reflow/slimflow", "options": {"phase": "anneal", "anneal_images": 2560}}
    plan = comparison.plan(resolve(vectors(flow=REFLOW | length | annealing), specfile.Path()), None)
    flow = budget.frozen(plan, alike(plan), (images + 127) * 0.001 / 60, "c")[0].stages["flow"]
    assert flow.options["anneal_images"] == flow.images == images


def test_checkpoints_are_as_many_as_before():
    spec, base = preset("digits")
    save = {"checkpoint": {"images": 6400, "minutes": None}}
    content = spec.model_dump(mode="json")
    content["stages"]["reflow"] |= save
    plan = comparison.plan(resolve(specfile.validate(content, "f"), base), ["reflow"])
    found, _ = budget.frozen(plan, alike(plan), 38.4 / 60 / 4, "c")
    assert (found.stages["reflow"].images, found.stages["reflow"].checkpoint.images) == (9600, 1600)


def test_students_are_measured_at_the_steps_that_they_are_made_for():
    plan, _ = planned("digits", "meanflow", "perflow", "proreflow", "reflow")
    found = alike(plan) | {"perflow": timed(steps=[4, 8, 12, 16]), "proreflow": timed(steps=[3, 6])}
    students = budget.frozen(plan, found, 1.0, "c")[0].stages["evaluate"].students
    assert students == {"meanflow": [1, 2, 4], "perflow": [4, 8], "proreflow": [3], "reflow": [1, 2, 4]}


def test_what_the_teacher_is_asked():
    plan, _ = planned("digits", "reflow", "perflow")
    found = {"reflow": timed(), "perflow": timed(teacher_calls=8, memory=2000)}
    _, record = budget.frozen(plan, found, 1.0, "c")
    by_name = {entry.name: entry for entry in record.entries}
    assert by_name["reflow"].teacher_calls == 14000 * 12
    assert by_name["perflow"].teacher_calls == 8 * by_name["perflow"].images > 0
    assert by_name["perflow"].memory == 2000
    assert record.measured == found
    assert Comparison.model_validate_json(record.model_dump_json()) == record
    again, _ = budget.frozen(plan, record.measured, 1.0, "c")
    assert again == budget.frozen(plan, found, 1.0, "c")[0]


def test_a_rehearsal_is_short_but_long_enough():
    plan, base = planned("digits-family", "reflow", "boss")
    small = budget.rehearsal(plan)
    checks.check(small, base)
    stages = small.stages
    assert stages["teach"].images == 2 * 128
    assert stages["reflow"].images == stages["boss"].images == 24 * 128
    assert (stages["pairs"].count, stages["pairs"].steps, stages["pairs"].solver) == (250, 1, "euler")
    assert (stages["best"].count, stages["best"].steps) == (250, 12), "its states are some of the solver's"


def test_a_miniature_of_states_can_be_made():
    spec, base = preset("digits-family")
    checks.check(planning.miniature(spec), base)


def test_a_rehearsal_tells_what_was_measured(tmp_path):
    plan, _ = planned("digits", "reflow")
    run = make_run(tmp_path / "runs")
    for batch in range(1, 25):  # the first four are slow
        time = batch if batch <= 4 else 4 + (batch - 4) * 0.1
        with (run.root / CREATED).open("a") as file:
            event = {"time": time, "event": "progress", "label": "reflow", "done": 128 * batch, "per_second": 1}
            file.write(json.dumps(event) + "\n")
    run.stage("reflow").root.mkdir(parents=True)
    for rank in range(2):
        write_json(run.stage("reflow").memory(rank), {
            "counted": {"parameters": 10, "ema": 5 + rank}, "activations": 100, "teacher_rows": 128 * 24 * 3,
        })  # fmt: skip
    run.student("reflow").mkdir(parents=True)
    card = {"name": "reflow", "recipe": "reflow/reflow", "spec_digest": "", "teacher_digest": None,
            "t_grids": {"2": [1, 0.5, 0]}, "num_classes": None, "null_class": None, "shape": [1, 8, 8],
            "weights": "raw", "images": 128}  # fmt: skip
    write_json(run.student("reflow") / "distill.json", card)
    found = budget.measured(plan, run)["reflow"]
    assert found == Measured(seconds_per_image=float(f"{0.1 / 128:.4g}"), memory=116, teacher_calls=6, steps=[2])


# --- what does not fit ---

UNFIT = {
    "no evaluation": (
        {"evaluate": None},
        None,
        "spec 'x' has no evaluate stage, which a comparison needs; add one, like evaluate: {kind: evaluate, "
        "teacher: teach, "
        "students: {}}",
    ),
    "nothing distilled": (
        {"solve": None, "flow": None},
        None,
        "spec 'x' has no distillation recipe; name some with --recipes, like reflow,one_step",
    ),
    "nothing to be like": (
        {"solve": None, "flow": None},
        ["reflow"],
        "--recipes: reflow/reflow has no stage in spec 'x', and there is no other distillation stage whose "
        "length, batch size and optimizer it could use; add a stage for it",
    ),
    "no states": (
        {},
        ["seqrf"],
        "--recipes: reflow/seqrf needs pairs with states of its teacher, but spec 'x' has none; add a pairs stage with "
        "paths: trajectories and times",
    ),
    "a name that is taken": (
        {"one_step": PAIRS},
        ["one_step"],
        "stages.one_step: the comparison also creates a stage with this name; rename this one",
    ),
    "no teacher needed": (
        {},
        ["flow_matching"],
        "--recipes: pretrain/flow_matching uses no teacher with its default options; add a stage with this "
        "recipe to the spec that uses the teacher, or starts from it (init)",
    ),
    "twice": ({}, ["reflow", "reflow/reflow"], "--recipes names reflow/reflow twice; name it once"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_specs_that_do_not_fit(case):
    stages, recipes, said = UNFIT[case]
    with pytest.raises(InputError) as caught:
        comparison.plan(resolve(vectors(**stages), specfile.Path()), recipes)
    assert str(caught.value) == said


def test_recipes_of_one_last_name(tmp_path, monkeypatch):
    package = tmp_path / "other_distill-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other-distill\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[distill.recipes]\nother/one_step = their_one_step\n")
    ours = registry.source("reflow/one_step", tmp_path)
    (tmp_path / "their_one_step.py").write_text(ours.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    both = ["other/one_step", "reflow/one_step"]
    with pytest.raises(InputError) as caught:
        comparison.plan(resolve(vectors(), specfile.Path()), both)
    assert str(caught.value) == (
        "--recipes: other/one_step and reflow/one_step would both get a stage 'one_step'; add a stage for one "
        "of them to the spec, with another name"
    )
    other = {**REFLOW, "recipe": "other/one_step"}
    named = comparison.plan(resolve(vectors(evaluate=None, theirs=other, last=EVALUATE), specfile.Path()), both)
    assert [chain.name for chain in named.chains] == ["theirs", "one_step"]


def test_no_pairs_for_a_recipe():
    spec, base = preset("digits-recipes")
    content = spec.model_dump(mode="json")
    for name in ("pairs", "reflow", "one_step"):
        del content["stages"][name]
    content["stages"]["evaluate"]["students"] = {}
    with pytest.raises(InputError) as caught:
        comparison.plan(resolve(specfile.validate(content, "f"), base), ["reflow"])
    assert str(caught.value) == (
        "--recipes: reflow/reflow needs pairs of 'teach', but spec 'digits-recipes' has none; add a pairs stage with "
        "kind: pairs"
    )


def test_a_recipe_of_ones_own_goes_by_the_name_of_its_file():
    own = REFLOW | {"recipe": "./mine.py"}
    plan = comparison.plan(
        resolve(vectors(flow=None, evaluate=None, mine=own, last=EVALUATE), specfile.Path()), ["mine"]
    )
    _, record = budget.frozen(plan, alike(plan), 1.0, "c")
    assert [comparison_table.titled(each) for each in record.entries] == ["mine"]


def test_a_copy_with_a_name_that_is_taken():
    content = preset("digits")[0].model_dump(mode="json")
    content["stages"] = {"one_step-reflow": PAIRS | {"teacher": None}, **content["stages"]}
    with pytest.raises(InputError) as caught:
        comparison.plan(resolve(specfile.validate(content, "f"), specfile.Path()), None)
    assert str(caught.value) == (
        "stages.one_step-reflow: the comparison also creates a stage with this name; rename this one"
    )


def test_two_recipes_of_one_short_name(tmp_path):
    (tmp_path / "reflow.py").write_text((presets.folder().parent / "reflow" / "reflow.py").read_text())
    spec = vectors(flow=REFLOW | {"recipe": "./reflow.py"})
    with pytest.raises(InputError) as caught:
        comparison.plan(resolve(spec, tmp_path), ["reflow"])
    assert str(caught.value) == "--recipes: 'reflow' matches reflow/reflow and ./reflow.py; give the full name"
    (chain,) = comparison.plan(resolve(spec, tmp_path), ["./reflow.py"]).chains
    assert (chain.name, chain.recipe) == ("flow", "./reflow.py")


def test_a_budget_that_is_too_short_says_what_would_do():
    plan, base = planned("digits-family", "slimflow")
    found = alike(plan, seconds=0.01)
    with pytest.raises(InputError) as caught:
        budget.frozen(plan, found, 0.04, "c")
    said = re.fullmatch(
        r"--budget 0.04: too short for 'slimflow': less than one batch of 'slimflow' fits; give at least (\S+) "
        r"minutes",
        str(caught.value),
    )
    enough = budget.frozen(plan, found, float(said[1]), "c")[0]
    checks.check(enough, base)
    assert enough.stages["slimflow"].images == 128
    anneal, slimflow = (plan.given.stages[name].images for name in ("anneal", "slimflow"))
    assert float(said[1]) < 1.02 * (anneal + slimflow) / slimflow * 128 * 0.01 / 60


RECIPES = ", ".join(sorted(name.rpartition("/")[2] for name in registry.names()))
REFUSED = {
    "no budget": (["digits"], "--budget is missing; give the minutes of training for each recipe, e.g. --budget 2"),
    "no time": (
        ["digits", "--budget", "0"],
        "--budget 0: give minutes of training for each recipe, above 0 and at most 1,000,000, like 2",
    ),
    "less than none": (
        ["digits", "--budget", "-1"],
        "--budget -1: give minutes of training for each recipe, above 0 and at most 1,000,000, like 2",
    ),
    "no number": (
        ["digits", "--budget", "nan"],
        "--budget nan: give minutes of training for each recipe, above 0 and at most 1,000,000, like 2",
    ),
    "endless": (
        ["digits", "--budget", "inf"],
        "--budget inf: give minutes of training for each recipe, above 0 and at most 1,000,000, like 2",
    ),
    "unknown": (
        ["digits", "--budget", "1", "--recipes", "reflow, one-step"],
        f"--recipes: there is no recipe 'one-step'; did you mean 'one_step'? valid: {RECIPES}",
    ),
    "none": (
        ["digits", "--budget", "1", "--recipes", ""],
        f"--recipes: there is no recipe ''; valid: {RECIPES}",
    ),
    "the teacher": (
        ["digits", "--budget", "1", "--recipes", "flow_matching"],
        "--recipes: pretrain/flow_matching trains the teacher here ('teach'); name recipes that distil it",
    ),
    "data that is not there": (
        ["mixture-2d", "--budget", "1", "--recipes", "meanflow"],
        "spec 'mixture-2d': stages.meanflow: shortcut/meanflow needs data, but the teacher makes vectors, for "
        "which there is no data; use reflow/reflow",
    ),
    "without a teacher": (
        ["./mine.yaml", "--budget", "1"],
        "spec 'mine': stages.evaluate: an evaluation needs a teacher; give stages.evaluate.teacher (a train stage), or "
        "the spec's teacher",
    ),
    "nothing to go on with": (
        ["digits", "--resume"],
        "there is no run 'digits' in runs to resume; start it without --resume",
    ),
    "neither new nor old": (
        ["digits", "--resume", "--dry-run"],
        "--dry-run describes a new run and cannot be combined with --resume; remove --resume",
    ),
    "taken": (
        ["digits", "--budget", "1", "--name", "one"],
        "there is a run 'one' in {store} already; resume it with --resume, or start another with --name OTHER",
    ),
    "no comparison": (
        ["one", "--resume"],
        "run 'one' is not a comparison; resume it with: distill run runs/one --resume",
    ),
    "a budget for a run": (
        ["two", "--resume", "--budget", "1"],
        "--budget has no effect when run 'two' is resumed; leave it out",
    ),
    "recipes for a run": (
        ["two", "--resume", "--recipes", "reflow"],
        "--recipes has no effect when run 'two' is resumed; leave it out",
    ),
    "another budget": (
        ["digits", "--resume", "--budget", "2", "--name", "two"],
        "--budget 2: run 'two' was started with 1.5 minutes for each recipe; leave the option out, or start another "
        "run with --name OTHER",
    ),
    "other recipes": (
        ["digits", "--resume", "--recipes", "one_step", "--name", "two"],
        "run 'two' compares reflow, not one_step; name the same recipes, or start another run with --name OTHER",
    ),
    "another spec": (
        ["digits", "--resume", "--recipes", "reflow", "--name", "two", "seed=5"],
        "run 'two' cannot be resumed with a changed spec (only launch and data.max_unreadable may change):\n"
        "  seed: 0 -> 5\nstart another run with --name OTHER, or undo the change",
    ),
    "another chain": (
        ["./two.yaml", "--resume", "--recipes", "reflow", "--name", "two"],
        "run 'two' cannot be resumed with a changed spec: the stages of 'reflow' are reflow in the run, but before, "
        "reflow in the spec; undo the change, or start another run with --name OTHER",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_commands_that_are_refused(capfd, tmp_path, case):
    make_run(tmp_path / "runs", "one")
    plan, base = planned("digits", "reflow")
    found, record = budget.frozen(plan, alike(plan), 1.5, "distill compare digits")
    two = make_run(tmp_path / "runs", "two")
    two.spec.write_text(specfile.resolved(found.model_copy(update={"name": "two"})))
    two.comparison.write_text(record.model_dump_json())
    (tmp_path / "mine.yaml").write_text(
        "{name: mine, data: {kind: digits}, stages: {evaluate: {kind: evaluate, students: {}}}}"
    )
    stages = plan.given.stages
    longer = {**stages, "before": stages["reflow"], "reflow": stages["reflow"].model_copy(update={"init": "before"})}
    order = ["teach", "pairs", "before", "reflow"]
    longer = {name: longer[name] for name in [*order, "evaluate"]}
    longer["evaluate"] = longer["evaluate"].model_copy(update={"students": {}})
    (tmp_path / "two.yaml").write_text(specfile.resolved(plan.given.model_copy(update={"stages": longer})))
    arguments, said = REFUSED[case]
    before = snapshot(tmp_path)
    done = command(capfd, "compare", *arguments)
    assert done.err == f"error: {said.format(store=tmp_path / 'runs')}\n"
    assert (done.code, done.out) == (2, "")
    assert snapshot(tmp_path) == before


# --- what is found ---


def entry(name, recipe, images, calls=0.0, pair_calls=0.0, *before):
    parts = [
        TrainedPart(stage=f"{name}-{i}", recipe=each, images=images, measured=timed()) for i, each in enumerate(before)
    ]
    last = TrainedPart(stage=name, recipe=recipe, images=images, measured=timed(memory=2_500_000, teacher_calls=calls))
    return ComparedRecipe(name=name, recipe=recipe, parts=[*parts, last], pair_calls=pair_calls)


RECORD = Comparison(
    command="distill compare digits --budget 2",
    budget_minutes=2,
    evaluation="evaluate",
    entries=[
        entry("reflow", "reflow/reflow", 128_000, 0.0, 168_000),
        entry("slim", "reflow/slimflow", 64_000, 1.5, 0.0, "reflow/reflow"),
        entry("perflow", "reflow/perflow", 6_400, 8.0),
    ],
)


def results(distance="FD-digits"):
    def each(*args, **changes):
        network, role, solver, steps, value = args
        return measured_row(
            network, role, solver, steps, steps, value if distance else None, rms=value / 1000,
            picture=f"pictures/{network}-{steps}.png", **changes,
        )  # fmt: skip

    flow_map = {"straightness": None}
    return Results(
        stage="evaluate", samples=100, seed=1, block=50, device="cpu", guidance_scale=1.0, features=None,
        distance=distance, reference=0, vector=False,
        rows=[
            each("teacher", "teacher", "euler", 1, 1000.0),
            each("teacher", "teacher", "euler", 8, 10.0),
            each("teacher", "teacher", "heun", 16, 5.0 if distance else 0.0, fine=True),
            each("reflow", "student", "euler", 2, 20.0),
            each("reflow", "student", "euler", 1, 40.0),
            each("slim", "student", "euler", 1, 10.0, **flow_map),
            each("perflow", "student", "euler", 4, 8.0),
            each("perflow", "student", "euler", 8, 4.0),
        ],
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunPaths:
    paths = RunPaths(tmp_path / "compared")
    paths.root.mkdir()
    paths.comparison.write_text(RECORD.model_dump_json())
    env = {"cpu": "A CPU", "cpus": 8, "threads": 4, "packages": {"Torch": "2.9"}, "distill": "0.3",
           "git": {"commit": "0123456789abcdef"}}  # fmt: skip
    write_json(paths.env, env)
    progress = {"unit": "images", "total": 128_000, "logs": {}}
    for stage, done, rate in (("reflow", 128_000, 1000), ("slim-0", 64_000, 1000), ("slim", 64_000, 2000)):
        append_event(paths, "stage started", stage=stage, kind="train", device="AVX512")
        append_event(paths, "progress", label=stage, done=done, per_second=rate, **progress)
    evaluated = {"time": 86400 * 365.25 * 30, "event": "progress", "label": "evaluate", "done": 1, "per_second": 1}
    with paths.old_events.open("a") as file:
        file.write(json.dumps({**evaluated, **progress, "unit": "samples"}) + "\n")
    folder = paths.stage("evaluate").root
    (folder / "pictures").mkdir(parents=True)
    write_json(folder / FILE_NAME, results().model_dump(mode="json"))
    return paths


EXPECTED = [
    ("teacher, euler", ["-", "1,000", "-", "-", "10.00", "-", "-", "0.5000", "-", "-", "-"]),
    ("teacher, heun", ["-", "-", "-", "-", "-", "5.00", "-", "0.5000", "-", "-", "-"]),
    ("reflow", ["128,000", "40.00", "20.00", "-", "-", "-", "1,000 euler", "0.1000", "2:08", "2.5 MB", "168,000"]),
    (
        "slim (reflow, slimflow)",
        ["128,000", "10.00", "-", "-", "-", "-", "1,000 euler", "-", "1:36", "2.5 MB", "96,000"],
    ),
    ("perflow", ["6,400", "-", "-", "8.00", "4.00", "-", "1,000 euler", "0.1000", "-", "2.5 MB", "51,200"]),
]
COLUMNS = [
    "images", "FD-digits@1", "@2", "@4", "@8", "@16", "best baseline", "S", "training", "memory", "teacher calls"
]  # fmt: skip


def test_the_table_says_each_number(run):
    found = comparison_table.found(run)
    assert comparison_table.columns(found) == COLUMNS
    assert comparison_table.rows(found) == EXPECTED
    console = Console(width=200)
    with console.capture() as shown:
        console.print(comparison_table.table(found))
    for name, cells in EXPECTED:
        (line,) = [each for each in shown.get().splitlines() if each.strip("│ ").startswith(f"{name} ")]
        assert [cell.strip() for cell in line.strip("│").split("│")] == [name, *cells]


def test_rows_along_other_times_are_not_compared(run):
    usual = results()
    along = [
        measured_row("teacher", "teacher", "euler", 8, 8, 9.0, along="optimal"),
        measured_row("teacher", "teacher", "euler", 3, 3, 9.0, along="1, 0.6, 0.2, 0"),
        measured_row("reflow", "student", "euler", 1, 1, 30.0, along="optimal"),
        measured_row("reflow", "student", "euler", 3, 3, 9.0, along="1, 0.6, 0.2, 0"),
    ]
    more = usual.model_copy(update={"rows": [*usual.rows, *along]})
    write_json(run.stage("evaluate").root / FILE_NAME, more.model_dump(mode="json"))
    found = comparison_table.found(run)
    *same, (name, cells) = EXPECTED
    better = [cell.replace("1,000 euler", "9.00 euler") for cell in cells]  # a baseline may have other times
    assert (comparison_table.columns(found), comparison_table.rows(found)) == (COLUMNS, [*same, (name, better)])
    assert comparison_table.ranked(found)["reflow"] == [(1, 40.0), (2, 20.0)]
    assert comparison_table.teacher(found) == [("1", 1000.0), ("8", 10.0), ("heun 16", 5.0)]


def test_the_page_is_a_table_of_github(run):
    report_page.write(run)
    lines = run.comparison_table.read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["recipe", *COLUMNS]
    assert table[1] == ["---", *["---:"] * 11]
    assert table[2:] == [[name, *cells] for name, cells in EXPECTED]
    versions = "torch 2.9, distill 0.3, commit 0123456789ab"
    assert lines[-1] == f"`distill compare digits --budget 2`; 4 of 8 cores of A CPU, {versions}; 2000-01-01"
    assert "with a budget of 2 minutes each" in lines[-3]


def test_what_a_comparison_names_is_text_on_its_page(run):
    evil = "<img src=x onerror=alert(1)> | [x](https://evil.example)"
    content = json.loads(run.comparison.read_text())
    content["command"] = f"`{evil}"
    for part in content["entries"][-1]["parts"]:
        part["recipe"] = f"{evil}.py"
    run.comparison.write_text(json.dumps(content))
    write_json(run.env, {"cpu": evil, "cpus": 8, "threads": 4, "packages": {"Torch": evil}})
    report_page.write(run)
    page = run.comparison_table.read_text()
    assert "<" not in page and "alert" in page
    assert not re.search(r"(?<!\\)[\[\]`]", page) and "https://evil" not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)[|]", line)) for line in rows}) == 1
    for broken in ("two\nlines", "\x1b[2J"):
        run.comparison.write_text(json.dumps(content | {"command": broken}))
        with pytest.raises(InputError, match="command: .* given; must be one line of text without control characters"):
            comparison_table.load(run)


def test_a_gpu_is_named_and_not_the_cpu_beside_it(run):
    append_event(run, "stage started", stage="evaluate", kind="evaluate", device="NVIDIA H100")
    content = results().model_copy(update={"device": "cuda"}).model_dump(mode="json")
    write_json(run.stage("evaluate").root / FILE_NAME, content)
    assert comparison_table.found(run).machine == "NVIDIA H100, torch 2.9, distill 0.3, commit 0123456789ab"


def test_without_a_distance_the_rms_is_compared(run):
    write_json(run.stage("evaluate").root / FILE_NAME, results(None).model_dump(mode="json"))
    found = comparison_table.found(run)
    assert comparison_table.columns(found)[1] == "RMS@1"
    assert dict(comparison_table.rows(found))["reflow"][1:3] == ["0.0400", "0.0200"]
    assert comparison_table.teacher(found) == [("1", 1.0), ("8", 0.01)], "of 0 there is no logarithm"
    report_page.write(run)


def test_the_best_at_its_fewest_steps_is_first(run):
    found = comparison_table.found(run)
    assert list(comparison_table.ranked(found).items()) == [
        ("perflow", [(4, 8.0), (8, 4.0)]),
        ("slim (reflow, slimflow)", [(1, 10.0)]),
        ("reflow", [(1, 40.0), (2, 20.0)]),
    ]
    assert comparison_table.teacher(found) == [("1", 1000.0), ("8", 10.0), ("heun 16", 5.0)]


def test_the_figure_has_each_number_at_its_place(run):
    found = comparison_table.found(run)
    lines = comparison_table.ranked(found)
    drawn = charts.ranks(lines, comparison_table.teacher(found), "FD-digits")
    assert drawn == charts.ranks(lines, comparison_table.teacher(found), "FD-digits")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    names = [text for text in texts if text in lines]
    assert names == [*lines]
    assert {"1", "8", "heun 16", "FD-digits", "steps"} <= set(texts)
    groups = re.findall(r'<g id="PathCollection_\d+">(.*?)</g>\s*</g>', drawn, re.DOTALL)
    dots = [[tuple(map(float, at)) for at in re.findall(r'<use[^>]* x="([\d.]+)" y="([\d.]+)"', g)] for g in groups]
    values = [[(v, name) for name, points in lines.items() for n, v in points if n == steps] for steps in (1, 2, 4, 8)]
    of_points = dots[: len(values)]  # a collection for each number of steps, then those of the legend
    placed = [(math.log(v), x, y, name) for row, at in zip(values, of_points, strict=True) for (v, name), (x, y) in
              zip(row, at, strict=True)]  # fmt: skip
    assert len(placed) == 5
    (a, x_a, *_), (b, x_b, *_) = min(placed), max(placed)
    for value, x, _, _ in placed:
        assert x == pytest.approx(x_a + (value - a) / (b - a) * (x_b - x_a), abs=0.01)
    heights = {name: y for _, _, y, name in placed}
    assert sorted(heights, key=lambda name: heights[name]) == [*lines], "the best on top"


def test_the_report_has_a_section_of_it(run):
    for row in results().rows:
        (run.stage("evaluate").root / row.picture).write_bytes(images_png(torch.zeros(1, 1, 8, 8), 1))
    page = Page(report_page.write(run).read_text())
    assert page.open == []
    assert "Comparison" in page.text
    for name, cells in EXPECTED:
        assert " ".join([name, *cells]) in page.text
    assert run.comparison_figure.read_text().startswith("<svg")
    assert "comparison.md" in page.text


def test_there_is_none_before_the_evaluation(run):
    (run.stage("evaluate").root / FILE_NAME).unlink()
    assert comparison_table.found(run) is None
    assert "Comparison" not in Page(report_page.write(run).read_text()).text
    assert not run.comparison_table.exists()


def test_time_that_a_kill_undid_does_not_count():
    def seconds(events, stage):
        sessions = comparison_table.Sessions()
        for event in events:
            sessions.add(event)
        return sessions.seconds(stage)

    def at(done, rate):
        return {"event": "progress", "label": "a", "done": done, "per_second": rate}

    def started(stage="a"):
        return {"event": "stage started", "stage": stage}

    whole = [started(), at(500, 90.0), at(1000, 100.0)]
    assert seconds(whole, "a") == 10
    assert seconds(whole, "b") == 0
    resumed = {"event": "resumed", "stage": "a", "images": 400}
    killed = [started(), at(600, 100.0), started(), resumed, at(1000, 50.0)]
    assert seconds(killed, "a") == 400 / 100 + 600 / 50
    twice = [started(), at(600, 100.0), started(), resumed, at(500, 50.0), started(), at(1000, 200.0)]
    assert seconds(twice, "a") == 1000 / 200, "begun anew, without a checkpoint"
    assert seconds([*killed[:3], started("b"), resumed], "a") == 400 / 100
