"""The codecs of latent-space teachers: their autoencoder, from pixels to the latents that the network works on.

An autoencoder is loaded when it is first used. Latents are the mean of its posterior, not a sample of it.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Self

import diffusers
import torch
from pydantic import Field, PositiveFloat, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from distill.core import file_checksums
from distill.core.errors import InputError
from distill.flow.codecs import LatentScaling, together
from distill.teachers import files, tiling, weights
from distill.teachers.layout import CONFIG
from distill.teachers.limits import NetworkLimits
from distill.teachers.read import Config, Read, Size, checked, lasting, parse, short

COLOURS = 3  # channels of pixels
TOGETHER = 4 << 30  # bytes of memory in which several samples are decoded together
WHOLE = 16 << 30  # bytes of memory above which one sample is decoded in tiles
MAX_CHANNELS = 1 << 12


@dataclass(frozen=True)
class Kind:
    """A class of autoencoders. Its latents z become (z - shift) scale; both are read from its config.

    levels: the option that lists its levels, each but the first of which halves the sides.
    factors: its config -> (temporal, spatial), if it has no such option.
    per_channel: shift and scale are latents_mean and scaling_factor / latents_std, of each channel. This also holds for
    other classes, if their config has these numbers.
    frames: whether it takes videos [B, C, F, H, W]. single: it does, but the network works on single frames.
    patches: 2x2 patches become channels, which are normalised by the batch norm of the autoencoder.
    quantized: latents are rounded to the entries of its codebook when they are decoded.
    decoding: bytes for each pixel while one sample is decoded in float32, counted for the published autoencoders.
    of_frames: whether the pixels of all frames count; False: videos are decoded a few frames at a time.
    spread: whether it returns a distribution of latents, and not only one z.
    """

    levels: str = "block_out_channels"
    factors: Callable[[Config], tuple[int, int]] | None = None
    per_channel: bool = False
    frames: bool = False
    single: bool = False
    patches: bool = False
    quantized: bool = False
    spread: bool = True
    decoding: int = 3100
    of_frames: bool = False


def _ltx(config: Config) -> tuple[int, int]:
    scaled = sum(map(bool, config.get("spatio_temporal_scaling", (True, True, True, False))))
    halved = {"temporal": config.get("patch_size_t", 1) << scaled, "spatial": config.get("patch_size", 4) << scaled}
    temporal, spatial = (config.get(f"{name}_compression_ratio") or factor for name, factor in halved.items())
    return temporal, spatial


def _wan(config: Config) -> tuple[int, int]:
    levels = config.get("temperal_downsample", (False, True, True))
    return 1 << sum(map(bool, levels)), (config.get("patch_size") or 1) << len(levels)


KINDS: Mapping[str, Kind] = {
    "AutoencoderDC": Kind(levels="encoder_block_out_channels", spread=False, decoding=2500),
    "AutoencoderKL": Kind(),
    "AutoencoderKLFlux2": Kind(patches=True),
    "AutoencoderKLLTXVideo": Kind(factors=_ltx, per_channel=True, frames=True, decoding=140, of_frames=True),
    "AutoencoderKLQwenImage": Kind(factors=_wan, per_channel=True, frames=True, single=True, decoding=7000),
    "AutoencoderKLWan": Kind(factors=_wan, per_channel=True, frames=True, decoding=20_000),
    "VQModel": Kind(quantized=True, spread=False),
}


class _Scaling(Read):
    """The options that convert between the latents of an autoencoder and those of the network."""

    scaling_factor: PositiveFloat = 1.0
    shift_factor: float | None = None
    latents_mean: Annotated[list[float], Field(max_length=MAX_CHANNELS)] | None = None
    latents_std: Annotated[list[PositiveFloat], Field(max_length=MAX_CHANNELS)] | None = None
    vq_embed_dim: Size | None = None
    latent_channels: Size | None = None
    z_dim: Size | None = None

    @property
    def channels(self) -> int:
        return self.vq_embed_dim or self.latent_channels or self.z_dim or 4

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> Self:
        for name in ("latents_mean", "latents_std"):
            given, other = getattr(self, name), self.latents_std if name == "latents_mean" else self.latents_mean
            if given is None and other is not None or given is not None and len(given) != self.channels:
                told = {"name": name, "count": "no" if given is None else len(given), "channels": self.channels}
                message = "{name} has {count} numbers; valid: one for each of the {channels} channels of its latents"
                raise PydanticCustomError("scaling", message, told)
        return self


@dataclass(frozen=True)
class LatentCodec:
    """Implements `protocols.Codec` by an autoencoder in a folder of a pipeline."""

    folder: Path
    config: Config
    kind: Kind
    variant: str | None = None  # of its weights, if there is such a variant

    @classmethod
    def of(cls, folder: Path, variant: str | None = None) -> "LatentCodec":
        """InputError if the autoencoder in this folder is of an unknown class, or its options are damaged."""
        config = parse(folder / CONFIG)
        name = config.get("_class_name")
        if not isinstance(name, str) or name not in KINDS:
            raise InputError(
                f"{folder / CONFIG}: autoencoder class {short(str(name))} is not supported; valid: {', '.join(KINDS)}"
            )
        checked(NetworkLimits, config, folder / CONFIG)
        checked(_Scaling, config, folder / CONFIG)
        codec = cls(folder, config, KINDS[name], variant)
        try:
            assert all(each >= 1 for each in codec.factors)
        except (TypeError, AssertionError, AttributeError) as error:
            raise InputError(f"{folder / CONFIG}: its levels are damaged; copy or download it again") from error
        return codec

    @property
    def is_identity(self) -> bool:
        return False

    @property
    def has_spread(self) -> bool:
        return self.kind.spread

    @cached_property
    def digest(self) -> str:
        """SHA-256 over configuration and weights. The files are read, but the autoencoder is not loaded."""
        digests = [file_checksums.sha256(path) for path in self.paths]
        identity = {"config": lasting(self.config), "weights": digests}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @property
    def factors(self) -> tuple[int, int]:
        """How many frames, and how many pixels per side, become one: (temporal, spatial)."""
        if self.kind.factors is not None:
            return self.kind.factors(self.config)
        levels = len(self.config.get(self.kind.levels, (64,)))
        return 1, 1 << (levels - 1 + self.kind.patches)

    def shape(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        channels = checked(_Scaling, self.config, self.folder / CONFIG).channels
        return (channels * (4 if self.kind.patches else 1), *latent_size(pixels[1:], self.factors, str(self.folder)))

    def encode(self, pixels: Tensor) -> Tensor:
        return _in_blocks(lambda part: self.scaling()(self._encoded(part)[0]), pixels, together(pixels.shape[1:]))

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents of pixels [B, ...], as the network takes them."""

        def convert(part: Tensor) -> Tensor:
            mean, spread = self._encoded(part)
            assert spread is not None, "only for codecs with `has_spread`"
            return torch.stack([self.scaling()(mean), self.scaling().log_variance(spread)], dim=1)

        mean, log_variance = _in_blocks(convert, pixels, together(pixels.shape[1:])).unbind(1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents [B, ...], decoded a few at a time, and in tiles if they are large.

        Gradients flow to the latents.
        """
        shape = latents.shape[1:]
        memory = self._decoding(shape)
        block = max(1, min(self.together(shape), TOGETHER // memory))
        vae = self._vae(latents.device)
        if latents.requires_grad and vae._supports_gradient_checkpointing:
            vae.enable_gradient_checkpointing()  # otherwise the gradient would need many times the memory
        tile = tiling.LONG_TILE if self.kind.of_frames else tiling.TILE
        with tiling.in_tiles(vae, tile) if memory > WHOLE and tiling.can_tile(vae) else nullcontext():
            return _in_blocks(self._decoded, latents, block)

    def _decoding(self, shape: tuple[int, ...]) -> int:
        """About how many bytes it takes to decode one sample of this shape at once."""
        pixels = self.pixels(shape)[1:]
        return self.kind.decoding * math.prod(pixels if self.kind.of_frames else pixels[-2:])

    def pixels(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (COLOURS, *pixel_size(shape[1:], self.factors))

    def together(self, shape: tuple[int, ...]) -> int:
        return together(self.pixels(shape))

    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Latents as the autoencoder returns them, the mean if they have a distribution, and their log variance."""
        vae, kind = self._vae(pixels.device), self.kind
        x = pixels.float()
        encoded: Any = vae.encode(x[:, :, None] if kind.frames and x.ndim == 4 else x)
        if kind.quantized:
            return encoded.latents, None
        if not kind.spread:
            return encoded.latent, None
        mean, log_variance = encoded.latent_dist.mean, encoded.latent_dist.logvar
        return (mean[:, :, 0], log_variance[:, :, 0]) if kind.single else (mean, log_variance)

    def _decoded(self, latents: Tensor) -> Tensor:
        vae, kind = self._vae(latents.device), self.kind
        z = self.scaling().inverse(latents.float())
        z = z[:, :, None] if kind.single else z
        # LTX-Video 0.9.1 and later can decode latents with noise, whose time is an argument; ours have none.
        time = (z.new_zeros(len(z)),) if self.config.get("timestep_conditioning") else ()
        decoded: Tensor = vae.decode(z, *time).sample
        return decoded[:, :, 0] if kind.single else decoded

    def scaling(self) -> LatentScaling:
        """Shift and scale, from the config or from the few numbers that the file of the weights has for them."""
        return self._scaling

    @cached_property
    def _scaling(self) -> LatentScaling:
        if self.kind.patches:
            mean, variance = self._numbers("bn.running_mean", "bn.running_var")
            return LatentScaling(mean, (variance + self._option("batch_norm_eps")).rsqrt(), patches=True)
        factor = self.config.get("scaling_factor", 1.0)
        if self._option("latents_mean") is not None:
            mean, std = (torch.tensor(self._option(f"latents_{name}")) for name in ("mean", "std"))
            return LatentScaling(mean, factor / std)
        if self.kind.per_channel:  # LTX keeps them as buffers
            mean, std = self._numbers("latents_mean", "latents_std")
            return LatentScaling(mean, factor / std)
        shift = self.config.get("shift_factor") or 0.0
        return LatentScaling(torch.tensor([shift]), torch.tensor([float(self._option("scaling_factor"))]))

    def _option(self, name: str) -> Any:  # noqa: ANN401  (what the config has)
        """An option of the config, or its default in the class of the autoencoder; None if the class has none."""
        known = signature(self._class.__init__).parameters
        return self.config.get(name, known[name].default if name in known else None)

    def _numbers(self, *names: str) -> list[Tensor]:
        """Tensors of the weights, by their names, in float32. The other weights are not read."""
        found = {each.name: each.file for each in weights.stored(self.paths)}
        if missing := [name for name in names if name not in found]:
            raise InputError(
                f"{self.folder}: config.json and the weights do not match: missing weights: {', '.join(missing)}"
            )
        return [weights.read(found[name], name).float() for name in names]

    def check(self) -> None:
        """InputError if there are no weights, or if they do not fit the config. Only their headers are read."""
        expected = weights.shapes(self.folder, self.config, self._class)
        weights.fitting(self.folder, weights.stored(self.paths), expected)

    @property
    def _class(self) -> type[diffusers.ModelMixin]:
        found: type[diffusers.ModelMixin] = getattr(diffusers, self.config["_class_name"])
        return found

    @property
    def paths(self) -> list[Path]:
        """The files of its weights. InputError if there are none."""
        return files.weights(self.folder, self.variant, optional=True)

    @cached_property
    def _read(self) -> diffusers.ModelMixin:
        """The autoencoder."""
        vae, _ = weights.network(self.folder, self.config, self._class, self.paths)
        return vae.eval().requires_grad_(False)

    def _vae(self, device: torch.device) -> diffusers.ModelMixin:
        return self._read.to(device)


def _in_blocks(convert: Callable[[Tensor], Tensor], samples: Tensor, block: int) -> Tensor:
    """Converts samples [N, ...], `block` at a time."""
    return torch.cat([convert(part) for part in samples.split(block)]).contiguous()


def latent_size(size: tuple[int, ...], factors: tuple[int, int], where: str) -> tuple[int, ...]:
    """(h, w) or (F, h, w) of the latents of samples of `size` pixels. InputError if they are not whole."""
    temporal, spatial = factors
    if any(side % spatial or side < spatial for side in size[-2:]):
        raise InputError(
            f"{where}: height and width must be multiples of {spatial}, and {size[-2]}x{size[-1]} are not; give "
            "other sides"
        )
    if len(size) == 3 and (size[0] - 1) % temporal:
        raise InputError(
            f"{where}: the number of frames must be 1 more than a multiple of {temporal}, and {size[0]} is not; give "
            f"{(size[0] - 1) // temporal * temporal + 1}"
        )
    frames = [(size[0] - 1) // temporal + 1] if len(size) == 3 else []
    return (*frames, size[-2] // spatial, size[-1] // spatial)


def pixel_size(latent: tuple[int, ...], factors: tuple[int, int]) -> tuple[int, ...]:
    """The inverse of `latent_size`."""
    temporal, spatial = factors
    frames = [(latent[0] - 1) * temporal + 1] if len(latent) == 3 else []
    return (*frames, latent[-2] * spatial, latent[-1] * spatial)
