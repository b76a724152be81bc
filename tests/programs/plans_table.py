"""Prints, as Markdown, how to train published models on 8, 64 and 1,024 GPUs: the table in slurm/README.md.

    python tests/programs/plans_table.py COUNTS.json

Counting takes about 30 minutes on one CPU; the counts are kept in COUNTS.json, and those that are in it already are not
made again.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.core.atomic import write_json
from distill.core.space import human
from distill.execution.layouts import RESERVE, TrainingJob, fitting_layouts
from distill.execution.rehearsal import Growth, TrainingCosts, UpdateCosts
from distill.execution.run_costs import RunCounter
from distill.plans import device_kinds, facts
from distill.plans.costs import ASSUMED, Machines, training_time
from distill.spec import checks
from distill.spec.model import RunSpec
from distill.training.counting import ATTENTION

KIND, PER_NODE, GPUS = "h100", 8, (8, 64, 1024)
BATCH, IMAGES, RANK = 1024, 1_024_000, 64
MILLION = 1_000_000
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "reflow": {"recipe": "reflow/reflow", "pairs": "pairs"},
    "consistency, LoRA": {"recipe": "consistency/consistency", "lora": {"student": {"rank": RANK}}},
    "dmd2": {"recipe": "score/dmd2"},
}


def spec(recipe: str) -> RunSpec:
    """A spec that trains with a recipe and its default options, on latents and embeddings of a cache."""
    train = {"kind": "train", "images": IMAGES, "batch_size": BATCH, "precision": "bf16", "optimizer": {"lr": 1e-4}}
    stages: dict[str, Any] = {"cache": {"kind": "cache"}}
    if "pairs" in RECIPES[recipe]:
        stages["pairs"] = {"kind": "pairs", "count": IMAGES, "solver": "euler", "steps": 25}
    stages["train"] = {**train, **RECIPES[recipe]}
    data = {"kind": "images", "path": "images", "captions": True, "size": 1024}
    teacher = {"kind": "diffusers", "path": "your/teacher", "dtype": "bfloat16"}
    return RunSpec.model_validate({"name": "plan", "teacher": teacher, "data": data, "stages": stages})


def counts(path: Path) -> dict[str, dict[str, TrainingJob]]:
    """Model -> recipe -> what is trained, and its costs."""
    known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    for name in facts.names():
        for recipe in RECIPES:
            if recipe not in known.setdefault(name, {}):
                resolved = checks.check(spec(recipe), Path())
                found = RunCounter(lambda line: None).of_model(resolved, facts.facts_of(name))
                known[name][recipe] = json.loads(json.dumps(asdict(found.trainings["train"])))
                write_json(path, known)
    return {name: {recipe: job_of(each) for recipe, each in recipes.items()} for name, recipes in known.items()}


def job_of(content: Mapping[str, Any]) -> TrainingJob:
    """A job from its JSON."""
    steps = {
        again == "true": UpdateCosts(each["operations"], Growth(**each["activations"]))
        for again, each in content["costs"]["steps"].items()
    }
    return TrainingJob(**{**content, "costs": TrainingCosts(**{**content["costs"], "steps": steps})})


def table(found: Mapping[str, Mapping[str, TrainingJob]]) -> Iterator[str]:
    """The lines of the table."""
    yield "| model | recipe | GPUs | launch | memory | step | samples/s | GPU-hours per million |"
    yield "|---|---|---:|---|---:|---:|---:|---:|"
    for name, jobs in found.items():
        for recipe, job in jobs.items():
            for gpus in GPUS:
                machines = Machines(device_kinds.kind_of(KIND), gpus // PER_NODE, PER_NODE)
                start = f"| {facts.facts_of(name).title} | {recipe} | {gpus:,} |"
                layouts = fitting_layouts({"train": job}, machines)
                if not layouts:
                    yield f"{start} does not fit | | | | |"
                    continue
                best, step = layouts[0], layouts[0].trainings["train"].step
                time = training_time(step, machines, job.batch_size, MILLION)
                given = best.launch.model_dump(exclude_defaults=True, exclude={"nodes", "procs"})
                options = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in given.items()) or "defaults"
                yield (
                    f"{start} {options} | {human(best.needed)} | {short(step.total)} s | "
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
