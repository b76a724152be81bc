"""How values are stored in shards."""

import torch
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
LEVELS = 127.5  # in uint8, -1 is stored as 0, and 1 as 255


def stored(values: Tensor, dtype: str) -> Tensor:
    """Convert float32 values of any shape to the stored dtype. For uint8 they are clamped to [-1, 1]."""
    if dtype == "uint8":
        return ((values.clamp(-1, 1) + 1) * LEVELS).round().to(torch.uint8)
    return values.to(DTYPES[dtype])


def restored(values: Tensor) -> Tensor:
    """Convert stored values back to float32."""
    return values.float() / LEVELS - 1 if values.dtype == torch.uint8 else values.float()
