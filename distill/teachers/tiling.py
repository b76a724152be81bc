"""Decoding of large latents in tiles, by what the autoencoder classes of diffusers have for it.

Tiles overlap by a quarter and are blended, so that memory does not grow with the height and width of the sample. The
result differs a little from that of decoding all at once, since attention and group norms of a tile see nothing of the
others. Videos are not divided in time.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import ModelMixin

TILE = 768  # pixels per side of a tile
LONG_TILE = 512  # the same for autoencoders whose memory grows with the number of frames
STRIDE = 0.75  # from one tile to the next, as a part of a tile


def can_tile(vae: ModelMixin) -> bool:
    """Whether an autoencoder of diffusers can decode in tiles."""
    return "use_tiling" in vars(vae)


@contextmanager
def in_tiles(vae: ModelMixin, tile: int) -> Iterator[None]:
    """Context manager: an autoencoder that `can_tile` decodes in tiles. tile: pixels per side."""
    own = {name: value for name, value in _settings(vae, tile).items() if name in vars(vae)}
    before = {name: vars(vae)[name] for name in own}
    for name, value in own.items():
        setattr(vae, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)


def _settings(vae: ModelMixin, tile: int) -> Mapping[str, object]:
    """The attributes of all classes; each has some of them."""
    levels = len(vae.config.get("block_out_channels", (0,)))
    latents = tile // vars(vae).get("spatial_compression_ratio", 1 << (levels - 1))
    stride = int(STRIDE * tile)
    return {
        "use_tiling": True,
        "tile_sample_min_size": tile,
        "tile_latent_min_size": latents,
        "tile_overlap_factor": 1 - STRIDE,
        "tile_sample_min_height": tile,
        "tile_sample_min_width": tile,
        "tile_latent_min_height": latents,
        "tile_latent_min_width": latents,
        "tile_sample_stride_height": stride,
        "tile_sample_stride_width": stride,
    }
