"""Teachers by hub id: the commit that is meant, and the files of it that are read, in the library's cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import snapshot_download

from distill import hub
from distill.guard import InputError
from distill.spec import CheckpointTeacher

FILES = ["*.json", "*.safetensors", "README.md"]  # all that is read of a repository; the last for its licence


def is_id(path: str) -> bool:
    """Whether a path is no place here and has the form of a hub id."""
    return not Path(path).exists() and path.count("/") == 1 and path[0] not in "./~"


def is_read(file: str) -> bool:
    """Whether a file of a repository is one of FILES."""
    return any(fnmatch(file, pattern) for pattern in FILES)


def commit(spec: CheckpointTeacher) -> str:
    """What its revision stands for now."""
    with _reachable(spec):
        return hub.commit("model", spec.path, spec.revision)


def files(spec: CheckpointTeacher) -> list[hub.File]:
    """Of the commit that is the spec's revision, what is read."""
    assert spec.revision is not None
    with _reachable(spec):
        return [file for file in hub.files("model", spec.path, spec.revision) if is_read(file.name)]


def snapshot(spec: CheckpointTeacher) -> Path:
    """The folder of its files, downloaded where they are not cached. Others may lie among them."""
    with _reachable(spec):
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=FILES))


@contextmanager
def _reachable(spec: CheckpointTeacher) -> Iterator[None]:
    """Says what cannot be had, and why."""
    try:
        yield
    except hub.UNREACHABLE as error:
        at = f" at revision {spec.revision}" if spec.revision else ""
        raise InputError(
            f"teacher.path={spec.path}{at} is neither a folder here nor a hub id that can be fetched or is cached "
            f"({hub.reason(error)}); check the name and the network, or download it and give the folder"
        ) from error
