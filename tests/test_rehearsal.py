"""What an update of a recipe costs: counted on tensors without values, against real ones and against real training."""

import json
from contextlib import nullcontext

import pytest
import tiny
import torch
from commands import command
from latent_runs import RECIPES, content, images

from distill.execution import preflight, rehearsal
from distill.execution.layouts import process_memory
from distill.execution.run_costs import RunCounter
from distill.spec import checks, specfile
from distill.spec.model import LaunchSpec

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers about itself

SEVERAL = ["reflow/boss", "consistency/consistency", "shortcut/meanflow", "score/dmd2"]
LORA = {"lora": {"student": {"rank": 2}}}


def spec_of(folder, teacher, recipes, **fields):
    """A spec with these recipes. fields: of their stages."""
    given = tiny.TINY[teacher]
    made = content(given.write(folder), images(folder / "data", 3, *given.size), recipes)
    for stage in made["stages"].values():
        if stage["kind"] == "train":
            stage |= fields
    return made


def counted(made, folder):
    """The costs of the train stages of a spec."""
    resolved = checks.check(specfile.validate(made, "spec"), folder)
    counter = RunCounter(lambda line: None)
    preflight.check(resolved, visit=counter)
    return {name: job.costs for name, job in counter.found.trainings.items()}


def close(first, second):
    """Whether two counts are the same but for a few activations, of which real tensors may share memory."""
    for again, step in first.steps.items():
        other = second.steps[again]
        assert step.operations == other.operations > 0
        for samples in (8, 16):
            assert step.activations.of(samples) == pytest.approx(other.activations.of(samples), rel=0.1)
    assert first.teacher_calls == second.teacher_calls


def on_real_tensors(made, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "FakeTensorMode", lambda **options: nullcontext())
        return counted(made, folder)


@pytest.mark.parametrize(
    ("recipes", "fields"),
    [
        pytest.param(["consistency/consistency"], {**LORA, "precision": "bf16"}, id="one"),
        pytest.param(SEVERAL, {}, id="whole", marks=pytest.mark.long),
        pytest.param(SEVERAL, LORA, id="lora", marks=pytest.mark.long),
        pytest.param(SEVERAL, {"precision": "bf16"}, id="bf16", marks=pytest.mark.long),
    ],
)
def test_tensors_without_values_cost_what_real_ones_cost(recipes, fields, tmp_path):
    made = spec_of(tmp_path, "sd3", recipes, **fields)
    pretended, real = counted(made, tmp_path), on_real_tensors(made, tmp_path)
    assert {name.partition("/")[2] for name in recipes} <= pretended.keys()
    for name, costs in pretended.items():
        close(costs, real[name])
        assert costs.shared == ("lora" in fields)


@pytest.mark.long
@pytest.mark.parametrize("teacher", ["sdxl", "dit", "flux"])
def test_every_recipe_on_other_networks(teacher, tmp_path):
    made = spec_of(tmp_path, teacher, list(RECIPES))
    if teacher == "sdxl":  # torch has no forward-mode derivative of its layers without values
        for name in ("meanflow", "scm"):
            made["stages"][name]["options"] = {"derivative": "central"}
    pretended, real = counted(made, tmp_path), on_real_tensors(made, tmp_path)
    for name, costs in pretended.items():
        close(costs, real[name])


def test_the_calls_of_dmd2_are_those_of_its_turns(tmp_path):
    """Five updates of the critic, each after a sample; then the student's, with a call of the teacher."""
    made = spec_of(tmp_path, "sd3", ["reflow/reflow", "score/dmd2"])
    made["stages"]["dmd2"]["options"] = {"gan_weight": 0}
    found = counted(made, tmp_path)
    costs, reflow = found["dmd2"], found["reflow"].steps[False]
    assert costs.updates == {"student": 1, "critic": 5} and costs.teacher_calls == 1
    # A forward pass costs about half of a backward pass: 5 + 1 + 1 + 1 of them, and 5 + 1 with their backward pass.
    assert costs.steps[False].operations / reflow.operations == pytest.approx(6 + 7 / 3, rel=0.05)
    made["stages"]["dmd2"]["options"]["guidance_scale"] = 3.0
    guided = counted(made, tmp_path)["dmd2"]  # one call with twice the samples
    assert guided.teacher_calls == 1
    more = guided.steps[False].operations - costs.steps[False].operations
    assert more / reflow.operations == pytest.approx(1 / 3, rel=0.05)


