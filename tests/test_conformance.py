"""Runs all conformance checks on every recipe. What is specific to a recipe, such as its trainings on the ring and its
closed-form checks, is declared as SUBJECTS in the test file of its folder.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from choices import few

from distill import testing
from distill.spec import registry

HERE = Path(__file__).parent
DECLARING = sorted(path.stem for path in HERE.glob("test_recipes_*.py"))
ALL_DECLARED = [each for module in DECLARING for each in importlib.import_module(module).SUBJECTS]
DECLARED = {each.recipe: each for each in ALL_DECLARED}
assert len(DECLARED) == len(ALL_DECLARED), "a recipe is declared twice"
ALL = {name: DECLARED.get(name, testing.Subject(name)) for name in registry.names()}
EACH = [pytest.param(name, marks=pytest.mark.costs(f"recipe {name}")) for name in ALL]


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


AGAIN = [check for check in testing.CHECKS if check.__name__ != "is_right"]


@pytest.mark.parametrize("check", AGAIN, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EACH)
def test_recipe(name, check, tmp_path):
    check(ALL[name], tmp_path)


@pytest.mark.parametrize("name", EACH)
def test_closed_form_checks_are_declared_and_are_tests(name):
    """So they run, but for `is_right` not twice."""
    assert ALL[name].closed_form
    for check in ALL[name].closed_form:
        called = [check.__name__, *check.__code__.co_names]
        assert any(each.startswith("test_") for each in called), f"pytest collects none of {called}"


OTHER_OPTIONS = [
    ("reflow/reflow", {"data_weight": 0.1, "time_law": "logit_normal", "distance": "pseudo_huber"}),
    ("reflow/rf_plus_plus", {"sampler": "same_noise"}),
    ("reflow/simple_reflow", {"project_block": 4, "sharpness": None, "high_pass_weight": 0.0}),
    ("pretrain/flow_matching", {"coupling": "ot_replacement", "coupling_block": 4, "within_classes": True}),
    ("pretrain/flow_matching", {"coupling": "immiscible_knn"}),
    ("pretrain/flow_matching", {"coupling": "weighted", "coupling_block": 2, "cost": "distance"}),
    ("consistency/consistency", {"times": "continuous", "halving_images": 4, "target_decay": 0.9}),
    ("consistency/consistency", {"point": "data", "distance": "l2"}),
    ("consistency/scm", {"derivative": "central", "h": 0.1, "tangent": "linear", "log_variance": "with_prior"}),
    ("consistency/scm", {"velocity": "data", "tangent": "clipped", "anchor": 1.0}),
    ("consistency/tcm", {"point": "data", "closeness": 0.1}),
    ("consistency/tcm", {"point": "heun", "guidance_scale": 2.0, "truncation": 0.3, "closeness": 0.1}),
    ("reflow/consistency_fm", {"target": "teacher", "segments": 4, "delta": 0.05, "guidance_scale": 2.0}),
    ("reflow/consistency_fm", {"boundary": 0.9, "delta": 0.1, "velocity_weight": 1.0}),
    ("shortcut/flow_map", {"law": "eulerian", "guidance_scale": 2.0, "normalise": True}),
    ("shortcut/flow_map", {"velocity": "self", "gradient": "full", "target_decay": 0.99}),
    ("shortcut/flow_map", {"law": "progressive", "velocity": "self", "middle": "uniform"}),
    ("shortcut/pdd", {"states": "data", "solver": "euler", "shift": 3.0, "guidance_scale": 2.0}),
    ("shortcut/pi_flow", {"policy": "data", "components": 3, "asked": 1, "guidance_scale": 2.0}),
    ("shortcut/progressive", {"weight": "plus_one", "distance": "l1", "guidance_scale": 2.0}),
    ("shortcut/shortcut", {"base": "two_steps", "grid": 4, "target_decay": None}),
    ("shortcut/shortcut", {"base": "step", "bootstrap": 0.75}),
    ("shortcut/shortcut", {"base": "data"}),
    ("shortcut/meanflow", {"derivative": "central", "h": 0.1, "time_law": "uniform", "to_data": 0.5, "power": 0.5}),
    ("shortcut/meanflow", {"velocity": "data", "tangent": "predicted"}),
    ("shortcut/meanflow", {"velocity": "pairs"}),
    ("shortcut/meanflow", {"velocity": "data", "omega": 0.5, "kappa": 0.5, "label_dropout": 0.25}),
    ("consistency/scm", {"velocity": "pairs"}),
    ("shortcut/alphaflow", {"velocity": "data", "window_end": 0.1, "derivative": "central", "h": 0.1, "clip": 1.0}),
    ("shortcut/alphaflow", {"velocity": "pairs", "window_start": 0.5}),
    ("shortcut/soflow", {"velocity": "data", "to_data": 0.5, "first_step": 1.0, "power": 0.5}),
    ("shortcut/soflow", {"velocity": "pairs", "diagonal": 0.5}),
    ("reflow/perflow", {"windows": 1, "parameterisation": "diff_eps", "label_dropout": 0.5, "guidance_sync": True}),
    ("reflow/rectified_diffusion", {"form": "phased", "phases": 1, "times": "grid"}),
    ("score/dmd2", {"gan_weight": 0.0}),
    ("score/dmd2", {"steps": 4, "weight": "kl", "ratio": 2}),
    ("reflow/slimflow", {"phase": "anneal", "anneal_images": 4, "flip": True}),
]


def other(name, options):
    """One step or several, in each segment where there are some; those of recipes that train for one number."""
    few = options.get("segments", 2) if name == "reflow/consistency_fm" else 1
    is_for_one = name in ("shortcut/progressive", "shortcut/pi_flow")
    return testing.Subject(name, options, steps=(1,) if is_for_one else (few, 2 * few, 4 * few))


OTHERS = [other(name, options) for name, options in OTHER_OPTIONS]


@pytest.mark.long
@pytest.mark.parametrize("check", ["learns", "draws_only_what_it_is_given", "splits", "resumes", "travels"])
@pytest.mark.parametrize("subject", OTHERS, ids=lambda subject: subject.recipe)
def test_recipe_with_other_options(subject, check, tmp_path):
    next(each for each in testing.CHECKS if each.__name__ == check)(subject, tmp_path)


def test_a_critic_without_discriminator_trains(tmp_path):
    """Its head waits: a preset that ships asks for it."""
    next(each for each in testing.CHECKS if each.__name__ == "learns")(
        testing.Subject("score/dmd2", {"gan_weight": 0.0, "ratio": 1}), tmp_path
    )


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Of the recipes that are tested now, what one pair of processes finds."""
    items = [item for item in request.session.items if item.originalname == "test_two_processes_agree_with_one"]
    wanted = [ALL[item.callspec.params["name"]] for item in items]
    return testing.train_together(wanted, tmp_path_factory.mktemp("pair"))


