"""Teachers with 8-bit weights, under adapters that are trained.

torchao is apart from the other packages (see the Makefile): where it is installed, others import it and print warnings.
"""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tiny
from latent_runs import content, images
from runs import ENV, distill, folder_bytes

from distill.core.errors import InputError
from distill.execution import preflight
from distill.networks import quantised
from distill.runs.run_store import RunPaths
from distill.spec import checks, specfile
from distill.testing.subject import unet_teacher

INT8 = Path(sys.prefix) / "int8"
HERE = Path(__file__).parent
WITH = {"PYTHONPATH": f"{INT8}:{HERE.parent}"}


def spec(folder, **fields):
    """A run of consistency distillation with adapters."""
    given = tiny.TINY["sd3"]
    teacher = given.write(folder, quantize="int8")
    more = {"measure": {"kind": "evaluate", "students": {"consistency": [1]}, "teacher_steps": [1], "fine_steps": 2,
                        "samples": 16, "block": 8, "baselines": []}}  # fmt: skip
    made = content(teacher, images(folder / "data", 3, *given.size), ["consistency/consistency"], more)
    made["stages"]["consistency"] |= {
        "lora": {"student": {"rank": 2}}, "images": 48, "checkpoint": {"images": 4, "minutes": None}, **fields,
    }  # fmt: skip
    made["launch"] = {"threads": 1, "device": "cpu"}
    return made


def run(folder, made):
    (folder / "spec.json").write_text(json.dumps(made))
    (folder / "spec.yaml").write_text(json.dumps(made))
    return ("run", str(folder / "spec.yaml"), "--store", str(folder / "runs"))


@pytest.mark.long
@pytest.mark.process
def test_adapters_of_a_quantised_base_are_trained_resumed_and_exported(tmp_path):
    """An export loads the LoRA into the stock pipeline with the whole weights, and compares outputs (`lora_verify`)."""
    assert (INT8 / "torchao").is_dir(), "run: make .venv/.test"
    args = run(tmp_path, spec(tmp_path))
    done = distill(*args, cwd=tmp_path, env=WITH, fresh=True)
    assert done.returncode == 0, done.stderr
    whole = RunPaths(tmp_path / "runs/run")
    again = RunPaths(tmp_path / "runs/again")
    command = [sys.executable, "-m", "distill", *args, "--name", "again"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**ENV, **WITH}, start_new_session=True)
    end = time.monotonic() + 120
    while not list(again.stage("consistency").checkpoints.glob("step-*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = distill("run", str(again.root), "--resume", cwd=tmp_path, env=WITH, fresh=True)
    assert done.returncode == 0, done.stderr
    files = [folder_bytes(each.student("consistency")) for each in (whole, again)]
    adapters = [{name: each for name, each in found.items() if name.endswith(".safetensors")} for found in files]
    assert adapters[0] == adapters[1] and any("lora" in name for name in adapters[0])


@pytest.mark.long
@pytest.mark.process
def test_the_velocity_and_its_gradient_are_nearly_the_same_in_half_of_the_memory(tmp_path):
    given = tiny.TINY["sd3"].write(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps(given))
    command = [sys.executable, str(HERE / "programs/quantised.py"), str(tmp_path)]
    done = subprocess.run(command, env={**ENV, **WITH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["quantised"] == [False, True]
    assert found["bytes"][1] < 0.5 * found["bytes"][0]
    assert all(0 < each < 0.02 for each in found["differences"])
    assert (found["same_base"], found["same_digest"]) == (True, False)


def test_without_torchao_it_is_said_how_to_install_it(tmp_path):
    made = checks.check(specfile.validate(spec(tmp_path), "spec"), tmp_path)
    with pytest.raises(InputError, match="teacher.quantize needs the package torchao, .*pip install 'distill.int8.'"):
        preflight.check(made)


def test_a_divided_teacher_cannot_be_quantised(tmp_path):
    made = spec(tmp_path)
    made["launch"] |= {"procs": 2, "divide_teacher": True}
    with pytest.raises(InputError, match="launch.divide_teacher: does not work with teacher.quantize"):
        checks.check(specfile.validate(made, "spec"), tmp_path)


def test_the_digest_of_a_spec_says_whether_its_teacher_is_quantised(tmp_path):
    made = spec(tmp_path)
    digest = specfile.validate(made, "spec").digest()
    del made["teacher"]["quantize"]
    assert specfile.validate(made, "spec").digest() != digest


@pytest.mark.long
@pytest.mark.process
def test_a_student_that_is_trained_in_full_is_refused(tmp_path):
    made = spec(tmp_path)
    del made["stages"]["consistency"]["lora"]
    done = distill(*run(tmp_path, made), cwd=tmp_path, env=WITH, fresh=True)
    assert done.returncode == 2 and not (tmp_path / "runs/run").exists()
    assert (
        "teacher.quantize: the teacher's weights are rounded, but a network that is trained in full starts"
        in done.stderr
    )


def test_a_network_without_linear_layers_is_refused(monkeypatch):
    fake = types.ModuleType("torchao.quantization")
    fake.Int8WeightOnlyConfig = fake.quantize_ = None
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    with pytest.raises(InputError, match="x: UNet2DModel has no linear layers in its blocks; remove it"):
        quantised.quantize(unet_teacher().network, ["conv_in"], "x")
