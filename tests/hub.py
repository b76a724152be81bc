"""A stand-in for the Hugging Face hub: folders served as repositories, over HTTP, on this machine alone.

It answers what `snapshot_download` and `load_dataset` ask. It is a proxy that leads nowhere, too: a process that has it
as its proxy reaches no other host, and what it asks of others stands among the requests.
"""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# /api/models/ID[/revision/REVISION], /api/models/ID/tree/REVISION[/FOLDER], /ID/resolve/REVISION/FILE
ASKED = re.compile(r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?")

MUTE = "org/mute"  # who asks for this repository is hung up on


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Commit:
    """What lies in a folder, by name. Its sha follows from the content."""

    def __init__(self, folder: Path) -> None:
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        self.files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        self.folders = {name: b"" for name in paths if name not in self.files}
        self.sha = sha1(repr(self.files).encode())

    def info(self, name: str) -> bytes:
        siblings = [{"rfilename": file} for file in self.files]
        return json.dumps({"id": name, "sha": self.sha, "siblings": siblings}).encode()

    def tree(self, folder: str, recursive: bool) -> bytes:
        above = folder and f"{folder}/"
        found = [
            {"type": kind, "path": name, "oid": sha1(content), "size": len(content)}
            for kind, contents in (("directory", self.folders), ("file", self.files))
            for name, content in contents.items()
            if name.startswith(above) and (recursive or "/" not in name.removeprefix(above))
        ]
        if not found:
            raise LookupError("EntryNotFound")
        return json.dumps(found).encode()

    def file(self, name: str) -> bytes:
        if name not in self.files:
            raise LookupError("EntryNotFound")
        return self.files[name]


class Hub(ThreadingHTTPServer):
    """Serves {"models/org/name" or "datasets/org/name": {revision: folder}} until its context is left."""

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []  # METHOD path
        self.commits = {name: {ref: Commit(at) for ref, at in refs.items()} for name, refs in repositories.items()}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, path: str, query: str) -> tuple[bytes, str]:
        """The body and the commit it is of; LookupError with the hub's word for what there is not."""
        if (match := ASKED.fullmatch(path)) is None:
            raise LookupError("EntryNotFound")
        kind, name, verb, revision, path = (unquote(group or "") for group in match.groups())
        if (commits := self.commits.get(f"{kind or 'models'}/{name}")) is None:
            raise LookupError("RepoNotFound")
        by_sha = {commit.sha: commit for commit in commits.values()}
        if (commit := (by_sha | commits).get(revision or "main")) is None:
            raise LookupError("RevisionNotFound")
        if verb == "resolve":
            return commit.file(path), commit.sha
        if verb == "tree":
            return commit.tree(path, "recursive=true" in query), commit.sha
        return commit.info(name), commit.sha


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if MUTE in self.path:
            return
        url = urlsplit(self.path)
        try:
            body, sha = self.server.answer(url.path, url.query)
            status, headers = 200, {"ETag": f'"{sha1(body)}"', "X-Repo-Commit": sha}
        except LookupError as missing:
            status, headers, body = 404, {"X-Error-Code": str(missing)}, b""
        self.send_response(status)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_request(self, *_) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def log_message(self, *_) -> None: ...
