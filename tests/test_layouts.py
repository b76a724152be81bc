"""Which ways to train fit into the memory of given GPUs, against calculations by hand."""

import json
from dataclasses import asdict, replace

import pytest
from programs import plans_table

from distill.execution.layouts import RESERVE, TrainingJob, fitting_layouts, layout_of
from distill.execution.rehearsal import Growth, TrainingCosts, UpdateCosts
from distill.plans.costs import Assumptions, Machines
from distill.plans.device_kinds import GIGA, kind_of
from distill.spec.model import LaunchSpec
from distill.training.choice import stage_of, ways

STEPS = {False: UpdateCosts(3e12, Growth(0, 8 * GIGA)), True: UpdateCosts(4e12, Growth(0, GIGA))}
COSTS = TrainingCosts(
    trained={"student": [GIGA]}, still={"student": []}, copies=[], averages=1, moments=None, frozen=0, shared=False,
    updates={"student": 1}, teacher_calls=0, steps=STEPS,
)  # fmt: skip
JOB = TrainingJob(COSTS, batch_size=16, images=1600, precision="bf16")
WEIGHTS = 4 * 5  # GB of weights, gradients, two moments and an average, of 10^9 weights
ASSUMED = Assumptions(utilisation=0.5, bandwidth=1.0, hidden=0.5)


def machines(memory, gpus=4):
    """GPUs that have this memory in GB beside the reserve."""
    peaks = {"bf16": 1e13, "tf32": 1e13, "fp32": 1e13}
    kind = replace(kind_of("h100"), memory=round(memory * GIGA / (1 - RESERVE)) + 1, peaks=peaks, link=1e12)
    return Machines(kind, 1, gpus)


def options(layout):
    return layout.launch.model_dump(exclude_defaults=True, exclude={"nodes", "procs"})


def layouts(costs, gpus, *, allowed=lambda launch: True):
    return fitting_layouts({"train": replace(JOB, costs=costs)}, gpus, ASSUMED, allowed)


def test_with_memory_enough_nothing_is_divided_or_recomputed():
    best, *_ = layouts(COSTS, machines(WEIGHTS + 4 * 8))
    assert options(best) == {}
    assert best.needed == (WEIGHTS + 4 * 8) * GIGA
    assert best.trainings["train"].step.compute == 4 * 3e12 / 5e12
    assert best.seconds == 100 * best.trainings["train"].step.total


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (WEIGHTS + 8, {"micro_batch": 1}),
        (WEIGHTS + 2, {"activation_checkpointing": True, "micro_batch": 2}),
        (WEIGHTS + 1, {"activation_checkpointing": True, "micro_batch": 1}),
    ],
)
def test_without_zero_less_memory_means_smaller_micro_batches_then_recomputation(memory, expected):
    found = [options(each) for each in layouts(COSTS, machines(memory))]
    assert [each for each in found if "zero_stage" not in each][0] == expected


def test_the_fastest_comes_first():
    found = layouts(COSTS, machines(WEIGHTS + 8))
    times = [float(f"{each.seconds:.2g}") for each in found]
    assert times == sorted(times) and len(times) > 3
    assert all(each.needed <= (WEIGHTS + 8) * GIGA for each in found)


def test_zero_makes_fit_what_does_not_fit_otherwise():
    """A quarter of weights, gradients, master weights with two moments, and an average; and gathered weights."""
    large, smallest = replace(COSTS, trained={"student": [4 * GIGA]}), 4 + 4 + 12 + 4 + 4 + 1
    found = [options(each) for each in layouts(large, machines(smallest))]
    assert {"zero_stage": 3, "activation_checkpointing": True, "micro_batch": 1} in found
    assert all(each["zero_stage"] == 3 for each in found)
    assert [options(each) for each in layouts(large, machines(smallest - 1))] == [
        {"zero_stage": 3, "offload_optimizer": True, "micro_batch": 1},
        {"zero_stage": 3, "offload_optimizer": True, "activation_checkpointing": True},
    ]
    assert layouts(large, machines(smallest - 13)) == []


def test_a_section_launch_that_does_not_fit_is_described_too():
    found = layout_of({"train": JOB}, machines(1).kind, LaunchSpec(procs=4, zero_stage=3, micro_batch="auto"), ASSUMED)
    assert found.trainings["train"].memory == {
        "parameters": GIGA, "gradients": GIGA, "optimizer": 3 * GIGA, "ema": GIGA, "frozen": 0,
        "activations": 8 * GIGA, "gathered": 4 * GIGA,
    }  # fmt: skip


