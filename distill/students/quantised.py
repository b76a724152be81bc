"""Linear layers with weights in 8 bits, as large networks are run on GPUs with little memory.

The values of each output channel are divided by a scale, so that the largest one becomes 127.5, and rounded to whole
numbers from -128 to 127. The inputs stay in bfloat16. torchao calls this int8 weight-only quantisation, and gives the
same outputs bit for bit. It is written here again because every command would import an installed torchao, through
diffusers and PEFT.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

LARGEST = 127.5


class Int8Linear(nn.Module):
    """A linear layer with the weight in int8 and one scale for each output channel."""

    scale: Tensor  # [out]
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).eps).to(layer.weight.dtype)
        levels = (weight / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
        # A parameter, [out, in], since some networks of diffusers look at the data types of the parameters in a layer.
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantise(network: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Replaces linear layers of a network, by name, by an `Int8Linear`, in place."""
    for name, layer in layers.items():
        network.set_submodule(name, Int8Linear(layer))


@contextmanager
def called_layers(network: nn.Module) -> Iterator[dict[str, nn.Linear]]:
    """The linear layers that are called in the block, by name. The weights of others may be used in another way."""
    found: dict[str, nn.Linear] = {}

    def note(name: str, layer: nn.Linear, inputs: object) -> None:
        found[name] = layer

    linear = [(name, each) for name, each in network.named_modules() if isinstance(each, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in linear]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
