"""Which sizes of samples a network can be called with, besides its own."""

from pathlib import Path

from torch import nn

from distill.core.errors import InputError
from distill.networks.edm_unet import DhariwalUNet2DModel, SongUNet2DModel
from distill.networks.experts import Experts
from distill.networks.two_times import ToData, TwoNetworks, TwoTimes
from distill.networks.velocity_edm import VelocityEdmUNet2DModel
from distill.teachers.architectures import convention_of
from distill.teachers.architectures.unet import ARCHITECTURE as UNET
from distill.teachers.layout import CONFIG

EDM = (SongUNet2DModel, DhariwalUNet2DModel, VelocityEdmUNet2DModel)


def obstacle(network: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Why a network cannot be called with samples of this shape, [C, h, w]; None: it can.

    A network of a latent-space pipeline takes the sizes that `teacher.size` may have. A U-Net halves the sides at each
    level but the first.
    """
    if isinstance(network, TwoTimes | ToData | TwoNetworks):
        network = network.velocity if isinstance(network, TwoNetworks) else network.network
    if (convention := convention_of(network)) is not None:
        first = network.transformer if isinstance(network, Experts) else network
        try:
            convention.latent_shape(dict(first.config), Path(CONFIG), shape[1:])
        except InputError as error:
            return str(error).removeprefix("teacher.size: ").rsplit("; ", 1)[0]
        return None
    name = type(network).__name__
    if isinstance(network, EDM):
        levels = len(network.config["channel_multipliers"])
    elif isinstance(network, UNET.classes):
        levels = len(network.config["block_out_channels"])
    else:
        return f"its network ({name}) takes samples of one size"
    unit = 1 << (levels - 1)
    if any(side % unit for side in shape[1:]):
        return f"its network ({name}) takes sides that are multiples of {unit}, and {shape[1]}x{shape[2]} are not"
    return None
