"""Where files come from: a folder, http(s), a hub, an object store, ssh. Each opens a file at an offset.

Servers may be slow or never end: every wait has a time limit, and their messages are shortened to one line before they
are shown. Passwords in a URL are used, and never shown.
"""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable
from urllib.parse import SplitResult, unquote, urlsplit

from distill.core.errors import InputError
from distill.core.regular_files import open_regular
from distill.core.text import is_text, one_line, short

if TYPE_CHECKING:
    import fsspec

URL = re.compile(r"[a-z][a-z0-9+.-]*:(/|:)|.*:/(/|.*@)", re.IGNORECASE | re.DOTALL)
SCHEMES = ("file", "http", "https", "s3", "hf", "ssh")
ACCOUNTS = {
    "s3": "write s3://BUCKET/PATH, and give the keys by $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "hf": "write hf://ORG/NAME or hf://ORG/NAME@REVISION, and give the token by $HF_TOKEN, or: hf auth login",
}  # how these take a user's keys
ANSWER = 120.0  # seconds until the other side has begun to send a file
SILENCE = 60.0  # seconds without a byte
BLOCK = 600.0  # seconds for a block of an object store, which may fetch 50 MB ahead
READ = 256 * 1024  # bytes asked of a network at once: what a broken connection may cost
MAX_LISTED, MAX_DEPTH = 10_000, 16  # files and folders of a folder that is to be a student

Result = TypeVar("Result")


class Broken(Exception):  # noqa: N818  (what the network did; asking again may help)
    """A transfer that ended too early."""


class Refused(Exception):  # noqa: N818  (the other side's answer; asking again does not help)
    """A file that the source refuses to send."""


class Missing(Refused):
    """There is no such file."""


@runtime_checkable
class Stream(Protocol):
    """Bytes in their order; b"" at the end. Broken or Refused where they cannot be had."""

    def read(self, size: int, /) -> bytes: ...


@runtime_checkable
class RemoteSource(Protocol):
    """A folder somewhere, for reading."""

    @property
    def where(self) -> str: ...  # for people, without passwords
    @property
    def parallel(self) -> int: ...  # files at once
    @property
    def retries(self) -> int: ...  # after a failure that brought nothing
    def open(self, name: str, offset: int) -> AbstractContextManager[Stream]: ...
    def listing(self) -> list[str] | None: ...  # every file, if that can be told
    def below(self, name: str) -> "RemoteSource": ...  # a folder in it


def is_url(text: str) -> bool:
    """Whether a place is given as scheme:/..., or holds one in another form, which `scheme_of` refuses."""
    return URL.match(text) is not None


def shown(url: str) -> str:
    """A URL for people: without a user, a password or a query, which may hold a token."""
    # The second form is a password with a '/', which no program reads as one.
    plain = re.sub(r"(?<=:)(/+)(?:[^/?#]*@|[^/?#@:]*:(?![0-9]*(?:/|$))[^?#]*@)", r"\1", url)
    return re.sub(r"[?#].*", "", plain, flags=re.DOTALL)


def reason(error: BaseException) -> str:
    """The innermost of the errors that a library wraps in each other, in one short line without passwords."""
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    said = re.sub(r"//[^/\s]*@", "//", str(cause))
    return one_line(said, 300) or type(cause).__name__


