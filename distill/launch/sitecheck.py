"""Checks a cluster with a one-minute job. Each process of the job records what it finds on its node."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from distill.core.atomic import write_atomic
from distill.core.errors import RunError
from distill.launch import environment, gpus, script, slurm
from distill.launch.script import Where
from distill.launch.sites import SiteSource
from distill.spec.model import SlurmSpec

NCCL_TIMEOUT = timedelta(seconds=30)
TOKEN = "token"  # a file that the processes must find in the store, with the same content
CACHES = ("HF_HOME", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR", "TMPDIR")


@dataclass(frozen=True)
class Seen:
    """The findings of one process on its node."""

    rank: int
    size: int
    node: str
    host: str
    address: str
    cpus: int
    store: str
    """ok, or what is wrong with the store on this node"""
    free: int
    """free bytes in the store"""
    quota: str
    """output of the command quota; "": none"""
    caches: dict[str, str]
    """environment variable -> ok, or what is wrong with its folder"""
    devices: list[str]
    torch: str
    """its version, or why it cannot be imported"""
    peers: str
    """ok if the processes could exchange their ranks; else why not"""
    nccl: str
    """the same for their GPUs, by NCCL; "": not every process has one"""


def run(store: Path, site: SiteSource, options: SlurmSpec, nodes: int, say: Callable[[str], None]) -> list[Seen]:
    """Submit the job, wait until it ends, and return the findings of its processes.

    Raises RunError if the job fails. Its temporary folder is deleted. say: prints a message.
    """
    store.mkdir(parents=True, exist_ok=True)
    folder = store.absolute() / f".doctor-{secrets.token_hex(4)}"
    folder.mkdir()
    job = ""
    try:
        write_atomic(folder / TOKEN, folder.name)
        where = Where(site, environment.ROOT, {})
        write_atomic(folder / "doctor.sbatch", script.doctor(folder, options, nodes, where))
        job = slurm.submit(folder / "doctor.sbatch")
        state = _wait(job, say)
        found = [Seen(**json.loads(path.read_text())) for path in sorted(folder.glob("rank-*.json"))]
        if state.state != "COMPLETED" or not found:
            log = folder / "job.log"
            text = (
                log.read_text(errors="replace").strip()
                if log.exists()
                else "(no log file; probably the nodes cannot access the store)"
            )
            raise RunError(
                f"job {job} ended in state {state.state} (exit code {state.exit_code}); its log ends with:\n"
                f"{text[-3000:]}"
            )
        return found
    finally:
        if job:
            slurm.cancel([job])
        try:
            shutil.rmtree(folder)
        except OSError as error:  # a job that is ending may still write there
            say(f"{folder} could not be removed ({error.strerror}); remove it yourself")


def _wait(job: str, say: Callable[[str], None]) -> slurm.JobState:
    said = ""
    while True:
        state = slurm.states([job]).get(job, slurm.JobState("PENDING"))
        if not state.is_live:
            return state
        text = f"job {job}: {state.state}" + (f" ({state.reason})" if state.reason not in ("", "None") else "")
        if text != said:
            say(text)
            said = text
        time.sleep(1)


def probe(folder: Path, caches: Mapping[str, str]) -> Seen:
    """Check the node as one process of the job, and write the findings to `folder`.

    caches: the cache folders of the site. They are passed explicitly, since Slurm replaces a TMPDIR that cannot be
    created by /tmp.
    """
    rank, size = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    address = slurm.address(os.environ["SLURM_JOB_NODELIST"])
    devices, version, peers, nccl = _torch(rank, size, address)
    seen = Seen(
        rank=rank,
        size=size,
        node=os.environ.get("SLURMD_NODENAME", ""),
        host=environment.host(),
        address=address,
        cpus=environment.cpus(),
        store=_store(folder),
        free=shutil.disk_usage(folder).free,
        quota=environment.quota(),
        caches={name: _writable(Path(path)) for name, path in {**_caches(), **caches}.items()},
        devices=devices,
        torch=version,
        peers=peers,
        nccl=nccl,
    )
    write_atomic(folder / f"rank-{rank}.json", json.dumps(asdict(seen)))
    return seen


def _caches() -> dict[str, str]:
    return {name: os.environ[name] for name in CACHES if os.environ.get(name)}


def _store(folder: Path) -> str:
    try:
        told = (folder / TOKEN).read_text()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return (
        _writable(folder)
        if told == folder.name
        else f"{folder}: a file written by the submitting process has other content on this node"
    )


def _writable(folder: Path) -> str:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".probe-{os.environ['SLURM_PROCID']}"
        path.write_text("")
        path.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return "ok"


def _torch(rank: int, size: int, address: str) -> tuple[list[str], str, str, str]:
    """(names of the GPUs, torch version, "ok" or why the other ranks are not reached, the same by NCCL)."""
    try:
        import torch
        from torch import distributed
    except ImportError as error:
        return [], str(error), "torch is missing", ""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    port = script.port(os.environ.get("SLURM_CLUSTER_NAME", ""), int(os.environ["SLURM_JOB_ID"]), 0, 0)
    nccl = ""
    try:
        distributed.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=size)
        heard = [torch.zeros(2, dtype=torch.int64) for _ in range(size)]
        distributed.all_gather(heard, torch.tensor([rank, len(devices)]))
        ranks = [int(each[0]) for each in heard]
        peers = "ok" if ranks == list(range(size)) else f"received ranks {ranks} instead of 0 to {size - 1}"
        if all(each[1] for each in heard):
            nccl = _nccl(rank, size)
        distributed.barrier()
        distributed.destroy_process_group()
    except RuntimeError as error:
        peers = str(error).splitlines()[0]
    return devices, str(torch.__version__), peers, nccl


def _nccl(rank: int, size: int) -> str:
    """ok if the GPUs of all ranks can add up their ranks by NCCL; else why not."""
    import torch
    from torch import distributed

    device = gpus.own(int(os.environ["SLURM_LOCALID"]))
    try:
        torch.cuda.set_device(device)
        group = distributed.new_group(backend="nccl", timeout=NCCL_TIMEOUT, device_id=device)
        total = torch.tensor([rank], device=device)
        distributed.all_reduce(total, group=group)
        found = int(total)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "ok" if found == size * (size - 1) // 2 else f"the sum of the ranks is {found}, not {size * (size - 1) // 2}"
