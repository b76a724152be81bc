"""The names that ComfyUI gives the layers of a network, as data: a YAML file for each network class.

layers: the name in diffusers -> the name in ComfyUI. "#" stands for a number, and "*", at the end, for any rest.
fused: a layer of ComfyUI whose rows are those of several layers of diffusers, in this order.
swapped: layers of ComfyUI whose two halves of rows are in the other order. "last" is the largest number of a block.
without_alpha: layers of ComfyUI whose factor is multiplied into the matrices, because diffusers refuses their alpha.
one_alpha: whether all layers must have the same alpha. Others are multiplied into the matrices.
diffusers: what its converter of LoRA files reads, if it has one. unread: layers with which it does not read a file, or
reads it wrong. complete: it reads a file only if all of these layers are in it. rows: the number of rows that it
assumes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

LayerNames = tuple[str, ...]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReadByDiffusers(_Data):
    """What the converter of diffusers reads."""

    unread: LayerNames = ()
    complete: LayerNames = ()
    rows: dict[str, int] = {}


class KeyList(_Data):
    """The names of one network class."""

    network: str
    prefix: str = "diffusion_model."
    underscores: bool = False
    matrices: tuple[str, str] = ("lora_A", "lora_B")
    layers: dict[str, str]
    fused: dict[str, LayerNames] = {}
    swapped: LayerNames = ()
    without_alpha: LayerNames = ()
    one_alpha: bool = False
    diffusers: ReadByDiffusers | None = None

    def native(self, modules: Iterable[str]) -> dict[str, list[str]]:
        """Maps each layer of ComfyUI to layers of diffusers, in the order of their rows. Others are left out.

        modules: the names of the layers of the network in diffusers.
        """
        patterns = [(_compiled(ours), theirs, 0, 1) for ours, theirs in self.layers.items()]
        for theirs, parts in self.fused.items():
            patterns += [(_compiled(ours), theirs, i, len(parts)) for i, ours in enumerate(parts)]
        found: dict[str, list[str]] = {}
        for name in modules:
            for pattern, theirs, part, count in patterns:
                if match := pattern.fullmatch(name):
                    found.setdefault(_filled(theirs, match.groups()), [""] * count)[part] = name
                    break
        return found


@cache
def key_list(network: str) -> KeyList | None:
    """The names for a network class; None if ComfyUI has no such network."""
    return _all().get(network)


def matches(patterns: Sequence[str], name: str, others: Iterable[str]) -> bool:
    """Whether a pattern matches a name, in which the number of its first block may be called "last".

    others: the names of all layers, from which the last block is known.
    """
    names = [name]
    if any(".last." in pattern for pattern in patterns) and (found := re.match(r"(.+?\.)(\d+)(\..+)", name)):
        start, number, rest = found.groups()
        numbers = [re.match(rf"{re.escape(start)}(\d+)\.", each) for each in others]
        if int(number) == max(int(each[1]) for each in numbers if each):
            names.append(f"{start}last{rest}")
    return any(_compiled(pattern).fullmatch(each) for pattern in patterns for each in names)


@cache
def _all() -> Mapping[str, KeyList]:
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    lists = [KeyList.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))) for path in files]
    return {each.network: each for each in lists}


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)"))


def _filled(pattern: str, groups: Sequence[str]) -> str:
    """The pattern with these texts in place of # and *."""
    texts = iter(groups)
    return re.sub(r"[#*]", lambda _: next(texts), pattern)
