"""Frozen networks whose linear layers hold their weights as 8-bit integers, made by torchao.

The weights W of a layer become integers with a scale for each output, and the layer computes with scale * integers, in
the data type that W had. Gradients flow through such a layer to its input. Embeddings, norms and the first and last
layers stay as they are.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distill.core.errors import InputError


def quantize(network: nn.Module, blocks: Sequence[str], where: str) -> None:
    """Quantise the linear layers in these blocks of a frozen network, in place.

    blocks: their names. where: the field of the spec, for messages. InputError if torchao is not installed, or if there
    are no such layers.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise InputError(
            f"{where} needs the package torchao, which is not installed; install it: pip install 'distill[int8]'"
        ) from None
    layers = {
        id(layer) for name in blocks for layer in network.get_submodule(name).modules() if isinstance(layer, nn.Linear)
    }
    if not layers:
        raise InputError(f"{where}: {type(network).__name__} has no linear layers in its blocks; remove it")
    quantize_(network, Int8WeightOnlyConfig(), lambda layer, name: id(layer) in layers)


def is_quantised(network: nn.Module | None) -> bool:
    """Whether weights of a network are quantised."""
    return network is not None and any(parts_of(each) for each in network.parameters())


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The memory of tensors, of which some may be quantised."""
    return sum(each.numel() * each.element_size() for tensor in tensors for each in parts_of(tensor) or [tensor])


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensors that a quantised one consists of; empty for others."""
    if not is_traceable_wrapper_subclass(tensor):  # a tensor that consists of others, by torch's own protocol
        return []
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
