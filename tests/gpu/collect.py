"""Collects wheels for a machine without network: python -m tests.gpu.collect PACKAGES [--out FOLDER] [--python 3.12].

PACKAGES is a file with the names of the packages that the machine has, one in each line, alone or as NAME==VERSION, or
the output of `pip list`. What distill[train] needs and the list lacks is taken in the versions of this environment, for
Linux on x86-64. Packages without a wheel for that Python (deepspeed) are built here, once. The wheels and the files of
git together may have at most 60 MB.
"""

import argparse
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MOST = 60e6  # bytes
ROOT = Path(__file__).parents[2]
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 26, 27, 28, 31, 34, 35)), "manylinux2014_x86_64",
             "manylinux1_x86_64"]  # fmt: skip
NEVER = re.compile(r"torch$|torchvision$|triton$|nvidia-|cuda-")  # too large, and part of any machine with GPUs


def listed(text: str) -> set[str]:
    """The names of packages in a file."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    names = (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", line) for line in lines)
    return {canonicalize_name(name[0]) for name in names if name}


def needed(python: str) -> dict[str, str]:
    """What distill[train] needs on Linux with this Python, with all that these packages need: name -> version here."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
                   "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
                   "platform_python_implementation": "CPython"}  # fmt: skip
    found: dict[str, str] = {}
    waiting = [Requirement("distill[train]")]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found and not wanted.extras:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # for other Pythons or systems than this one
        found[name] = installed.version
        for text in installed.requires or ():
            other = Requirement(text)
            extras = [*wanted.extras, ""]
            if other.marker is None or any(other.marker.evaluate({**environment, "extra": each}) for each in extras):
                waiting.append(other)
    found.pop("distill")
    return found


def fetch(name: str, version: str, python: str, out: Path) -> None:
    """Download the wheel of a package, or build it if there is none."""
    platforms = [option for each in PLATFORMS for option in ("--platform", each)]
    pip = [sys.executable, "-m", "pip", "-q"]
    wheel = [*pip, "download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    done = subprocess.run([*wheel, *platforms, "-d", str(out), f"{name}=={version}"], capture_output=True, text=True)
    if done.returncode:
        built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), f"{name}=={version}"]
        subprocess.run(built, check=True, env={"DS_BUILD_OPS": "0", "PATH": "/usr/bin:/bin"})


def size_of_tree() -> int:
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sum((ROOT / name).stat().st_size for name in names.split("\0") if name and (ROOT / name).is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "wheels")
    parser.add_argument("--python", default="3.12")
    given = parser.parse_args()
    has = listed(given.packages.read_text())
    wanted = {name: at for name, at in needed(given.python).items() if name not in has and not NEVER.match(name)}
    given.out.mkdir(parents=True, exist_ok=True)
    kept = {tuple(path.name.split("-")[:2]): path for path in given.out.glob("*.whl")}
    for name, version in sorted(wanted.items()):
        if (name.replace("-", "_"), version) not in {(part.lower(), at) for part, at in kept}:
            fetch(name, version, given.python, given.out)
    wheels = sorted(given.out.glob("*.whl"))
    for path in wheels:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.name}")
    total = sum(path.stat().st_size for path in wheels) + size_of_tree()
    print(f"{total / 1e6:8.2f} MB  in all, with the files of git")
    if total > MOST:
        sys.exit(f"more than {MOST / 1e6:.0f} MB; install some of these packages on the machine")


if __name__ == "__main__":
    main()
