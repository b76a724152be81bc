"""`distill doctor`: what this machine has, what is missing, and how to get it."""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import typer

from distill.cli.common import JsonOption, StoreOption, print_json, print_table, store_path
from distill.launch import environment
from distill.space import human

TRAIN = (
    *("torch", "torchvision", "diffusers", "datasets", "safetensors", "numpy", "scipy", "scikit-learn"),
    *("deepspeed", "lpips", "matplotlib", "pillow", "pot"),
)
FREE = 2e9  # bytes that a quickstart and a few checkpoints take with ease


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "missing", "note"]
    found: str
    fix: str = ""


def doctor(store: StoreOption = None, json: JsonOption = False) -> None:
    """Check this machine: packages, devices, threads, the store; each trouble with its remedy."""
    findings = [_python(), *_packages(), *_devices(), _threads(), *_store(store_path(store))]
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(["", "state", "found", "what to do"], [[f.what, f.state, f.found, f.fix] for f in findings])
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _python() -> Finding:
    found = platform.python_version()
    return Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", found, "")


def _packages() -> list[Finding]:
    findings = []
    for name in TRAIN:
        try:
            findings.append(Finding(name, "ok", version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, "missing", "", "pip install 'distill[train]'"))
    return findings


def _devices() -> list[Finding]:
    findings = [Finding("CPUs", "ok", f"{environment.cpus()} that this process may use")]
    if importlib.util.find_spec("torch") is not None:
        import torch

        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(i) for i in range(count)]
        findings.append(
            Finding("GPUs", "ok" if count else "note", ", ".join(names) or "none; everything runs on the CPU")
        )
    return findings


def _threads() -> Finding:
    given = os.environ.get("OMP_NUM_THREADS")
    if given is None:
        return Finding("threads", "ok", "one per CPU")
    return Finding(
        "threads", "note", f"OMP_NUM_THREADS={given}", "unset it to use all CPUs; launch.threads overrides it"
    )


def _store(folder: Path) -> list[Finding]:
    """Whether the store can be written, or made, and what is free there; it is not made."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
        writable = Finding("store", "ok", f"{folder.absolute()}{'' if folder.exists() else ' (not made yet)'}")
    except OSError as error:
        writable = Finding(
            "store", "missing", f"{existing}: {error.strerror}", "choose another: --store or $DISTILL_STORE"
        )
    free = shutil.disk_usage(existing).free
    few = "" if free >= FREE else "free some space: distill clean RUN --checkpoints"
    return [writable, Finding("free space", "ok" if free >= FREE else "note", human(free), few)]
