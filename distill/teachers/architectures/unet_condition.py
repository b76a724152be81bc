"""Stable Diffusion 1.x, 2.x and XL: U-Nets on latents that attend to the embedding of a prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, size_of
from distill.teachers.read import Config, Read, ShortText, Side, Size, checked, short

# time_cond_proj_dim of our students. With this option, the pipelines do not guide a network, but give it the guidance
# scale, which the weights of its layer, all zero, ignore. Networks that use it have 256 channels for it.
IGNORED = 4
SIZES = 6  # numbers in time_ids: height and width before cropping, top and left of the crop, height and width

# Options of networks that are called in another way, and who has them. Valid: null.
REFUSED = {
    "time_cond_proj_dim": "the guidance scale as an input, as in consistency models",
    "class_embed_type": "a class or a noise level as an input",
    "num_class_embeds": "a class as an input",
    "encoder_hid_dim": "another projection of the embedding, as in Kolors, Kandinsky and DeepFloyd IF",
    "encoder_hid_dim_type": "another projection of the embedding, as in Kolors, Kandinsky and DeepFloyd IF",
}

Levels = Annotated[Sequence[Size], Field(min_length=1, max_length=16)]


class _Config(Read):
    sample_size: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    in_channels: Size = 4
    out_channels: Size = 4
    block_out_channels: Levels = (320, 640, 1280, 1280)
    cross_attention_dim: Size | Levels = 1280
    time_embedding_type: ShortText = "positional"
    time_embedding_dim: Size | None = None
    addition_embed_type: ShortText | None = None
    addition_time_embed_dim: Size | None = None
    projection_class_embeddings_input_dim: Size | None = None
    time_cond_proj_dim: Size | None = None
    class_embed_type: ShortText | None = None
    num_class_embeds: Size | None = None
    encoder_hid_dim: Size | None = None
    encoder_hid_dim_type: ShortText | None = None

    @property
    def text_width(self) -> int:
        widths = self.cross_attention_dim
        return widths if isinstance(widths, int) else widths[0]

    @property
    def pooled_width(self) -> int | None:
        """The width of SDXL's pooled embedding; None: the network does not take one, or its options are damaged."""
        if self.addition_time_embed_dim is None or self.projection_class_embeddings_input_dim is None:
            return None
        width = self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim
        return width if width > 0 else None

    @property
    def is_xl(self) -> bool:
        return self.addition_embed_type == "text_time"


