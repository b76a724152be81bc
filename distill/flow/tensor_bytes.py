"""Tensors as a safetensors file whose bytes depend on its content alone."""

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def in_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file with these tensors and metadata. The same content gives the same bytes.

    The library writes metadata of two or more keys in random order. Here, they are sorted.
    """
    content = save({name: each.contiguous() for name, each in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    first = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    entries = first | json.loads(content[8 : 8 + length])
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]))
