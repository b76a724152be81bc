"""Every recipe there is, through everything that is asked of one. What is particular to a recipe, the ring's trainings
and its closed-form checks, is declared as SUBJECTS in the test file of its folder.
"""

import importlib
import subprocess
from pathlib import Path

import pytest
import torch

from distill import registry, testing

HERE = Path(__file__).parent
DECLARING = sorted(path.stem for path in HERE.glob("test_recipes_*.py"))
DECLARED = {each.recipe: each for module in DECLARING for each in importlib.import_module(module).SUBJECTS}
SUBJECTS = {name: DECLARED.get(name, testing.Subject(name)) for name in registry.names()}


def changed():
    """The recipes whose file differs from the commit before; all, where that cannot be said."""
    git = ["git", "-C", str(HERE.parent), "diff", "--name-only", "HEAD~1", "--", "recipes"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    names = {line.removeprefix("recipes/").removesuffix(".py") for line in done.stdout.split()}
    return names if done.returncode == 0 else set(SUBJECTS)


def some():
    """One recipe of each folder and the changed ones run in `make test`; all others in `make test-all`."""
    first = {name.split("/")[0]: name for name in sorted(SUBJECTS, reverse=True)}
    now = changed() | set(first.values())
    return [name if name in now else pytest.param(name, marks=pytest.mark.long) for name in SUBJECTS]


@pytest.fixture(autouse=True)
def one_thread():
    """Small networks: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_recipe(name, check, tmp_path):
    check(SUBJECTS[name], tmp_path)


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Of the recipes that are tested now, what one pair of processes finds."""
    items = [item for item in request.session.items if item.originalname == "test_two_processes_agree_with_one"]
    wanted = [SUBJECTS[item.callspec.params["name"]] for item in items]
    return testing.train_together(wanted, tmp_path_factory.mktemp("pair"))


@pytest.mark.process
@pytest.mark.parametrize("name", some())
def test_two_processes_agree_with_one(name, pair, tmp_path):
    testing.agrees(SUBJECTS[name], tmp_path, pair)


@pytest.mark.train
@pytest.mark.parametrize("name", some())
def test_a_short_training_beats_the_teacher_on_the_ring(name, tmp_path):
    subject = SUBJECTS[name]
    found = testing.recovers(subject, subject.short, tmp_path)
    print(name, found)
    for steps, distance in found["student"].items():
        assert distance < found["teacher"][steps]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_long_training_recovers_the_ring(name, tmp_path):
    subject = SUBJECTS[name]
    found = testing.recovers(subject, subject.long, tmp_path)
    print(name, found)
    worst = found["teacher"][1] if 1 in found["teacher"] else max(found["teacher"].values())
    for distance in found["student"].values():
        assert distance <= 0.15 * worst
