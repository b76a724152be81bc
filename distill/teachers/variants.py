"""The names of weight files: plain, of a variant like fp16, whole or in shards with an index; and of adapters."""

import re
from collections.abc import Iterable

from distill.guard import InputError
from distill.teachers.read import short

STEM = "diffusion_pytorch_model"
WEIGHTS = re.compile(  # STEM.safetensors, STEM.fp16.safetensors, STEM.fp16-00001-of-00002.safetensors, and an index
    rf"{STEM}(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d+-of-\d+)?\.safetensors|"
    rf"{STEM}\.safetensors\.index(?:\.(?P<of>[A-Za-z0-9_]+))?\.json"
)
PREFERRED = ("", "fp32", "fp16", "bf16")  # of several variants the first that is there; "" is the plain file
ADAPTERS = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


def one_of(names: Iterable[str], where: str) -> list[str]:
    """Of the names in a model folder, those of its weights in one variant: the plain one, else the most precise.

    where: the folder, as a message calls it.
    """
    variants: dict[str, list[str]] = {}
    for name in sorted(names):
        if (found := WEIGHTS.fullmatch(name)) is not None:
            variants.setdefault(found["variant"] or found["of"] or "", []).append(name)
    for variant, inside in variants.items():  # what is there whole is not read in shards
        whole = [name for name in inside if name.endswith(".safetensors") and "-of-" not in name]
        variants[variant] = whole or inside
    for variant in PREFERRED:
        if variant in variants:
            return variants[variant]
    if len(variants) > 1:
        raise InputError(
            f"{where} has weights in the variants {short(', '.join(variants))}, none of them plain, "
            f"{', '.join(PREFERRED[1:])}; keep the one that is meant in a folder of its own"
        )
    return next(iter(variants.values()), [])
