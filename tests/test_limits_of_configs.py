"""Configs of untrusted checkpoints: options that would make too many modules or too large tables are refused."""

import json
from pathlib import Path

import pytest
from latent import load

from distill.convert import conversion
from distill.core.errors import InputError
from distill.teachers import architectures, weights
from distill.teachers.codecs import LatentCodec

REFUSED = [
    ("FluxTransformer2DModel", {"num_layers": 10**9}, "num_layers=1000000000; valid: less than or equal to 256"),
    ("SD3Transformer2DModel", {"num_layers": -1}, "num_layers=-1; valid: greater than or equal to 0"),
    ("ZImageTransformer2DModel", {"n_refiner_layers": 300}, "n_refiner_layers=300; valid: less than or equal to 256"),
    ("WanTransformer3DModel", {"rope_max_seq_len": 10**7}, "rope_max_seq_len=10000000; valid: less than or equal"),
    ("Lumina2Transformer2DModel", {"axes_lens": [10**7] * 3}, "axes_lens=[10000000, 10000000, 10000000]; valid: "),
    (
        "PixArtTransformer2DModel",
        {"sample_size": 8192},
        "sample_size=8192; valid for patch_size=2: at most 1024",
    ),
    ("UNet2DConditionModel", {"sample_size": 8, "block_out_channels": [1] * 20_000}, "block_out_channels=[1, 1, "),
    ("UNet2DConditionModel", {"sample_size": 8, "layers_per_block": 10**6}, "layers_per_block=1000000; valid: "),
    (
        "UNet2DConditionModel",
        {"sample_size": 8, "transformer_layers_per_block": [[10**6]]},
        "transformer_layers_per_block=[[1000000]]; valid: ",
    ),
]


def config(folder: Path, name: object, **options) -> Path:
    (folder / "config.json").write_text(json.dumps({"_class_name": name, "patch_size": 2} | options))
    return folder


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_a_network_that_is_too_large_is_refused(tmp_path, name, options, said):
    patch = {"WanTransformer3DModel": {"patch_size": [1, 2, 2]}}.get(name, {})
    folder = config(tmp_path, name, **patch, **options)
    with pytest.raises(InputError) as error:
        weights.without_weights(folder, json.loads((folder / "config.json").read_text()), architectures.class_of(name))
    assert str(error.value).startswith(f"{folder / 'config.json'}: ") and said in str(error.value)


def test_a_class_that_is_named_by_a_list_is_refused(tmp_path):
    with pytest.raises(InputError, match="network class .* is not supported"):
        load(config(tmp_path, ["a"]))
    with pytest.raises(InputError, match="autoencoder class .* is not supported"):
        LatentCodec.of(config(tmp_path, ["a"]))


def test_an_autoencoder_has_few_levels(tmp_path):
    with pytest.raises(InputError, match="block_out_channels=.*; valid: .* at most 16"):
        LatentCodec.of(config(tmp_path, "AutoencoderKL", block_out_channels=[1] * 20_000))


def test_convert_refuses_a_class_that_is_named_by_a_list(tmp_path):
    with pytest.raises(InputError, match="network class .* is not supported"):
        conversion.described(tmp_path / "model.bin", config(tmp_path, ["a"]))


@pytest.mark.parametrize(
    ("name", "options", "size", "said"),
    [
        ("Lumina2Transformer2DModel", {"axes_lens": [300, 8, 9]}, (18, 16), "latents of 18x16, but the network"),
        ("ZImageTransformer2DModel", {"axes_lens": [300, 8, 9]}, (16, 18), "latents of 16x18, but the network"),
        ("WanTransformer3DModel", {"rope_max_seq_len": 8}, (3, 16, 18), "latents of 16x18, but the network"),
        ("WanTransformer3DModel", {"rope_max_seq_len": 8}, (9, 16, 16), "latents of 9 frames, but the network"),
    ],
)
def test_sizes_for_which_a_network_has_no_positions_are_refused(tmp_path, name, options, size, said):
    """The network is tested with a smaller sample, which would not show it."""
    with pytest.raises(InputError, match=f"{said} .* has positions for"):
        architectures.known()[name].latent_shape(options, tmp_path, size)
