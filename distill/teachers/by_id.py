"""Teachers by hub id: finds the commit, and downloads the files that are read to the Hugging Face cache."""

import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from distill import hub
from distill.core.errors import InputError
from distill.core.hub_repository import Repository
from distill.spec.model import CheckpointTeacher
from distill.teachers import variants
from distill.teachers.layout import CONFIG, INDEX, NETWORKS, SECOND, SMALL, VAES
from distill.teachers.read import short

FILES = ["*.json", "*.safetensors", "README.md"]  # patterns of the files that are read; README.md for the licence
ENCODERS = ("text_encoder", "tokenizer")  # how the names of the folders of text encoders and tokenizers begin
ENCODER_FILES = (".json", ".txt", ".model", ".jinja")  # how the names of their files end that are not weights
ENCODER_WEIGHTS = re.compile(r"model(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class _Folders:
    """The folders of a repository that are read, each with a slash at its end; "" is the repository itself."""

    own: str  # the folder that the spec names
    above: str | None  # the one that contains it, which may be its pipeline; None if there is none

    @classmethod
    def of(cls, spec: CheckpointTeacher) -> "_Folders":
        if spec.subfolder is None:
            return cls("", None)
        above, slash, _ = spec.subfolder.rpartition("/")
        return cls(f"{spec.subfolder}/", above + slash)

    @property
    def small(self) -> set[str]:
        """The small files that are read, if there are such files."""
        return {folder + name for folder in (self.own, self.above) if folder is not None for name in SMALL}

    @property
    def configs(self) -> set[str]:
        """The configs of a network, one of which is needed."""
        return {self.own + CONFIG, *(f"{self.own}{name}/{CONFIG}" for name in NETWORKS)}

    def with_weights(self, listed: Collection[str]) -> tuple[list[str], list[str]]:
        """The folders that may have weights that are read: those of networks, and of autoencoders."""
        if self.own + INDEX in listed:
            networks = [f"{self.own}{name}/" for name in (*NETWORKS, SECOND)]
            return networks, [f"{self.own}{name}/" for name in VAES]
        if self.above is None or self.above + INDEX not in listed:
            return [self.own], []
        is_network = self.own.removeprefix(self.above)[:-1] in NETWORKS
        networks = [self.own, f"{self.above}{SECOND}/"] if is_network else [self.own]
        return networks, [f"{self.above}{name}/" for name in VAES]


def read_of(
    spec: CheckpointTeacher, files: Iterable[str], *, weights: bool = True, encoders: bool = False
) -> list[str]:
    """Selects those of a repository's files that are read: the weights in one variant, and the configs.

    encoders: also those of the text encoders and tokenizers of a pipeline.

    Raises InputError if there is also an adapter (LoRA), or if the only weights are pickled files.
    """
    listed, folders = set(files), _Folders.of(spec)
    networks, autoencoders = folders.with_weights(listed)
    inside = {folder: _inside(folder, listed) for folder in [*networks, *autoencoders]}
    if spec.lora is None:
        _refuse_adapters(spec, {folder: _inside(folder, listed) for folder in (folders.own, *networks)})
    found = listed & folders.small
    if encoders:
        found |= _of_encoders(listed, folders, spec.variant)
    if weights:
        for folder, names in inside.items():
            optional = folder not in networks
            chosen = variants.one_of(names, _where(spec, folder), spec.variant, optional=optional)
            found |= {folder + name for name in chosen}
        pickled = [folder for folder in networks if any(map(variants.PICKLED.fullmatch, inside[folder]))]
        if pickled and not any(name.startswith(tuple(networks)) for name in found - folders.small):
            folder = pickled[0]
            raise variants.no_weights(inside[folder], f"teacher.path={spec.path}", Path(folder), on_hub=True)
    return sorted(found)


def _of_encoders(listed: Collection[str], folders: _Folders, wanted: str | None) -> set[str]:
    """The files of text encoders and tokenizers, with the weights of text encoders in one variant."""
    pipeline = folders.own if folders.own + INDEX in listed or folders.above is None else folders.above
    below = [name.removeprefix(pipeline).partition("/")[0] for name in listed if name.startswith(pipeline)]
    found = set()
    for folder in sorted({name for name in below if name.startswith(ENCODERS)}):
        inside = _inside(f"{pipeline}{folder}/", listed)
        variants = {name: match["variant"] for name in inside if (match := ENCODER_WEIGHTS.fullmatch(name)) is not None}
        known = list(variants.values())
        chosen = wanted if wanted in known else None if None in known else min(filter(None, known), default=None)
        kept = {name for name in inside if Path(name).suffix in ENCODER_FILES}
        kept |= {name for name, variant in variants.items() if variant == chosen}
        found |= {f"{pipeline}{folder}/{name}" for name in kept}
    return found


def _inside(folder: str, listed: Collection[str]) -> list[str]:
    """The names of the files that are directly in a folder."""
    names = [name.removeprefix(folder) for name in listed if name.startswith(folder)]
    return sorted(name for name in names if "/" not in name)


def _where(spec: CheckpointTeacher, folder: str) -> str:
    return f"teacher.path={spec.path}" + (f", in {folder[:-1]}," if folder else "")


def _refuse_adapters(spec: CheckpointTeacher, places: Mapping[str, Sequence[str]]) -> None:
    """InputError if there is an adapter beside the weights, because it is not clear whether it is to be used."""
    for folder, names in places.items():
        for name in names:
            if variants.ADAPTER.fullmatch(name):
                raise InputError(
                    f"teacher.path={spec.path}: adapters like {folder}{short(name)} are not loaded by themselves; "
                    f"download it and {variants.LORA_OPTION}, {variants.MERGE}, or download the repository without it"
                )


def repository(spec: CheckpointTeacher, commit: str | None = None, *, encoders: bool = False) -> Repository:
    """The repository that a teacher with a hub id reads. commit: None for the newest commit of its revision.

    encoders: see `read_of`.
    """
    if commit is None:
        with _reachable(spec):
            commit = hub.commit("model", spec.path, spec.revision)
    pinned = spec.model_copy(update={"revision": commit})

    def needs(folder: Path) -> list[tuple[Path, int]]:
        with _reachable(pinned):
            listed = {file.name: file for file in hub.files("model", pinned.path, commit)}
        files = [listed[name] for name in read_of(pinned, listed, encoders=encoders)]
        missing = sum(file.bytes for file in files if not file.cached)
        return [(Path(constants.HF_HUB_CACHE), missing), (folder, sum(file.bytes for file in files))]

    def download() -> Callable[[Path], None]:
        """Downloads into the Hugging Face cache, which can resume downloads and holds what a plan has read."""
        found = snapshot(pinned, encoders=encoders)

        def copy(folder: Path) -> None:
            folder.mkdir(parents=True)
            there = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
            for name in read_of(pinned, there, encoders=encoders):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found / name, folder / name)

        return copy

    # What the spec selects is added only if it is set, so that earlier downloads are still found.
    part = [
        *FILES,
        *(f"{name}={value}" for name, value in _selected(spec).items()),
        *(["encoders"] if encoders else []),
    ]
    link = f"hub/models--{spec.path.replace('/', '--')}/snapshots/{commit}"
    return Repository("teacher", spec.path, spec.revision, commit, part, link, needs, download)


