"""Queries to the Hugging Face hub: the commit of a revision, the sizes of files, and the reason for a failure."""

import re
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

RepoKind = Literal["model", "dataset"]

COMMIT = re.compile(r"[0-9a-f]{40}")
UNREACHABLE = (HTTPError, OSError, ValueError)  # since huggingface_hub 1.0, HTTPError is not an OSError
REASONS = (  # the first match counts: GatedRepoError is a subclass of RepositoryNotFoundError
    (GatedRepoError, "request access on the repository's page, then log in with `hf auth login`"),
    (RevisionNotFoundError, "there is no such revision"),
    (RepositoryNotFoundError, "there is no such repository, or it is private"),
)


@dataclass(frozen=True)
class File:
    """A file of a repository."""

    name: str
    bytes: int
    cached: bool  # whether it is in the local Hugging Face cache


def commit(kind: RepoKind, name: str, revision: str | None) -> str:
    """Returns the commit hash of a branch or tag (None: the main branch). A hash is returned without a request."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    return str(HfApi().repo_info(name, repo_type=kind, revision=revision).sha)


def files(kind: RepoKind, name: str, commit: str | None) -> list[File]:
    """Lists the files of a commit (None: the newest of the main branch). In offline mode the list is empty."""
    if constants.HF_HUB_OFFLINE:
        return []
    found = HfApi().repo_info(name, repo_type=kind, revision=commit, files_metadata=True).siblings or []

    def is_cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(name, file, revision=commit, repo_type=kind), str)

    return [File(each.rfilename, each.size or 0, is_cached(each.rfilename)) for each in found]


def reason(error: Exception) -> str:
    """Describes in one line why a download or a query failed."""
    for kind, text in REASONS:
        if isinstance(error, kind):
            return text
    return (str(error).strip() or type(error).__name__).splitlines()[0]
