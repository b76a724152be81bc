"""Files in folders that others write to: opened only where they are files, without following links, read to a limit.

A FIFO blocks its reader, a device never ends, a link leads anywhere: each is an OSError that says what it is.
"""

import errno
import os
import stat
from io import FileIO
from pathlib import Path

BLOCK = 1 << 24  # bytes read at once: a buffer of the whole limit may not fit
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, *, follow: bool = False) -> FileIO:
    """A file, unbuffered, for reading. OSError, without waiting, if it is anything else.

    follow: take a link for what it leads to, for a path that the user has named.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags if follow else flags | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise OSError(errno.ELOOP, "it is a link; links are not followed", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is a socket or device, not a file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return FileIO(descriptor)


def read_regular(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """The bytes of a small file. OSError if it is no file, or has more than `limit` bytes."""
    with open_regular(path, follow=follow) as file:
        content = bytearray()
        while len(content) <= limit and (block := file.read(min(BLOCK, limit + 1 - len(content)))):
            content += block
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return bytes(content)
