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

FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
TREE = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
INFO = re.compile(r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")


class Commit:
    """What lies in a folder, by name. Its sha follows from the content."""

    def __init__(self, folder: Path) -> None:
        self.paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        self.files = {name: path for name, path in self.paths.items() if path.is_file()}
        self.sha = hashlib.sha1("".join(name + oid(path) for name, path in self.paths.items()).encode()).hexdigest()

    def tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        """The entries of a folder, "" being the root."""
        above = f"{folder}/" if folder else ""
        found = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": oid(path)}
            if name in self.files
            else {"type": "directory", "path": name, "oid": oid(path)}
            for name, path in self.paths.items()
            if name.startswith(above) and (recursive or "/" not in name[len(above) :])
        ]
        if not found:
            raise LookupError("EntryNotFound")
        return found


def oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves {"models/org/name" or "datasets/org/name": {revision: folder}} as a context, whose end ends it."""

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[str] = []
        self.repositories = {
            name: {revision: Commit(folder) for revision, folder in folders.items()}
            for name, folders in repositories.items()
        }
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()

    def commit(self, kind: str, name: str, revision: str) -> Commit:
        """Of a branch, a tag or a sha."""
        commits = self.repositories.get(f"{kind}/{name}")
        if commits is None:
            raise LookupError("RepoNotFound")
        found = [commit for ref, commit in commits.items() if revision in (ref, commit.sha)]
        if not found:
            raise LookupError("RevisionNotFound")
        return found[0]


class Answer(BaseHTTPRequestHandler):
    """One request and its answer."""

    server: Hub

    def do_GET(self) -> None:
        try:
            status, body, headers = 200, *self._found()
        except LookupError as missing:
            status, body, headers = 404, b"", {"X-Error-Code": str(missing)}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815

    def log_request(self, *_) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def log_message(self, *_) -> None: ...

    def _found(self) -> tuple[bytes, dict[str, str]]:
        """Body and headers; LookupError with the hub's code of what there is not."""
        url = urlsplit(self.path)
        match = FILE.fullmatch(url.path) or TREE.fullmatch(url.path) or INFO.fullmatch(url.path)
        if match is None:
            raise LookupError("EntryNotFound")
        given = {key: unquote(value or "") for key, value in match.groupdict().items()}
        commit = self.server.commit(given["kind"] or "models", given["id"], given["revision"] or "main")
        if match.re is FILE:
            path = commit.files.get(given["path"])
            if path is None:
                raise LookupError("EntryNotFound")
            return path.read_bytes(), {"ETag": f'"{oid(path)}"', "X-Repo-Commit": commit.sha}
        if match.re is TREE:
            return json.dumps(commit.tree(given["path"], recursive="recursive=true" in url.query)).encode(), {}
        files = [{"rfilename": name} for name in commit.files]
        return json.dumps({"id": given["id"], "sha": commit.sha, "siblings": files}).encode(), {}
