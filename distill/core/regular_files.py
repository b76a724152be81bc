"""Safe reading of files in folders that other users or programs write to.

Only regular files are opened, and at most a given number of bytes is read. A FIFO can block its reader, a device may
be endless, and a symbolic link may point anywhere. Each raises an OSError that names it; links can be allowed.
"""

import errno
import os
import stat
from io import FileIO
from pathlib import Path

BLOCK = 1 << 24  # bytes read at once: a buffer of the full limit may not fit into memory
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path, *, follow: bool = False) -> FileIO:
    """Open a regular file for reading, unbuffered. Raises OSError at once, without blocking, for anything else.

    follow: follow symbolic links. Meant for a path that the user has given.
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
    """The content of a small file. Raises OSError if it is not a regular file or has more than `limit` bytes."""
    with open_regular(path, follow=follow) as file:
        content = bytearray()
        while len(content) <= limit and (block := file.read(min(BLOCK, limit + 1 - len(content)))):
            content += block
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return bytes(content)
