"""Converts a pickled checkpoint to a model folder with config.json, safetensors and, if it is known, the scheduler.

The file is unpickled in another process; see `unpickle`. Its weights are compared with the network that config.json
describes before the folder appears.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin
from safetensors.torch import load_file, save_file

from distill.convert import edm
from distill.convert.unpickle import FACTS, OLD_TORCH, PICKLE, WEIGHTS, ZIP
from distill.core.atomic import new_folder, write_files
from distill.core.errors import EXIT_INPUT, InputError, RunError
from distill.core.regular_files import open_regular, read_regular
from distill.core.text import one_line, suggest
from distill.launch import helper
from distill.teachers import architectures, codecs, layout, weights
from distill.teachers.read import MAX_BYTES, Config, Read, checked, parse, short, unreadable
from distill.teachers.variants import PICKLED, PICKLES, STEM

CARD = "README.md"
LONGEST_HEADER = 100_000_000  # bytes of the JSON at the start of a safetensors file


class _Facts(Read):
    """What the process that unpickles a file reports. module: see `unpickle.StandIn.facts`."""

    error: str = ""
    chosen: str = ""
    found: list[str] = []
    module: dict[str, Any] | None = None


@dataclass(frozen=True)
class Target:
    """The network that the weights belong to.

    place: where it is described, for messages. content: of config.json. more: further files, by their path in the
    folder. name_of: the network's name of a weight of the file; None: the network does not have it.
    """

    place: Path
    content: Config
    network_class: type[ModelMixin]
    more: Mapping[str, bytes]
    name_of: Callable[[str], str | None] = lambda name: name


@dataclass(frozen=True)
class Converted:
    """chosen, found: names of the converted state dict and of all in the file; "" is the file itself."""

    network: str  # name of the class
    chosen: str
    found: Sequence[str]
    has_scheduler: bool


def convert(file: Path, folder: Path, config: Path | None, wanted: str | None, *, ema: bool) -> Converted:
    """Writes the network of `file` to the new folder `folder`. Raises InputError if anything does not fit.

    config: folder of config.json; None: it lies beside `file`, or `file` contains an EDM network, which needs none.
    wanted: the state dict to convert, by its name. ema: if there are several, prefer the one with averaged weights.
    """
    _refuse_existing(folder)
    sources = _sources(file)
    if not _may_describe_itself(file):
        described(file, config)  # a mistake is told before the file is read
    with new_folder(folder) as new:
        _unpickle(sources, new, wanted, ema=ema)
        return complete(file, config, new)


def complete(file: Path, config: Path | None, new: Path) -> Converted:
    """Makes a model folder of a folder with WEIGHTS and FACTS, which the process that unpickled `file` wrote."""
    facts = checked(_Facts, parse(new / FACTS), new / FACTS)
    if facts.module is not None and edm.is_module(facts.module):
        if config is not None:
            raise InputError(f"--config {config} has no effect: {file} describes its network itself; remove it")
        target = described_by_edm(file, facts.module)
    else:
        target = described(file, config)
    _write_weights(file, target, new)
    (new / FACTS).unlink()
    (new / WEIGHTS).unlink()
    write_files(new, {layout.CONFIG: to_json(target.content), **target.more})
    has_scheduler = f"scheduler/{layout.SCHEDULER}" in target.more
    return Converted(target.network_class.__name__, facts.chosen, facts.found, has_scheduler)


def _refuse_existing(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists already; name another folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder.absolute().parent} is not a folder; create it first")


def _sources(file: Path) -> list[Path]:
    """The files with the weights: `file`, and the other shards if it is one of them. InputError if it is no pickle."""
    if file.is_dir():
        inside = sorted(path for path in file.iterdir() if path.suffix in PICKLES)
        raise InputError(f"{file} is a folder; give a pickled file" + (f", such as {inside[0]}" if inside else ""))
    try:
        with open_regular(file, follow=True) as opened:
            start = opened.read(9)
    except OSError as error:
        raise unreadable(file, error) from error
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") < LONGEST_HEADER:
        raise InputError(
            f"{file} is a safetensors file, which needs no conversion; give the folder that contains it and its "
            "config.json as teacher.path"
        )
    if not start.startswith((ZIP, PICKLE)):
        raise InputError(f"{file} is not a pickled checkpoint; valid: {', '.join(PICKLES)} files")
    found = PICKLED.fullmatch(file.name)
    if found is None or found["shards"] is None:
        return [file]
    before, count = file.name.removesuffix(".bin").rpartition("-of-")[::2]
    width = len(count)
    names = [f"{before[:-width]}{number + 1:0{width}}-of-{count}.bin" for number in range(int(count))]
    shards = [file.with_name(name) for name in names]
    if missing := [path.name for path in shards if not path.is_file()]:
        raise InputError(f"{file} is one of {len(shards)} files, and {missing[0]} is missing; copy or download it")
    return shards


def described(file: Path, given: Path | None) -> Target:
    """The network that a config.json describes."""
    folder = file.parent if given is None else given
    path = folder / layout.CONFIG
    if given is None and not path.exists():
        raise InputError(
            f"{file}: the {layout.CONFIG} that describes its network is not beside it; give the folder that contains "
            "it with --config"
        )
    content = parse(path)
    name = architectures.class_name(content)
    if isinstance(name, str) and name in architectures.known():
        network_class = architectures.class_of(name)
    elif isinstance(name, str) and name in codecs.KINDS:
        network_class = getattr(diffusers, name)
    else:
        valid = suggest(short(str(name)), [*architectures.known(), *codecs.KINDS])
        raise InputError(f"{path}: network class {short(str(name))} is not supported; {valid}")
    root = folder.absolute().parent if (folder.absolute().parent / layout.INDEX).is_file() else folder
    more = {}
    for name in (f"scheduler/{layout.SCHEDULER}", CARD):  # README.md: its licence also applies to the new folder
        try:
            more[name] = read_regular(root / name, MAX_BYTES, follow=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise unreadable(root / name, error) from error
    return Target(path, content, network_class, more)


def _may_describe_itself(file: Path) -> bool:
    """Whether it is a plain pickle, as EDM's checkpoints are, and not a file of torch.save."""
    with open_regular(file, follow=True) as opened:
        return not opened.read(len(OLD_TORCH)).startswith((ZIP, OLD_TORCH))