class UNetCondition(Convention):
    title = "Stable Diffusion 1.x, 2.x, XL"
    networks = ("UNet2DConditionModel",)
    folder = "unet"
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
    prediction = "epsilon or v_prediction"
    guidance_scale = 7.5
    size_options = (
        "block_out_channels",
        "layers_per_block",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "down_block_types",
        "mid_block_type",
        "up_block_types",
        "attention_head_dim",
        "norm_num_groups",
    )

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = _supported(config, path)
        if own.sample_size is None and latent is None:
            raise InputError(f"{path} has no sample_size; set teacher.size to the size of the samples in pixels")
        size = own.sample_size or (1, 1)
        return (own.in_channels, *size_of(latent, (size, size) if isinstance(size, int) else tuple(size), path))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        found = {"encoder_hidden_states": CondField((None, own.text_width))}
        if own.is_xl:
            found |= {"text_embeds": CondField((own.pooled_width,)), "time_ids": CondField((SIZES,))}
        return found

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        if not _Config.model_validate(config).is_xl:
            return {}
        height, width = asked.size
        return {"time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)}

    def of_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        return {"time_ids": sizes.float()}

    def pipeline_of(self, config: Config) -> str:
        return self.pipelines[_Config.model_validate(config).is_xl]

    def scale_of(self, config: Config) -> float:
        return 5.0 if _Config.model_validate(config).is_xl else self.guidance_scale

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        return {} if whole else {"guidance_scale": 1.0}  # whole: see `for_pipeline`

    def layers(self, network: nn.Module) -> Sequence[str]:
        """The names of the blocks: down_blocks.0, ..., mid_block, up_blocks.0, ..."""
        names = [name for name, _ in network.named_modules()]
        down, up = (
            [name for name in names if name.startswith(part) and name.count(".") == 1]
            for part in ("down_blocks.", "up_blocks.")
        )
        return [*down, *(["mid_block"] if "mid_block" in names else []), *up]

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_embedding"]

    def time_width(self, config: Config) -> int:
        own = _Config.model_validate(config)
        return own.time_embedding_dim or own.block_out_channels[0] * (2 if own.time_embedding_type == "fourier" else 4)

    def critic_width(self, config: Config) -> int:
        return _Config.model_validate(config).block_out_channels[-1]

    def for_pipeline(self, network: nn.Module) -> None:
        first = network.time_embedding.linear_1
        layer = nn.Linear(IGNORED, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype)
        network.time_embedding.cond_proj = layer
        nn.init.zeros_(layer.weight).requires_grad_(False)
        network.register_to_config(time_cond_proj_dim=IGNORED)

    def from_pipeline(self, network: nn.Module, path: Path) -> None:
        if (layer := network.time_embedding.cond_proj) is None:
            return
        if layer.weight.any():
            raise _refused(path, "time_cond_proj_dim", layer.in_features)
        network.time_embedding.cond_proj = None
        network.register_to_config(time_cond_proj_dim=None)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        added = {name: cond[name] for name in ("text_embeds", "time_ids") if name in cond}
        states = cond["encoder_hidden_states"]
        output: Tensor = network(
            x_t, time, encoder_hidden_states=states, added_cond_kwargs=added or None, return_dict=False
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        if not _has_two_encoders(pipeline):
            states, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, False)
            return {"encoder_hidden_states": states}
        states, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def encode_null(self, pipeline: DiffusionPipeline, negative: str) -> dict[str, Tensor]:
        """With SDXL, the unconditional call gets zeros in place of the embedding of "", if its pipeline says so."""
        rows = self.encode(pipeline, [negative])
        if not negative and _has_two_encoders(pipeline) and pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(each) for name, each in rows.items()}
        return rows


def _has_two_encoders(pipeline: DiffusionPipeline) -> bool:
    return "text_encoder_2" in pipeline.components


def _refused(path: Path, name: str, value: object) -> InputError:
    return InputError(
        f"{path}: {name}={short(str(value))}: the network takes {REFUSED[name]}, which is not supported; valid: null"
    )


def _supported(config: Config, path: Path) -> _Config:
    """The config. InputError if the network is called in a way that is not supported."""
    own = checked(_Config, config, path)
    given = own.model_dump()
    for name in REFUSED:
        if given[name] is not None and (name, given[name]) != ("time_cond_proj_dim", IGNORED):
            raise _refused(path, name, given[name])
    if own.addition_embed_type not in (None, "text_time"):
        raise InputError(
            f"{path}: addition_embed_type={short(str(own.addition_embed_type))}: the network takes more than a prompt, "
            "which is not supported; valid: null (Stable Diffusion 1.x, 2.x), text_time (SDXL)"
        )
    if own.is_xl and own.pooled_width is None:
        raise InputError(
            f"{path}: addition_embed_type=text_time needs addition_time_embed_dim, and a larger "
            f"projection_class_embeddings_input_dim than {SIZES} times that; got {own.addition_time_embed_dim} and "
            f"{own.projection_class_embeddings_input_dim}; copy or download it again"
        )
    if own.in_channels != own.out_channels:
        inputs = {9: " (as for inpainting)", 8: " (as for InstructPix2Pix)"}.get(own.in_channels, "")
        raise InputError(
            f"{path}: in_channels={own.in_channels}{inputs}, out_channels={own.out_channels}: the network takes "
            "an image besides the noisy latents, which is not supported; valid: networks in which both are equal"
        )
    return own


ARCHITECTURE = UNetCondition()
