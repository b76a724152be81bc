"""The Hugging Face hub: which commit a name refers to, how large its files are, and why it cannot be downloaded."""

import re
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

Kind = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}")
UNREACHABLE = (HTTPError, OSError, ValueError)  # HTTPError is httpx's from version 1 on: no OSError, unlike the rest
REASONS = (  # the first that fits: what is gated is also not found
    (GatedRepoError, "access has to be asked for on its page; then log in by `hf auth login`"),
    (RevisionNotFoundError, "there is no such revision"),
    (RepositoryNotFoundError, "there is no such repository, or it is private"),
)


@dataclass(frozen=True)
class File:
    """A file of a repository."""

    name: str
    bytes: int
    cached: bool  # it is in the library's cache already


def commit(kind: Kind, name: str, revision: str | None) -> str:
    """The commit of a branch or tag, by default of the main branch; a commit is returned without a request."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)


def files(kind: Kind, name: str, commit: str | None) -> list[File]:
    """Of a commit, by default that of the main branch; none where the hub must not be asked, so that nothing can be
    downloaded either.
    """
    if constants.HF_HUB_OFFLINE:
        return []
    found = HfApi().repo_info(name, repo_type=kind, revision=commit, files_metadata=True).siblings or []

    def is_cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, revision=commit, repo_type=kind), str)

    return [File(each.rfilename, each.size or 0, is_cached(each.rfilename)) for each in found]


def reason(error: Exception) -> str:
    """Why it cannot be had, in one line."""
    for kind, text in REASONS:
        if isinstance(error, kind):
            return text
    return (str(error).strip() or type(error).__name__).splitlines()[0]
