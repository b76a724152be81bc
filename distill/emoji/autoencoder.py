"""A small autoencoder of images: diffusers' AutoencoderKL, trained in one process that can be stopped and go on."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from distill.core.atomic import new_folder, write_atomic
from distill.core.errors import RunError
from distill.core.printing import warn
from distill.core.stop import StopRequest
from distill.flow.draws import Rows, StepDraw, key
from distill.flow.tensor_bytes import in_safetensors
from distill.runs.progress import Progress
from distill.teachers.quiet import without_bars

FACTOR = 4  # by which latents are smaller than images, in height and width
BATCH = 16
STEPS = 3000
LEARNING_RATE = 2e-3
WARM_UP = 100  # steps
KL = 1e-6  # weight of the KL divergence, which keeps the latents near zero; noise of this size is not seen
SAVE_EVERY = 200  # steps
MEASURED = 256  # images whose latents give the scaling factor


def untrained() -> AutoencoderKL:
    """An autoencoder whose latents have 4 channels, and a quarter (1/FACTOR) of the height and width of the images."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key("emoji autoencoder"))
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
        )


def pixels(folder: Path) -> Tensor:
    """All PNG files of a folder by name, [N, 3, H, W] uint8."""
    found = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found.append(pil_to_tensor(image))
    return torch.stack(found)


def train(folder: Path, images: Tensor, stop: StopRequest, steps: int = STEPS) -> None:
    """Trains an autoencoder on images [N, 3, H, W] uint8 and writes it to `folder`.

    The state is saved beside it every 200 steps. The next call goes on from there, with the same result. Raises
    Stopped after a signal, and RunError if it cannot write.
    """
    state, begun = folder.with_name(f"{folder.name}-state.safetensors"), 0
    network = untrained().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    if state.exists():
        try:
            begun = _load(state, network, optimizer)
        except (SafetensorError, KeyError, RuntimeError, ValueError):
            warn(f"{state} is damaged, or of another version; the autoencoder is trained from the beginning")
            network = untrained().train()
            optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    with Progress("emoji autoencoder", steps * BATCH, "images", None) as progress:
        progress.start(begun * BATCH)
        for step in range(begun, steps):
            for group in optimizer.param_groups:
                warm, cooled = min(1.0, (step + 1) / WARM_UP), 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = LEARNING_RATE * warm * cooled
            error, divergence = _errors(network, images, StepDraw(0, step, 0, Rows(0, BATCH, BATCH)))
            optimizer.zero_grad()
            (error + KL * divergence).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            progress.update((step + 1) * BATCH, {"error": error.item()})
            if stop.signal is not None or (step + 1) % SAVE_EVERY == 0:
                _save(state, network, optimizer, step + 1)
                stop.raise_if_requested(f"step {step + 1} of the autoencoder")
    _export(folder, network.eval(), images)
    state.unlink(missing_ok=True)


def in_range(images: Tensor) -> Tensor:
    """uint8 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _errors(network: AutoencoderKL, images: Tensor, draw: StepDraw) -> tuple[Tensor, Tensor]:
    """The mean absolute error of a batch, and the KL divergence of its latents from standard normal ones, per value."""
    place = torch.empty(BATCH, 1)
    chosen = (draw.uniform("image", place).double() * len(images)).long()
    mirrored = draw.uniform("mirrored", place) < 0.5
    x = in_range(images[chosen])
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    found = network.encode(x).latent_dist
    z = found.mean + found.std * draw.normal("latents", found.mean)
    error = (network.decode(z).sample - x).abs().mean()
    divergence = 0.5 * (found.mean.square() + found.var - 1 - found.logvar).mean()
    return error, divergence


def _load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Reads what `_save` wrote, and returns its step."""
    found = load_file(path)
    network.load_state_dict({name.partition(":")[2]: each for name, each in found.items() if name.startswith("n:")})
    moments: dict[int, dict[str, Tensor]] = {}
    for name, each in found.items():
        kind, _, rest = name.partition(":")
        if kind == "o":
            number, _, moment = rest.partition(":")
            moments.setdefault(int(number), {})[moment] = each
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(found["step"])


def _save(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    moments: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
    found = {f"n:{name}": each for name, each in network.state_dict().items()}
    found |= {f"o:{number}:{name}": each for number, state in moments.items() for name, each in state.items()}
    write_atomic(path, in_safetensors({**found, "step": torch.tensor(step)}, {}))


@torch.no_grad()
def _export(folder: Path, network: AutoencoderKL, images: Tensor) -> None:
    """Writes the autoencoder with the scaling factor that gives its latents a standard deviation of 1."""
    apart = images[:: max(1, len(images) // MEASURED)]  # of all kinds: neighbours are alike
    latents = network.encode(in_range(apart)).latent_dist.mean
    network.register_to_config(scaling_factor=1 / latents.std().item())
    try:
        with new_folder(folder) as new, without_bars():
            network.save_pretrained(new)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror}; nothing was kept") from error
