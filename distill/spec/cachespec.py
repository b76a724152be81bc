"""The cache stage of a spec: latents of images and embeddings of prompts are computed once and stored."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from distill.core.field_types import FrozenModel, ShardPairs
from distill.core.text import is_text

MAX_NEGATIVE = 10_000  # characters


class CacheStage(FrozenModel):
    """Encode images by the teacher's autoencoder and prompts by its text encoders, once, and store the results.

    All runs that use the same data, encoders and settings share them.
    """

    kind: Literal["cache"]
    latents: Literal["moments", "sample", "mean", "pixels"] | None = None
    """what is stored for an image; moments: mean and log variance of its latents, of which each epoch takes another
    sample; sample: one sample; mean: their mean; pixels: the decoded image as uint8, for teachers on pixels; null:
    moments, or mean for autoencoders without variance, or pixels; nothing if there are no images"""
    prompts: bool | None = None
    """whether to store embeddings of the prompts of the data; null: if it has prompts and the teacher takes them"""
    negative: str = Field("", max_length=MAX_NEGATIVE)
    """prompt of the second call of guidance; by default empty"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """data type of latents and embeddings on disk"""
    encoder_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """data type in which the text encoders compute; the autoencoder always computes in float32"""
    block: ShardPairs = 32
    """images or prompts that are encoded at once; it may affect the last bits of the results"""
    shard: ShardPairs = 1024
    """images per file, a multiple of block"""
    prompts_shard: ShardPairs = 256
    """prompts per file, a multiple of block; a row of embeddings is often much larger than latents"""


def mistakes(stage: CacheStage, prefix: str) -> Iterator[str]:
    """The mistakes in a cache stage that can be found without the data and the teacher."""
    for name in ("shard", "prompts_shard"):
        given = getattr(stage, name)
        if given % stage.block:
            nearest = max(stage.block, round(given / stage.block) * stage.block)
            yield f"{prefix}{name}: {given} is not a multiple of block ({stage.block}); nearest: {nearest}"
    if not is_text(stage.negative):
        yield f"{prefix}negative: contains a control character; remove it"
    if stage.prompts is False:
        yield from (f"{prefix}{name}: has no effect with prompts: false; remove it" for name in of_prompts(stage))
    if stage.latents == "pixels" and stage.prompts is False and stage.dtype != "float32":
        yield f"{prefix}dtype: has no effect with latents: pixels and prompts: false, as pixels are uint8; remove it"


def of_prompts(stage: CacheStage) -> list[str]:
    """The settings that are given and apply only to prompts."""
    fields = CacheStage.model_fields
    return [name for name in ("negative", "encoder_dtype") if getattr(stage, name) != fields[name].default]
