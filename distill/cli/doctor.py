"""`distill doctor`: checks this machine or a cluster, and says how to fix what is missing."""

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill.cli import start
from distill.cli.common import JsonOption, StoreOption, print_json, print_table, site_setting, store_path
from distill.core.errors import InputError
from distill.core.printing import say
from distill.core.space import human
from distill.core.text import expanded
from distill.launch import environment

if TYPE_CHECKING:
    import distill.data.timing
    import distill.launch.sitecheck

TRAIN = (
    *("torch", "torchvision", "diffusers", "datasets", "safetensors", "numpy", "scipy", "scikit-learn"),
    *("deepspeed", "lpips", "matplotlib", "pillow", "pot"),
)
NO_REPORT = "no report found in the store; it crashed, or its node cannot write to the store"
RATES = (100, 300, 1000)  # samples per second that one GPU trains, as examples
FREE = 2e9  # bytes; enough for the quickstart and a few checkpoints


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    state: Literal["ok", "missing", "broken", "note"]
    found: str
    fix: str = ""


def doctor(
    site: Annotated[bool, typer.Option("--site", help="Check the cluster instead, with a one-minute job.")] = False,
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SITE]",
            help="With --site: file that describes the cluster; the default is that of `distill submit`.",
        ),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="With --site: number of nodes; by default 2.")
    ] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="With --site: GPUs to request per node.")] = None,
    partition: Annotated[str | None, typer.Option(help="With --site: partition; by default the site's.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="A spec or preset: measure how fast its data is read and decoded."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs for which to say how many workers read data; by default those here.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Samples per second that one GPU trains; by default, examples.")
    ] = None,
    store: StoreOption = None,
    json: JsonOption = False,
) -> None:
    """Check packages, devices, threads and the store, and say how to fix problems; or check the cluster.

    It also measures how fast data is read, and says how many worker processes (launch.workers) the GPUs need.
    """
    if site:
        _refuse({"--data": data, "--gpus": gpus, "--rate": rate}, "with --site; remove it")
        _cluster(path, store_path(store), nodes or 2, gpus_per_node or 0, partition, json)
        return
    given = {"SITE": path, "--nodes": nodes, "--gpus-per-node": gpus_per_node, "--partition": partition}
    _refuse(given, "without --site; add --site to check the cluster")
    findings = [_python(), *_packages(), *_partners(), *_devices(), _threads(), *_store(store_path(store))]
    if data is not None or not any(finding.state in ("missing", "broken") for finding in findings):
        findings += _reading(data, gpus, rate, store_path(store))
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(["", "state", "found", "what to do"], [[f.what, f.state, f.found, f.fix] for f in findings])
    if any(finding.state in ("missing", "broken") for finding in findings):
        raise typer.Exit(1)


def _refuse(given: Mapping[str, object], reason: str) -> None:
    without_effect = [name for name, value in given.items() if value is not None]
    if without_effect:
        raise InputError(f"{', '.join(without_effect)} has no effect {reason}")


def _cluster(path: Path | None, store: Path, nodes: int, gpus: int, partition: str | None, json: bool) -> None:
    """Run a small job on the cluster, and print what each of its processes found and which problems there are."""
    from distill.cli import arguments
    from distill.launch import queue, sitecheck, sites
    from distill.spec.model import SlurmSpec

    where = sites.load(expanded(site_setting(path).value))
    options = arguments.stage(SlurmSpec, {"partition": partition, "gpus_per_node": gpus})
    queue.check_partition(options, where)
    if not json:
        say(f"site {where.path}: a one-minute job on {nodes} node{'s' if nodes > 1 else ''}", flush=True)
    said = (lambda text: None) if json else (lambda text: say(text, flush=True))
    found = sitecheck.run(store, where, options, nodes, said)
    troubles = [f"rank {seen.rank} on {seen.node}: {trouble}" for seen in found for trouble in _troubles(seen, gpus)]
    missing = sorted(set(range(found[0].size)) - {seen.rank for seen in found})
    troubles += [f"rank {rank}: {NO_REPORT}" for rank in missing]
    if json:
        print_json({"ranks": [asdict(seen) for seen in found], "troubles": troubles})
    else:
        rows = [
            [str(seen.rank), seen.node, seen.address, str(seen.cpus), ", ".join(seen.devices) or "none", seen.store,
             human(seen.free), seen.quota, seen.peers, seen.nccl or "no GPUs", seen.torch]
            for seen in found
        ]  # fmt: skip
        columns = [
            "rank",
            "node",
            "rendezvous",
            "CPUs",
            "GPUs",
            "store",
            "free",
            "quota",
            "other ranks",
            "NCCL",
            "torch",
        ]
        print_table(columns, rows)
        say("\n".join(troubles) or "no problems found")
    if troubles:
        raise typer.Exit(1)


