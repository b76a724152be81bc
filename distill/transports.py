"""Where files come from: a folder, http(s), a hub, an object store, ssh. Each opens a file at an offset."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from distill.guard import InputError

if TYPE_CHECKING:
    import fsspec
    import requests

URL = re.compile(r"([a-z][a-z0-9+.-]*):/", re.IGNORECASE)
SCHEMES = "file, http, https, s3, hf, ssh"
SECONDS = (20, 60)  # to connect; without a byte
READ = 256 * 1024  # bytes asked of a network at once: what a broken connection may cost


class Broken(Exception):  # noqa: N818  (what the network did; asking again may help)
    """A transfer that ended before its time."""


class Refused(Exception):  # noqa: N818  (the other side's answer; asking again does not help)
    """What will not be had from there."""


class Missing(Refused):
    """There is no such file."""


@runtime_checkable
class Stream(Protocol):
    """Bytes in their order; b"" at the end. Broken or Refused where they cannot be had."""

    def read(self, size: int, /) -> bytes: ...


@runtime_checkable
class Source(Protocol):
    """A folder somewhere, for reading."""

    @property
    def where(self) -> str: ...  # for people, without passwords
    @property
    def parallel(self) -> int: ...  # files at once
    @property
    def retries(self) -> int: ...  # after a failure that brought nothing
    def open(self, name: str, offset: int) -> AbstractContextManager[Stream]: ...
    def listing(self) -> list[str] | None: ...  # every file, if that can be told
    def below(self, name: str) -> "Source": ...  # a folder in it


def is_url(text: str) -> bool:
    """Whether a place is given as scheme://..."""
    return URL.match(text) is not None


def at(place: str | Path) -> Source:
    """The folder that a path or a URL names."""
    text = str(place)
    if not isinstance(place, str) or not is_url(text):
        return Folder(Path(place))
    try:
        url = urlsplit(text)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from None
    scheme = url.scheme.lower()
    if url.query or url.fragment or re.search(r"::\w+:", text):  # fsspec would go from one to the next
        raise InputError(f"{text}: a plain URL of a folder is expected, without '?', '#' and '::'")
    if scheme == "file":
        if url.netloc not in ("", "localhost"):
            raise InputError(f"{text}: a file URL has three slashes: file:///path")
        return Folder(Path(unquote(url.path)))
    if not url.netloc:
        raise InputError(f"{text}: names no host; write {scheme}://HOST/PATH")
    base = text.rstrip("/")
    if scheme in ("http", "https"):
        shown = base.replace(url.netloc, url.netloc.rpartition("@")[2], 1)
        return Http(shown, base)
    if scheme == "hf":
        return _hub(base)
    if scheme == "ssh":
        from distill import ssh

        return ssh.at(base)
    return _fsspec(base, scheme)


# --- folders ---


@dataclass(frozen=True)
class Folder:
    """A folder of this machine."""

    path: Path
    parallel: int = 2
    retries: int = 0

    @property
    def where(self) -> str:
        return str(self.path)

    @contextmanager
    def open(self, name: str, offset: int) -> Iterator[Stream]:
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Refused(f"{path} is a link; links are not followed") from error
            kind = Missing if isinstance(error, FileNotFoundError | NotADirectoryError) else Refused
            raise kind(f"{path}: {error.strerror}") from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            file.seek(offset)
            yield file

    def listing(self) -> list[str] | None:
        """InputError where there is a link: it may lead anywhere."""
        found = []
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path).as_posix()
            if path.is_symlink():
                raise InputError(f"{self.path}: {name} is a link; a student has none. Copy the files themselves")
            if not path.is_dir():
                found.append(name)
        return found

    def below(self, name: str) -> "Source":
        return Folder(self.path / name)


# --- http ---


