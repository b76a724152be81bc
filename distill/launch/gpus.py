"""Which GPU each process uses."""

from typing import TYPE_CHECKING

from distill.core.errors import InputError
from distill.launch import environment

if TYPE_CHECKING:
    import torch
    from torch import distributed


def own(local_rank: int) -> "torch.device":
    """The GPU of a process. local_rank: its number among the processes of this node.

    A process that sees only one GPU has this one: Slurm's --gpus-per-task, for example, hides those of other processes.
    """
    import torch

    return torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)


def refuse_shared(store: "distributed.Store", rank: int, size: int, device: "torch.device") -> None:
    """InputError on all ranks if two of them have the same GPU. All ranks must call it.

    store: the store of the rendezvous.
    """
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)
    store.set(f"gpu {rank}", uuid.encode())
    if rank == 0:
        found = [each.decode() for each in store.multi_get([f"gpu {other}" for other in range(size)])]
        first = {each: number for number, each in reversed(list(enumerate(found)))}
        twice = [f"ranks {first[each]} and {number}" for number, each in enumerate(found) if first[each] != number]
        store.set("gpus", ", ".join(twice[:3]).encode())
    if shared := store.get("gpus").decode():
        raise InputError(
            f"{environment.host()}: {shared} have the same GPU; each process needs one of its own. Start as many "
            "processes per node as there are GPUs (launch.procs)"
        )
