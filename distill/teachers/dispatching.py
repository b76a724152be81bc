"""Offloading for teachers whose weights do not fit on the device.

Part of the weights stays in CPU memory or on disk, and the weights of each layer are copied to the device when the
layer is called. The results are the same. A process computes on a single device: with layers on several GPUs,
operations between layers would have operands on different devices.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

from distill.core.atomic import hidden_folder
from distill.networks.quantised import held_bytes

SHARE = 0.8  # maximum share of a device's free memory for weights; activations need the rest

Limits = Mapping[int | str, int]  # bytes by GPU index or "cpu"


@contextmanager
def dispatched(network: nn.Module, device: torch.device, folder: Path, limits: Limits | None = None) -> Iterator[None]:
    """Context manager: a frozen network on the CPU can be called with samples on `device`; do not use it after exit.

    If all weights fit, the network is moved to the device.

    folder: weights that stay on disk are in a hidden folder beside this one, which is removed at exit.
    limits: maximum bytes of weights per place. None: a share of the device's free memory, and CPU memory for all
    weights.
    """
    total = held_bytes([*network.parameters(), *network.buffers()])
    place = torch.cuda.current_device() if device.type == "cuda" else "cpu"
    limits = limits or _free(place, total)
    if total <= limits[place]:
        network.to(device)
        yield
        return
    lists = [each for each in network.children() if isinstance(each, nn.ModuleList)]
    blocks = sorted({type(block).__name__ for each in lists for block in each})
    places = infer_auto_device_map(network, max_memory=dict(limits), no_split_module_classes=blocks, clean_result=False)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it would warn about offloading
    with hidden_folder(folder) if "disk" in places.values() else nullcontext() as offload:
        dispatch_model(network, places, main_device=device, offload_dir=offload)
        yield


def _free(place: int | str, total: int) -> Limits:
    """The default limits for weights of `total` bytes, which are in CPU memory now."""
    if isinstance(place, str):
        return {place: total}
    free, _ = torch.cuda.mem_get_info(place)
    return {place: int(SHARE * free), "cpu": total}