class _Caught:
    """Keeps an exception of a thread for the thread that waits for it."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.error = error
        return True


def within(seconds: float, call: Callable[[], Result], what: str) -> Result:
    """What `call` returns or raises. Broken if it takes longer: its thread is left behind, and ends with the program.

    Time limits of libraries hold for each byte, so that a server which sends one now and then is never too slow.
    """
    found, caught = list[Result](), _Caught()

    def work() -> None:
        with caught:
            found.append(call())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if caught.error is not None:
        raise caught.error
    if not found:
        raise Broken(f"{what}: no answer within {seconds:.0f} s")
    return found[0]


def at(place: str | Path) -> RemoteSource:
    """The folder that a path or a URL names."""
    if not isinstance(place, str) or not is_url(place):
        return RemoteFolder(Path(place))
    url, base = _parsed(place), place.rstrip("/")
    scheme = url.scheme.lower()
    if scheme == "file":
        path = unquote(url.path)
        if not is_text(path) or "\n" in path:
            raise InputError(f"{one_line(shown(place), 500)}: the path holds a control character; give another folder")
        return RemoteFolder(Path(path))
    if scheme == "ssh":
        from distill.exchange import ssh

        return ssh.at(base)
    if scheme == "s3":
        return _s3(base)
    from distill.exchange import web

    return web.hub(base) if scheme == "hf" else web.Http(shown(base), base)


def scheme_of(text: str) -> str:
    """The scheme of a URL; InputError, without its passwords, if it is none of ours or there are several in a row."""
    scheme = re.match(r"\s*([a-z][a-z0-9+.-]*):/", text, re.IGNORECASE)
    if scheme is None or re.search(r"::\w+:", text):  # fsspec would go from one to the next
        raise InputError(
            "the address given is not a plain URL of a folder, without '?', '#' and '::'; write SCHEME://HOST/PATH; "
            f"valid schemes: {', '.join(SCHEMES)}"
        )
    if scheme[1].lower() not in SCHEMES:
        plain = one_line(re.sub(":/(?!/)", "://", shown(text), count=1), 500)  # a Path has lost one of them
        raise InputError(f"{plain}: unknown scheme '{scheme[1].lower()}'; valid: {', '.join(SCHEMES)}")
    return scheme[1].lower()


def _parsed(text: str) -> SplitResult:
    """The parts of a URL; InputError, without its passwords, unless it is of a scheme and form that is taken."""
    plain, scheme = one_line(shown(text), 500), scheme_of(text)
    try:
        url = urlsplit(text)
    except ValueError as error:
        raise InputError(f"{plain}: {error}") from None
    try:
        _ = url.port
    except ValueError:  # it may be the beginning of a password
        raise InputError(
            f"{scheme}://{url.hostname}:...: the port is not a number. If the password contains '/', write it as %2F"
        ) from None
    if url.query or url.fragment or re.search(r"[?#]", text):
        raise InputError(f"{plain}: a plain URL of a folder is expected, without '?', '#' and '::'")
    if one_line(text, len(text)) != text:
        raise InputError(f"{plain}: a URL has no control characters, and no spaces at its ends or in a row")
    if scheme == "file":
        if url.netloc not in ("", "localhost"):
            raise InputError(f"{plain}: a file URL has three slashes: file:///path")
    elif not url.netloc:
        raise InputError(f"{plain}: names no host; write {scheme}://HOST/PATH")
    elif scheme in ACCOUNTS and "@" in url.netloc:
        raise InputError(f"{plain}: {scheme} takes no user and no password in a URL; {ACCOUNTS[scheme]}")
    return url


# --- folders ---


@dataclass(frozen=True)
class RemoteFolder:
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
            file = open_regular(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Missing(f"{path}: {error.strerror}") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise Refused(f"{short(str(path))}: {error.strerror}; give a shorter name") from error
            raise Refused(f"{path}: {error.strerror}") from error
        with file:
            file.seek(offset)
            yield file

    def listing(self) -> list[str] | None:
        """InputError where there is a link, which may lead anywhere, or more than a student has."""
        found, seen = list[str](), 0
        for above, folders, files in os.walk(self.path):
            seen += len(folders) + len(files)
            if seen > MAX_LISTED or len(Path(above).relative_to(self.path).parts) > MAX_DEPTH:
                raise InputError(
                    f"{self.path} holds more than {MAX_LISTED:,} files or {MAX_DEPTH} levels of folders, so it is not "
                    "a student"
                )
            for path in (Path(above) / each for each in sorted([*folders, *files])):
                if path.is_symlink():
                    name = one_line(path.relative_to(self.path).as_posix(), 200)
                    raise InputError(f"{self.path}: {name} is a link; a student has none. Copy the files themselves")
            found += [(Path(above) / each).relative_to(self.path).as_posix() for each in files]
        return sorted(found)

    def below(self, name: str) -> "RemoteSource":
        return RemoteFolder(self.path / name)


# --- object stores ---


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
        where = f"{self.where}/{name}"
        try:
            file = within(ANSWER, lambda: self.system.open(f"{self.path}/{name}", "rb"), where)
        except FileNotFoundError as error:
            raise Missing(f"{where}: there is no such file") from error
        except PermissionError as error:
            raise Refused(f"{where}: {reason(error)}") from error
        except self.errors as error:
            raise Broken(f"{self.where}: {reason(error)}") from error
        with file:
            file.seek(offset)
            yield _Checked(file, self.errors, where)

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> "RemoteSource":
        return Fsspec(f"{self.where}/{name}", self.system, f"{self.path}/{name}", self.errors)


@dataclass(frozen=True)
class _Checked:
    """A stream whose errors are ours."""

    stream: Stream
    errors: tuple[type[Exception], ...]
    where: str

    def read(self, size: int, /) -> bytes:
        try:
            return within(BLOCK, lambda: self.stream.read(size), self.where)
        except self.errors as error:
            raise Broken(reason(error)) from error


def _s3(url: str) -> RemoteSource:
    where = shown(url)
    try:
        from botocore.exceptions import BotoCoreError
        from fsspec import url_to_fs

        system, path = url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{where} needs a package that is not installed; pip install 'distill[s3]'") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{where} cannot be used: {reason(error)}") from error
    return Fsspec(where, system, str(path), (OSError, ValueError, BotoCoreError))
