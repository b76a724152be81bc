"""Records the environment of a run: versions, machine, threads. The recorded packages are not imported."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import distill
from distill.core import versions
from distill.core.text import whole_number

SPINS = 50_000  # GOMP_SPINCOUNT: spins of a waiting thread in GNU OpenMP before it sleeps

ROOT = Path(distill.__file__).parent.parent


def record() -> dict[str, Any]:
    """The content of a run's env.json."""
    return {
        "distill": distill.__version__,
        "draws": versions.DRAWS,
        "git": git_state(ROOT),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu(),
        "cpus": cpus(),
        "threads": threads(),
        "command": sys.argv,
        "packages": dict(sorted((package.name, package.version) for package in distributions() if package.name)),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a checkout and whether files differ from it; None if it is not a checkout or git fails."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def host() -> str:
    """Host name of this machine."""
    return platform.node()


def quota() -> str:
    """This user's disk quotas from the command `quota`; "" if there are none or the command fails."""
    try:
        done = subprocess.run(["quota", "-w", "-s", "-Q"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(" ".join(line.split()) for line in done.stdout.splitlines()[2:])


def cpu() -> str:
    """The CPU model of this machine; the architecture if the model is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cpus() -> int:
    """Number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpus_of_process(procs: int) -> int:
    """Number of CPUs for this process, at least 1, if `procs` processes of this machine share those they may use.

    Slurm reserves CPUs for each process if the job asks for a number per task.
    """
    reserved = whole_number(os.environ.get("SLURM_CPUS_PER_TASK", ""))
    return max(1, min(reserved, cpus()) if reserved else cpus() // procs)


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables for a process with this number of CPU threads.

    OpenMP threads spin while they wait for each other. Without a limit, a waiting thread occupies a core that another
    process needs: next to two busy loops, a step took 3.6 times as long (recipes/LOG.md). OMP_WAIT_POLICY=passive
    avoids this but is slower on an idle machine; `python -m tests.benchmarks threads` measures it. If the user has set
    OMP_WAIT_POLICY or GOMP_SPINCOUNT, neither is changed.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    return {"OMP_NUM_THREADS": str(threads)} | ({} if chosen else {"GOMP_SPINCOUNT": str(SPINS)})


def threads() -> int:
    """Default number of CPU threads of a process: OMP_NUM_THREADS, else the CPUs that it may use."""
    return whole_number(os.environ.get("OMP_NUM_THREADS", "")) or cpus()


def python_path() -> dict[str, str]:
    """Environment variables with which a new Python process imports this copy of the package, even with option -P.

    -P removes the current folder from sys.path, which may contain the package.
    """
    installed = {Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")}
    if ROOT in installed:
        return {}
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def make_cublas_exact() -> None:
    """Let cuBLAS use a workspace with which its results do not vary. Call it before the first use of a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that NVIDIA documents for this


def has_compiler() -> bool:
    """Whether there is a C++ compiler, as torch.compile looks for it."""
    return bool(os.environ.get("CXX")) or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def local_ranks(size: int) -> int:
    """The number of the `size` ranks that are on this host, as launchers say it; all of them if they do not."""
    return min(size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
