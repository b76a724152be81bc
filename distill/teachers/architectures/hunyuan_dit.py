"""HunyuanDiT: a transformer on latents that attends to the embeddings of a prompt by BERT and mT5."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond
from distill.teachers.convention import Asked, CondField, Convention, size_of
from distill.teachers.read import Config, Read, Side, Size, checked

ORIGINAL = 1024  # height and width that the pipeline names as those before cropping, whatever the size is
TRAINED = 64  # sides of the latents for which the positions were made


class _Config(Read):
    in_channels: Size
    patch_size: Size
    sample_size: Side = 32
    hidden_size: Size = 1152
    learn_sigma: bool = True
    cross_attention_dim: Size = 1024
    cross_attention_dim_t5: Size = 2048
    text_len: Size = 77
    text_len_t5: Size = 256
    use_style_cond_and_image_meta_size: bool = True


class HunyuanDiT(Convention):
    title = "HunyuanDiT"
    networks = ("HunyuanDiT2DModel",)
    pipelines = ("HunyuanDiTPipeline",)
    prediction = "v_prediction"
    guidance_scale = 5.0
    size_options = ("num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio")
    width_options = ("hidden_size",)

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if not own.learn_sigma:
            raise InputError(
                f"{path}: learn_sigma=false; valid: true, because the prediction is the first half of the output"
            )
        return (own.in_channels, *size_of(latent, (own.sample_size, own.sample_size), path, own.patch_size))

    def fields(self, config: Config) -> Mapping[str, CondField]:
        own = _Config.model_validate(config)
        found = {
            "encoder_hidden_states": CondField((own.text_len, own.cross_attention_dim)),
            "text_embedding_mask": CondField((own.text_len,), torch.int64),
            "encoder_hidden_states_t5": CondField((own.text_len_t5, own.cross_attention_dim_t5)),
            "text_embedding_mask_t5": CondField((own.text_len_t5,), torch.int64),
        }
        sizes = {"image_meta_size": CondField((6,)), "style": CondField((), torch.int64)}
        return found | (sizes if own.use_style_cond_and_image_meta_size else {})

    def constants(self, config: Config, asked: Asked) -> dict[str, Tensor]:
        if not _Config.model_validate(config).use_style_cond_and_image_meta_size:
            return {}
        sizes = [ORIGINAL, ORIGINAL, *asked.size, 0, 0]
        return {"image_meta_size": torch.tensor(sizes, dtype=torch.float32), "style": torch.tensor(0)}

    def of_sizes(self, sizes: Tensor) -> dict[str, Tensor]:
        original, crop, sample = sizes.float().split(2, dim=1)
        return {"image_meta_size": torch.cat([original, sample, crop], dim=1)}

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["time_extra_emb"]

    def time_width(self, config: Config) -> int:
        return _Config.model_validate(config).hidden_size

    def with_velocity(self, config: Config) -> Config:
        """The output is as wide as before, as it has no variance; `call` takes its first half."""
        return {**config, "in_channels": 2 * _Config.model_validate(config).in_channels, "learn_sigma": False}

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        patch, sizes = network.config.patch_size, cond.get("image_meta_size")
        grid = (x_t.shape[-2] // patch, x_t.shape[-1] // patch)
        output: Tensor = network(
            x_t,
            time.to(x_t.dtype),  # the network computes its embedding in the dtype of the time
            encoder_hidden_states=cond["encoder_hidden_states"],
            text_embedding_mask=cond["text_embedding_mask"],
            encoder_hidden_states_t5=cond["encoder_hidden_states_t5"],
            text_embedding_mask_t5=cond["text_embedding_mask_t5"],
            image_meta_size=None if sizes is None else sizes.contiguous(),
            style=cond.get("style"),
            image_rotary_emb=get_2d_rotary_pos_embed(
                network.config.attention_head_dim, region(*grid, TRAINED // patch), grid, device=x_t.device
            ),
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0]

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, suffix in enumerate(("", "_t5")):
            states, _, mask, _ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, text_encoder_index=i
            )
            found |= {f"encoder_hidden_states{suffix}": states, f"text_embedding_mask{suffix}": mask}
        return found


def region(height: int, width: int, side: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest region with the aspect of height x width in the middle of a square: (top, left), (bottom, right)."""
    scale = side / max(height, width)
    rows, columns = round(scale * height), round(scale * width)
    top, left = round((side - rows) / 2), round((side - columns) / 2)
    return (top, left), (top + rows, left + columns)


ARCHITECTURE = HunyuanDiT()
