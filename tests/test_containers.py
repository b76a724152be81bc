"""The container files, read as text. `make container-test` builds an image from them."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "containers"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VARIANTS = ["cpu", "cuda"]


def instructions():
    """The Dockerfile's instructions in order, as (name, rest); continued lines are kept as they stand."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.MULTILINE)
    return re.findall(r"^([A-Z]+) ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)


def stages():
    """The Dockerfile's stages: of each its FROM and what follows; first what stands before any."""
    found = [[]]
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def last(name):
    return [rest for each, rest in stages()[-1] if each == name][-1]


def arguments():
    """The Dockerfile's build arguments and their defaults."""
    pairs = (rest.partition("=") for name, rest in instructions() if name == "ARG" and "=" in rest)
    return {name: default.strip('"') for name, _, default in pairs}


def install_lines():
    (run,) = [rest for name, rest in instructions() if name == "RUN" and "install " in rest and "/venv" in rest]
    return [line.strip() for line in run.splitlines()]


def definition():
    """Header and sections of distill.def."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "distill.def").read_text(), flags=re.MULTILINE)
    header, *parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(parts) == 2 * len(sections), "a section stands twice"
    lines = {name: [line.strip() for line in body.splitlines() if line.strip()] for name, body in sections.items()}
    return dict(line.split(": ") for line in header.split("\n") if line), lines


def pins_of(path):
    """A lock's packages and versions; every line must pin one, and say nothing else."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line), f"{path.name}: {line}"
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def lock(variant):
    return pins_of(FOLDER / f"requirements-{variant}.lock")


def assert_pins(pins, asked, name):
    """What is asked for, such as "torch>=2.13", is pinned to a version that it allows."""
    for requirement in map(Requirement, asked):
        package = canonicalize_name(requirement.name)
        if package != "distill":
            assert package in pins, f"{name} lacks {package}; run: make lock"
            assert requirement.specifier.contains(pins[package]), f"{name}: {package}=={pins[package]}, {requirement}"


# --- the Dockerfile ---


def test_a_variant_is_a_stage_over_the_base_and_a_lock():
    before, cpu, cuda, final = stages()
    assert before == [("ARG", "VARIANT=cuda"), ("ARG", "BASE=debian:bookworm-slim")]
    assert cpu == [("FROM", "${BASE} AS cpu")]
    assert cuda == [
        ("FROM", "${BASE} AS cuda"),
        ("ENV", "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"),
    ]
    assert final[0] == ("FROM", "${VARIANT}")
    assert any("requirements-${VARIANT}.lock" in line for line in install_lines())
    assert sorted(path.name for path in FOLDER.glob("*.lock")) == [f"requirements-{name}.lock" for name in VARIANTS]


def test_the_image_runs_distill_as_an_ordinary_user_where_the_store_is():
    assert last("ENTRYPOINT") == '["distill"]'
    assert last("USER") == "distill"
    assert last("WORKDIR") == last("VOLUME") == "/distill"
    assert "useradd --create-home distill && install --directory --owner=distill /distill" in [
        rest for name, rest in instructions() if name == "RUN"
    ]


def test_the_image_sets_no_variable_that_a_job_sets():
    """Under Pyxis the image's value of a variable wins over the job's."""
    assert [rest for name, rest in stages()[-1] if name == "ENV"] == ["PATH=/venv/bin:$PATH"]


def test_all_installs_are_one_instruction():
    runs = [rest for name, rest in instructions() if name == "RUN"]
    assert len([rest for rest in runs if re.search(r"\b(apt-get|pip) ", rest)]) == 1
    assert install_lines()[-1] == "&& rm -rf /src"


# --- distill.def ---


def test_apptainer_installs_what_docker_installs():
    header, sections = definition()
    assert header == {"Bootstrap": "docker", "From": "{{ BASE }}"}
    assert list(sections) == ["arguments", "files", "post", "environment", "runscript", "test", "help"]
    assert dict(line.split("=") for line in sections["arguments"]) == arguments()
    exports = [f'export {name}="{{{{ {name} }}}}"' for name in arguments() if name != "BASE"]
    assert sections["post"] == [*exports, *install_lines()]
    assert sections["environment"] == [f"export {last('ENV')}"]
    assert sections["runscript"] == ['exec distill "$@"']
    assert sections["test"] == ["/venv/bin/distill --version"]


def test_every_argument_of_the_definition_is_declared():
    text = (FOLDER / "distill.def").read_text()
    assert set(re.findall(r"{{ *(\w+) *}}", text)) == set(arguments())


def test_the_readme_explains_every_argument():
    text = (FOLDER / "README.md").read_text()
    for name in arguments():
        assert f"`{name}" in text, f"containers/README.md does not explain {name}"


# --- what is copied in ---


def copied():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert lines[1] == "*", "all is left out but what is named"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_only_what_the_package_is_made_of_is_copied_in():
    setuptools = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    made_of = [*(name.removesuffix("*") for name in setuptools), PROJECT["project"]["readme"]]
    made_of += [*PROJECT["project"]["license-files"], "pyproject.toml", "containers/*.lock"]
    assert sorted(copied()) == sorted(made_of)
    locks = "containers/requirements-{{ VARIANT }}.lock"
    files = [locks if name == "containers/*.lock" else name for name in copied()]
    assert definition()[1]["files"] == [f"{name} /src/{name}" for name in files]


# --- the locks ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lock_pins_what_the_project_asks_for(variant):
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["train"]]
    assert_pins(lock(variant), [*asked, *PROJECT["build-system"]["requires"]], f"requirements-{variant}.lock")


