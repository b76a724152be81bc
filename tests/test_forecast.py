"""The forecast of a run's cost: disk space in bytes, and time from measured network calls."""

import time
from dataclasses import replace

import pytest
import torch
from test_rounds import GAUSSIAN, MLP, PAIRS

from distill.core.stop import StopRequest
from distill.execution import forecast, preflight, stages
from distill.flow.interpolants import linear
from distill.plans import planning
from distill.runs.run_store import RunPaths
from distill.spec import kinds, presets, specfile
from distill.spec.resolved import resolve
from distill.teachers.loaded import LoadedTeacher
from distill.training import checkpoint

TRAIN = {
    "kind": "train", "recipe": "reflow/reflow", "network": MLP, "pairs": "solve", "images": 512, "batch_size": 64,
    "ema_half_lives": [64, 128], "checkpoint": {"images": 64, "minutes": None, "keep": 3},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    """A second thread would only wait."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spec(**found):
    return specfile.validate({"name": "x", "teacher": GAUSSIAN, "stages": found}, "f")


def files(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_disk_that_pairs_and_training_take(tmp_path):
    one = spec(solve=PAIRS | {"count": 4096, "block": 1024, "shard": 2048}, flow=TRAIN)
    costs = forecast.forecast(preflight.check(resolve(one, tmp_path)), here=True)
    run = RunPaths(tmp_path / "run")
    run.root.mkdir()
    stages.run(run, one, ["solve", "flow"], StopRequest())
    # Each file has a header, each folder a file of JSON: these are small tensors.
    assert costs["solve"].bytes == 4096 * 2 * 4
    assert costs["solve"].bytes < files(run.stage("solve").pairs) < 1.1 * costs["solve"].bytes + 2000
    students = sum(path.stat().st_size for path in run.student("flow").rglob("*.safetensors"))
    found = files(run.stage("flow").checkpoints) + students
    assert len(checkpoint.complete(run.stage("flow").checkpoints)) == 3
    assert costs["flow"].bytes < found < costs["flow"].bytes + 3 * 8000


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({}, 2 * 4),
        ({"dtype": "float16"}, 2 * 2),
        ({"dtype": "uint8"}, 2),
        ({"store_noise": True}, 2 * 4 + 2 * 4),
        ({"paths": "forward"}, 2 * 4 + 2 * 4),
        ({"paths": "trajectories", "times": [1, 0.5, 0]}, 2 * 2 * 4),
    ],
)
def test_bytes_of_a_pair(tmp_path, changes, each):
    costs = forecast.forecast(preflight.check(resolve(spec(solve=PAIRS | changes), tmp_path)), here=True)
    assert costs["solve"].bytes == PAIRS["count"] * each


def test_time_is_a_number_of_calls(tmp_path, monkeypatch):
    """A call that takes a second for a sample."""
    monkeypatch.setattr(forecast, "_measure", lambda network, batch, device: 1.0)
    one = spec(
        solve=PAIRS | {"count": 100, "solver": "heun", "steps": 4},
        flow=TRAIN,
        e={"kind": "evaluate", "students": {"flow": [1, 2]}, "fine_students": ["flow"], "fine_steps": 3,
           "teacher_steps": [1, 4], "samples": 20},
    )  # fmt: skip
    costs = forecast.forecast(preflight.check(resolve(one, tmp_path)), here=True)
    assert costs["solve"].seconds == 100 * 7
    assert costs["flow"].seconds == 512 * 3  # costs.json: 1.0
    baselines = 3 * 2  # euler, ab3 and unipc2 in two steps; one step is that of Euler
    assert costs["e"].seconds == 20 * (1 + 4 + 5 + baselines + 1 + 2 + 5)
    assert costs["e"].seconds == planning.steps(resolve(one, tmp_path))[2].network_calls


def test_every_row_of_an_evaluation_counts(tmp_path, monkeypatch):
    """Those along other times too, and what its sampler calls beside its steps."""
    monkeypatch.setattr(forecast, "_measure", lambda network, batch, device: 1.0)
    rows = {"kind": "evaluate", "students": {"flow": [1, 2], "bent": [1, 4]}, "fine_steps": 3, "teacher_steps": [1, 4],
            "times": {"teacher": [[1, 0.6, 0]], "flow": ["optimal"]}, "samples": 20,
            "teacher_solvers": {"sa": [6, 7], "restart": [5]}}  # fmt: skip
    stages_ = {"solve": PAIRS, "flow": TRAIN, "bent": TRAIN | {"recipe": "reflow/caf"}}
    one = spec(**stages_, e=rows | {"guidance_scale": 2})
    baselines = 3 * 2  # in two steps, four network calls under guidance, which the five of bent allow
    calls = 20 * (2 * (1 + 4 + 5 + 2 + 6 + 7 + 17 + baselines) + 2 * (1 + 2) + (1 + 1) + (4 + 1))
    planned = planning.steps(resolve(one, tmp_path))[3]
    assert planned.network_calls == calls and planned.work.startswith("16 rows x 20 samples; ")
    assert planned.what == "teacher at 1, 4 steps and heun 3, sa 6, sa 7, restart 5"
    ready = preflight.check(resolve(spec(**stages_, e=rows), tmp_path))  # its teacher cannot be guided
    assert forecast.forecast(replace(ready, resolved=resolve(one, tmp_path)), here=True)["e"].seconds == calls


def test_the_calls_of_a_tolerance_are_estimated(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "_measure", lambda network, batch, device: 1.0)
    fine = {"fine_solver": "dopri5", "fine_tolerance": 1e-4, "guidance_scale": 1}
    stage = {"kind": "evaluate", "students": {"flow": [1]}, "teacher_steps": [], "baselines": [], "samples": 20, **fine}
    one = resolve(spec(solve=PAIRS, flow=TRAIN, e=stage), tmp_path)
    (planned,) = (each for each in planning.steps(one) if each.name == "e")
    assert kinds.about_calls(1e-4) == 57 and kinds.about_calls(0.1) == kinds.about_calls(0.01) == 25
    assert planned.what == "teacher by dopri5 0.0001" and planned.network_calls == 20 * 58
    assert planned.work == "2 rows x 20 samples; about 1,160 network calls"
    assert forecast.forecast(preflight.check(one), here=True)["e"].seconds == 20 * 58


class Slow:
    """A field that takes two milliseconds for a sample and five for a call."""

    interpolant, t_range = linear(), (0.0, 1.0)

    def __call__(self, x_t, t, cond):
        time.sleep(0.005 + 0.002 * len(x_t))
        return x_t


@pytest.mark.parametrize(("batch", "each"), [(1, 0.007), (16, 0.005 / 16 + 0.002)])
def test_a_call_is_measured_in_a_batch(batch, each):
    teacher = LoadedTeacher(Slow(), (2,), None, None, "", "slow")
    assert each <= forecast._measure(teacher, batch, torch.device("cpu")) < 2 * each


@pytest.mark.long
def test_students_of_all_kinds_are_measured(tmp_path):
    digits = specfile.load(presets.find("digits-recipes")).spec
    kept = {name: digits.stages[name] for name in ("teach", "shortcut")}
    bent = kept["shortcut"].model_copy(update={"recipe": "reflow/caf", "options": {}, "pairs": "pairs"})
    stages_ = {"teach": kept["teach"], "pairs": digits.stages["pairs"], "shortcut": kept["shortcut"], "caf": bent}
    ready = preflight.check(resolve(digits.model_copy(update={"stages": stages_}), tmp_path))
    costs = forecast.forecast(ready, here=True)
    assert list(costs) == ["teach", "pairs", "shortcut", "caf"]
    assert all(cost.seconds > 0 for cost in costs.values())
