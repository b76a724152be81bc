"""kill -9 at random moments while pairs or caches are made: existing files are complete, the final ones identical."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import alive

PROGRAMS = Path(__file__).parent / "programs"

pytestmark = pytest.mark.process


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def complete(folder):
    """Names of the shards that the manifest lists, if there is one, or that have a record."""
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())["shards"] if manifest.exists() else {}
    return {*listed, *(path.with_suffix(".safetensors").name for path in folder.glob("shard-*.json"))}


@pytest.fixture
def run(program):
    """run(folder, shards, seconds) makes sets in a process, and returns its exit code.

    The process is killed so many seconds after the folder has so many shards, if any number is given.
    """
    server = subprocess.Popen(
        [sys.executable, PROGRAMS / program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def make(folder, shards=None, seconds=0.0):
        print(folder, file=server.stdin, flush=True)
        process = int(server.stdout.readline())
        if shards is not None:
            while alive(process) and len(list(folder.rglob("shard-*.safetensors"))) < shards:
                time.sleep(0.002)
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # at its end already
                os.kill(process, signal.SIGKILL)
        return int(server.stdout.readline())

    yield make
    server.stdin.close()
    assert server.wait(timeout=60) == 0


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("program", "sets", "kills"),
    [
        ("make_pairs.py", ["."], 4),
        pytest.param("make_pairs.py", ["."], 10, marks=LONG),
        pytest.param("make_caches.py", ["latents", "prompts"], 10, marks=LONG),
    ],
)
def test_kills_leave_the_bytes_of_an_undisturbed_run(tmp_path, run, sets, kills):
    assert run(tmp_path / "warm") == 0  # imports and caches
    began = time.monotonic()
    assert run(tmp_path / "whole") == 0
    duration = time.monotonic() - began
    whole = contents(tmp_path / "whole")
    for each in sets:
        folder = tmp_path / "whole" / each
        assert len(list(folder.glob("shard-*"))) == 32 and json.loads((folder / "manifest.json").read_text())["done"]

    moments, folder, codes, inodes = random.Random(0), tmp_path / "killed", [], {}
    for made in sorted(moments.sample(range(24 * len(sets)), kills)):  # of 32 in each set
        codes.append(run(folder, made, moments.uniform(0, 2 * duration / (32 * len(sets)))))
        shards = list(folder.rglob("shard-*.safetensors"))
        for path in shards:
            assert path.read_bytes() == whole[str(path.relative_to(folder))], f"{path.name} is not whole"
        for path, inode in inodes.items():
            assert path.stat().st_ino == inode, f"{path.name} was complete and was made again"
        finished = [folder / each / name for each in sets for name in complete(folder / each)]
        inodes = {path: path.stat().st_ino for path in finished}
        assert len(shards) - len(inodes) in (0, 1), "more than one shard is lost"
    assert codes.count(-signal.SIGKILL) >= kills / 2, f"too few kills came before the end: {codes}"
    assert inodes, "nothing survived the kills"
    assert run(folder) == 0
    assert contents(folder) == whole