def _selected(spec: CheckpointTeacher) -> dict[str, str]:
    """The options that select a part of a repository."""
    return spec.model_dump(include={"subfolder", "variant"}, exclude_none=True)


def snapshot(spec: CheckpointTeacher, *, weights: bool = True, encoders: bool = False) -> Path:
    """Downloads the files that are not cached, and returns their folder. It may contain other files too.

    If the hub cannot be reached, the cached files are used; InputError is raised if there are none. weights: False:
    download the configs only. encoders: see `read_of`.
    """
    with _reachable(spec):
        try:
            listed = [file.name for file in hub.files("model", spec.path, spec.revision)]
        except hub.UNREACHABLE:
            if (found := _cached(spec, weights=weights)) is None:
                raise
            return found
        if not listed and (found := _cached(spec, weights=weights)) is not None:
            return found
        names = read_of(spec, listed, weights=weights, encoders=encoders)
        patterns = [escape(name) for name in names] if listed else FILES
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a repository, by its hub id, in the Hugging Face cache; None if no file of it is there."""
    try:
        # With the default patterns, the library raises an error if any listed file of the repository is not cached.
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    except hub.UNREACHABLE:
        return None


def _cached(spec: CheckpointTeacher, *, weights: bool) -> Path | None:
    """The folder of a teacher in the Hugging Face cache; None if its config, or its weights if needed, are missing."""
    if (folder := cached_folder(spec.path, spec.revision)) is None:
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    read, folders = set(read_of(spec, names, weights=weights)), _Folders.of(spec)
    return folder if read & folders.configs and (not weights or read - folders.small) else None


@contextmanager
def _reachable(spec: CheckpointTeacher) -> Iterator[None]:
    """Context manager: converts errors of the hub to an InputError that says what cannot be loaded, and why."""
    try:
        yield
    except InputError:
        raise
    except hub.UNREACHABLE as error:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise InputError(
            f"teacher.path={spec.path}{at} is neither a folder here nor a hub id that can be fetched or is cached "
            f"({hub.reason(error)}); check the name and the internet connection, or download it and give the folder"
        ) from error
