"""Runs of every recipe on a tiny teacher of a latent-space pipeline: a few steps of each, pairs and an evaluation."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.execution import preflight, sources, stages
from distill.runs.run_store import RunPaths
from distill.spec import checks, registry, specfile

BATCH, STEPS = 4, 3
PAIRS = {"kind": "pairs", "count": 8, "block": 4, "shard": 4, "steps": 2, "solver": "euler"}
TRAIN = {"kind": "train", "images": STEPS * BATCH, "batch_size": BATCH, "optimizer": {"lr": 1e-4}}
MORE_PAIRS = {
    "halves": {**PAIRS, "paths": "trajectories", "times": [1, 0.5, 0]},
    "segments": {**PAIRS, "paths": "segments", "times": [1, 0.5, 0]},
}
OF_PIXELS = {"shortcut/pdd", "shortcut/pi_flow"}  # recipes whose students have several outputs
# recipe -> options, and other fields of its stage
RECIPES = {
    "reflow/reflow": ({}, {"pairs": "pairs"}),
    "pretrain/flow_matching": ({"label_dropout": 0.0}, {"init": "reflow"}),
    "reflow/one_step": ({}, {"pairs": "pairs"}),
    "reflow/rf_plus_plus": ({}, {"pairs": "pairs"}),
    "reflow/simple_reflow": ({}, {"pairs": "pairs"}),
    "reflow/rectified_diffusion": ({}, {"pairs": "pairs"}),
    "reflow/boss": ({}, {"pairs": "halves"}),
    "reflow/seqrf": ({}, {"pairs": "halves"}),
    "reflow/slimflow": ({}, {"pairs": "pairs", "init": "reflow"}),
    "reflow/caf": ({}, {"pairs": "pairs"}),
    "reflow/perflow": ({"windows": 2}, {}),
    "reflow/proreflow": ({"windows": 2}, {}),
    "reflow/consistency_fm": ({}, {"init": "reflow"}),
    "consistency/consistency": ({"levels": 4}, {}),
    "consistency/scm": ({}, {}),
    "consistency/tcm": ({"closeness": 0.05}, {}),
    "shortcut/shortcut": ({}, {}),
    "shortcut/meanflow": ({}, {}),
    "shortcut/flow_map": ({"law": "progressive"}, {}),
    "shortcut/soflow": ({}, {}),
    "shortcut/alphaflow": ({}, {}),
    "shortcut/cmt": ({}, {"pairs": "halves"}),
    "shortcut/progressive": ({}, {}),
    "score/dmd2": ({}, {}),
}


def images(folder: Path, classes: int, height: int, width: int) -> dict[str, object]:
    """The data of a spec: three coloured images for each class."""
    generator = torch.Generator().manual_seed(3)
    for label in range(classes):
        (folder / str(label)).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / str(label) / f"{i}.png")
    return {"kind": "images", "path": str(folder), "size": [height, width], "channels": 3}


def content(teacher: dict[str, object], data: dict[str, object], recipes: list[str], more=None) -> dict[str, object]:
    """The spec of a run of these recipes, and of the stages `more`. It has data only if a stage needs it."""
    made: dict[str, object] = {"pairs": PAIRS}
    needs = frozenset({"data"} if any(stage["kind"] == "evaluate" for stage in (more or {}).values()) else ())
    for recipe in recipes:
        options, fields = RECIPES[recipe]
        if fields.get("pairs") in MORE_PAIRS:
            made[fields["pairs"]] = MORE_PAIRS[fields["pairs"]]
        if "init" in fields:
            made.setdefault(fields["init"], {**TRAIN, "recipe": f"reflow/{fields['init']}", "pairs": "pairs"})
        made[recipe.partition("/")[2]] = {**TRAIN, "recipe": recipe, "options": options, **fields}
    made |= more or {}
    for stage in made.values():
        if stage["kind"] == "train":
            needs |= registry.configure(
                stage["recipe"], registry.load(stage["recipe"], Path()), stage.get("options", {}), "options"
            ).needs
    return {"name": "run", "teacher": teacher, "stages": made, **({"data": data} if "data" in needs else {})}


def run(folder: Path, spec: dict[str, object], data: DataSet | None = None) -> RunPaths:
    """Checks a spec as a command does, and runs all its stages. data: in place of that of the spec."""
    torch.set_num_threads(1)
    given = specfile.validate(spec, "spec")
    with pytest.MonkeyPatch.context() as patch:
        if data is not None:
            for module in (preflight, sources):
                patch.setattr(module, "load_data", lambda kind, *args, **kwargs: None if kind.kind == "none" else data)
        resolved = checks.check(given, folder)
        preflight.check(resolved)
        paths = RunPaths(folder / given.name)
        paths.root.mkdir()
        stages.run(paths, resolved.spec, list(resolved.spec.stages), StopRequest())
    return paths
