"""Chroma: FLUX.1 without the pooled embedding, and with a mask of the text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.flow.packing import grid_ids, packed, unpacked
from distill.protocols import Cond
from distill.teachers.convention import CondField, Convention, Recompute, size_of
from distill.teachers.read import Config, Read, Size, checked


class _Config(Read):
    in_channels: Size = 64
    out_channels: Size | None = None
    joint_attention_dim: Size = 4096
    num_attention_heads: Size = 24
    attention_head_dim: Size = 128
    approximator_num_channels: Size = 64

    @property
    def channels(self) -> int:
        return self.out_channels or self.in_channels


class Chroma(Convention):
    title = "Chroma"
    networks = ("ChromaTransformer2DModel",)
    pipelines = ("ChromaPipeline",)
    prediction = "velocity"
    passes = "sigmas"
    guidance_scale = 5.0
    image_output = 1
    size_options = (
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "approximator_layers",
        "approximator_hidden_dim",
    )

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        channels = checked(_Config, config, path).channels
        return (channels // 4, *size_of(latent, (128, 128), path, patch=2))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        # The mask is 1 for the tokens of the prompt and for one token of the padding, else 0.
        return {
            "encoder_hidden_states": CondField((None, own.joint_attention_dim)),
            "attention_mask": CondField((None,)),
        }

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        # All later embeddings have one row for each of the layers that they modulate.
        return ["time_text_embed.time_proj"]

    def time_width(self, config: Config) -> int:
        return _Config.model_validate(config).approximator_num_channels // 4

    def critic_width(self, config: Config) -> int:
        own = _Config.model_validate(config)
        return own.num_attention_heads * own.attention_head_dim

    def image_tokens(self, network: nn.Module, x_t: Tensor) -> int | None:
        return x_t.shape[-2] // 2 * (x_t.shape[-1] // 2)

    def recomputing(self, network: nn.Module, checkpoint: Recompute) -> Recompute:
        """With the mask of the text in the single blocks, from which the class leaves it out in this case."""
        masks: list[Tensor] = []  # of the current call

        def keep(module: nn.Module, inputs: object, options: Mapping[str, Tensor]) -> None:
            masks[:] = [options["attention_mask"]]

        def block(module: nn.Module, *inputs: object) -> object:
            left_out = len(inputs) == 3  # hidden_states, temb and image_rotary_emb; attention_mask comes next
            return checkpoint(module, *inputs, *(masks if left_out else []))

        network.register_forward_pre_hook(keep, with_kwargs=True)
        return block

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        text, tokens, (height, width) = cond["encoder_hidden_states"], packed(x_t), x_t.shape[-2:]
        output = network(
            hidden_states=tokens,
            timestep=time / 1000,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
            img_ids=grid_ids(height // 2, width // 2, text),
            attention_mask=nn.functional.pad(cond["attention_mask"], (0, tokens.shape[1]), value=1.0),
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        states, _, mask, *_ = pipeline.encode_prompt(prompt=prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "attention_mask": mask}


ARCHITECTURE = Chroma()
