"""A teacher whose weights do not fit on the device that calls it: part of them stays in the CPU's memory, or on the
disk, and each layer's are brought to the device when it is called. The numbers are the same.

Everything is computed on the one device of the process. Several GPUs are not used: networks do arithmetic between
their layers, whose operands would lie on different ones.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

from distill.core.atomic import hidden_folder

SHARE = 0.8  # of a device's free memory that weights may take; activations need the rest

Limits = Mapping[int | str, int]  # bytes by the number of a GPU, or "cpu"


@contextmanager
def dispatched(network: nn.Module, device: torch.device, folder: Path, limits: Limits | None = None) -> Iterator[None]:
    """While entered, a frozen network that lies on the CPU can be called with samples on `device`.

    It moves there whole if its weights fit. folder: a hidden folder beside it holds what stays on the disk, until the
    end of the block. limits: bytes that weights may take; None: what the device has free, and the CPU's memory.
    Afterwards the network must not be used.
    """
    total = sum(each.numel() * each.element_size() for each in [*network.parameters(), *network.buffers()])
    place = torch.cuda.current_device() if device.type == "cuda" else "cpu"
    limits = limits or _free(place, total)
    if total <= limits[place]:
        network.to(device)
        yield
        return
    lists = [each for each in network.children() if isinstance(each, nn.ModuleList)]
    blocks = sorted({type(block).__name__ for each in lists for block in each})
    places = infer_auto_device_map(network, max_memory=dict(limits), no_split_module_classes=blocks, clean_result=False)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is meant
    with hidden_folder(folder) if "disk" in places.values() else nullcontext() as offload:
        dispatch_model(network, places, main_device=device, offload_dir=offload)
        yield


def _free(place: int | str, total: int) -> Limits:
    """What weights of `total` bytes, which the CPU's memory holds now, may take."""
    if isinstance(place, str):
        return {place: total}
    free, _ = torch.cuda.mem_get_info(place)
    return {place: int(SHARE * free), "cpu": total}
