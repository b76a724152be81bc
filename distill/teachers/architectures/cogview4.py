"""CogView4: a transformer on latents that is conditioned on sizes, and called with the time before the time shift."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, of_one_length, size_of
from distill.teachers.read import Config, Read, Size, checked

BASE_SHIFT, MAX_SHIFT, BASE_TOKENS = 0.25, 0.75, 256  # of the time shift with which the network was trained


class _Config(Read):
    sample_size: Size = 128
    patch_size: Size = 2
    in_channels: Size = 16
    out_channels: Size = 16
    attention_head_dim: Size = 40
    num_attention_heads: Size = 64
    text_embed_dim: Size = 4096
    time_embed_dim: Size = 512


class PaddedText:
    """The attention of CogView4 for prompts of different lengths: no token looks at the padding of the text.

    A processor for the `Attention` of diffusers. The one that it replaces does not hide masked tokens.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The image [B, S, width], the text [B, L, width] and its mask [B, L] -> changes of the image and the text."""
        tokens = encoder_hidden_states.shape[1]
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (
            layer(joined).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            torch.cat(
                [x[:, :, :tokens], apply_rotary_emb(x[:, :, tokens:], image_rotary_emb, use_real_unbind_dim=-2)], 2
            )
            for x in (attn.norm_q(query), attn.norm_k(key))
        )
        seen = nn.functional.pad(attention_mask, (0, hidden_states.shape[1]), value=True)[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        output: Tensor = attn.to_out[1](attn.to_out[0](mixed.transpose(1, 2).flatten(2)))
        return output[:, tokens:], output[:, :tokens]


class CogView4(Convention):
    title = "CogView4"
    networks = ("CogView4Transformer2DModel",)
    pipelines = ("CogView4Pipeline",)
    scheduler: Config = {
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "time_shift_type": "linear",
        "base_shift": BASE_SHIFT,
        "max_shift": MAX_SHIFT,
        "base_image_seq_len": BASE_TOKENS,
    }
    prediction = "velocity"
    passes = "timesteps"
    guidance_scale = 5.0

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        return (own.out_channels, *size_of(latent, (own.sample_size, own.sample_size), path, own.patch_size))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        states = CondField((None, _Config.model_validate(config).text_embed_dim))
        # The mask is true for the tokens that the pipeline would use for this prompt alone.
        return {"encoder_hidden_states": states, "attention_mask": CondField((None,), torch.bool)}

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        size = torch.tensor(asked.size, dtype=torch.float32)
        return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(2)}

    def of_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        original, crop, sample = sizes.float().split(2, dim=1)
        return {"original_size": original, "target_size": sample, "crop_coords": crop}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_condition_embed"]

    def time_width(self, config: Config) -> int:
        return _Config.model_validate(config).time_embed_dim

    def critic_width(self, config: Config) -> int:
        own = _Config.model_validate(config)
        return own.num_attention_heads * own.attention_head_dim

    def settled(self, network: nn.Module) -> None:
        for block in network.transformer_blocks:
            block.attn1.set_processor(PaddedText())

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(
            hidden_states=x_t,
            encoder_hidden_states=cond["encoder_hidden_states"],
            timestep=unshifted(time, x_t.shape[-2:].numel() // network.config["patch_size"] ** 2),
            attention_mask=cond["attention_mask"],
            original_size=cond["original_size"],
            target_size=cond["target_size"],
            crop_coords=cond["crop_coords"],
            return_dict=False,
        )[0]
        return output

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        """Each prompt is encoded by itself, because it looks at its padding, which depends on the longest prompt."""
        rows = [pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)[0][0] for prompt in prompts]
        masks = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in rows]
        longest = max(map(len, rows))
        return {"encoder_hidden_states": of_one_length(rows, longest), "attention_mask": of_one_length(masks, longest)}


def unshifted(time: Tensor, tokens: int) -> Tensor:
    """The time with which the network is called, [B]; both in 0 to 1000.

    The network was trained with times u and noise levels t = mu / (mu + 1/u - 1), where mu grows with the number of
    tokens of the image. It is called with u, not with t.
    """
    mu = BASE_SHIFT + MAX_SHIFT * math.sqrt(tokens / BASE_TOKENS)
    t = time / 1000
    return 1000 * t / (t + mu * (1 - t))


ARCHITECTURE = CogView4()