@pytest.mark.process
@pytest.mark.parametrize("name", few(ALL, "score/dmd2"))
def test_two_processes_agree_with_one(name, pair):
    testing.agrees(ALL[name], pair)


@pytest.mark.long
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_processes_that_divide_their_networks_agree_with_one(zero_stage, tmp_path):
    """Forward-mode derivatives stop at stage 2: what gathers weights has none."""
    subjects = [each for each in ALL.values() if zero_stage < 3 or "jvp" not in each.config().needs]
    assert len(subjects) >= len(ALL) - 1
    numbers = testing.train_together(subjects, tmp_path / "pair", zero_stage=zero_stage)
    for subject in subjects:
        testing.agrees(subject, numbers)


@pytest.mark.train
@pytest.mark.parametrize("name", few(ALL))
def test_a_short_training_beats_the_teacher_on_the_ring(name, tmp_path):
    subject = ALL[name]
    found = testing.recovers(subject, subject.short, tmp_path)
    print(name, found)
    for steps, distance in found["student"].items():
        assert distance < found["teacher"][steps]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_a_long_training_recovers_the_ring(name, tmp_path):
    subject = ALL[name]
    found = testing.recovers(subject, subject.long, tmp_path)
    print(name, found)
    worst = found["teacher"][1] if 1 in found["teacher"] else max(found["teacher"].values())
    for distance in found["student"].values():
        assert distance <= 0.15 * worst


@pytest.mark.long
@pytest.mark.process
def test_somebody_elses_package_is_installed_and_conforms(tmp_path):
    shutil.copytree(HERE / "outside", tmp_path / "source")
    site, python = tmp_path / "site", [sys.executable, "-m"]
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*python, *install, str(tmp_path / "source")], check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}

    def run(*command):
        return subprocess.run(
            [*python, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300
        )

    done = run("pytest", "-q", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "source" / "checks.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(testing.CHECKS) + 1} passed" in done.stdout
    assert "outside/velocity" in run("distill", "recipes").stdout


# What each check is for: a recipe that is wrong in one way, and what is said of it.
WRONG = {
    "builds": ('frozenset({"teacher", "pairs"})', 'frozenset({"images"})', "needs"),
    "is_right": ("", "", "has no closed-form check"),
    "learns": (
        "student(x_t, t, cond)",
        "0 * student(x_t, t, cond)",
        "gradients are zero for",
    ),
    "draws_only_what_it_is_given": ('ctx.draw.uniform("t", data)', "__import__('torch').rand(len(data))", "ctx.draw"),
    "splits": (", v).mean()", ", v).mean().sqrt()", "sample by sample"),
    "resumes": ("Loss(on_pairs)", 'Loss(on_pairs * vars(self).setdefault("seen", ctx.step + 1))', "after a resume"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name, tmp_path):
    old, new, message = WRONG[name]
    text = (HERE.parent / "recipes" / "reflow" / "reflow.py").read_text()
    assert old in text
    (tmp_path / "wrong.py").write_text(text.replace(old, new))
    check = next(each for each in testing.CHECKS if each.__name__ == name)
    with pytest.raises(AssertionError, match=message):
        check(testing.Subject("./wrong.py", base=tmp_path), tmp_path)


def test_weights_that_the_recipe_freezes_are_not_looked_for(tmp_path):
    text = (HERE.parent / "recipes" / "reflow" / "reflow.py").read_text()
    old = 'return {"student": Trained(init.velocity_field())}'
    new = "student = init.velocity_field()\n        next(student.parameters()).requires_grad_(False)\n        "
    assert old in text
    (tmp_path / "frozen.py").write_text(text.replace(old, new + 'return {"student": Trained(student)}'))
    learns = next(each for each in testing.CHECKS if each.__name__ == "learns")
    learns(testing.Subject("./frozen.py", base=tmp_path), tmp_path)
