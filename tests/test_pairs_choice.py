"""Pairs whose solver is chosen, or fitted to the teacher: what is chosen, once for all parts of a set, and refusals."""

import json
from pathlib import Path

import pytest
import torch
from runs import folder_bytes
from safetensors.torch import load_file

from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.execution.solving import Solving
from distill.flow.draws import sample_noise
from distill.pairs import accuracy, choice, manifest
from distill.plans import planning
from distill.runs.progress import Progress
from distill.spec import pairspec, specfile
from distill.spec.model import MixtureTeacher, PairsStage
from distill.spec.resolved import resolve
from distill.students import fitted
from distill.teachers import load_teacher

CPU = torch.device("cpu")
TEACHER = MixtureTeacher(kind="mixture", means=[[-1.0, 0.3], [1.2, -0.5]], std=0.35, weights=[0.4, 0.6])


def stage(**fields) -> PairsStage:
    facts = {"kind": "pairs", "count": 40, "block": 10, "shard": 20, "solver": "auto"}
    return PairsStage.model_validate(facts | fields)


def solving(given: PairsStage, store: Path) -> Solving:
    teacher = load_teacher(TEACHER, CPU)
    return Solving.of(teacher, given, store, seed=3, device=CPU, data=None, law=teacher)


def make(given: PairsStage, folder: Path, part: tuple[int, int] | None = None) -> list[str]:
    """Make the pairs. Returns what was said about the solver."""
    said = []
    with StopRequest() as stop, Progress("pairs", pairspec.size(given, part), "pairs", None) as progress:
        progress._sink.say = said.append
        solving(given, folder.parent).prepare(folder, progress, stop).generate(folder, progress, stop, part)
    return [text for text in said if text.startswith("solver")]


@pytest.mark.parametrize("tolerance", [pytest.param(None, marks=pytest.mark.long), 0.05])
def test_the_solver_with_the_fewest_calls_is_chosen(tmp_path, tolerance):
    """Against every other candidate and number of steps, and against the exact ends."""
    given = stage(tolerance=tolerance)
    chosen = solving(given, tmp_path)._choose(StopRequest())
    search = choice._Search(
        load_teacher(TEACHER, CPU).field, given, solving(given, tmp_path)._planned, None, CPU, StopRequest()
    )
    exact, allowed = search.ends("heun", 512), tolerance or 0.01
    steps = [n for n in pairspec.STEPS_TO_TRY if n <= (12 if tolerance is None else 8)]
    errors = {(s, n): accuracy.difference(search.ends(s, n), exact) for s in choice.CANDIDATES for n in steps}
    assert errors[chosen.solver, chosen.steps] < 1.05 * allowed
    assert chosen.calls == chosen.steps < chosen.calls_of_default
    assert all(search.calls(*each) >= chosen.calls for each, error in errors.items() if error < 0.95 * allowed)


def test_it_is_chosen_once_and_said(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    (said,) = make(stage(), whole)
    found = manifest.read(whole)
    told = json.loads((whole / choice.FILE).read_text())
    assert (found.solver, found.steps, found.nfe) == (told["solver"], told["steps"], told["calls"]) == ("ab3", 8, 8)
    saved = 40 * (told["calls_of_default"] - 8)
    assert said.startswith("solver: auto uses ab3 with 8 steps: its pairs differ from exact ones by 0.")
    assert said.endswith(
        f"(RMS), with 8 network calls per pair; heun needs {told['calls_of_default']:g}, so {saved:,.0f} calls are "
        f"saved; choosing it took {told['calls_of_choice']:,.0f} calls"
    )
    for part in range(2):
        make(stage(), parts, (part, 2))
    assert make(stage(), whole) == [said], "the finished set is found again"
    shards = [{n: b for n, b in folder_bytes(each).items() if n.endswith(".safetensors")} for each in (whole, parts)]
    assert len(shards[0]) == 2 and shards[0] == shards[1]
    with pytest.raises(InputError, match="belongs to pairs with other settings"):
        make(stage(tolerance=0.2), whole)


def test_states_are_stored_at_times_of_the_chosen_grid(tmp_path):
    times = [1.0, 0.4, 0.0]
    given = stage(paths="trajectories", times=times)
    assert set(pairspec.steps_to_try(given)) == {5, 10, 20, 40}
    make(given, tmp_path / "p")
    found = manifest.read(tmp_path / "p")
    assert found.steps in (10, 20) and found.times == pytest.approx(times)


def test_pairs_of_a_fitted_solver(tmp_path):
    given = stage(solver="bns", steps=1)
    make(given, tmp_path / "p")
    teacher, found = load_teacher(TEACHER, CPU), manifest.read(tmp_path / "p")
    fit = fitted.load(tmp_path, teacher.digest, 1)
    assert found.fitted == fit and (found.solver, found.steps, found.nfe) == ("bns", 1, 1)
    data = torch.cat([load_file(path)["data"] for path in sorted((tmp_path / "p").glob("*.safetensors"))])
    made = fitted.method(teacher, fit).generate(sample_noise(3, range(40), (2,)), {}, [])
    assert torch.allclose(data, made, atol=1e-6)
    before = folder_bytes(tmp_path / "p")
    (tmp_path / "p" / "shard-00001.safetensors").unlink()
    make(given, tmp_path / "p")
    assert folder_bytes(tmp_path / "p") == before
    said = solving(given, tmp_path).accuracy()
    assert said == f"the samples of the fitted solver differ from exact ones by {fit.rms:.4g} (RMS, not relative)"


def test_a_manifest_without_a_fitted_solver_has_the_digest_that_it_had(tmp_path):
    make(stage(solver="euler", steps=2), tmp_path / "p")
    found = manifest.read(tmp_path / "p")
    content = json.loads((tmp_path / "p" / "manifest.json").read_text())
    del content["fitted"]
    (tmp_path / "p" / "manifest.json").write_text(json.dumps(content))
    assert manifest.read(tmp_path / "p") == found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 8}, "steps: has no effect with solver: auto, which finds the number of steps; remove it"),
        ({"solver": "heun", "tolerance": 0.1}, "tolerance: has no effect with solver: heun; remove it, or use"),
        ({"paths": "trajectories", "optimal_times": 4}, "optimal_times: does not work with solver: auto"),
        ({"paths": "trajectories", "times": [1, 0.123, 0]}, "with solver: auto, times must be multiples of"),
        ({"solver": "bns", "paths": "forward"}, "solver: bns is fitted to the ends of paths from noise"),
        ({"solver": "bns", "steps": 65}, "steps: 65 given; with solver: bns, at most 64"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_refused(fields, said):
    (found,) = pairspec.mistakes(stage(**fields), "")
    assert found.startswith(said) or said in found


def test_a_tolerance_that_no_steps_reach(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "DOUBLINGS", 1)
    with pytest.raises(RunError, match="cannot measure errors of 1e-06: the first pairs still change by more than"):
        solving(stage(tolerance=1e-6), tmp_path)._choose(StopRequest())


def test_the_plan_says_that_it_is_an_estimate():
    content = {
        "name": "r",
        "teacher": TEACHER.model_dump(),
        "stages": {"p": {"kind": "pairs", "count": 100, "solver": "auto"}},
    }
    (planned,) = planning.steps(resolve(specfile.validate(content, "f"), Path()))
    assert planned.what == "solver auto, guidance 1"
    assert planned.work == "100 pairs x about 31 network calls = about 3,100"
