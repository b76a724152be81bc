"""Teachers by hub id: finds the commit, and downloads the files that are read to the Hugging Face cache."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from distill import hub
from distill.core.errors import InputError
from distill.core.hub_repository import Repository
from distill.spec.model import CheckpointTeacher
from distill.teachers import variants
from distill.teachers.read import short

FILES = ["*.json", "*.safetensors", "README.md"]  # patterns of the files that are read; README.md for the licence
MODELS = ("", "unet/")  # folders that can contain the network's weights
SMALL = {"model_index.json", "distill.json", "config.json", "README.md"}
SMALL |= {"unet/config.json", "scheduler/scheduler_config.json"}


def read_of(name: str, files: Iterable[str], *, weights: bool = True) -> list[str]:
    """Selects the files of repository `name` that are read: the weights in one variant, and the configs.

    Raises InputError if there is also an adapter (LoRA), or if the only weights are pickled files.
    """
    listed = list(files)
    places = {folder: [file.removeprefix(folder) for file in listed if file.startswith(folder)] for folder in MODELS}
    places = {folder: [file for file in inside if "/" not in file] for folder, inside in places.items()}
    for folder, inside in places.items():
        for file in inside:
            if variants.ADAPTER.fullmatch(file):
                raise InputError(
                    f"teacher.path={name}: adapters like {folder}{short(file)} are not loaded; {variants.MERGE}, or "
                    "download the repository without it"
                )
    found = {file for file in listed if file in SMALL}
    if weights:
        for folder, inside in places.items():
            found |= {folder + file for file in variants.one_of(inside, f"teacher.path={name}")}
        pickled = [folder for folder, inside in places.items() if any(map(variants.PICKLED.fullmatch, inside))]
        if pickled and found <= SMALL:
            folder = pickled[0]
            raise variants.no_weights(places[folder], f"teacher.path={name}", Path(folder), on_hub=True)
    return sorted(found)


def repository(spec: CheckpointTeacher, commit: str | None = None) -> Repository:
    """The repository that a teacher with a hub id reads. commit: None for the newest commit of its revision."""
    if commit is None:
        with _reachable(spec):
            commit = hub.commit("model", spec.path, spec.revision)
    pinned = spec.model_copy(update={"revision": commit})

    def needs(folder: Path) -> list[tuple[Path, int]]:
        with _reachable(pinned):
            listed = {file.name: file for file in hub.files("model", pinned.path, commit)}
        files = [listed[name] for name in read_of(pinned.path, listed)]
        missing = sum(file.bytes for file in files if not file.cached)
        return [(Path(constants.HF_HUB_CACHE), missing), (folder, sum(file.bytes for file in files))]

    def download() -> Callable[[Path], None]:
        """Downloads into the Hugging Face cache, which can resume downloads and holds what a plan has read."""
        found = snapshot(pinned)

        def copy(folder: Path) -> None:
            folder.mkdir(parents=True)
            there = [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]
            for name in read_of(pinned.path, there):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found / name, folder / name)

        return copy

    link = f"hub/models--{spec.path.replace('/', '--')}/snapshots/{commit}"
    return Repository("teacher", spec.path, spec.revision, commit, FILES, link, needs, download)


def snapshot(spec: CheckpointTeacher, *, weights: bool = True) -> Path:
    """Downloads the files that are not cached, and returns their folder. It may contain other files too.

    If the hub cannot be reached, the cached files are used; InputError is raised if there are none. weights: False:
    download the configs only.
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
        names = read_of(spec.path, listed, weights=weights)
        patterns = [escape(name) for name in names] if listed else FILES
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=patterns))


def _cached(spec: CheckpointTeacher, *, weights: bool) -> Path | None:
    """The folder of a teacher in the Hugging Face cache; None if its config, or its weights if needed, are missing."""
    try:
        # With the default patterns, the library raises an error if any listed file of the repository is not cached.
        found = snapshot_download(spec.path, revision=spec.revision, local_files_only=True, allow_patterns=[])
    except hub.UNREACHABLE:
        return None
    folder = Path(found)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    read = set(read_of(spec.path, names, weights=weights))
    return folder if read & {"config.json", "unet/config.json"} and (not weights or read - SMALL) else None


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