def test_only_adapters_are_trained_and_the_base_is_kept_once(tmp_path):
    whole = counted(spec_of(tmp_path / "a", "sd3", ["consistency/consistency"]), tmp_path)["consistency"]
    costs = counted(spec_of(tmp_path / "b", "sd3", ["consistency/consistency"], **LORA), tmp_path)["consistency"]
    assert sum(costs.trained["student"]) < 0.2 * sum(whole.trained["student"])
    assert costs.still == {"student": []} and costs.frozen == whole.frozen  # of the teacher, which it shares
    assert (costs.shared, whole.shared) == (True, False)
    assert costs.steps[False].operations < whole.steps[False].operations


def test_stages_that_cost_the_same_are_counted_once(tmp_path):
    made, said = spec_of(tmp_path, "sd3", ["reflow/reflow"]), []
    first = made["stages"]["reflow"]
    made["stages"] |= {
        "again": {**first, "init": "reflow", "images": 8}, "short": {**first, "precision": "bf16"},
    }  # fmt: skip
    counter = RunCounter(said.append)
    preflight.check(checks.check(specfile.validate(made, "spec"), tmp_path), visit=counter)
    assert [line.split("'")[1] for line in said] == ["reflow", "short"]
    jobs = counter.found.trainings
    assert jobs["again"].costs == jobs["reflow"].costs != jobs["short"].costs
    assert (jobs["again"].images, jobs["reflow"].images) == (8, 12)


def test_a_recipe_that_needs_values_is_left_out(tmp_path):
    made, said = spec_of(tmp_path, "sdxl", ["shortcut/meanflow", "reflow/reflow"]), []
    resolved = checks.check(specfile.validate(made, "spec"), tmp_path)
    counter = RunCounter(said.append)
    preflight.check(resolved, visit=counter)
    assert list(counter.found.trainings) == ["reflow"]
    assert any(line.startswith("warning: stage 'meanflow' cannot be counted: its recipe reads values") for line in said)


def test_the_spec_and_its_teacher_stay_as_they_are(tmp_path):
    """Counting makes its own copies: the checks that follow see the same networks."""
    made = spec_of(tmp_path, "sd3", ["shortcut/shortcut"])
    resolved = checks.check(specfile.validate(made, "spec"), tmp_path)
    plain = preflight.check(resolved)
    visited = preflight.check(resolved, visit=RunCounter(lambda line: None))
    for name, each in plain.built.items():
        assert visited.built[name].sizes == each.sizes
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in visited.teacher.network.parameters())


@pytest.mark.long
@pytest.mark.process
@pytest.mark.parametrize("procs", [1, 2, 4])
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_memory_is_within_ten_percent_of_what_training_holds(stage, procs, tmp_path, capfd, monkeypatch):
    """The bytes of live tensors before an optimizer step, and what autograd kept, in two real steps of each rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = spec_of(tmp_path, "sd3", ["reflow/reflow", "consistency/consistency"])
    for each in made["stages"].values():
        if each["kind"] == "train":
            each |= {"batch_size": 8, "images": 24}
    made["launch"] = {"procs": procs, "zero_stage": stage, "threads": 1, "device": "cpu"}
    if stage == 3:
        made["launch"]["zero_persistence_threshold"] = 0  # else all weights of a network this small stay whole
    (tmp_path / "spec.yaml").write_text(json.dumps(made))
    done = command(capfd, "plan", str(tmp_path / "spec.yaml"), "--measure", "--json", "--store", str(tmp_path / "runs"))
    assert done.code == 0, done.err
    memory, costs = json.loads(done.out)["memory"], counted(made, tmp_path)
    assert memory.keys() == {"reflow", "consistency"}
    for name, ranks in memory.items():
        expected = process_memory(costs[name], LaunchSpec(**made["launch"]), 8 // procs)
        for rank in ranks:
            held, predicted = sum(rank["counted"].values()), sum(expected[kind] for kind in rank["counted"])
            assert predicted == pytest.approx(held, rel=0.1)
            assert expected["activations"] == pytest.approx(rank["activations"], rel=0.1)
