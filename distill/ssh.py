"""Files over the system's own ssh, with all that the user's config says of the host: jump hosts, agents, names."""

import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO
from urllib.parse import unquote, urlsplit

from distill.guard import InputError
from distill.transports import READ, Broken, Missing, Refused, Source, Stream

ABSENT = 44  # exit code of our remote line where there is no such file
HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%\[\]-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
# Ask nothing on a terminal; notice within a minute that the other side is gone.
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=20")
FATAL = ("Permission denied", "Host key verification failed", "Could not resolve hostname", "Bad configuration option")


@dataclass(frozen=True)
class Ssh:
    """A folder of another machine. Its shell must know `test` and `tail`."""

    where: str
    host: tuple[str, ...]
    """what stands on ssh's command line for it"""
    path: str
    parallel: int = 2
    retries: int = 5

    @contextmanager
    def open(self, name: str, offset: int) -> Iterator[Stream]:
        path = shlex.quote(f"{self.path}/{name}")
        script = f"test -f {path} || exit {ABSENT}; exec tail -c +{offset + 1} {path}"
        command = ["ssh", *OPTIONS, *self.host, f"exec sh -c {shlex.quote(script)}"]
        with tempfile.TemporaryFile() as said:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, bufsize=0
                )
            except OSError as error:
                raise Refused(f"ssh cannot be started: {error.strerror}; install an ssh client") from error
            try:
                yield _Output(process, said, f"{self.where}/{name}")
            finally:
                process.kill()
                process.wait()
                assert process.stdout is not None
                process.stdout.close()

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> Source:
        return Ssh(f"{self.where}/{name}", self.host, f"{self.path}/{name}", self.parallel, self.retries)


@dataclass(frozen=True)
class _Output:
    """What ssh brings; at its end, why it ended."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]
    where: str

    def read(self, size: int, /) -> bytes:
        assert self.process.stdout is not None
        content: bytes = self.process.stdout.read(min(size, READ))
        if content or (code := self.process.wait()) == 0:
            return content
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        message = f"{self.where}: {lines[-1].strip() if lines else f'ssh ended with code {code}'}"
        if code == ABSENT:
            raise Missing(f"{self.where}: there is no such file")
        if any(word in message for word in FATAL):
            raise Refused(message)
        raise Broken(message)


def at(url: str) -> Source:
    """ssh://[USER@]HOST[:PORT]/PATH; /~/PATH lies below the home there."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    try:
        port, name = parts.port, parts.hostname or ""
    except ValueError as error:
        raise InputError(f"{url}: {error}") from None
    # The host as it was written: ssh's config may tell capitals apart.
    name = re.sub(r":\d+$", "", host) if not host.startswith("[") else name
    path = unquote(parts.path)
    path = f"./{path[3:]}" if path.startswith("/~/") else path
    if not HOST.fullmatch(name) or (user and not USER.fullmatch(user)) or not path.strip("/") or "\0" in path:
        raise InputError(f"{url}: ssh://[USER@]HOST[:PORT]/PATH is expected; /~/PATH lies below the home there")
    options = (*(["-p", str(port)] if port else []), *(["-l", user] if user else []))
    return Ssh(url, (*options, "--", name), path)