def _troubles(seen: "distill.launch.sitecheck.Seen", gpus: int) -> list[str]:
    found = [f"store: {seen.store}"] if seen.store != "ok" else []
    found += [f"{name}: {state}" for name, state in seen.caches.items() if state != "ok"]
    found += [f"cannot reach the other ranks: {seen.peers}"] if seen.peers != "ok" else []
    found += [f"the GPUs cannot reach each other by NCCL: {seen.nccl}"] if seen.nccl not in ("", "ok") else []
    if gpus and len(seen.devices) < gpus:
        found.append(
            f"torch sees {len(seen.devices)} of {gpus} GPUs; check that torch is a CUDA build and the driver works"
        )
    if seen.free < FREE:
        found.append(f"only {human(seen.free)} free in the store")
    return found


def probe(
    folder: Annotated[Path, typer.Argument()], caches: Annotated[list[str] | None, typer.Argument()] = None
) -> None:
    """The checks of one process in the job of `doctor --site`; CACHES: the site's, NAME=FOLDER."""
    from distill.launch import sitecheck, tasks

    tasks.require("probe")
    sitecheck.probe(folder, dict(cache.split("=", 1) for cache in caches or []))


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


def _partners() -> list[Finding]:
    """Check that torchvision was built for the installed torch. Otherwise diffusers, and so every run, would fail."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torchvision")):
        return []
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        found = f"torchvision cannot be imported with torch {version('torch')}: {error}"
        return [
            Finding("torch, torchvision", "broken", found, "install both from the same index, with one pip install")
        ]
    return []


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


def _reading(given: str | None, gpus: int | None, rate: float | None, store: Path) -> list[Finding]:
    """Measure how fast data is read: that of a spec, or an example. Say how many workers the GPUs need for it."""
    try:
        from distill.data import timing

        found = timing.of_example() if given is None else _reading_of(given, store)
    except ModuleNotFoundError as error:
        text = f"not measured: the package {error.name} is missing"
        return [Finding("reading data", "missing", text, "pip install 'distill[train]'")]
    cpus, gpus, rates = environment.cpus(), gpus or _gpus() or 1, RATES if rate is None else (rate,)
    counts = [found.workers(each) for each in rates]
    needed = ", ".join(f"{count} for {each:,g}" for each, count in zip(rates, counts, strict=True))
    in_all = f"; {gpus} GPUs: {', '.join(str(gpus * count) for count in counts)}" if gpus > 1 else ""
    few = rate is not None and gpus * counts[0] > cpus
    more = "; there are too few CPUs: `distill cache SPEC` stores data that is quick to read" if few else ""
    return [
        Finding(
            "reading data",
            "ok",
            f"{found.what}: {1000 * found.seconds:.2g} ms, {1 / found.seconds:,.0f} a second",
            "measure your data: --data SPEC" if given is None else "",
        ),
        Finding(
            "workers per GPU",
            "note" if few else "ok",
            f"{needed} samples a second and GPU{in_all} ({cpus} CPUs here)",
            "give the rate of your GPU: --rate" if rate is None else f"launch.workers={counts[0]}{more}",
        ),
    ]


def _reading_of(given: str, store: Path) -> "distill.data.timing.ReadingTime":
    """How fast training reads the data of a spec: from the images, or from a cache if it is complete."""
    from distill.data import timing, update_index
    from distill.execution.caching import Caching
    from distill.spec import checks

    source = start.find(given, [], None)
    spec = source.spec
    if spec.cache is None:
        return timing.of_data(spec.data, spec.seed, store)
    update_index(spec.data, store)
    made = Caching.of(checks.check(spec, source.base), store.absolute(), store)
    if all(each.what != "latents" for each in made.planned):
        return timing.of_data(spec.data, spec.seed, store)
    latents = made.latents()
    if latents is None:
        raise InputError(
            f"--data: the images of spec '{spec.name}' are not cached yet; make the cache first, with: distill cache "
            f"{given}"
        )
    return timing.of_set(latents, spec.seed, f"a cached sample of '{latents.name}'")


def _gpus() -> int:
    import torch

    return int(torch.cuda.device_count())


def _store(folder: Path) -> list[Finding]:
    """Check that the store is writable or can be created, and its free space. It is not created."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
        writable = Finding("store", "ok", f"{folder.absolute()}{'' if folder.exists() else ' (not created yet)'}")
    except OSError as error:
        writable = Finding(
            "store", "broken", f"{existing}: {error.strerror}", "choose another: --store or $DISTILL_STORE"
        )
    free = shutil.disk_usage(existing).free
    few = "" if free >= FREE else "free some space: distill clean RUN --checkpoints"
    return [writable, Finding("free space", "ok" if free >= FREE else "note", human(free), few)]
