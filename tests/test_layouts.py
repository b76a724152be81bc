"""Which ways to train fit into the memory of given GPUs, against calculations by hand."""

from dataclasses import replace

import pytest
from programs import plans_table

from distill.execution.layouts import RESERVE, TrainingJob, fitting_layouts
from distill.execution.model_costs import Growth, NetworkCosts
from distill.plans.costs import Assumptions, Machines
from distill.plans.device_kinds import GIGA, kind_of
from distill.spec.model import LaunchSpec
from distill.training.choice import stage_of, ways

KEPT = NetworkCosts([GIGA], [], forward=10**12, training=3 * 10**12, activations=Growth(0, 8 * GIGA))
AGAIN = replace(KEPT, training=4 * 10**12, activations=Growth(0, GIGA))
ONCE = {"student": 1}
JOB = TrainingJob({False: {"student": KEPT}, True: {"student": AGAIN}}, 16, {}, ONCE, ONCE, ONCE)
WEIGHTS = 4 * 5  # GB of weights, gradients, two moments and an average, of 10^9 weights
ASSUMED = Assumptions(utilisation=0.5, bandwidth=1.0, hidden=0.5)


def machines(memory, gpus=4):
    """GPUs that have this memory in GB beside the reserve."""
    peaks = {"bf16": 1e13, "tf32": 1e13, "fp32": 1e13}
    kind = replace(kind_of("h100"), memory=round(memory * GIGA / (1 - RESERVE)) + 1, peaks=peaks, link=1e12)
    return Machines(kind, 1, gpus)


def options(layout):
    return layout.launch.model_dump(exclude_defaults=True, exclude={"nodes", "procs"})


def test_with_memory_enough_nothing_is_divided_or_recomputed():
    best, *_ = fitting_layouts(JOB, machines(WEIGHTS + 4 * 8), "bf16", ASSUMED)
    assert options(best) == {}
    assert best.needed == (WEIGHTS + 4 * 8) * GIGA
    assert best.step.compute == 4 * 3e12 / 5e12


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (WEIGHTS + 8, {"micro_batch": 1}),
        (WEIGHTS + 2, {"activation_checkpointing": True, "micro_batch": 2}),
        (WEIGHTS + 1, {"activation_checkpointing": True, "micro_batch": 1}),
    ],
)
def test_without_zero_less_memory_means_smaller_micro_batches_then_recomputation(memory, expected):
    found = [options(each) for each in fitting_layouts(JOB, machines(memory), "bf16", ASSUMED)]
    assert [each for each in found if "zero_stage" not in each][0] == expected


def test_the_fastest_comes_first():
    found = fitting_layouts(JOB, machines(WEIGHTS + 8), "bf16", ASSUMED)
    times = [float(f"{each.step.total:.2g}") for each in found]
    assert times == sorted(times) and len(times) > 3
    assert all(each.needed <= (WEIGHTS + 8) * GIGA for each in found)


def test_zero_makes_fit_what_does_not_fit_otherwise():
    """A quarter of weights, gradients, master weights with two moments, and an average; and gathered weights."""
    large = {again: {"student": replace(each, trained=[4 * GIGA])} for again, each in ((False, KEPT), (True, AGAIN))}
    job, smallest = replace(JOB, networks=large), 4 + 4 + 12 + 4 + 4 + 1
    found = [options(each) for each in fitting_layouts(job, machines(smallest), "bf16", ASSUMED)]
    assert {"zero_stage": 3, "activation_checkpointing": True, "micro_batch": 1} in found
    assert all(each["zero_stage"] == 3 for each in found)
    assert [options(each) for each in fitting_layouts(job, machines(smallest - 1), "bf16", ASSUMED)] == [
        {"zero_stage": 3, "offload_optimizer": True, "micro_batch": 1},
        {"zero_stage": 3, "offload_optimizer": True, "activation_checkpointing": True},
    ]
    assert fitting_layouts(job, machines(smallest - 13), "bf16", ASSUMED) == []


def test_the_teacher_and_the_critic_are_counted():
    networks = {again: {"student": each, "critic": each} for again, each in ((False, KEPT), (True, AGAIN))}
    job = replace(
        JOB,
        networks=networks,
        forwards={"student": 5, "teacher": 1},
        trainings={"student": 1, "critic": 11},
        updates={"student": 1, "critic": 5},
        kept={"student": 1, "critic": 1},
        frozen=2 * GIGA,
    )
    assert job.operations(recompute=False) == (6 + 12 * 3) * 10**12
    assert job.operations(recompute=True) == (6 + 12 * 4) * 10**12
    best = fitting_layouts(job, machines(200), "bf16", ASSUMED)[0]
    # Two networks with moments, the gradients of one, an average of the student; activations of both; the teacher.
    assert best.needed == (8 + 4 + 16 + 4 + 2 * 4 * 8 + 2) * GIGA
    assert best.step.communication == pytest.approx(6 * 2 * 3 / 4 * 4 * GIGA / 1e12)


def test_weights_that_networks_share_with_the_teacher_are_not_divided():
    plain = LaunchSpec(procs=4)
    assert [stage_of(each) for each in ways(plain, shared=True, teacher=False)] == [None, 1, 2]
    assert [stage_of(each) for each in ways(plain, shared=False, teacher=False)] == [None, 1, 2, 3, 3]
    assert [each.divide_teacher for each in ways(plain, shared=False, teacher=True)] == [False] * 4 + [True] * 2
    adapters = replace(KEPT, trained=[10**6])
    job = replace(
        JOB, networks={False: {"student": adapters}, True: {"student": adapters}}, frozen=2 * GIGA, shared=True
    )
    assert {stage_of(each.launch) for each in fitting_layouts(job, machines(200), "bf16", ASSUMED)} == {None, 1, 2}


def test_the_table_of_published_models_says_what_to_launch():
    adapters = replace(KEPT, trained=[10**6], still=[GIGA])
    counted = {"whole": KEPT, "whole again": AGAIN, "adapters": adapters, "adapters again": adapters}
    lines = list(plans_table.table({"sdxl": counted}))
    assert len(lines) == 2 + 3 * 3
    # 128 samples of 3e12 operations at 40 % of 989e12 per second; 4 + 4 * 8 GB, an eighth of 16 GB, and 4 GB whole.
    reflow = "`micro_batch: 4`, `zero_stage: 1` | 42.0 GB | 0.972 s | 1,050 | 2.11 |"
    assert lines[2] == f"| SDXL base 1.0 | reflow | 8 | {reflow}"
    # 42e12 operations, and 6 times 2 * 4 GB at 300 GB/s, less half of the time of the operations; two networks, the
    # gradients of one, the teacher, and the activations of two calls.
    assert lines[-1] == "| SDXL base 1.0 | dmd2 | 1,024 | `zero_stage: 1` | 30.0 GB | 0.213 s | 4,810 | 59.2 |"
    huge = {name: replace(each, trained=[10**12]) for name, each in counted.items()}
    assert "| SDXL base 1.0 | reflow | 8 | does not fit | | | | |" in plans_table.table({"sdxl": huge})
