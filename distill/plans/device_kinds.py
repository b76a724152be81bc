"""Kinds of GPUs: how fast they compute, remember and communicate at best, as their makers say.

Speeds are those of dense matrices; data sheets often say twice as much, for matrices of which half are zeros. Speeds of
links are for one direction; data sheets add up both. GB and TB are powers of ten.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distill.core.errors import InputError
from distill.core.text import short, suggest

Precision = Literal["bf16", "tf32", "fp32"]

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class DeviceKind:
    """What one GPU of a kind can do at best, and where this is said."""

    title: str
    memory: int
    """bytes"""
    peaks: Mapping[Precision, float]
    """floating-point operations per second in matrix products"""
    bandwidth: float
    """bytes per second from and to its memory"""
    link: float
    """bytes per second to the other GPUs of its node"""
    network: float
    """bytes per second to other nodes, for each GPU"""
    host: float
    """bytes per second to the memory of its node"""
    source: str


_DGX_A100 = "network: DGX A100, 200 Gb/s for each GPU"
_DGX_H100 = "network: DGX H100 and H200, 400 Gb/s for each GPU"
_A100: Mapping[Precision, float] = {"bf16": 312 * TERA, "tf32": 156 * TERA, "fp32": 19.5 * TERA}
_H100: Mapping[Precision, float] = {"bf16": 989.4 * TERA, "tf32": 494.7 * TERA, "fp32": 66.9 * TERA}

KINDS: Mapping[str, DeviceKind] = {
    "a100-40gb": DeviceKind(
        "NVIDIA A100 SXM 40 GB", 40 * GIGA, _A100, 1.555 * TERA, 300 * GIGA, 25 * GIGA, 32 * GIGA,
        f"NVIDIA A100 data sheet (NVLink 600 GB/s in both directions, PCIe 4.0 x16); {_DGX_A100}",
    ),
    "a100-80gb": DeviceKind(
        "NVIDIA A100 SXM 80 GB", 80 * GIGA, _A100, 2.039 * TERA, 300 * GIGA, 25 * GIGA, 32 * GIGA,
        f"NVIDIA A100 data sheet (NVLink 600 GB/s in both directions, PCIe 4.0 x16); {_DGX_A100}",
    ),
    "h100": DeviceKind(
        "NVIDIA H100 SXM 80 GB", 80 * GIGA, _H100, 3.35 * TERA, 450 * GIGA, 50 * GIGA, 64 * GIGA,
        f"NVIDIA H100 data sheet, Hopper white paper (NVLink 900 GB/s in both directions, PCIe 5.0 x16); {_DGX_H100}",
    ),
    "h200": DeviceKind(
        "NVIDIA H200 SXM 141 GB", 141 * GIGA, _H100, 4.8 * TERA, 450 * GIGA, 50 * GIGA, 64 * GIGA,
        f"NVIDIA H200 data sheet (NVLink 900 GB/s in both directions, PCIe 5.0 x16; computes as H100); {_DGX_H100}",
    ),
    "b200": DeviceKind(
        "NVIDIA B200 180 GB", 180 * GIGA, {"bf16": 2250 * TERA, "tf32": 1100 * TERA, "fp32": 80 * TERA},
        8 * TERA, 900 * GIGA, 50 * GIGA, 64 * GIGA,
        "NVIDIA Blackwell technical brief, column HGX B200; DGX B200 data sheet: 1,440 GB, 64 TB/s, NVLink 14.4 TB/s "
        "in both directions for 8 GPUs, PCIe 5.0 x16; network: 400 Gb/s for each GPU",
    ),
    "l40s": DeviceKind(
        "NVIDIA L40S 48 GB", 48 * GIGA, {"bf16": 362.05 * TERA, "tf32": 183 * TERA, "fp32": 91.6 * TERA},
        864 * GIGA, 32 * GIGA, 12.5 * GIGA, 32 * GIGA,
        "NVIDIA L40S data sheet (PCIe 4.0 x16, 64 GB/s in both directions); network: assumed, 100 Gb/s for each GPU",
    ),
    "rtx-4090": DeviceKind(
        "NVIDIA GeForce RTX 4090 24 GB", 24 * GIGA, {"bf16": 165.2 * TERA, "tf32": 82.6 * TERA, "fp32": 82.6 * TERA},
        1008 * GIGA, 32 * GIGA, 3.125 * GIGA, 32 * GIGA,
        "NVIDIA Ada GPU architecture white paper, with accumulation in float32 (PCIe 4.0 x16); network: assumed, "
        "25 Gb/s for each GPU",
    ),
}  # fmt: skip


def gpus_of(text: str) -> tuple[int, DeviceKind]:
    """(number, kind) of GPUs that are given like 8xh100 or 8x80GB. InputError if that is malformed or not known."""
    match = re.fullmatch(r"([1-9][0-9]{0,3})x([A-Za-z0-9-]+)", text)
    if match is None:
        raise InputError(
            f"{short(text)} given; valid: the GPUs of a node, like 8xh100 or, with their memory alone, 8x80GB; kinds: "
            f"{', '.join(KINDS)}"
        )
    return int(match[1]), kind_or_memory(match[2])


def kind_or_memory(text: str) -> DeviceKind:
    """A kind by its name, or the slowest one with a memory that is given like 80GB. InputError if there is none."""
    if (size := re.fullmatch(r"([0-9]{1,5})GB", text)) is None:
        return kind_of(text)
    same = [each for each in KINDS.values() if each.memory == int(size[1]) * GIGA]
    if not same:
        sizes = sorted({each.memory // GIGA for each in KINDS.values()})
        raise InputError(f"no kind of GPU with {text} is known; valid: {', '.join(f'{each}GB' for each in sizes)}")
    return min(same, key=lambda each: each.peaks["bf16"])


def kind_of(name: str) -> DeviceKind:
    """The kind of this name. InputError if there is none."""
    if name not in KINDS:
        raise InputError(f"no kind of GPU '{name}' is known; {suggest(name, KINDS)}")
    return KINDS[name]
