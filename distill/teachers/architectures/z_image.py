"""Z-Image: a transformer on lists of latents and of prompts without padding, with time 1 - t and output -v."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.protocols import Cond, LayerOutput
from distill.teachers.convention import CondField, Convention, Weights, of_one_length, size_of
from distill.teachers.read import Config, Read, Size, checked

TOKENS = 512  # of a prompt, at most
PATCH = 2
TIME_WIDTH = 256  # at most

Patches = Annotated[Sequence[Size], Field(min_length=1, max_length=8)]


class _Config(Read):
    in_channels: Size = 16
    dim: Size = 3840
    cap_feat_dim: Size = 2560
    all_patch_size: Patches = (PATCH,)
    all_f_patch_size: Patches = (1,)
    axes_lens: Annotated[Sequence[Size], Field(min_length=3, max_length=3)] = (1024, 512, 512)
    siglip_feat_dim: Size | None = None


class ZImage(Convention):
    title = "Z-Image, Z-Image Turbo"
    networks = ("ZImageTransformer2DModel",)
    pipelines = ("ZImagePipeline",)
    prediction = "velocity"
    passes = "sigmas"
    guidance_scale = 6.0  # the pipeline's is 5: it computes c + scale (c - u)
    size_options = ("n_layers", "n_refiner_layers", "n_heads")

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        if own.siglip_feat_dim is not None:
            raise InputError(
                f"{path}: siglip_feat_dim={own.siglip_feat_dim}: this network is also conditioned on images, which is "
                "not supported; valid: networks of text to image"
            )
        patches = [list(each) for each in (own.all_patch_size, own.all_f_patch_size)]
        if patches != [[PATCH], [1]]:
            raise InputError(
                f"{path}: all_patch_size={patches[0]}, all_f_patch_size={patches[1]}; valid: [{PATCH}] and [1]"
            )
        return (own.in_channels, *size_of(latent, (128, 128), path, PATCH, min(own.axes_lens[1:])))

    def small(self, config: Config, shape: tuple[int, ...]) -> tuple[int, ...]:
        return super().small({"patch_size": PATCH}, shape)

    def fields(self, config: Config) -> Mapping[str, CondField]:
        return {
            "cap_feats": CondField((None, _Config.model_validate(config).cap_feat_dim)),
            "cap_feats_mask": CondField((None,), torch.bool),
        }

    def unguided(self, config: Config, *, whole: bool) -> Mapping[str, float]:
        return {"guidance_scale": 0.0}

    def layers(self, network: nn.Module) -> Sequence[str]:
        return [name for name, _ in network.named_modules() if name.startswith("layers.") and name.count(".") == 1]

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        return ["t_embedder"]

    def time_width(self, config: Config) -> int:
        return min(_Config.model_validate(config).dim, TIME_WIDTH)

    def critic_width(self, config: Config) -> int:
        return _Config.model_validate(config).dim

    def resized(self, config: Config, changes: Config) -> Config:
        """The width of a head is that of its positions. The network does not use n_kv_heads."""
        found = super().resized(config, changes)
        heads = found["n_heads"]
        return {**found, "dim": heads * sum(found["axes_dims"]), "n_kv_heads": heads}

    def with_velocity(self, config: Config) -> Config:
        """This class has as many channels out as in. So x_t and the velocity are two frames, in one patch."""
        return {**config, "all_f_patch_size": [2]}

    def widened(self, config: Config, weights: Weights, wider: Weights) -> dict[str, Tensor]:
        """The layers that read and write patches of two frames, the first of which is x_t, have other names."""
        found = {name.replace(f"{PATCH}-1.", f"{PATCH}-2."): weight for name, weight in weights.items()}
        for name, weight in found.items():
            if weight.shape != wider[name].shape:
                dim = 1 if name.startswith("all_x_embedder.") else 0
                found[name] = torch.cat([weight, torch.zeros_like(weight)], dim=dim)
        return found

    def of_image(self, network: nn.Module, output: LayerOutput, x_t: Tensor, cond: Cond) -> Tensor:
        """The tokens of the image come before those of the prompt."""
        assert isinstance(output, Tensor)
        return output[:, : x_t.shape[-2] // PATCH * (x_t.shape[-1] // PATCH)]

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        frames = x_t.shape[1] // network.config["in_channels"]  # 1, or 2 of `with_velocity`
        x = x_t.unflatten(1, (frames, -1)).transpose(1, 2)  # [B, C, frames, h, w]
        prompts = [states[mask.bool()] for states, mask in zip(cond["cap_feats"], cond["cap_feats_mask"], strict=True)]
        output = network(list(x), 1 - time / 1000, prompts, patch_size=PATCH, f_patch_size=frames, return_dict=False)[0]
        return -torch.stack(list(output))[:, :, 0]

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        # The pipeline changes the list that it is given.
        states, _ = pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        present = [torch.ones(len(each), dtype=torch.bool, device=each.device) for each in states]
        longest = max(map(len, states))
        return {"cap_feats": of_one_length(states, longest), "cap_feats_mask": of_one_length(present, longest)}


ARCHITECTURE = ZImage()
