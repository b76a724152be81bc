"""Limits for the options of networks of diffusers that decide how many modules and how large tables are made.

What depends on the width of a network needs no limit, because it is compared with the weights before memory is used.
"""

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from distill.teachers.read import Read, ShortText, Side, Size

LAYERS, LEVELS = 256, 16  # the largest known network has 60 layers
TABLE = 1 << 14  # entries of a table of positions
PATCHES = 512  # per side, of a table of positions in two dimensions

Layers = Annotated[int, Field(ge=0, le=LAYERS)]
Entries = Annotated[int, Field(ge=1, le=TABLE)]
Names = Annotated[Sequence[ShortText], Field(max_length=LEVELS)]
SizesOfLevels = Annotated[Sequence[Size], Field(max_length=LEVELS)]
LayersOfLevels = Annotated[Sequence[Layers], Field(max_length=LEVELS)]
LayersOfBlocks = Annotated[Sequence[Layers | LayersOfLevels], Field(max_length=LEVELS)]


class NetworkLimits(Read):
    """The options that are limited, of all networks and autoencoders of diffusers. Each class has some of them."""

    # layers of transformers
    num_layers: Layers | None = None
    num_single_layers: Layers | None = None
    num_mmdit_layers: Layers | None = None
    num_single_dit_layers: Layers | None = None
    num_refiner_layers: Layers | None = None
    n_layers: Layers | None = None
    n_refiner_layers: Layers | None = None
    approximator_layers: Layers | None = None
    dual_attention_layers: Annotated[Sequence[Layers], Field(max_length=LAYERS)] | None = None
    # levels of U-Nets and autoencoders, and layers of each
    down_block_types: Names | None = None
    up_block_types: Names | None = None
    block_out_channels: SizesOfLevels | None = None
    cross_attention_dim: Size | SizesOfLevels | None = None
    attention_head_dim: Size | SizesOfLevels | None = None
    num_attention_heads: Size | SizesOfLevels | None = None
    layers_per_block: Layers | LayersOfLevels | None = None
    transformer_layers_per_block: Layers | LayersOfBlocks | None = None
    reverse_transformer_layers_per_block: Layers | LayersOfBlocks | None = None
    encoder_layers_per_block: LayersOfLevels | None = None
    decoder_layers_per_block: LayersOfLevels | None = None
    encoder_block_out_channels: SizesOfLevels | None = None
    decoder_block_out_channels: SizesOfLevels | None = None
    dim_mult: SizesOfLevels | None = None
    num_res_blocks: Layers | None = None
    # tables of positions
    rope_max_seq_len: Entries | None = None
    axes_lens: Annotated[Sequence[Entries], Field(max_length=LEVELS)] | None = None
    axes_dims: SizesOfLevels | None = None
    axes_dim_rope: SizesOfLevels | None = None
    axes_dims_rope: SizesOfLevels | None = None
    rope_axes_dim: SizesOfLevels | None = None
    sample_size: Side | SizesOfLevels | None = None
    patch_size: Size | SizesOfLevels | None = None

    @model_validator(mode="after")
    def _has_a_table_of_positions(self) -> Self:
        size, patch = self.sample_size, self.patch_size
        if isinstance(size, int) and isinstance(patch, int) and size > PATCHES * patch:
            told = {"size": size, "patch": patch, "most": PATCHES * patch}
            raise PydanticCustomError(
                "positions", "sample_size={size}; valid for patch_size={patch}: at most {most}", told
            )
        return self