@dataclass(frozen=True)
class Http:
    """Files below a URL. A server that knows no ranges works too: what is known already is read again."""

    where: str
    base: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    parallel: int = 4
    retries: int = 5

    @contextmanager
    def open(self, name: str, offset: int) -> Iterator[Stream]:
        import requests

        headers = {**self.headers, "Accept-Encoding": "identity"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
        try:
            response = requests.get(f"{self.base}/{name}", headers=headers, stream=True, timeout=SECONDS)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Broken(f"{self.where}: {_reason(error)}") from error
        except (requests.RequestException, ValueError) as error:
            raise Refused(f"{self.where}: {_reason(error)}") from error
        with response:
            _refuse_status(response, f"{self.where}/{name}", offset)
            stream = _Body(response)
            if offset and response.status_code == 200:
                _skip(stream, offset)
            yield stream

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> "Source":
        return Http(f"{self.where}/{name}", f"{self.base}/{name}", self.headers, self.parallel, self.retries)


def _refuse_status(response: "requests.Response", where: str, offset: int) -> None:
    status = response.status_code
    said = f"{where}: {status} {response.reason}"
    if status in (404, 410):
        raise Missing(said)
    if status == 416:
        raise Broken(f"{where} ends before byte {offset:,}")
    if status in (408, 425, 429) or status >= 500:
        raise Broken(said)
    if status not in (200, 206):
        raise Refused(said)
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if status == 206 and (start is None or int(start[1]) != offset):
        raise Refused(f"{where}: asked for byte {offset:,}, given {response.headers.get('Content-Range')}")


class _Body:
    """The body of a response."""

    def __init__(self, response: "requests.Response") -> None:
        self._raw = response.raw

    def read(self, size: int, /) -> bytes:
        from urllib3.exceptions import HTTPError

        try:
            content: bytes = self._raw.read(min(size, READ))
        except (HTTPError, OSError) as error:
            raise Broken(_reason(error)) from error
        return content


def _skip(stream: Stream, count: int) -> None:
    while count:
        passed = stream.read(min(count, READ))
        if not passed:
            raise Broken(f"ended {count:,} bytes before where it is to go on")
        count -= len(passed)


def _reason(error: Exception) -> str:
    """The innermost of the errors that a library wraps in each other, in one line."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return " ".join(str(cause).split()) or type(cause).__name__


# --- hubs ---


def _hub(url: str) -> Source:
    """hf://ORG/NAME[@REVISION], at the commit that its revision is now."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", url)
    if match is None:
        raise InputError(f"{url}: hf://ORG/NAME or hf://ORG/NAME@REVISION is expected")
    try:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import build_hf_headers
    except ModuleNotFoundError as error:
        raise InputError(f"{url} needs the package {error.name}; pip install 'distill[hf]'") from error
    try:
        commit = HfApi().model_info(match[1], revision=match[2]).sha
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"{url} cannot be found ({type(error).__name__}: {_reason(error)}); check it") from error
    base = hf_hub_url(match[1], "-", revision=commit).removesuffix("/-")
    return Http(url, base, build_hf_headers())


# --- what fsspec knows ---


@dataclass(frozen=True)
class Fsspec:
    """Files of an object store."""

    where: str
    system: "fsspec.AbstractFileSystem"
    path: str
    errors: tuple[type[Exception], ...]
    parallel: int = 4
    retries: int = 2  # these libraries try again themselves

    @contextmanager
    def open(self, name: str, offset: int) -> Iterator[Stream]:
        try:
            file = self.system.open(f"{self.path}/{name}", "rb")
        except FileNotFoundError as error:
            raise Missing(f"{self.where}/{name}: there is no such file") from error
        except PermissionError as error:
            raise Refused(f"{self.where}/{name}: {_reason(error)}") from error
        except self.errors as error:
            raise Broken(f"{self.where}: {_reason(error)}") from error
        with file:
            file.seek(offset)
            yield _Checked(file, self.errors)

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> "Source":
        return Fsspec(f"{self.where}/{name}", self.system, f"{self.path}/{name}", self.errors)


@dataclass(frozen=True)
class _Checked:
    """A stream whose errors are ours."""

    stream: Stream
    errors: tuple[type[Exception], ...]

    def read(self, size: int, /) -> bytes:
        try:
            return self.stream.read(size)
        except self.errors as error:
            raise Broken(_reason(error)) from error


def _fsspec(url: str, scheme: str) -> Source:
    from fsspec import available_protocols, url_to_fs

    if scheme not in available_protocols():
        raise InputError(f"{url}: unknown scheme '{scheme}'; valid: {SCHEMES}")
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        package = "pip install 'distill[s3]'" if scheme == "s3" else str(error)
        raise InputError(f"{url} needs a package that is not installed; {package}") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{url} cannot be used: {_reason(error)}") from error
    return Fsspec(url, system, str(path), _errors(scheme))


def _errors(scheme: str) -> tuple[type[Exception], ...]:
    if scheme != "s3":
        return (OSError,)
    from botocore.exceptions import BotoCoreError

    return (OSError, BotoCoreError)
