"""What training and sampling must not wait for: copies between a GPU and the CPU."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakTensorKeyDictionary

_placed = WeakTensorKeyDictionary()  # table -> device -> its copy


def on(table: Tensor, device: torch.device) -> Tensor:
    """A constant table on a device. It is copied there once, and must not be changed."""
    if table.device == device:
        return table
    copies: dict[torch.device, Tensor] = _placed.setdefault(table, {})
    if device not in copies:
        copies[device] = table.to(device)
    return copies[device]


def any_known(mask: Tensor) -> bool:
    """Whether any value is true, on the CPU; on other devices False, because reading a value waits for the device.

    For values that can be wrong only by a mistake in the code, which tests find on the CPU. False, too, for a tensor
    without values.
    """
    return mask.device.type == "cpu" and not is_fake(mask) and bool(mask.any())
