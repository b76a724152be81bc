"""`make system`: programs in packages are unpacked and work, and nothing else changes. The tests make the packages."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import daemons
import pytest

pytestmark = pytest.mark.process
GROUPS = "tests of slurm and ssh need programs that are not here: "
SKIPPED = (
    "These tests are skipped, unless you install the programs; on Debian and Ubuntu, as root: make system SYSTEM=yes\n"
)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the script, and commands of this machine without those that tests need."""
    (tmp_path / "tests").mkdir()
    shutil.copy(daemons.__file__, tmp_path / "tests")
    (tmp_path / "bin").mkdir()
    needed = {name for names in daemons.PROGRAMS.values() for name in names}
    for file in [*Path("/usr/bin").iterdir(), *Path("/bin").iterdir()]:
        link = tmp_path / "bin" / file.name
        if file.name not in needed and not link.is_symlink():
            link.symlink_to(file)
    return tmp_path


def system(checkout: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", checkout / "tests" / "daemons.py", *options]
    env = {"PATH": str(checkout / "bin"), **env}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def package(repository: Path, name: str, programs: dict[str, str], depends: str = "") -> None:
    """A package of copies of this machine's programs."""
    root = repository / name
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: tests <tests@localhost>\n"
    control += f"Depends: {depends}\n" if depends else ""
    (root / "DEBIAN" / "control").write_text(f"{control}Description: a test\n")
    for path, source in programs.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shutil.which(source), root / path)
        (root / path).chmod(0o4755)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", root], check=True, stdout=subprocess.DEVNULL)
    file = (repository / f"{name}.deb").read_bytes()
    control += f"Filename: ./{name}.deb\nSize: {len(file)}\nSHA256: {hashlib.sha256(file).hexdigest()}\n"
    with (repository / "Packages").open("a") as index:
        index.write(f"{control}Description: a test\n\n")


@pytest.fixture
def repository(checkout):
    """APT_CONFIG for an apt that knows only packages made here, and takes none for installed."""
    if shutil.which("apt-get") is None:
        pytest.skip("there is no apt-get here")
    folder = checkout / "repository"
    package(folder, "munge", {"usr/sbin/munged": "echo"}, depends="libmade")
    package(folder, "libmade", {"usr/lib/made/libmade.so.1": "true"})
    package(folder, "slurmctld", {"usr/sbin/slurmctld-wlm": "true"})
    package(folder, "slurmd", {"usr/sbin/slurmd-wlm": "echo"})
    package(folder, "slurm-client", {"usr/bin/sbatch": "env"})
    package(folder, "slurm-wlm-basic-plugins", {})
    (checkout / "sources").write_text(f"deb [trusted=yes] copy:{folder} ./\n")
    (checkout / "status").touch()
    config = checkout / "apt.conf"
    paths = {"Etc::sourcelist": checkout / "sources", "Etc::sourceparts": "-", "State::status": checkout / "status"}
    config.write_text("".join(f'Dir::{name} "{path}";\n' for name, path in paths.items()) + "Acquire::Retries 0;\n")
    return str(config)


def test_packages_are_unpacked_and_their_programs_find_their_parts(checkout, repository):
    (checkout / "bin" / "ssh").symlink_to("true")
    (checkout / "bin" / "sshd").symlink_to("true")
    (checkout / "bin" / "ssh-keygen").symlink_to("true")
    done = system(checkout, APT_CONFIG=repository)
    folder = checkout / ".venv" / "system" / "slurm"
    size = sum(file.stat().st_size for file in (checkout / "repository").glob("*.deb")) / 1e6
    assert done.stdout.startswith("tests of slurm need programs that are not here: ")
    assert done.stdout.endswith(f" sbatch\n6 packages ({size:.1f} MB) were unpacked into {folder}; none is installed\n")
    assert [path.name for path in folder.parent.iterdir()] == ["slurm"]
    assert (folder / "usr" / "sbin" / "munged").stat().st_mode & 0o7777 == 0o755

    def out(*command: str) -> str:
        env = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/mine"}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    assert out(folder / "bin" / "slurmd", "-N", "n 1") == f"-d {folder}/usr/sbin/slurmstepd -N n 1\n"
    assert f"LD_LIBRARY_PATH={folder}/usr/lib/made:/mine\n" in out(folder / "bin" / "sbatch")
    assert system(checkout).stdout == ""  # once


def test_a_package_that_cannot_be_had_is_one_message_and_leaves_nothing(checkout, repository):
    index = checkout / "repository" / "Packages"
    index.write_text(index.read_text().replace("Package: slurmd\n", "Package: other\n"))
    done = system(checkout, APT_CONFIG=repository)
    assert done.returncode == 0
    assert done.stdout.endswith(f"\napt-get failed:\nE: Unable to locate package slurmd\n{SKIPPED}")
    assert list((checkout / ".venv" / "system").iterdir()) == []
    (checkout / "sources").write_text("deb [trusted=yes] http://127.0.0.1:1 ./\n")
    said = system(checkout, APT_CONFIG=repository).stdout
    assert "apt-get could not download its lists of packages:\n" in said and "Connection refused" in said


def test_without_apt_it_says_so_and_does_nothing(checkout):
    (checkout / "bin" / "apt-get").unlink(missing_ok=True)
    done = system(checkout)
    said = f"Packages of Debian or Ubuntu cannot be used: there is no apt-get.\n{SKIPPED}"
    assert (done.returncode, done.stdout.startswith(GROUPS)) == (0, True)
    assert done.stdout.endswith(said) and len(done.stdout.splitlines()) == 3
    asked = system(checkout, "--install")
    assert asked.returncode == 1
    assert asked.stdout.endswith(
        "SYSTEM=yes needs root and apt-get, to install munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins "
        "openssh-server openssh-client\n"
    )
    assert not (checkout / ".venv").exists()


def test_venv_is_installed_only_when_asked(tmp_path):
    """With a Python that has no venv, and an apt-get that writes down what it is asked."""
    shutil.copy(daemons.UNPACKED.parents[1] / "Makefile", tmp_path)
    scripts = {
        "python": f'case "$*" in *ensurepip*|*venv*) exit 1;; esac; exec {sys.executable} "$@"',
        "apt-get": f'echo "$@" >>{tmp_path}/asked',
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def make(*options: str) -> str:
        command = ["make", "--silent", "--no-print-directory", ".venv/bin/python", "PYTHON=python", *options]
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stdout

    assert make() == "missing: venv for python. Run: sudo apt-get install -y python3-venv\n"
    assert not (tmp_path / "asked").exists()
    assert make("SYSTEM=yes") == ""
    assert (tmp_path / "asked").read_text() == "update -q\ninstall -qy python3-venv\n"
