"""The architecture of EDM's networks, which `distill convert` makes from its pickled checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.core.field_types import CheckedRange
from distill.flow.conditioning import of_classes
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.networks.flow_map_edm import FlowMapEdmUNet2DModel
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.protocols import Cond, Conditioning
from distill.teachers.architectures.unet import taking_guidance
from distill.teachers.network_field import call_unet
from distill.teachers.read import Read, Side, Size, checked

Probability = Annotated[float, Field(ge=0, le=1)]


class EdmConfig(Read):
    """The options of both networks, and of the students that are made from them."""

    sample_size: Side
    in_channels: Literal[1, 3] = 3
    out_channels: Literal[1, 3] = 3
    num_classes: Size | None = None
    base_channels: Annotated[int, Field(ge=4, le=1 << 14)] = 128
    channel_multipliers: Annotated[list[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=12)] = [1]
    embedding_multiplier: Annotated[int, Field(ge=1, le=64)] = 4
    layers_per_block: Annotated[int, Field(ge=1, le=64)] = 4
    attention_sizes: Annotated[list[Side], Field(max_length=12)] = []
    dropout: Probability = 0.1
    label_dropout: Probability = 0.0
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_channels_multiplier: Annotated[int, Field(ge=1, le=64)] = 1
    encoder_type: Literal["standard", "residual"] = "standard"
    filter_taps: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=16)] = [1, 1]
    # of VelocityEdmUNet2DModel and FlowMapEdmUNet2DModel
    num_class_embeds: Annotated[int, Field(ge=2, le=(1 << 16) + 1)] | None = None
    design: Literal["song", "dhariwal"] = "song"
    second_time_waves: Size = 16
    guidance_range: CheckedRange | None = None
    sign: Literal[1, -1] = 1
    sigma_data: PositiveFloat = 0.5
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0

    @property
    def count(self) -> int | None:
        """The number of classes without the null class; None: there are no classes."""
        return self.num_classes if self.num_class_embeds is None else self.num_class_embeds - 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        halvings = len(self.channel_multipliers) - 1
        if self.sample_size % (1 << halvings):
            given = {"size": self.sample_size, "levels": halvings + 1}
            raise PydanticCustomError(
                "size", "sample_size={size} cannot be halved between each of {levels} channel_multipliers", given
            )
        if self.in_channels != self.out_channels:
            raise PydanticCustomError("channels", "in_channels and out_channels must be equal")
        if self.sigma_min >= self.sigma_max:
            told = {"low": f"{self.sigma_min:g}", "high": f"{self.sigma_max:g}"}
            raise PydanticCustomError("range", "sigma_min={low}; valid: less than sigma_max={high}", told)
        return self


@dataclass(frozen=True)
class EdmArchitecture:
    """Networks for images in pixel space, with or without class labels. Implements `protocols.Architecture`."""

    classes: tuple[type[nn.Module], ...] = (
        SongUNet2DModel,
        DhariwalUNet2DModel,
        VelocityEdmUNet2DModel,
        FlowMapEdmUNet2DModel,
    )
    title: str = "EDM (files of `distill convert`)"
    pipelines: tuple[str, ...] = ()
    prediction: str = "epsilon (the raw network)"
    conditions: str = "class labels, or none"
    guidance: str = "second call, if there is a null class"
    size_options: tuple[str, ...] = (
        "channel_multipliers",
        "embedding_multiplier",
        "layers_per_block",
        "attention_sizes",
    )  # as in Convention; not base_channels, on which frequencies depend that are stored with the weights

    def shape(self, content: dict[str, Any], path: Path) -> tuple[int, ...]:
        config = checked(EdmConfig, content, path)
        return (config.in_channels, config.sample_size, config.sample_size)

    def conditioning(self, content: dict[str, Any], path: Path, null_class: int | None) -> Conditioning:
        """With K classes, the null class is K: no class at all. It exists if the network was trained without labels
        part of the time, or if the spec says so.
        """
        config = checked(EdmConfig, content, path)
        count = config.count
        if null_class is not None and null_class != count:
            valid = "has no classes; leave it out" if count is None else f"has {count} classes, valid: {count}"
            raise InputError(f"teacher.null_class={null_class}: {path} {valid}")
        found = of_classes(count, count if config.label_dropout > 0 else null_class)
        return taking_guidance(found, config.guidance_range, path)

    def layers(self, network: nn.Module) -> Sequence[str]:
        """The names of the levels: down_blocks.0, ..., mid_block, up_blocks.0, ..."""
        levels = [name for name, _ in network.named_modules() if name.count(".") == 1]
        down, up = ([name for name in levels if name.startswith(part)] for part in ("down_blocks.", "up_blocks."))
        return [*down, "mid_block", *up]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        return call_unet(network, x_t, time, cond)


ARCHITECTURE = EdmArchitecture()
