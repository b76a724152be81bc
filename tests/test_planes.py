"""Imports and start time of commands: commands that compute nothing start fast without torch, and need few packages."""

import json
import os
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from flaky import Flaky
from students import make, put

from distill.runs.run_store import CREATED, create_run, event_line
from distill.spec import presets, specfile

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "numpy", "diffusers", "datasets", "scipy", "sklearn", "transformers", "accelerate", "recipes"]
PROBE = """
import sys
from distill.cli.main import main
code = main(sys.argv[1:])
print(code, *[name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def make_run(store):
    spec = specfile.load(presets.find("digits"), name="one").spec
    created = event_line("created", stages={name: stage.kind for name, stage in spec.stages.items()})
    files = {"spec.yaml": specfile.resolved(spec), CREATED: created, "logs/rank-0.log": "a line\n"}
    return create_run(store, "one", files)


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["reflow", "--help"],
        ["compare", "--help"],
        ["list"],
        ["list", "--json"],
        ["show", "one"],
        ["show", "one", "--json"],
        ["clean", "one", "--checkpoints"],
        ["clean", "one", "--pairs"],
        ["init"],
        ["init", "digits"],
        ["recipes"],
        ["status"],
        ["status", "one", "--json"],
        ["logs", "one"],
        ["submit", "--help"],
        ["cancel", "one"],
        ["doctor", "--site", "--help"],
        ["config"],
        ["config", "store", "runs"],
        ["students"],
        ["pull", "student", "copy"],
        ["pull", "published:v1"],
        ["verify", "student"],
        ["publish", "one", "--help"],
    ],
    ids=" ".join,
)
def test_commands_that_look_leave_torch_out(tmp_path, arguments):
    make_run(tmp_path / "runs")
    put(make(tmp_path / "student"), tmp_path / "runs", "published")
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments],
        cwd=tmp_path,
        env={**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.splitlines()[-1].split() == ["0"], f"{' '.join(arguments)} imports {done.stderr.split()[1:]}"


@pytest.mark.process
def test_commands_that_look_start_quickly(tmp_path):
    """As a ratio to the interpreter alone, which is what this machine's load allows; the goal is 0.5 s when idle."""
    make_run(tmp_path / "runs")

    def seconds(*arguments):
        best = float("inf")
        for _ in range(5):
            before = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, check=True)
            best = min(best, time.perf_counter() - before)
        return best

    bare = seconds("-c", "pass")
    for arguments in (["--help"], ["list"], ["show", "one"]):
        took = seconds("-m", "distill", *arguments)
        print(f"distill {' '.join(arguments)}: {took:.2f} s, {took / bare:.0f} times `python -c pass`")
        assert took < max(0.5, 40 * bare), arguments


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
    assert bare("list").stdout == "no runs in runs; make the first: distill run digits\n"
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
    assert "without a picture of samples: no evaluation has drawn one, and torch is not installed\n" in said
    shutil.rmtree(empty / "runs" / "registry")
    said = bare("run", "digits", code=2).stderr
    assert "needs the package torch; pip install 'distill[train]'" in said
    said = bare("doctor", code=1).stdout
    assert "pip install 'distill[train]'" in said
    assert sorted(path.name for path in (empty / "runs").iterdir()) == ["one"], "nothing was begun"
