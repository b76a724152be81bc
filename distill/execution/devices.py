"""The device that a process computes on."""

import torch

from distill.core.errors import InputError
from distill.launch import environment
from distill.spec.model import LaunchSpec

MOST_WORKERS = 8  # processes that read data, unless the spec says how many


def place(launch: LaunchSpec, processes: int = 1) -> torch.device:
    """The device of this process. Also sets up torch for reproducible results.

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
    if processes > (found := torch.cuda.device_count()):
        raise InputError(
            f"launch.procs={processes}, but there are only {found} GPUs, and each process needs one; give fewer"
        )
    # The same spec must give the same values: no TF32, no kernels that are chosen by timing, no varying order of sums.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return torch.device("cuda")


def of_rank(launch: LaunchSpec, rank: int) -> torch.device:
    """The device of one of `launch.procs` processes on this machine that do not meet: each has a GPU of its own."""
    device = place(launch, launch.procs)
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    return device


def workers(launch: LaunchSpec, device: torch.device) -> int:
    """The number of processes that prepare batches for this process, which trains on `device`; see LaunchSpec."""
    if launch.workers is not None:
        return launch.workers
    if device.type == "cpu":
        return 0
    return min(MOST_WORKERS, environment.cpus_of_process(launch.procs) - 1)
