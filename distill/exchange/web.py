"""Reads files over http(s) and from the Hugging Face Hub."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from distill.core.errors import InputError
from distill.core.text import one_line
from distill.exchange.transports import (
    ANSWER,
    READ,
    SILENCE,
    Broken,
    Missing,
    Refused,
    RemoteSource,
    Stream,
    reason,
    shown,
    within,
)

if TYPE_CHECKING:
    import requests

CONNECT = 20.0  # seconds to establish a connection
REDIRECTS = 10
GATHER = 1.0  # seconds for which received data is collected before it is returned


@dataclass(frozen=True)
class Http:
    """Files below a URL. A server without range requests works too: the known part is read again and skipped."""

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
            response = within(ANSWER, lambda: _get(f"{self.base}/{name}", headers), self.where)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise Broken(f"{self.where}: {reason(error)}") from error
        except (requests.RequestException, ValueError) as error:
            raise Refused(f"{self.where}: {reason(error)}") from error
        with response:
            _refuse_status(response, f"{self.where}/{name}", offset)
            stream = _Body(response)
            if offset and response.status_code == 200:
                _skip(stream, offset)
            yield stream

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> RemoteSource:
        return Http(f"{self.where}/{name}", f"{self.base}/{name}", self.headers, self.parallel, self.retries)


def _get(url: str, headers: Mapping[str, str]) -> "requests.Response":
    with _session()() as session:
        session.max_redirects = REDIRECTS
        return session.get(url, headers=dict(headers), stream=True, timeout=(CONNECT, SILENCE))


@cache
def _session() -> type["requests.Session"]:
    """The session class. requests is imported only when needed, since the import is a third of a command's startup."""
    import requests

    class Session(requests.Session):
        """Follows redirects only over http(s), and never from https to http."""

        def get_redirect_target(self, resp: requests.Response) -> str | None:
            target = super().get_redirect_target(resp)
            if target is None:
                return None
            before, after = urlsplit(resp.url).scheme.lower(), urlsplit(target).scheme.lower() or None
            if after not in (None, "https", "http" if before == "http" else "https"):
                raise Refused(
                    f"{one_line(shown(resp.url), 300)} redirects to {one_line(shown(target), 300)}; redirects from "
                    f"{before} may only lead to {'http and https' if before == 'http' else 'https'}"
                )
            return target

    return Session


def _refuse_status(response: "requests.Response", where: str, offset: int) -> None:
    status = response.status_code
    said = f"{where}: {status} {one_line(response.reason or '', 100)}".rstrip()
    if status in (404, 410):
        raise Missing(said)
    if status == 416:
        raise Broken(f"{where} ends before byte {offset:,}")
    if status in (408, 425, 429) or status >= 500:
        raise Broken(said)
    if status not in (200, 206):
        raise Refused(said)
    given = response.headers.get("Content-Range", "")
    start = re.match(r"bytes ([0-9]{1,20})-", given)
    if status == 206 and (start is None or int(start[1]) != offset):
        raise Refused(
            f"{where}: byte {offset:,} was requested, the answer has {one_line(given, 100) or 'no Content-Range'}"
        )


class _Body:
    """The body of a response. A read returns after a second with what has arrived, so that a slow server is noticed."""

    def __init__(self, response: "requests.Response") -> None:
        self._raw = response.raw
        self._broken = ""  # the error to raise at the next read, after the data before it was returned

    def read(self, size: int, /) -> bytes:
        from urllib3.exceptions import HTTPError

        if self._broken:
            raise Broken(self._broken)
        content, end, wanted = bytearray(), time.monotonic() + GATHER, min(size, READ)
        try:
            while len(content) < wanted and time.monotonic() < end:
                block = self._raw.read1(wanted - len(content))
                if not block:
                    break
                content += block
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            self._broken = reason(error)
            if not content:
                raise Broken(self._broken) from error
        return bytes(content)


def _skip(stream: Stream, count: int) -> None:
    """Skip the first `count` bytes of a stream. Raises Broken if less than a block arrives in a minute."""
    begin, left = time.monotonic(), count
    while count:
        if time.monotonic() - begin > SILENCE:
            if left - count < READ:
                raise Broken(f"it is too slow: {left - count:,} bytes in {SILENCE:.0f} s")
            begin, left = time.monotonic(), count
        passed = stream.read(min(count, READ))
        if not passed:
            raise Broken(f"ended {count:,} bytes before the point to resume from")
        count -= len(passed)


def hub(url: str) -> RemoteSource:
    """The files of hf://ORG/NAME[@REVISION], at the current commit of the revision. InputError if it is not found."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", url)
    if match is None:
        raise InputError(f"{shown(url)}: hf://ORG/NAME or hf://ORG/NAME@REVISION is expected")
    try:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HTTPError
        from huggingface_hub.utils import build_hf_headers
    except ModuleNotFoundError as error:
        raise InputError(f"{url} needs the package {error.name}; pip install 'distill[hf]'") from error
    try:
        commit = within(ANSWER, lambda: HfApi().model_info(match[1], revision=match[2]).sha, url)
    except (HTTPError, OSError, ValueError, Broken) as error:
        raise InputError(f"{url} cannot be found ({type(error).__name__}: {reason(error)}); check the URL") from error
    base = hf_hub_url(match[1], "-", revision=commit).removesuffix("/-")
    return Http(url, base, build_hf_headers())
