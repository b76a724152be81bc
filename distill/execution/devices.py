"""The device that a process computes on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from distill.core.errors import InputError
from distill.launch import environment, gpus, tasks
from distill.spec.model import LaunchSpec

NOT_EXACT = re.compile(r"(\S+) does not have a deterministic implementation")  # what torch says
Numerics = Literal["exact", "fast"]
MOST_WORKERS = 8  # processes that read data, unless the spec says how many


def place(launch: LaunchSpec, processes: int = 1, numerics: Numerics = "exact") -> torch.device:
    """The device of this process. Also sets up torch for the numerics of the spec.

    The number of CPU threads is that of `launch.threads`, or else of OMP_NUM_THREADS, which the launcher sets.
    InputError if there are no GPUs, or too few for the processes.

    processes: those that compute together on this machine. They need not be `launch.procs`, see `RunSpec.processes`.
    """
    if launch.threads is not None:
        torch.set_num_threads(launch.threads)
    if launch.device == "cuda" and not torch.cuda.is_available():
        raise InputError("launch.device=cuda, but torch sees no GPU here; use launch.device=auto or cpu")
    if launch.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.cuda.device_count()
    sees_own = tasks.is_task() and found == 1  # see gpus.own; `World.join` refuses a GPU that processes share
    if processes > found and not sees_own:
        raise InputError(
            f"launch.procs={processes}, but there are only {found} GPUs, and each process needs one; give fewer"
        )
    set_numerics(numerics)
    return torch.device("cuda")


def set_numerics(numerics: Numerics) -> None:
    """Set up torch for GPUs. Call it before the first use of a GPU: cuBLAS reads its workspace from the environment.

    exact: the same values each time, in full precision. An operation without a deterministic implementation raises
    RuntimeError; see `explained`.
    """
    fast = numerics == "fast"
    if not fast:
        environment.make_cublas_exact()
    torch.use_deterministic_algorithms(not fast)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check for errors, which takes time
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = not fast, fast
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = fast
    matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = fast


@contextmanager
def explained() -> Iterator[None]:
    """InputError, with advice, for an operation that has no deterministic implementation."""
    try:
        yield
    except RuntimeError as error:
        if not (found := NOT_EXACT.match(str(error))):
            raise
        raise InputError(
            f"numerics: exact needs deterministic operations, but {found[1]} has no deterministic implementation on "
            "this device; set numerics: fast in the spec"
        ) from error


def of_rank(launch: LaunchSpec, rank: int) -> torch.device:
    """The device of one of `launch.procs` processes on this machine that do not meet: each has a GPU of its own."""
    device = place(launch, launch.procs)
    if device.type == "cuda":
        torch.cuda.set_device(gpus.own(rank))
    return device


def workers(launch: LaunchSpec, device: torch.device) -> int:
    """The number of processes that prepare batches for this process, which trains on `device`; see LaunchSpec."""
    if launch.workers is not None:
        return launch.workers
    if device.type == "cpu":
        return 0
    return min(MOST_WORKERS, environment.cpus_of_process(launch.procs) - 1)
