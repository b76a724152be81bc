"""A process of a Slurm job: it takes its rank from Slurm, and records how it ended for the main process of the job.

Each rank writes a file, since the exit code of srun need not be that of the rank that failed first.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.core.atomic import write_json
from distill.core.errors import InputError

ENDS = "DISTILL_ENDS"  # folder of these files; set in every process of a job, and only there
UNIT = "DISTILL_UNIT"  # the unit of the run that the process computes, see `claims`


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    rank: int
    code: int
    message: str
    time: float
    """unix seconds"""


def is_task() -> bool:
    """Whether this process was started by the main process of a job."""
    return ENDS in os.environ


def require(command: str) -> None:
    """Raise InputError if this process was not started by Slurm."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError(f"`distill {command}` is started by a job in Slurm's queue; use `distill submit`")


def identity() -> tuple[str, int]:
    """(job id of this process, how many times that job had been started before)."""
    array, part = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{part}" if array else os.environ.get("SLURM_JOB_ID", "")
    return job, int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def adopt() -> None:
    """Set the environment variables of a rank from those of Slurm. On one machine, `local` sets them."""
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS"}
    if os.environ.get("MASTER_ADDR"):  # the process trains together with others
        os.environ.update({name: os.environ[slurm] for name, slurm in names.items()})
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["SLURM_NTASKS_PER_NODE"]
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    modules = Path(os.environ.get("HF_MODULES_CACHE", ".modules"))
    os.environ["HF_MODULES_CACHE"] = str(modules / f"{identity()[0]}-{os.environ['SLURM_PROCID']}")


def leave_word(code: int, message: str) -> None:
    """Record how this process ends."""
    rank = int(os.environ["SLURM_PROCID"])
    write_json(Path(os.environ[ENDS]) / f"rank-{rank}", asdict(End(rank, code, message, time.time())))


def read(folder: Path) -> list[End]:
    """The recorded ends of a job's processes, in order of time. A process that was killed has none."""
    found = (End(**each) for each in _contents(folder))
    return sorted(found, key=lambda end: end.time)


def _contents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in folder.glob("rank-*"):
        yield json.loads(path.read_text())
