"""Recognises PNG files by their content."""

import re

PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = re.compile(rb"[A-Za-z]{4}")


def is_png(content: bytes) -> bool:
    """Whether the bytes are one whole PNG file: signature, chunks up to IEND, and nothing after it."""
    if not content.startswith(PNG):
        return False
    at, first = len(PNG), True
    while at + 12 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if not CHUNK.fullmatch(kind) or (first and (kind, length) != (b"IHDR", 13)):
            return False
        at, first = at + 12 + length, False
        if kind == b"IEND":
            return at == len(content)
    return False