def described_by_edm(file: Path, module: Mapping[str, Any]) -> Target:
    """The network that a pickled EDM module describes."""
    content, scheduler = edm.config_of(module, file)
    side, levels = content["sample_size"], len(content["channel_multipliers"])
    more = {f"scheduler/{layout.SCHEDULER}": to_json(scheduler)}
    network_class = architectures.class_of(content["_class_name"])
    return Target(file, content, network_class, more, lambda name: edm.name_of(name, side, levels))


def to_json(content: Mapping[str, Any]) -> bytes:
    """Indented JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def _unpickle(sources: Sequence[Path], new: Path, wanted: str | None, *, ema: bool) -> None:
    """Unpickles files in another process, which writes WEIGHTS and FACTS to the folder `new`."""
    request = {"files": list(map(str, sources)), "out": str(new), "weights": wanted, "ema": ema}
    ended = helper.run("distill.convert.unpickle", json.dumps(request))
    if ended.code == EXIT_INPUT and (new / FACTS).exists():
        raise InputError(checked(_Facts, parse(new / FACTS), new / FACTS).error)
    if ended.code:
        said = one_line((ended.errors.strip().splitlines() or ["it printed nothing"])[-1], 300)
        raise RunError(f"the process that reads {sources[0]} ended with code {ended.code}: {said}; nothing was written")


def _write_weights(file: Path, target: Target, new: Path) -> None:
    """Writes the weights that were unpickled from `file` to the folder `new`, by the names of the network.

    InputError unless they are exactly the weights of the network, and finite.
    """
    entries, originals = [], {}
    for each in weights.stored([new / WEIGHTS]):
        if (name := target.name_of(each.name)) is not None:
            entries.append(replace(each, file=file, name=name))
            originals[name] = each.name
    shapes = weights.shapes(target.place.parent, target.content, target.network_class)
    names = weights.fitting(file, entries, shapes)
    tensors = load_file(new / WEIGHTS)
    found = {name: tensors[originals[each.name]] for name, each in names.items()}
    if broken := [name for name, each in found.items() if not each.isfinite().all()]:
        raise InputError(f"{file} contains NaN or infinity in {short(broken[0])}; give valid weights")
    save_file(found, new / f"{STEM}.safetensors", {"format": "pt"})
