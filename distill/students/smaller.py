"""Smaller students of the teacher's network class: `student.config` of a train stage."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
from diffusers import ModelMixin
from pydantic import Field
from torch import nn

from distill.core.errors import InputError
from distill.core.space import human
from distill.core.text import suggest
from distill.networks import smaller
from distill.networks.architectures import kind_of
from distill.networks.experts import Experts
from distill.networks.sharing import adapted
from distill.networks.velocity import VelocityStudent
from distill.spec.kinds import STUDENTS
from distill.students import native
from distill.students.loaded import LoadedStudent
from distill.teachers import weights
from distill.teachers.architectures import known
from distill.teachers.architectures.edm_unet import EdmArchitecture
from distill.teachers.architectures.unet import UNet
from distill.teachers.convention import Convention
from distill.teachers.limits import NetworkLimits, SizesOfLevels
from distill.teachers.loaded import LoadedTeacher
from distill.teachers.network_field import EdmField, NetworkField, VeField
from distill.teachers.read import Config, Read, ShortText, Size, checked, short

FIELD = "student.config"
Original = LoadedTeacher | LoadedStudent
SHOWN = 8  # lists of blocks in a line
NULLABLE = ("mid_block_type",)  # options for which null means: none


class _OtherSizes(Read):
    """Options that `NetworkLimits` does not have."""

    num_kv_heads: Size | None = None
    num_cross_attention_heads: Size | None = None
    cross_attention_head_dim: Size | None = None
    n_heads: Size | None = None
    n_kv_heads: Size | None = None
    hidden_size: Size | None = None
    dim: Size | None = None
    ffn_dim: Size | None = None
    approximator_hidden_dim: Size | None = None
    norm_num_groups: Size | None = None
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] | None = None
    mid_block_type: ShortText | None = None
    embedding_multiplier: Size | None = None
    channel_multipliers: SizesOfLevels | None = None
    attention_sizes: SizesOfLevels | None = None


@dataclass(frozen=True)
class SmallerStudent:
    """What a smaller student is, for people."""

    teacher: int
    """parameters of the network that it is made from"""
    student: int
    """its own parameters"""
    copied: int
    """how many of these start with weights of the other network"""
    blocks: Mapping[str, Sequence[int | None]]
    """the lists of blocks in which they differ; see `smaller.Inheritance`"""

    @property
    def words(self) -> str:
        """On one line, like "100 parameters (teacher: 200), 80 of them with its weights; blocks from its 0, 5, 9"."""
        lists = [f"{name} from its {', '.join(map(_origin, origins))}" for name, origins in self.blocks.items()]
        more = [f"and {len(lists) - SHOWN} further lists"] if len(lists) > SHOWN else []
        counts = f"{self.student:,} parameters (teacher: {self.teacher:,}), {self.copied:,} of them with its weights"
        return "; ".join([counts, *lists[:SHOWN], *more])


def of(source: Original, changes: Mapping[str, object], seed: int) -> Original:
    """The source with a smaller network of its class, whose new weights depend on `seed`.

    changes: to the config of the network. InputError if they have no effect, if they change more than its size, or if
    there is no such network.
    """
    network = source.network
    assert network is not None
    check(source, changes)
    if isinstance(network, Experts):
        first, second = (_smaller(part, changes, seed, f"smaller {name}") for name, part in native.parts_of(network))
        return _with(source, Experts(first, second, network.boundary))
    assert isinstance(network, ModelMixin)
    return _with(source, _smaller(network, changes, seed, "smaller network"))


def describe(source: Original, changes: Mapping[str, object]) -> SmallerStudent:
    """What `of` makes, without making it."""
    assert source.network is not None
    found = SmallerStudent(0, 0, 0, {})
    for prefix, part in native.parts_of(source.network):
        empty = _empty(part, changes)
        origins = smaller.inheritance(empty, part)
        sizes = {name: each.numel() for name, each in empty.named_parameters()}
        found = SmallerStudent(
            found.teacher + _count(part),
            found.student + sum(sizes.values()),
            found.copied + sum(sizes.get(name, 0) for name in origins.copied),
            {**found.blocks, **{prefix + name: each for name, each in origins.blocks.items()}},
        )
    return found


def check(source: Original, changes: Mapping[str, object]) -> None:
    """InputError if no smaller network can be made with these changes."""
    network = source.network
    if network is None:
        raise InputError(f"{FIELD}: {source.description} has no network; use `network`, which describes a new one")
    if adapted(network):
        raise InputError(
            f"{FIELD}: {source.description} has adapters (LoRA), of which no smaller student can be made; start from "
            "its folder after `distill merge`, or from a student that was trained in full"
        )
    if kind_of(network) != "velocity":
        raise InputError(
            f"{FIELD}: no smaller student can be made of {source.description}, because it is "
            f"{STUDENTS[kind_of(network)].words}; start from a velocity student, or from the teacher"
        )
    part = native.parts_of(network)[0][1]
    class_name, architecture = type(part).__name__, known().get(type(part).__name__)
    if not isinstance(architecture, Convention | EdmArchitecture | UNet):
        raise InputError(
            f"{FIELD}: {source.description} is a {class_name}, whose size cannot be changed here; use `network`, which "
            "describes a new network"
        )
    _check_names(part, architecture.size_options, changes)
    _check_values(changes)
    for name, value in changes.items():
        if _plain(part.config[name]) == _plain(value):
            raise InputError(
                f"{FIELD}.{name}: {short(str(value))} is also the value of {source.description}, so it has no effect; "
                "leave it out"
            )
    for _, each in native.parts_of(network):
        _check_fit(_empty(each, changes), source)


def _check_names(part: nn.Module, options: Sequence[str], changes: Mapping[str, object]) -> None:
    class_name, config = type(part).__name__, part.config
    for name in changes:
        shown = short(name)
        if name not in config:
            raise InputError(
                f"{FIELD}.{shown}: the config of {class_name} has no such option; {suggest(shown, options)}"
            )
        if name not in options:
            raise InputError(
                f"{FIELD}.{shown}: must be as in the teacher, because it is not an option of the size of a "
                f"{class_name}, or follows from those that are; valid: {', '.join(sorted(options))}"
            )


def _check_values(changes: Mapping[str, object]) -> None:
    for name, value in changes.items():
        if value is None and name not in NULLABLE:
            raise InputError(f"{FIELD}.{name}: null given; leave it out, to keep the value of the teacher")
        model = NetworkLimits if name in NetworkLimits.model_fields else _OtherSizes
        checked(model, {name: value}, Path(FIELD))  # ignores options of classes of other packages


@torch.no_grad()
def _check_fit(empty: ModelMixin, source: Original) -> None:
    """InputError if the network cannot be called with a sample as the source can.

    empty: on the meta device. What depends on values, such as the lengths of prompts, cannot be called there.
    """
    architecture = known()[type(empty).__name__]
    if not architecture.layers(empty):
        raise InputError(f"{FIELD}: the network would have no blocks; give at least one")
    meta = torch.device("meta")
    cond = source.conditioning.collate(torch.zeros(1, dtype=torch.int64))
    x, t = torch.empty(1, *source.shape, device=meta), torch.empty(1, device=meta)
    try:
        found = architecture.call(empty, x, t, {name: each.to(meta) for name, each in cond.items()})
    except NotImplementedError:  # Lumina 2 and Z-Image compute what has no meaning without values
        return
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{FIELD}: the network cannot be called with a sample of shape {list(source.shape)}: "
            f"{weights.said(error)}; change other options as well, or others"
        ) from error
    if found.shape != x.shape:
        raise InputError(
            f"{FIELD}: from samples of shape {list(x.shape[1:])}, the network makes {list(found.shape[1:])}; change "
            "other options as well, or others"
        )


def _smaller(network: nn.Module, changes: Mapping[str, object], seed: int, name: str) -> ModelMixin:
    assert isinstance(network, ModelMixin)
    size, here = 4 * _count(_empty(network, changes)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > here and network.device.type != "meta":
        raise InputError(f"{FIELD}: the weights take about {human(size)}, and this machine has {human(here)}")
    made = smaller.smaller(network, _config(network, changes), seed, name)
    if isinstance(architecture := known()[type(made).__name__], Convention):
        architecture.settled(made)
    return made


def _empty(network: nn.Module, changes: Mapping[str, object]) -> ModelMixin:
    """The smaller network on the meta device."""
    assert isinstance(network, ModelMixin)
    with torch.device("meta"):
        return weights.built(_config(network, changes), type(network), Path(FIELD))


def _config(network: nn.Module, changes: Mapping[str, object]) -> Config:
    # diffusers would ignore what is set here for options that the config did not have
    config = {name: each for name, each in network.config.items() if name != "_use_default_values"}
    architecture = known()[type(network).__name__]
    if isinstance(architecture, Convention):
        return architecture.resized(config, dict(changes))
    return {**config, **changes}


def _with(source: Original, network: nn.Module) -> Original:
    """The source with another network."""
    if isinstance(source, LoadedStudent):
        assert isinstance(source.student, VelocityStudent)
        return replace(source, student=VelocityStudent(network, source.student.call))
    assert isinstance(source.field, NetworkField | EdmField | VeField)
    return replace(source, field=replace(source.field, network=network), network=network)


def _count(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def _plain(value: object) -> object:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _origin(block: int | None) -> str:
    return "none (new)" if block is None else str(block)
