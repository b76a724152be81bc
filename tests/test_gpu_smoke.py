"""The GPU smoke test in its small form, on the CPU, and the collection of wheels for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import collect, smoke

ROOT = Path(__file__).parents[1]


def run(out, *options):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "tests/gpu/smoke.sh"), "--device", "cpu", "--small", "--out", str(out), *options]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    file = out / "smoke.json"
    return done, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.process
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_all_parts_pass_on_the_cpu(tmp_path):
    done, found = run(tmp_path / "out", "--limit", "1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(smoke.PARTS, "ok"), done.stdout
    rows = {row["what"]: row for part in found.values() for row in part["rows"]}
    for what in ("two runs give the same bits", "so does a killed and resumed run", "largest difference of samples"):
        assert rows[what]["ok"] is True
    assert rows["ZeRO 3, fp32: relative difference of losses"]["ok"] is True
    assert all(row["ok"] is not False for row in rows.values())


@pytest.mark.process
def test_what_is_not_reached_is_listed_and_can_be_run_by_name(tmp_path):
    done, found = run(tmp_path / "out", "--limit", "0", "--part", "2/3")
    assert done.returncode == 0
    assert {name: part["state"] for name, part in found.items()} == {"resume": "not reached", "recipes": "not reached"}
    assert found["resume"]["why"] == "run: resume" and "not reached" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["speeed"], "unknown parts: speeed; valid: quickstart, resume, zero, speed, recipes, export"),
        (["--part", "4/3"], "--part 4/3: give K/N with K from 1 to N"),
        (["--part", "half"], "--part half: give K/N with K from 1 to N"),
    ],
)
def test_wrong_options_are_one_message(tmp_path, options, said):
    done, found = run(tmp_path / "out", *options)
    assert done.returncode == 2 and done.stderr.strip().endswith(said) and not found


def test_packages_of_a_machine_are_read_from_pip_list_or_plain_lines():
    listing = (
        "Package    Version\n---------- -------\nannotated_types 0.7.0\nPyYAML 6.0\n# a comment\nrich==13.9  # one\n"
    )
    assert collect.listed(listing) >= {"annotated-types", "pyyaml", "rich"}


def test_what_training_needs_includes_what_its_packages_need():
    found = collect.needed("3.12")
    assert {"deepspeed", "diffusers", "pydantic", "pydantic-core", "hjson", "lpips", "pot"} <= set(found)
    assert "distill" not in found and "pytest" not in found
    assert [name for name in found if collect.NEVER.match(name)]
