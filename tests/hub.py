"""A local HTTP server that replaces the Hugging Face Hub in tests. It serves folders as repositories.

It answers the requests of `snapshot_download` and `load_dataset`, and can fail in some ways in which the hub fails. It
can also be set as the proxy of a process. It then answers no requests to other hosts, but records them.
"""

import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import datasets
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from runs import ENV

# /api/models/ID[/revision/REVISION], /api/models/ID/tree/REVISION[/FOLDER], /ID/resolve/REVISION/FILE
ASKED = re.compile(r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?")

RANGE = re.compile(r"bytes=(\d+)-(\d*)")

NO_GC = "import gc\ngc.disable()\n"  # before a program, so that its imports take less time
MUTE = "org/mute"  # who asks for this repository is hung up on
GATED = "org/gated"  # of this one, and it must be among those served, all can be seen but the files
CLASSES = ["cat", "dog", "owl", "fox"]


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Commit:
    """What lies in a folder, by name. Its sha follows from the content."""

    def __init__(self, folder: Path) -> None:
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        self.files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        self.said: dict[str, int] = {}  # sizes that are not true
        self.folders = {name: b"" for name in paths if name not in self.files}
        self.sha = sha1(repr({name: sha1(content) for name, content in self.files.items()}).encode())

    def info(self, name: str) -> bytes:
        siblings = [
            {"rfilename": file, "size": self.said.get(file, len(content))} for file, content in self.files.items()
        ]
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
        self.sent = 0  # bytes of files
        self.cuts = 0  # of this many answers, only half of the file is sent
        self.held = ""  # half of the files of this name is sent, and the rest when the hub closes
        self.busy = False  # it tells nobody what a repository holds (429)
        self.closing = threading.Event()
        self.commits = {name: {ref: Commit(at) for ref, at in refs.items()} for name, refs in repositories.items()}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_) -> None:
        self.closing.set()
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
            if name == GATED:
                raise LookupError("GatedRepo")
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
        if self.server.busy and "/resolve/" not in url.path:
            self.send_error(429)
            return
        try:
            body, sha = self.server.answer(url.path, url.query)
            status, headers = 200, {"ETag": f'"{sha1(body)}"', "X-Repo-Commit": sha}
        except LookupError as missing:
            status = 403 if str(missing) == "GatedRepo" else 404
            headers, body = {"X-Error-Code": str(missing)}, b""
        asked = RANGE.fullmatch(self.headers.get("Range", ""))
        if status == 200 and asked is not None and "/resolve/" in url.path:
            start, stop = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            body, status = body[start:stop], 206
        if self.command == "GET" and "/resolve/" in url.path:
            self.server.sent += len(body)
        self.send_response(status)
        for header in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            if self.server.cuts and "/resolve/" in url.path:
                self.server.cuts -= 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            half = len(body) // 2 if self.server.held and url.path.endswith(self.server.held) else len(body)
            self.wfile.write(body[:half])
            if half < len(body):
                self.server.closing.wait()
            self.wfile.write(body[half:])

    do_HEAD = do_GET  # noqa: N815

    def log_request(self, *_) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def log_message(self, *_) -> None: ...


# --- what it serves, and who asks ---


def pipeline(folder: Path, seed: int) -> Path:
    """What diffusers saves, beside files that nobody wants."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    (folder / "README.md").write_text("A tiny teacher.")
    (folder / "pipeline.py").write_text("raise RuntimeError('code of the hub was run')")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    return folder


def pictures(folder: Path, labels: list[int]) -> Path:
    """A data set of grey noise, as parquet."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES))
    images = [Image.effect_noise((8, 8), 50).convert("RGB") for _ in labels]
    file = folder / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    datasets.Dataset.from_dict({"image": images, "label": labels}, features).to_parquet(file)
    return folder


def environment(hub: Hub, home: Path, offline: bool = False) -> dict[str, str]:
    """Of a process that reaches no host but the hub, and whose caches lie in `home`."""
    return {name: value for name, value in ENV.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_DATASETS_OFFLINE": str(int(offline)),
        "http_proxy": hub.url,
        "https_proxy": hub.url,
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }


def python(program: str, *arguments: str, hub: Hub, cwd: Path, offline: bool = False) -> subprocess.CompletedProcess:
    """A program to its end; its caches are `home`, beside its folder."""
    cwd.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", NO_GC + program, *arguments],
        cwd=cwd,
        env=environment(hub, cwd.parent / "home", offline),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