def test_the_critic_and_the_teacher_are_counted():
    costs = replace(
        COSTS,
        trained={"student": [GIGA], "critic": [GIGA]},
        still={"student": [], "critic": []},
        updates={"student": 1, "critic": 5},
        frozen=2 * GIGA,
        steps={False: UpdateCosts(42e12, Growth(0, 8 * GIGA))},
    )
    best = layouts(costs, machines(200))[0]
    # Two networks with moments, the gradients of one, an average of the student; activations; the teacher.
    assert best.needed == (8 + 4 + 16 + 4 + 4 * 8 + 2) * GIGA
    assert best.trainings["train"].step.communication == pytest.approx(6 * 2 * 3 / 4 * 4 * GIGA / 1e12)


def test_weights_of_the_teacher_that_are_divided_are_gathered_for_each_call():
    costs = replace(COSTS, frozen=2 * GIGA, teacher_calls=3)
    launch = LaunchSpec(procs=4, zero_stage=3, micro_batch=2)
    whole, divided = (
        layout_of({"train": replace(JOB, costs=costs)}, machines(1).kind, each, ASSUMED).trainings["train"]
        for each in (launch, launch.model_copy(update={"divide_teacher": True}))
    )
    assert whole.memory["frozen"] == 4 * divided.memory["frozen"] == 2 * GIGA
    sent = divided.step.communication - whole.step.communication
    assert sent == pytest.approx(3 / 4 * 2 * 3 * 2 * GIGA / 1e12)


def test_weights_that_networks_share_with_the_teacher_are_not_divided():
    plain = LaunchSpec(procs=4)
    assert [stage_of(each) for each in ways(plain, shared=True, teacher=False)] == [None, 1, 2]
    assert [stage_of(each) for each in ways(plain, shared=False, teacher=False)] == [None, 1, 2, 3, 3]
    assert [each.divide_teacher for each in ways(plain, shared=False, teacher=True)] == [False] * 4 + [True] * 2
    costs = replace(COSTS, trained={"student": [10**6]}, frozen=2 * GIGA, shared=True)
    assert {stage_of(each.launch) for each in layouts(costs, machines(200))} == {None, 1, 2}


def test_what_a_spec_or_its_optimizer_does_not_allow_is_left_out():
    found = layouts(COSTS, machines(200), allowed=lambda launch: launch.zero_stage != 3)
    assert {stage_of(each.launch) for each in found} == {None, 1, 2}
    assert {stage_of(each.launch) for each in layouts(replace(COSTS, moments=GIGA), machines(200))} == {None}
    without = replace(COSTS, steps={False: STEPS[False]})
    assert not any(each.launch.activation_checkpointing for each in layouts(without, machines(200)))


def test_trainings_of_a_run_have_one_section_launch():
    """That of 12 samples for each process takes parts of 1, 2 or 4, so that the other with 4 can take them, too."""
    jobs = {"few": JOB, "many": replace(JOB, batch_size=48, images=4800)}
    best = fitting_layouts(jobs, machines(WEIGHTS + 4 * 8), ASSUMED)[0]
    assert options(best) == {"micro_batch": 4}
    assert best.needed == (WEIGHTS + 4 * 8) * GIGA
    assert best.seconds == sum(each.seconds for each in best.trainings.values())
    assert options(fitting_layouts(jobs, machines(WEIGHTS + 12 * 8), ASSUMED)[0]) == {}


def test_the_table_of_published_models_says_what_to_launch():
    job = replace(JOB, batch_size=1024, images=1024)
    costs = replace(
        COSTS, trained={"student": [GIGA], "critic": [GIGA]}, still={"student": [], "critic": []},
        updates={"student": 1, "critic": 5}, frozen=2 * GIGA, steps={False: UpdateCosts(42e12, Growth(0, 16 * GIGA))},
    )  # fmt: skip
    lines = list(plans_table.table({"sdxl": {"reflow": job, "dmd2": replace(job, costs=costs)}}))
    assert len(lines) == 2 + 2 * 3
    # 128 samples of 3e12 operations at 40 % of 989e12 per second; 4 + 4 * 8 GB, an eighth of 16 GB, and 4 GB whole.
    reflow = "`micro_batch: 4`, `zero_stage: 1` | 42.0 GB | 0.972 s | 1,050 | 2.11 |"
    assert lines[2] == f"| SDXL base 1.0 | reflow | 8 | {reflow}"
    # 42e12 operations, and 6 times 2 * 4 GB at 300 GB/s, less half of the time of the operations; two networks, the
    # gradients of one, the teacher, and the activations of two calls.
    assert lines[-1] == "| SDXL base 1.0 | dmd2 | 1,024 | `zero_stage: 1` | 30.0 GB | 0.213 s | 4,810 | 59.2 |"
    huge = replace(job, costs=replace(COSTS, trained={"student": [10**12]}))
    assert "| SDXL base 1.0 | reflow | 8 | does not fit | | | | |" in plans_table.table({"sdxl": {"reflow": huge}})


def test_counts_are_read_as_they_were_written():
    assert plans_table.job_of(json.loads(json.dumps(asdict(JOB)))) == JOB
