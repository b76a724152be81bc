"""Sources of files: a folder, http(s), the hub, an object store, ssh. Each can open a file at an offset.

Servers may be slow or send data without end, so every wait has a time limit. Their messages are shortened to one line
before they are shown. Passwords in a URL are used but never shown.
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
    "s3": "write s3://BUCKET/PATH, and set the keys in $AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "hf": "write hf://ORG/NAME or hf://ORG/NAME@REVISION, and set the token in $HF_TOKEN, or run: hf auth login",
}  # scheme -> how the user gives credentials
ANSWER = 120.0  # seconds until a source must begin to send a file
SILENCE = 60.0  # seconds without any data
BLOCK = 600.0  # seconds for a block of an object store, whose library may read 50 MB ahead
READ = 256 * 1024  # bytes per network read: at most this much is lost when a connection breaks
MAX_LISTED, MAX_DEPTH = 10_000, 16  # limits for a student folder: files and folders in it, depth of folders

Result = TypeVar("Result")


class Broken(Exception):  # noqa: N818  (a failure of the network; a retry may help)
    """A transfer ended too early. A retry may help."""


class Refused(Exception):  # noqa: N818  (the answer of the source; a retry does not help)
    """The source refuses to send a file. A retry does not help."""


class Missing(Refused):
    """The source has no such file."""


@runtime_checkable
class Stream(Protocol):
    """A stream of bytes. `read` returns b"" at the end, and raises Broken or Refused if it fails."""

    def read(self, size: int, /) -> bytes: ...


@runtime_checkable
class RemoteSource(Protocol):
    """A readable folder, local or remote."""

    @property
    def where(self) -> str: ...  # its address for messages, without passwords
    @property
    def parallel(self) -> int: ...  # number of files to fetch at the same time
    @property
    def retries(self) -> int: ...  # number of retries after failures in a row
    def open(self, name: str, offset: int) -> AbstractContextManager[Stream]: ...
    def listing(self) -> list[str] | None: ...  # all files; None: it cannot be listed
    def below(self, name: str) -> "RemoteSource": ...  # a sub-folder


def is_url(text: str) -> bool:
    """Whether a text is a URL: scheme:/..., or a malformed URL, which `scheme_of` refuses."""
    return URL.match(text) is not None


def shown(url: str) -> str:
    """A URL for messages: without user, password and query, which may contain a token."""
    # The second alternative is a password that contains '/', which is not valid in a URL.
    plain = re.sub(r"(?<=:)(/+)(?:[^/?#]*@|[^/?#@:]*:(?![0-9]*(?:/|$))[^?#]*@)", r"\1", url)
    return re.sub(r"[?#].*", "", plain, flags=re.DOTALL)


def reason(error: BaseException) -> str:
    """The message of the innermost cause of an error, as one short line without passwords."""
    cause = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    said = re.sub(r"//[^/\s]*@", "//", str(cause))
    return one_line(said, 300) or type(cause).__name__


class _Caught:
    """Context manager that catches an exception in a thread, for the thread that waits for it."""

    error: BaseException | None = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        self.error = error
        return True


def within(seconds: float, call: Callable[[], Result], what: str) -> Result:
    """Call `call` in a thread, and return its result or raise its exception. Raises Broken if it takes longer.

    The timeouts of libraries are per received byte, so a server that sends a byte now and then would never be too slow.
    After a timeout, the thread is not stopped; it ends with the program.
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
    """The source for a path or a URL of a folder. InputError if the URL is not valid."""
    if not isinstance(place, str) or not is_url(place):
        return RemoteFolder(Path(place))
    url, base = _parsed(place), place.rstrip("/")
    scheme = url.scheme.lower()
    if scheme == "file":
        path = unquote(url.path)
        if not is_text(path) or "\n" in path:
            raise InputError(
                f"{one_line(shown(place), 500)}: the path contains a control character; give another folder"
            )
        return RemoteFolder(Path(path))
    if scheme == "ssh":
        from distill.exchange import ssh

        return ssh.at(base)
    if scheme == "s3":
        return _s3(base)
    from distill.exchange import web

    return web.hub(base) if scheme == "hf" else web.Http(shown(base), base)


def scheme_of(text: str) -> str:
    """The scheme of a URL. Raises InputError, without passwords, if it is unknown or if URLs are chained by '::'."""
    scheme = re.match(r"\s*([a-z][a-z0-9+.-]*):/", text, re.IGNORECASE)
    if scheme is None or re.search(r"::\w+:", text):  # fsspec would follow such a chain
        raise InputError(
            "the URL must have the form SCHEME://HOST/PATH, without '?', '#' and '::'; "
            f"valid schemes: {', '.join(SCHEMES)}"
        )
    if scheme[1].lower() not in SCHEMES:
        plain = one_line(re.sub(":/(?!/)", "://", shown(text), count=1), 500)  # Path changes '//' to '/'
        raise InputError(f"{plain}: unknown scheme '{scheme[1].lower()}'; valid: {', '.join(SCHEMES)}")
    return scheme[1].lower()


def _parsed(text: str) -> SplitResult:
    """The parts of a URL. Raises InputError, without passwords, if its scheme or form is not supported."""
    plain, scheme = one_line(shown(text), 500), scheme_of(text)
    try:
        url = urlsplit(text)
    except ValueError as error:
        raise InputError(f"{plain}: {error}") from None
    try:
        _ = url.port
    except ValueError:  # what follows ':' may be a part of a password
        raise InputError(
            f"{scheme}://{url.hostname}:...: the port is not a number. If the password contains '/', write it as %2F"
        ) from None
    if url.query or url.fragment or re.search(r"[?#]", text):
        raise InputError(f"{plain}: give the URL of a folder, without '?', '#' and '::'")
    if one_line(text, len(text)) != text:
        raise InputError(f"{plain}: the URL must not contain control characters, or spaces at its ends or in a row")
    if scheme == "file":
        if url.netloc not in ("", "localhost"):
            raise InputError(f"{plain}: a file URL needs three slashes: file:///path")
    elif not url.netloc:
        raise InputError(f"{plain}: the host is missing; write {scheme}://HOST/PATH")
    elif scheme in ACCOUNTS and "@" in url.netloc:
        raise InputError(f"{plain}: {scheme} URLs must not contain a user or a password; {ACCOUNTS[scheme]}")
    return url


# --- folders ---


@dataclass(frozen=True)
class RemoteFolder:
    """A folder on this machine."""

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
        """All files. Raises InputError if there is a link, or more files or folders than a student may have."""
        found, seen = list[str](), 0
        for above, folders, files in os.walk(self.path):
            seen += len(folders) + len(files)
            if seen > MAX_LISTED or len(Path(above).relative_to(self.path).parts) > MAX_DEPTH:
                raise InputError(
                    f"{self.path} contains more than {MAX_LISTED:,} files or {MAX_DEPTH} levels of folders, so it is "
                    "not a student"
                )
            for path in (Path(above) / each for each in sorted([*folders, *files])):
                if path.is_symlink():
                    name = one_line(path.relative_to(self.path).as_posix(), 200)
                    raise InputError(
                        f"{self.path}: {name} is a link; a student must not contain links. Copy the files themselves"
                    )
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
    retries: int = 2  # few, since the libraries retry themselves

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
    """A stream with a time limit, whose errors are converted to Broken."""

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
