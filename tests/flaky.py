"""A real HTTP server of a folder that can be told to fail in various ways."""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self


@dataclass
class Fault:
    """What is done to the answers about files whose names end with `name`, `times` times."""

    name: str
    times: int = 1_000_000
    status: int | None = None  # this instead of the file
    after: int | None = None  # bytes of the body before the connection is cut
    promise: int = 0  # added to Content-Length
    change: Callable[[bytes], bytes] = field(default=lambda content: content)  # of the whole file
    hold: threading.Event | None = None  # the connection stays open, and silent, until then


class Flaky(ThreadingHTTPServer):
    """Serves a folder until its context is left."""

    daemon_threads = True

    def __init__(self, folder: Path, *faults: Fault, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.faults, self.ranges = folder, list(faults), ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, int]] = []  # path, first byte asked for
        self.sent = 0  # bytes of bodies
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def fault(self, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if path.endswith(fault.name) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return Fault("")


class Answer(BaseHTTPRequestHandler):
    server: Flaky

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        start = int(asked[1])
        self.server.requests.append((self.path, start))
        fault, path = self.server.fault(self.path), self.server.folder / self.path.lstrip("/")
        if fault.status is not None or not path.is_file():
            self.send_response(fault.status or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = fault.change(path.read_bytes())
        partial = self.server.ranges and "Range" in self.headers
        if partial and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:] if partial else content
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body) + fault.promise))
        self.end_headers()
        body = body if fault.after is None else body[: fault.after]
        with suppress(OSError):
            self.wfile.write(body)
        with self.server.lock:
            self.server.sent += len(body)
        if fault.hold is not None:
            fault.hold.wait(60)
        if fault.after is not None or fault.promise:
            self.close_connection = True

    def log_message(self, *_) -> None: ...
