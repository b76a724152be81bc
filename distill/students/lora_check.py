"""`distill lora-check`: whether a LoRA student still makes the same samples when its base has weights in 8 bits."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from distill.networks.sharing import is_shared
from distill.spec.model import CheckpointTeacher
from distill.students import lora_folder
from distill.students.comparing import Difference, difference, drawn_samples, pictures
from distill.students.loaded import load_student
from distill.students.quantised import called_layers, quantise


@dataclass(frozen=True)
class LoraCheck:
    """base, lora: the difference of the samples on the int8 base to those on the bfloat16 base, without and with the
    LoRA. effect: the difference that the LoRA makes on the bfloat16 base. layers: in int8. compared: images or latents.
    """

    base: Difference
    lora: Difference
    effect: Difference
    layers: int
    steps: int
    samples: int
    compared: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check(folder: Path, spec: CheckpointTeacher, *, samples: int, seed: int, device: torch.device) -> LoraCheck:
    """Draws the same samples with and without the LoRA, on the base in bfloat16 and in int8.

    The linear layers of the base are quantised; the LoRA is not merged and stays in float32. Raises InputError if
    `folder` is not a LoRA student, or `spec` not its base.
    """
    card = lora_folder.card_of(folder)
    student = load_student(folder, device, spec.model_copy(update={"dtype": "bfloat16"}))
    network, codec, steps = student.network, student.codec, card.fewest_steps

    def drawn(enabled: bool) -> Tensor:
        """With or without the LoRA."""
        _enable(network, enabled)
        return pictures(drawn_samples(student, steps=steps, seed=seed, count=samples, device=device), codec, device)

    with called_layers(network) as called:
        base = drawn(False)
    lora = drawn(True)
    layers = {name: layer for name, layer in called.items() if is_shared(layer.weight)}
    quantise(network, layers)
    base_8, lora_8 = drawn(False), drawn(True)
    return LoraCheck(
        base=difference(base_8, base, codec),
        lora=difference(lora_8, lora, codec),
        effect=difference(lora, base, codec),
        layers=len(layers),
        steps=steps,
        samples=samples,
        compared="latents" if codec.is_identity else "images",
    )


def _enable(network: nn.Module, enabled: bool) -> None:
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(enabled)
