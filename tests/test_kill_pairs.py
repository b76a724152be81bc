"""kill -9 at random moments while pairs are made: existing files are complete, the final files byte-identical."""

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

PROGRAM = Path(__file__).parent / "programs" / "make_pairs.py"

pytestmark = pytest.mark.process


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def complete(folder):
    """Names of the shards that the manifest lists, if there is one, or that have a record."""
    manifest = folder / "manifest.json"
    listed = json.loads(manifest.read_text())["shards"] if manifest.exists() else {}
    return {*listed, *(path.with_suffix(".safetensors").name for path in folder.glob("shard-*.json"))}


@pytest.fixture
def run():
    """run(folder, seconds) makes pairs in a process that is killed after so many seconds: its exit code."""
    server = subprocess.Popen([sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def make(folder, seconds=None):
        print(folder, file=server.stdin, flush=True)
        process = int(server.stdout.readline())
        if seconds is not None:
            time.sleep(seconds)
            with contextlib.suppress(ProcessLookupError):  # at its end already
                os.kill(process, signal.SIGKILL)
        return int(server.stdout.readline())

    yield make
    server.stdin.close()
    assert server.wait(timeout=60) == 0


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_kills_leave_the_bytes_of_an_undisturbed_run(tmp_path, run, kills):
    assert run(tmp_path / "warm") == 0  # imports and caches
    began = time.monotonic()
    assert run(tmp_path / "whole") == 0
    duration = time.monotonic() - began
    whole = contents(tmp_path / "whole")
    assert len(whole) == 33 and json.loads(whole["manifest.json"])["done"]

    moments, folder, codes, inodes = random.Random(0), tmp_path / "killed", [], {}
    for _ in range(kills):
        codes.append(run(folder, moments.uniform(0, 1.6 * duration / kills)))
        for path in folder.glob("shard-*.safetensors"):
            assert path.read_bytes() == whole[path.name], f"{path.name} is not whole"
        for name, inode in inodes.items():
            assert (folder / name).stat().st_ino == inode, f"{name} was complete and was made again"
        inodes = {name: (folder / name).stat().st_ino for name in complete(folder)}
        assert len(list(folder.glob("shard-*.safetensors"))) - len(inodes) in (0, 1), "more than one shard is lost"
    assert codes.count(-signal.SIGKILL) >= kills / 2, f"too few kills came before the end: {codes}"
    assert inodes, "nothing survived the kills"
    assert run(folder) == 0
    assert contents(folder) == whole
