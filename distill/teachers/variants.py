"""The names of weight files: with or without a variant such as fp16, single or sharded; and the names of adapters."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.core.errors import InputError
from distill.teachers.read import short

STEM = "diffusion_pytorch_model"
WEIGHTS = re.compile(  # STEM.safetensors, STEM.fp16.safetensors, STEM.fp16-00001-of-00002.safetensors, or an index
    rf"{STEM}(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-\d+-of-\d+)?\.safetensors|"
    rf"{STEM}\.safetensors\.index(?:\.(?P<of>[A-Za-z0-9_]+))?\.json"
)
PREFERRED = ("", "fp32", "fp16", "bf16")  # if there are several variants, the first of these; "": no variant
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")  # how the names of pickled checkpoints end
SUFFIXES = r"\.(?:safetensors|bin|pt|pth|ckpt)"
LORA = r"(?i:(?:.*[^a-z])?lora(?:[^a-z].*)?)|.*[a-z]L(?:oRA|ora|ORA)(?:[^a-z].*)?"  # as a word: not in "exploration"
ADAPTER = re.compile(rf"(?:{LORA}|(?i:adapter_model))(?i:{SUFFIXES})", re.DOTALL)
PICKLED = re.compile(rf"{STEM}(?:\.(?P<variant>[A-Za-z0-9_]+))?(?P<shards>-\d+-of-\d+)?\.bin")
LORA_OPTION = "set teacher.lora to the adapter"
MERGE = (
    "merge it into the weights first (fuse_lora() and unload_lora_weights(), or peft's merge_and_unload(), then "
    "save_pretrained into a new folder)"
)


def one_of(names: Iterable[str], where: str, variant: str | None = None, *, optional: bool = False) -> list[str]:
    """Selects the weight files in a model folder, of one variant only: the first in `PREFERRED`, else the only one.

    where: name of the folder in messages. variant: the one to select; if it is `optional`, the choice is as without it
    where there are no such files. Returns [] if there are no weights. Raises InputError if there are weights, but not
    of this variant, or if none of several variants is preferred.
    """
    variants: dict[str, list[str]] = {}
    for name in sorted(names):
        if (found := WEIGHTS.fullmatch(name)) is not None:
            variants.setdefault(found["variant"] or found["of"] or "", []).append(name)
    for each, inside in variants.items():  # a single file is preferred to shards
        whole = [name for name in inside if name.endswith(".safetensors") and "-of-" not in name]
        variants[each] = whole or inside
    valid = short(", ".join(each or "null (the plain weights)" for each in variants), 200)
    if variant is not None and variants and variant not in variants and not optional:
        raise InputError(f"{where} has no weights in the variant {variant}; valid for teacher.variant: {valid}")
    for each in (*(() if variant is None else (variant,)), *PREFERRED):
        if each in variants:
            return variants[each]
    if len(variants) > 1:
        raise InputError(
            f"{where} has weights in the variants {valid}, and none of them is chosen automatically; set "
            "teacher.variant to one of them"
        )
    return next(iter(variants.values()), [])


def listing(names: Iterable[str]) -> str:
    """Lists the names in a folder for a message."""
    listed = sorted(short(name, 60) for name in names)
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "") if listed else "nothing"


def no_weights(names: Sequence[str], where: str, folder: Path, *, on_hub: bool = False) -> InputError:
    """Makes the InputError for a folder with these file names, none of which `one_of` selects.

    where: name of the folder or repository in the message. folder: its path, or its path within a repository.
    """
    others = other_weights(names)
    if safe := [name for name in others if name.endswith(".safetensors")]:
        todo = f"rename {short(safe[0], 60)} to {STEM}.safetensors if it contains the weights of this config.json"
    elif others:
        told, first = short(others[0], 60), "download the repository and convert it" if on_hub else "convert it"
        path = folder / told
        todo = f"only safetensors files are loaded. If you trust {told}, {first}: distill convert {path} NEW_FOLDER"
    else:
        todo = "copy or download the weights"
    return InputError(f"{where} has no {STEM}.safetensors, but {listing(names)}; {todo}")


def other_weights(names: Iterable[str]) -> list[str]:
    """The names of all files that may contain weights, in the order in which one would try to convert them."""
    others = sorted(name for name in names if re.fullmatch(f".*{SUFFIXES}", name, re.DOTALL))

    def rank(name: str) -> int:
        found = PICKLED.fullmatch(name)
        variant = found["variant"] or "" if found else None
        return PREFERRED.index(variant) if variant in PREFERRED else len(PREFERRED)

    return sorted(others, key=rank)
