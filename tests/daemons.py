"""Slurm and ssh for the tests: those of this machine, or packages that `make system` downloads and unpacks in .venv.

Nothing is installed and no service is started, so root is not needed. To run the packages of Debian and Ubuntu from
another folder, there is a small script for each program. It sets LD_LIBRARY_PATH and the paths of the program's other
files.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[1] / ".venv" / "system"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = {"slurm": ("munged", "slurmctld", "slurmd", "sbatch"), "ssh": ("sshd", "ssh", "ssh-keygen")}
PACKAGES = {
    "slurm": ("munge", "slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins"),
    "ssh": ("openssh-server", "openssh-client"),
}
ALSO_UNPACKED = {"slurm": (), "ssh": ("libnss-wrapper",)}

# For an apt-get that keeps its state in a folder of its own and leaves the machine's alone, so that anybody may run it.
APT_CONF = """
Dir::State "{folder}/state";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
Acquire::Languages "none";
APT::Sandbox::User "root";
APT::Get::Show-User-Simulation-Note "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""
SCRIPT = """#!/bin/sh
root="${{0%/bin/*}}"
export LD_LIBRARY_PATH="{libraries}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
{options}exec "$root/{program}" "$@"
"""
OPTIONS = {
    "slurmd": 'set -- -d "$root/usr/sbin/slurmstepd" "$@"\n',
    # Newer versions of sshd are several programs. Run by root, sshd wants a user "sshd", which only an installation
    # would add to the machine; nss_wrapper shows it one.
    "sshd": """for part in Session:session Auth:auth; do
  file="$root/usr/lib/openssh/sshd-${part#*:}"
  [ ! -e "$file" ] || set -- -o "Sshd${part%:*}Path=\\"$file\\"" "$@"
done
if [ "$(id -u)" = 0 ] && ! getent passwd sshd >/dev/null; then
  { cat /etc/passwd; echo "sshd:x:65534:65534::/run/sshd:/usr/sbin/nologin"; } >"$root/passwd"
  export LD_PRELOAD=libnss_wrapper.so NSS_WRAPPER_PASSWD="$root/passwd" NSS_WRAPPER_GROUP=/etc/group
fi
""",
}


class UnavailableError(Exception):
    """Why a group of programs cannot be had."""


def missing(group: str, path: str = PATH) -> list[str]:
    return [name for name in PROGRAMS[group] if shutil.which(name, path=path) is None]


def unpacked(group: str) -> Path | None:
    """The folder of a group of which this machine lacks a program; the versions of two sources are not mixed."""
    folder = UNPACKED / group
    return folder if missing(group) and folder.exists() else None


def path(group: str) -> str:
    """PATH with the programs of a group."""
    folder = unpacked(group)
    return PATH if folder is None else f"{folder}/bin:{PATH}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="install the packages on this machine instead, as root")
    to_install = parser.parse_args().install
    lacking = {group: names for group in PROGRAMS if (names := missing(group, PATH if to_install else path(group)))}
    if not lacking:
        return
    names = ", ".join(name for names in lacking.values() for name in names)
    print(f"tests of {' and '.join(lacking)} need programs that are not here: {names}", flush=True)
    packages = [package for group in lacking for package in PACKAGES[group]]
    if to_install:
        install(packages)
        return
    try:
        unpack(list(lacking))
    except (UnavailableError, OSError) as why:
        print(
            f"{why}\nThese tests are skipped, unless you install the programs; "
            "on Debian and Ubuntu, as root: make system SYSTEM=yes"
        )


def install(packages: Sequence[str]) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"SYSTEM=yes needs root and apt-get, to install {' '.join(packages)}")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        if code := subprocess.run(["apt-get", "-q", *command], check=False).returncode:
            sys.exit(code)


def unpack(groups: Sequence[str]) -> None:
    """Download groups and what they need that is not installed here, and unpack each into a folder."""
    if lacking := [tool for tool in ("apt-get", "dpkg-deb", "ldd") if shutil.which(tool) is None]:
        raise UnavailableError(f"Packages of Debian or Ubuntu cannot be used: there is no {', '.join(lacking)}.")
    UNPACKED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=UNPACKED) as name:
        partial = Path(name)
        apt = make_apt(partial)
        for group in groups:
            folder = partial / group
            packages = download(apt, [*PACKAGES[group], *ALSO_UNPACKED[group]], partial / f"{group}-packages")
            for package in packages:
                run("dpkg-deb", "--extract", package, folder)
            run("chmod", "-R", "u+w,ug-s", folder)
            for program in folder.glob("usr/sbin/*-wlm"):
                program.rename(program.with_name(program.name.removesuffix("-wlm")))  # as update-alternatives would
            add_scripts(group, folder)
            shutil.rmtree(UNPACKED / group, ignore_errors=True)
            folder.rename(UNPACKED / group)
            size = sum(package.stat().st_size for package in packages) / 1e6
            print(f"{len(packages)} packages ({size:.1f} MB) were unpacked into {UNPACKED / group}; none is installed")


def make_apt(folder: Path) -> Sequence[str]:
    """An apt-get command with fresh lists of packages."""
    for name in ("state/lists/partial", "cache/archives/partial", "log"):
        (folder / name).mkdir(parents=True)
    (folder / "apt.conf").write_text(APT_CONF.format(folder=folder))
    apt = ("apt-get", "-qq", "-c", str(folder / "apt.conf"))
    said = run(*apt, "update")
    if not any(folder.glob("state/lists/*_Packages*")):
        raise UnavailableError(f"apt-get could not download its lists of packages:\n{said.rstrip()}")
    return apt


def download(apt: Sequence[str], packages: Sequence[str], folder: Path) -> list[Path]:
    """The newest packages, and those of their dependencies that are not installed here."""
    folder.mkdir()
    plan = run(*apt, "install", "--simulate", "--reinstall", "--no-install-recommends", *packages)
    # Inst NAME [the version that is installed] (VERSION ...
    chosen = re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", plan, re.MULTILINE)
    run(*apt, "download", *(f"{name}={version}" for name, version in chosen), cwd=folder)
    return sorted(folder.glob("*.deb"))


def add_scripts(group: str, folder: Path) -> None:
    """Make bin/, with a script that starts each program where it is unpacked."""
    folders = sorted({file.parent for usr in (folder, folder / "usr") for file in usr.glob("lib/**/lib*.so*")})
    for name in PROGRAMS[group]:
        program = shutil.which(name, path=f"{folder}/usr/bin:{folder}/usr/sbin")
        if program is None:
            raise UnavailableError(f"There is no {name} in the packages {', '.join(PACKAGES[group])} of this system.")
        linked = run("ldd", program, env={**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, folders))})
        if lacking := [line.strip() for line in linked.splitlines() if "not found" in line]:
            raise UnavailableError(f"{name} cannot run where it was unpacked: {'; '.join(lacking)}.")
    libraries = ":".join(f"$root/{library.relative_to(folder)}" for library in folders)
    (folder / "bin").mkdir(exist_ok=True)
    for program in [*folder.glob("usr/bin/*"), *folder.glob("usr/sbin/*")]:
        script = folder / "bin" / program.name
        options = OPTIONS.get(program.name, "")
        script.write_text(SCRIPT.format(libraries=libraries, options=options, program=program.relative_to(folder)))
        script.chmod(0o755)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """What a command prints."""
    done = subprocess.run(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise UnavailableError(f"{command[0]} failed:\n{done.stdout.rstrip()}")
    return done.stdout


if __name__ == "__main__":
    main()
