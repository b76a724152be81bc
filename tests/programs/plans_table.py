"""Prints, as Markdown, how to train published models on 8, 64 and 1,024 GPUs: the table in slurm/README.md.

    python tests/programs/plans_table.py COUNTS.json

Counting takes about 15 minutes on one CPU; the counts are kept in COUNTS.json, and models that are in it already are
not counted again.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from distill.core.atomic import write_json
from distill.core.space import human
from distill.execution.layouts import RESERVE, TrainingJob, fitting_layouts
from distill.execution.model_costs import Growth, NetworkCosts, costs_of
from distill.plans import device_kinds, facts
from distill.plans.costs import ASSUMED, Machines, training_time
from distill.training.counting import ATTENTION

KIND, PER_NODE, GPUS = "h100", 8, (8, 64, 1024)
BATCH, IMAGES, RANK = 1024, 1_000_000, 64
HALF = 2  # bytes of a weight of the teacher, in bf16


def counts(path: Path) -> dict[str, dict[str, NetworkCosts]]:
    """Model -> way of training ("whole", "whole again", "adapters", "adapters again") -> its costs.

    "again": with recomputed activations.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    for name in facts.names():
        if name not in known:
            known[name] = {
                f"{what}{' again' * recompute}": asdict(
                    costs_of(facts.facts_of(name), recompute=recompute, lora_rank=rank)
                )
                for what, rank in (("whole", None), ("adapters", RANK))
                for recompute in (False, True)
            }
            write_json(path, known)
    return {
        name: {
            way: NetworkCosts(**{**each, "activations": Growth(**each["activations"])}) for way, each in ways.items()
        }
        for name, ways in known.items()
    }


def jobs(found: Mapping[str, NetworkCosts]) -> Iterator[tuple[str, TrainingJob]]:
    """(recipe, job) with the calls that the recipe makes with its default options, and one step for dmd2."""

    def networks(way: str, *names: str) -> dict[bool, dict[str, NetworkCosts]]:
        own = {again: replace(found[f"{way}{' again' * again}"], still=[]) for again in (False, True)}
        return {again: dict.fromkeys(names, each) for again, each in own.items()}

    once = {"student": 1}
    yield "reflow", TrainingJob(networks("whole", "student"), BATCH, {}, once, once, once)
    teacher = HALF * sum(found["whole"].trained)
    yield (
        "consistency, LoRA",
        TrainingJob(
            networks("adapters", "student"),
            BATCH,
            forwards={"student": 1, "teacher": 2},
            trainings=once,
            updates=once,
            kept=once,
            frozen=teacher,
            shared=True,
        ),
    )
    yield (
        "dmd2",  # for each update of the student, five of the critic, which is called with a sample and with data
        TrainingJob(
            networks("whole", "student", "critic"),
            BATCH,
            forwards={"student": 5, "teacher": 1},
            trainings={"student": 1, "critic": 11},
            updates={"student": 1, "critic": 5},
            kept={"student": 1, "critic": 1},
            frozen=teacher,
        ),
    )


def table(found: Mapping[str, Mapping[str, NetworkCosts]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| model | recipe | GPUs | launch | memory | step | samples/s | GPU-hours per million |"
    yield "|---|---|---:|---|---:|---:|---:|---:|"
    for name, ways in found.items():
        for recipe, job in jobs(ways):
            for gpus in GPUS:
                machines = Machines(device_kinds.kind_of(KIND), gpus // PER_NODE, PER_NODE)
                start = f"| {facts.facts_of(name).title} | {recipe} | {gpus:,} |"
                layouts = fitting_layouts(job, machines, "bf16")
                if not layouts:
                    yield f"{start} does not fit | | | | |"
                    continue
                best = layouts[0]
                time = training_time(best.step, machines, BATCH, IMAGES)
                given = best.launch.model_dump(exclude_defaults=True, exclude={"nodes", "procs"})
                options = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in given.items()) or "defaults"
                yield (
                    f"{start} {options} | {human(best.needed)} | {short(best.step.total)} s | "
                    f"{short(time.images_per_second)} | {short(time.gpu_hours)} |"
                )


def short(number: float) -> str:
    """A number in three digits."""
    return f"{float(f'{number:.3g}'):,g}"


def main() -> None:
    print(f"Batch {BATCH:,}, bf16, {device_kinds.kind_of(KIND).title}, {PER_NODE} in a node, attention `{ATTENTION}`,")
    print(f"LoRA of rank {RANK} in the attention; {ASSUMED}, reserve {RESERVE:.0%} of the memory.\n")
    print("\n".join(table(counts(Path(sys.argv[1])))))


if __name__ == "__main__":
    main()
