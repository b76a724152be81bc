"""EDM's checkpoints: what a pickled module says about its network, and the names of its weights.

The layout: an EDMPrecond module holds a SongUNet or DhariwalUNet as `model`. Both were stored with the arguments of
their constructors.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat

from distill.core.errors import InputError
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.teachers.architectures.edm_unet import EdmConfig
from distill.teachers.read import Read, checked, short

WRAPPER = "EDMPrecond"
OTHERS = {  # EDM's other wrappers, and what they are
    "VPPrecond": "the baseline with a variance preserving schedule",
    "VEPrecond": "the baseline with a variance exploding schedule",
    "iDDPMPrecond": "the schedule of improved DDPM",
    "Precond": "the network of EDM2",
}
CLASSES = {"SongUNet": SongUNet2DModel, "DhariwalUNet": DhariwalUNet2DModel}
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # the noise levels at which EDM samples (Karras et al. 2022, table 1)

# Their argument -> our option. Those that are left out do not change what the network computes when it samples.
OPTIONS = {
    "img_resolution": "sample_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "label_dim": "num_classes",
    "model_channels": "base_channels",
    "channel_mult": "channel_multipliers",
    "channel_mult_emb": "embedding_multiplier",
    "num_blocks": "layers_per_block",
    "attn_resolutions": "attention_sizes",
    "dropout": "dropout",
    "label_dropout": "label_dropout",
    "embedding_type": "time_embedding_type",
    "channel_mult_noise": "time_channels_multiplier",
    "encoder_type": "encoder_type",
    "resample_filter": "filter_taps",
}
IGNORED = {"augment_dim", "decoder_type"}
TOP = {
    "map_noise.freqs": "frequencies",
    "map_label": "class_embedding",
    "map_layer0": "time_in",
    "map_layer1": "time_out",
    "out_norm": "norm_out",
    "out_conv": "conv_out",
}
LAYERS = {
    "norm0": "norm_in",
    "conv0": "conv_in",
    "affine": "embedding",
    "norm1": "norm_out",
    "conv1": "conv_out",
    "skip": "skip",
    "norm2": "attention.norm",
    "qkv": "attention.qkv",
    "proj": "attention.out",
}
PLACE = re.compile(r"(?P<way>enc|dec)\.(?P<side>\d+)x(?P=side)_(?P<kind>[a-z_]+)(?P<number>\d*)\.(?P<rest>.+)")


class _Network(Read):
    """A module as `unpickle.StandIn.facts` describes it."""

    class_name: str = ""
    arguments: list[Any] = []
    options: dict[str, Any] = {}
    values: dict[str, Any] = {}
    modules: dict[str, dict[str, Any]] = {}


class _Supported(Read):
    """Those arguments of their constructors that `EdmConfig` does not check."""

    img_resolution: int
    label_dim: Annotated[int, Field(ge=0)] = 0
    decoder_type: Literal["standard"] = "standard"


class _Levels(Read):
    sigma_data: PositiveFloat = 0.5


def is_module(facts: Mapping[str, Any]) -> bool:
    """Whether a module is one of EDM's networks, even if it is not supported."""
    return facts.get("class_name") in (WRAPPER, *OTHERS, *CLASSES)


def config_of(facts: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, scheduler_config.json) of a pickled module. InputError if it is not an EDM network."""
    wrapper = checked(_Network, dict(facts), file)
    if wrapper.class_name != WRAPPER:
        told = f", {OTHERS[wrapper.class_name]}" if wrapper.class_name in OTHERS else ""
        raise InputError(
            f"{file}: its network is a {short(wrapper.class_name)}{told}, which is not supported; valid: {WRAPPER}"
        )
    network = checked(_Network, wrapper.modules.get("model", {}), file)
    if network.class_name not in CLASSES:
        raise InputError(
            f"{file}: its network is a {short(network.class_name) or 'module without a name'}, which is not supported; "
            f"valid: {', '.join(CLASSES)}"
        )
    unknown = sorted(network.options.keys() - OPTIONS.keys() - IGNORED)
    if unknown or network.arguments:
        raise InputError(
            f"{file}: its network was made with arguments that are not known "
            f"({short(', '.join(unknown)) or 'without names'}); valid: {', '.join([*OPTIONS, *sorted(IGNORED)])}"
        )
    supported, network_class = checked(_Supported, network.options, file), CLASSES[network.class_name]
    parameters = inspect.signature(network_class.__init__).parameters.values()
    config = {each.name: each.default for each in parameters if each.default is not each.empty}
    config |= {OPTIONS[name]: value for name, value in network.options.items() if name in OPTIONS}
    config["num_classes"] = supported.label_dim or None
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
    checked(EdmConfig, config, file)
    scheduler = {
        "_class_name": "EDMEulerScheduler",
        "prediction_type": "epsilon",
        "sigma_data": checked(_Levels, wrapper.values, file).sigma_data,
        "sigma_max": SIGMA_MAX,
        "sigma_min": SIGMA_MIN,
    }
    return {"_class_name": network_class.__name__, **config}, scheduler


def name_of(theirs: str, side: int, levels: int) -> str | None:
    """Our name of one of their weights; None if we do not have it. An unknown name stays as it is.

    side: height of the samples.
    """
    theirs = theirs.removeprefix("model.")
    if theirs.startswith("map_augment.") or theirs.endswith("resample_filter"):
        return None
    for name, ours in TOP.items():
        if theirs == name or theirs.startswith(f"{name}."):
            return ours + theirs.removeprefix(name)
    place = PLACE.fullmatch(theirs)
    if place is None:
        return theirs
    level = {side >> each: each for each in range(levels)}.get(int(place["side"]), levels)
    first, _, rest = place["rest"].partition(".")
    within = f"{LAYERS.get(first, first)}.{rest}" if rest else first
    number, blocks = (
        place["number"],
        f"down_blocks.{level}" if place["way"] == "enc" else f"up_blocks.{levels - 1 - level}",
    )
    return {
        "conv": f"conv_in.{within}",
        "aux_norm": f"norm_out.{within}",
        "aux_conv": f"conv_out.{within}",
        "aux_residual": f"{blocks}.image.conv.{within}",
        "down": f"{blocks}.change.{within}",
        "up": f"{blocks}.change.{within}",
        "in": f"mid_block.blocks.{number}.{within}",
        "block": f"{blocks}.blocks.{number}.{within}",
    }.get(place["kind"], theirs)
