"""Programs in a process that cannot import this project."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distill.core.errors import RunError
from distill.students import isolated, isolated_process


def test_packages_of_this_project_are_blocked(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [isolated_process.BlockedPackages, *sys.meta_path])
    for name in ("distill.unheard", "recipes.unheard", "slurm"):
        monkeypatch.delitem(sys.modules, "recipes", raising=False)
        monkeypatch.delitem(sys.modules, "slurm", raising=False)
        with pytest.raises(
            ModuleNotFoundError, match="(distill.unheard|recipes|slurm) cannot be imported in this process"
        ):
            __import__(name)
    with pytest.raises(ModuleNotFoundError, match="No module named 'distillery'"):
        __import__("distillery")


def until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


PROGRAM = """
import os, sys
import torch
from pathlib import Path

assert not Path("pyproject.toml").exists() and "PYTHONPATH" not in os.environ
assert os.environ["HF_HUB_OFFLINE"] == "1"
for name in ("distill", "recipes", "slurm", "distill.core.errors"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        assert "which tests that it is not needed" in str(error)
    else:
        raise AssertionError(name)
outputs["doubled"] = 2 * inputs["x"]
outputs["named"] = torch.tensor(arguments["numbers"])
outputs["view"] = outputs["doubled"].T
if arguments["fail"]:
    raise ValueError("two\\nlines \\x1b[31m")
"""


@pytest.mark.process
def test_a_program_exchanges_tensors(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    x = torch.arange(6.0).reshape(2, 3)
    found = isolated.run(PROGRAM, {"x": x.T}, {"numbers": [1, 2], "fail": False})
    assert torch.equal(found["doubled"], 2 * x.T) and torch.equal(found["view"], 2 * x)
    assert found["named"].tolist() == [1, 2]


@pytest.mark.long
def test_a_program_that_fails_says_why():
    with pytest.raises(RunError) as error:
        isolated.run(PROGRAM, {"x": torch.ones(2, 2)}, {"numbers": [1], "fail": True})
    assert str(error.value) == (
        "a process that cannot import distill ended with code 1: ValueError: two lines \ufffd[31m"
    )
    with pytest.raises(RunError, match="has not ended after 0.5 seconds, and was killed"):
        isolated.run("", {}, {}, seconds=0.5)


@pytest.mark.long
def test_a_program_ends_with_the_process_that_runs_it(tmp_path):
    program = f"""
import os, time
from pathlib import Path
Path({str(tmp_path / "number")!r}).write_text(str(os.getpid()))
time.sleep(600)
"""
    ours = f"from distill.students import isolated; isolated.run({program!r}, {{}}, {{}})"
    parent = subprocess.Popen([sys.executable, "-c", ours], stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "number").exists() and (tmp_path / "number").read_text())
    child = int((tmp_path / "number").read_text())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    until(lambda: not Path(f"/proc/{child}").exists())
