"""DiT: a transformer on latents that is conditioned on ImageNet classes."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from distill.core.errors import InputError
from distill.flow.conditioning import of_classes
from distill.protocols import Cond, Conditioning
from distill.teachers.convention import Asked, Convention, size_of
from distill.teachers.read import Config, Read, Side, Size, checked


class _Config(Read):
    sample_size: Side = 32
    patch_size: Size = 2
    in_channels: Size = 4
    out_channels: Size | None = None
    num_attention_heads: Size = 16
    attention_head_dim: Size = 72
    num_embeds_ada_norm: Size = 1000


class DiT(Convention):
    title = "DiT"
    networks = ("DiTTransformer2DModel",)
    pipelines = ("DiTPipeline",)
    prediction = "epsilon"
    conditions = "classes"
    guidance_scale = 4.0

    def latent_shape(self, config: Config, path: Path, latent: tuple[int, ...] | None) -> tuple[int, ...]:
        own = checked(_Config, config, path)
        check_variance(own.in_channels, own.out_channels, path)
        height, width = size_of(latent, (own.sample_size, own.sample_size), path, own.patch_size)
        if height != width:
            raise InputError(
                f"teacher.size: height and width give latents of {height}x{width}, but the network ({path}) makes "
                "squares only; give equal sides"
            )
        return (own.in_channels, height, width)

    def conditioning(self, config: Config, path: Path, asked: Asked) -> Conditioning:
        for name, value in {"conditions": asked.conditions, "embedded_guidance": asked.embedded_guidance}.items():
            if value is not None:
                raise InputError(
                    f"teacher.{name} has no effect: the network ({path}) is conditioned on classes only; remove it"
                )
        classes = _Config.model_validate(config).num_embeds_ada_norm
        if asked.null_class not in (None, classes):
            raise InputError(
                f"teacher.null_class={asked.null_class}: {path} has {classes} classes and one more embedding for the "
                f"unconditional call; valid: {classes}, which is the default"
            )
        return of_classes(classes, classes)

    def time_layers(self, network: nn.Module) -> Sequence[str]:
        """Each block embeds the time and the class by itself."""
        return [f"{name}.norm1.emb" for name in self.layers(network)]

    def with_velocity(self, config: Config) -> Config:
        """The output is as wide as before; `call` takes its first half."""
        channels = 2 * _Config.model_validate(config).in_channels
        return {**config, "in_channels": channels, "out_channels": channels}

    def settled(self, network: nn.Module) -> None:
        """In train() mode, each block would replace classes by the null class at random."""
        for name in self.time_layers(network):
            network.get_submodule(f"{name}.class_embedder").dropout_prob = 0.0

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, cond: Cond) -> Tensor:
        output: Tensor = network(x_t, timestep=time, class_labels=cond["class_labels"], return_dict=False)[0]
        return output.chunk(2, dim=1)[0]

    def encode(self, pipeline: DiffusionPipeline, prompts: list[str]) -> dict[str, Tensor]:
        raise InputError("this pipeline is conditioned on classes, not on prompts, so there is nothing to encode")


def check_variance(channels: int, output: int | None, path: Path) -> None:
    """InputError unless half of the network's output is the prediction, and half the variance, which is not used."""
    if output != 2 * channels:
        raise InputError(
            f"{path}: in_channels={channels}, out_channels={output}; valid: networks with a learned variance, whose "
            f"out_channels are twice their in_channels, {2 * channels}"
        )


ARCHITECTURE = DiT()