def test_the_locks_differ_by_torch_and_what_it_needs_alone():
    cpu, cuda = lock("cpu"), lock("cuda")
    assert cpu["torch"].endswith("+cpu"), "a CUDA build would be taken where the CPU index is not named"
    assert "+" not in cuda["torch"]
    assert set(cpu) <= set(cuda)
    assert all(re.match(r"nvidia-|cuda-|triton$", name) for name in set(cuda) - set(cpu))
    assert {name for name in cpu if cpu[name] != cuda[name]} == {"torch", "torchvision"}


# --- what `make quickstart` and `make test` install ---

PYTHONS = re.search("^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def test_every_python_that_is_supported_has_its_constraints():
    assert PROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert {path.name for path in FOLDER.glob("constraints*")} == {f"constraints-{python}.txt" for python in PYTHONS}


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_the_project_and_its_tests_ask_for(python):
    pins = pins_of(FOLDER / f"constraints-{python}.txt")
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], *itertools.chain(*extras)]
    assert_pins(pins, asked, f"constraints-{python}.txt")
    cuda = lock("cuda")
    for name in ("torch", "torchvision", "setuptools"):
        assert pins[name] == cuda[name], f"{name} is another one than in the container; run: make lock"


@pytest.mark.process
def test_a_python_without_constraints_gets_the_newest_of_everything_and_is_told_so(tmp_path):
    """In an environment without pip, where the installation ends at once."""
    (tmp_path / "containers").mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    venv.create(tmp_path / ".venv")

    def install(*options):
        command = ["make", "--silent", "--no-print-directory", ".venv/.train", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "No module named pip" in done.stderr
        return done.stdout

    constraints = "containers/constraints-{}.{}.txt".format(*sys.version_info)
    newest = "installing the newest release of every package, as"
    others = f"if that fails use one of these Pythons: {' '.join(PYTHONS)}"
    assert install() == f"{newest} there is no {constraints}; {others}\n"
    (tmp_path / constraints).touch()
    assert install() == ""
    assert install("NEWEST=1") == f"{newest} NEWEST is set\n"


# --- make container-test ---


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with what the script needs before it builds, a `df` that tells of free space, and no more."""
    for name in ("bash", "dirname", "tail", "id"):
        (tmp_path / name).symlink_to(shutil.which(name))

    def free(gigabytes):
        (tmp_path / "df").write_text(f"#!/bin/bash\necho Avail; echo {gigabytes}000\n")
        (tmp_path / "df").chmod(0o755)
        env = {"PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
        done = subprocess.run([FOLDER / "test.sh"], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done

    return free


@pytest.mark.process
def test_too_little_space_is_refused_first(bare_path, tmp_path):
    done = bare_path(10)
    assert done.stdout == f"needs 11 GB in {tmp_path}; 10 GB are free\n"
    assert done.stderr == "container-test: too little space: free some, or set TMPDIR to a folder elsewhere\n"


@pytest.mark.process
def test_missing_tools_are_named_with_the_line_that_installs_them(bare_path):
    assert bare_path(11).stderr == (
        "container-test: buildah or debootstrap is missing. "
        "Run: sudo apt-get install -y --no-install-recommends buildah debootstrap\n"
    )


def test_the_script_is_no_part_of_make_test():
    makefile = (ROOT / "Makefile").read_text()
    assert "container-test: ##" in makefile
    assert "containers/test.sh" not in makefile.split("container-test:")[0]
    assert os.access(FOLDER / "test.sh", os.X_OK)
