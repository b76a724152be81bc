"""What students in a store cost: to pull a large one, against `cp` and `sha256sum`; to read an index of many."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from distill.exchange import published, student_card
from distill.exchange.student_card import StudentCard
from distill.exchange.transports import at

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PROGRAM = """
import re, sys, time
from pathlib import Path
from distill.exchange import pulling
from distill.exchange.transports import at
began = time.perf_counter()
pulling.pull(at(Path(sys.argv[1])), Path(sys.argv[2]))
seconds = time.perf_counter() - began
print(seconds, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def make(folder: Path, size: int) -> Path:
    """A student with weights of `size` bytes that nothing can compress."""
    (folder / "unet").mkdir(parents=True)
    head = json.dumps({"w": {"dtype": "U8", "shape": [size - 128], "data_offsets": [0, size - 128]}}).ljust(120)
    with (folder / WEIGHTS).open("wb") as file:
        file.write((120).to_bytes(8, "little") + head.encode())
        for start in range(0, size - 128, 1 << 24):
            file.write(os.urandom(min(1 << 24, size - 128 - start)))
    card = StudentCard(
        name="large", recipe="any", spec_digest="", teacher_digest=None, num_classes=None, null_class=None,
        shape=(1, 8, 8), weights="raw", images=0, files=student_card.record(folder),
    )  # fmt: skip
    (folder / student_card.FILE_NAME).write_text(student_card.to_json(card))
    return folder


def ours(student: Path, to: Path) -> tuple[float, int]:
    """Seconds, and kilobytes at most in memory."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, student, to], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    seconds, memory = done.stdout.split()
    return float(seconds), int(memory)


def theirs(student: Path, to: Path, *, sync: bool) -> float:
    began = time.perf_counter()
    subprocess.run(["cp", "-r", student, to], check=True)
    subprocess.run(["sha256sum", to / WEIGHTS], check=True, stdout=subprocess.DEVNULL)
    if sync:
        subprocess.run(["sync", to / WEIGHTS], check=True)
    return time.perf_counter() - began


def bench_pull(size: int = 1_000_000_000, rounds: int = 3) -> str:
    """A local pull checks and syncs in the pass that copies."""
    taken: dict[str, list[float]] = {"pull": [], "cp": [], "cp, sync": []}
    with tempfile.TemporaryDirectory() as folder:
        small, large = make(Path(folder) / "small", size // 10), make(Path(folder) / "large", size)
        least = ours(small, Path(folder) / "pulled-small")[1]
        for number in range(rounds):
            seconds, most = ours(large, Path(folder) / f"pulled-{number}")
            taken["pull"].append(seconds)
            for name in ("cp", "cp, sync"):
                taken[name].append(theirs(large, Path(folder) / f"{name}-{number}", sync="sync" in name))
            for name in ("pulled", "cp", "cp, sync"):
                subprocess.run(["rm", "-r", Path(folder) / f"{name}-{number}"], check=True)
    rate = {name: size / 1e6 / statistics.median(values) for name, values in taken.items()}
    bare, synced = (rate["pull"] / rate[name] for name in ("cp", "cp, sync"))
    return (
        f"pull    {rate['pull']:.0f} MB/s; cp and sha256sum {rate['cp']:.0f} MB/s: ratio {bare:.2f} (goal >= 0.8); "
        f"with sync, as we do, {rate['cp, sync']:.0f} MB/s: {synced:.2f}\n"
        f"        memory of {size / 1e6:.0f} MB {most / 1e3:.0f} MB, of {size / 1e7:.0f} MB {least / 1e3:.0f} MB"
    )


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, without a line for each request."""

    def log_message(self, *_: object) -> None:
        pass


def index(folder: Path, count: int) -> float:
    """An index of `count` students over http, as one that cannot be listed: its MB."""
    entry = {"name": "digits", "digest": "0" * 64, "size": 1_700_000, "published": 1.8e9, "recipe": "reflow/one_step",
             "kind": "velocity", "license": "", "metrics": {f"FD-digits@{n}": 3.0 for n in range(1, 9)}}  # fmt: skip
    content = {"format": 1, "students": [{**entry, "version": f"v{n}"} for n in range(count)]}
    (folder / published.REGISTRY).mkdir(exist_ok=True)
    path = folder / published.REGISTRY / published.INDEX
    path.write_text(json.dumps(content))
    return path.stat().st_size / 1e6


def bench_index(counts: tuple[int, ...] = (20_000, 40_000, 80_000, 150_000)) -> str:
    """CPU seconds of reading an index, which is checked entry by entry, and what a MB more costs."""
    sizes, taken = [], []
    with tempfile.TemporaryDirectory() as folder:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for count in counts:
            sizes.append(index(Path(folder), count))
            began = time.process_time()
            assert len(published.listed(at(f"http://127.0.0.1:{server.server_port}")).students) == count
            taken.append(time.process_time() - began)
        server.shutdown()
    rows = ", ".join(f"{size:.0f} MB {seconds:.2f} s" for size, seconds in zip(sizes, taken, strict=True))
    return f"index   {rows}: {(taken[-1] - taken[0]) / (sizes[-1] - sizes[0]):.3f} s a MB (flat: it was the square)"
