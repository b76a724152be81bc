"""Imports of commands: those that compute nothing do not import torch, and the base wheel needs few packages."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from flaky import Flaky
from programs import planes
from students import make, put

from distill.runs.run_store import CREATED, create_run, event_line
from distill.spec import presets, specfile

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "numpy", "diffusers", "datasets", "scipy", "sklearn", "transformers", "accelerate", "peft", "recipes"}


def make_run(store):
    spec = specfile.load(presets.find("digits"), name="one").spec
    created = event_line("created", stages={name: stage.kind for name, stage in spec.stages.items()})
    files = {"spec.yaml": specfile.resolved(spec), CREATED: created, "logs/rank-0.log": "a line\n"}
    return create_run(store, "one", files)


COMMANDS = [
    "--help",
    "--version",
    "run --help",
    "reflow --help",
    "compare --help",
    "list",
    "list --json",
    "show one",
    "show one --json",
    "clean one --checkpoints",
    "clean one --pairs",
    "init",
    "init digits",
    "recipes",
    "status",
    "status one --json",
    "logs one",
    "submit --help",
    "cancel one",
    "doctor --site --help",
    "config",
    "config store runs",
    "students",
    "pull student copy",
    "pull published:v1",
    "verify student",
    "publish one --help",
]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """Exit code and imported modules of each command, each in a folder of its own; all forked from one process."""
    place = tmp_path_factory.mktemp("looked")
    commands = []
    for number, command in enumerate(COMMANDS):
        folder = place / f"in-{number}"
        make_run(folder / "runs")
        put(make(folder / "student"), folder / "runs", "published")
        commands.append((str(folder), command.split()))
    done = subprocess.run(
        [sys.executable, planes.__file__, place],
        input=json.dumps(commands),
        env={**os.environ, "XDG_CONFIG_HOME": str(place / "config")},
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        command: (code, set(modules), (place / f"{number}.err").read_text())
        for number, (command, (code, modules)) in enumerate(zip(COMMANDS, json.loads(done.stdout), strict=True))
    }


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_look_leave_torch_out(looked, command):
    code, modules, said = looked[command]
    assert code == 0, said
    assert not modules & HEAVY


@pytest.mark.process
def test_a_command_starts_with_few_modules(looked):
    """What a start costs is what it imports: 0.3 s for these. torch alone has 1,300 modules."""
    for command in ("--help", "list", "show one"):
        modules = looked[command][1]
        print(f"distill {command}: {len(modules)} modules")
        assert len(modules) < 600, command


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of the sources, so that nothing is left behind in them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("distill", "recipes", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.process
def test_the_wheel_holds_what_it_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in [("distill", "*.py"), ("recipes", "*.py"), ("recipes/presets", "*.yaml"), ("slurm", "*")]:
        for path in (ROOT / folder).rglob(pattern):
            assert str(path.relative_to(ROOT)) in names
    templates = [path for path in (ROOT / "distill" / "templates").iterdir() if path.is_file()]
    assert templates
    for path in templates:
        assert str(path.relative_to(ROOT)) in names
    assert not [name for name in names if name.startswith("tests")]


def closure(names):
    """Installed distributions that `names` need, themselves included."""
    from packaging.requirements import Requirement

    found, todo = {}, list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except ModuleNotFoundError:
            continue  # needed on other systems only
        for text in requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@pytest.mark.process
@pytest.mark.long
def test_the_bare_wheel_is_the_control_plane(wheel, tmp_path):
    """Installed with the base's own needs and nothing else, from an empty folder, without the sources at hand."""
    from packaging.requirements import Requirement

    place = tmp_path / "venv"
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    (metadata,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("dist-info/METADATA")]
    said = message_from_bytes(zipfile.ZipFile(wheel).read(metadata))
    base = [Requirement(text) for text in said.get_all("Requires-Dist")]
    needs = closure([r.name for r in base if r.marker is None or r.marker.evaluate({"extra": ""})])
    assert "torch" not in needs and "numpy" not in needs, "the base install needs no tensors"
    for package in needs.values():
        for file in package.files or []:
            top = file.parts[0]
            source = Path(package.locate_file(top))
            if top not in ("..", "__pycache__") and not (site / top).exists() and source.exists():
                (site / top).symlink_to(source)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DISTILL_STORE")}
    env |= {"XDG_CONFIG_HOME": str(tmp_path), "COLUMNS": "200"}

    def bare(*arguments, code=0):
        script = place / "bin" / "distill"
        done = subprocess.run([script, *arguments], cwd=empty, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        return done

    where = subprocess.run(
        [python, "-I", "-c", "import distill, recipes; print(distill.__file__, recipes.__file__)"],
        cwd=empty, env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.count(str(site)) == 2, "the installed copy, not the sources"
    bare("--help")
    assert bare("list").stdout == "no runs in runs; start one with: distill run digits\n"
    bare("init", "digits", "--out", "d.yaml")
    assert (empty / "d.yaml").is_file()
    assert {each["name"] for each in json.loads(bare("recipes", "--json").stdout)} >= {"reflow/reflow"}
    make_run(empty / "runs")
    assert json.loads(bare("show", "one", "--json").stdout)["state"] == "new"
    assert bare("run", "--help").returncode == 0
    put(make(tmp_path / "student"), empty / "runs", "small")
    assert json.loads(bare("students", "--json").stdout)[0]["name"] == "small"
    assert bare("pull", "small").stdout.startswith("pulled small: ")
    with Flaky(empty) as server:
        assert bare("pull", f"{server.url}/small", "again").stdout.startswith("pulled again: ")
    assert bare("verify", "again").returncode == 0
    said = bare("publish", "again", "same").stderr
    assert (
        "the model card has no picture of samples: no evaluation has drawn samples, and torch is not installed\n"
        in said
    )
    shutil.rmtree(empty / "runs" / "registry")
    said = bare("run", "digits", code=2).stderr
    assert "needs the package torch; distill's own recipes need: pip install 'distill[train]'" in said
    said = bare("doctor", code=1).stdout
    assert "pip install 'distill[train]'" in said
    said = bare("doctor", "--data", "digits", code=1)
    assert "not measured: the package" in said.stdout and said.stderr == ""
    assert sorted(path.name for path in (empty / "runs").iterdir()) == ["one"], "nothing was begun"
