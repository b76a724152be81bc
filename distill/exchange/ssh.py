"""Reads files with the system's ssh client, so that the user's ssh config applies: jump hosts, agents, host names."""

import os
import re
import selectors
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from distill.core.errors import InputError
from distill.core.text import one_line
from distill.exchange.transports import READ, SILENCE, Broken, Missing, Refused, RemoteSource, Stream, shown

LAST = 4096  # bytes of ssh's messages that are kept
ABSENT = 44  # exit code of the remote script if there is no such file
HOST = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:%\[\]-]*")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*")
# Never prompt on a terminal, and notice a lost connection within a minute.
OPTIONS = ("-T", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ConnectTimeout=20")
FATAL = ("Permission denied", "Host key verification failed", "Could not resolve hostname", "Bad configuration option")


@dataclass(frozen=True)
class Ssh:
    """A folder of another machine, which must have the commands `test` and `tail`."""

    where: str
    host: tuple[str, ...]
    """the arguments of ssh that select the host"""
    path: str
    parallel: int = 2
    retries: int = 5

    @contextmanager
    def open(self, name: str, offset: int) -> Iterator[Stream]:
        path = shlex.quote(f"{self.path}/{name}")
        script = f"test -f {path} || exit {ABSENT}; exec tail -c +{offset + 1} {path}"
        command = ["ssh", *OPTIONS, *self.host, f"exec sh -c {shlex.quote(script)}"]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            raise Refused(f"ssh cannot be started: {error.strerror}; install an ssh client") from error
        output = _Output(process, f"{self.where}/{name}")
        try:
            yield output
        finally:
            process.kill()
            process.wait()
            output.close()

    def listing(self) -> list[str] | None:
        return None

    def below(self, name: str) -> RemoteSource:
        return Ssh(f"{self.where}/{name}", self.host, f"{self.path}/{name}", self.parallel, self.retries)


@dataclass
class _Output:
    """The output of ssh as a stream, which raises an error if ssh fails. Only the end of ssh's messages is kept."""

    process: subprocess.Popen[bytes]
    where: str
    said: bytes = b""
    waiting: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def __post_init__(self) -> None:
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            self.waiting.register(pipe, selectors.EVENT_READ)

    def close(self) -> None:
        self.waiting.close()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def read(self, size: int, /) -> bytes:
        """The next bytes; b"" once ssh has ended successfully.

        Raises Broken after a minute without data or if the connection fails, Missing if there is no such file, and
        Refused for errors that a retry cannot fix.
        """
        end = time.monotonic() + SILENCE
        while self.waiting.get_map():
            left = end - time.monotonic()
            ready = self.waiting.select(left) if left > 0 else []
            if left <= 0:
                raise Broken(f"{self.where}: no data for {SILENCE:.0f} s")
            for key, _ in ready:
                content = os.read(key.fd, min(size, READ))
                if not content:
                    self.waiting.unregister(key.fileobj)
                elif key.fileobj is self.process.stdout:
                    return content
                else:
                    self.said = (self.said + content)[-LAST:]
        try:
            code = self.process.wait(SILENCE)
        except subprocess.TimeoutExpired:
            raise Broken(f"{self.where}: ssh did not exit") from None
        if code == 0:
            return b""
        lines = [each for each in map(str.strip, self.said.decode(errors="replace").splitlines()) if each]
        message = f"{self.where}: {one_line(lines[-1], 300) if lines else f'ssh ended with code {code}'}"
        if code == ABSENT:
            raise Missing(f"{self.where}: there is no such file")
        if any(word in message for word in FATAL):
            raise Refused(message)
        raise Broken(message)


def at(url: str) -> RemoteSource:
    """The folder ssh://[USER@]HOST[:PORT]/PATH. /~/PATH is relative to the home folder on that host."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    port, name = parts.port, parts.hostname or ""
    # The host as it was written, since ssh's config may be case-sensitive.
    name = re.sub(r":\d+$", "", host) if not host.startswith("[") else name
    path = unquote(parts.path)
    path = f"./{path[3:]}" if path.startswith("/~/") else path
    if not HOST.fullmatch(name) or (user and not USER.fullmatch(user)) or not path.strip("/") or "\0" in path:
        raise InputError(
            f"{shown(url)}: must be ssh://[USER@]HOST[:PORT]/PATH; /~/PATH is relative to the home folder on that host"
        )
    options = (*(["-p", str(port)] if port else []), *(["-l", user] if user else []))
    return Ssh(shown(url), (*options, "--", name), path)
