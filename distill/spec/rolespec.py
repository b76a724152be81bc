"""How the networks of a train stage are made: new, as adapters of the teacher's, or of its class in another size."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from distill.core.field_types import Fraction, FrozenModel

MAX_RANK = 4096


def _layer(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", text) or len(text) > 200:
        raise PydanticCustomError(
            "other_form", "", {"valid": "the name of a layer, or the end of its name, such as to_q or to_out.0"}
        )
    return text


LayerName = Annotated[str, AfterValidator(_layer)]


class UNetSpec(FrozenModel):
    """A new pixel U-Net (diffusers UNet2DModel) for samples of the data's shape."""

    kind: Literal["unet"]
    channels: Annotated[list[Annotated[int, Field(gt=0, le=16384)]], Field(max_length=12)]
    """channels at each resolution, finest first"""
    layers_per_block: Annotated[int, Field(gt=0, le=100)] = 1
    """residual blocks at each resolution"""
    attention: bool = False
    """self-attention at the coarsest resolution"""
    norm_groups: Annotated[int, Field(gt=0, le=16384)] = 8
    """number of groups of the group norms; every entry of channels must be a multiple of it"""
    dropout: Fraction = 0.0
    """probability of dropping a feature in training"""


class MlpSpec(FrozenModel):
    """A new MLP for vectors of the teacher's dimension."""

    kind: Literal["mlp"]
    width: Annotated[int, Field(gt=0, le=65536)] = 192
    """units of a hidden layer"""
    depth: Annotated[int, Field(gt=0, le=1000)] = 3
    """hidden layers"""
    frequencies: Annotated[int, Field(ge=0, le=1000)] = 16
    """waves in which it sees a time: k / 4 turns from 0 to 1, k = 1 ... frequencies; 0: it sees the time itself;
    recipes that learn from derivatives by a time, such as scm and flow_map, need slow ones: 5"""


NetworkSpec = Annotated[UNetSpec | MlpSpec, Field(discriminator="kind")]


class LoraSpec(FrozenModel):
    """Low-rank adapters (LoRA): the weights W of the teacher stay as they are, and layers compute with
    W + alpha/rank B A, of which A and B are trained."""

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)]
    """number of rows of A and of columns of B"""
    alpha: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """the adapters are multiplied by alpha / rank; null: the rank, so that the factor is 1"""
    targets: Annotated[list[LayerName], Field(min_length=1, max_length=1000)] | None = None
    """layers with adapters, by name or by the end of their names, such as to_q or ff.net.2; null: those of `path`, or
    of the student that is continued, else all linear layers in the attention of the network"""
    path: str | None = None
    """LoRA whose weights the adapters start from: a .safetensors file, or a folder with one; null: adapters that do not
    change the output at first"""

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class StudentSpec(FrozenModel):
    """A student of the teacher's network class with another size. Layers that the teacher has in the same shape start
    with its weights. If there are fewer blocks, they start from the teacher's first and last, and from those evenly
    spaced between them. All other layers are new."""

    config: Annotated[dict[str, Any], Field(min_length=1, max_length=1000)]
    """options of its size that replace those of the teacher's config.json, such as num_layers: 12; `distill plan`
    prints the number of parameters and which blocks start with which of the teacher's"""
