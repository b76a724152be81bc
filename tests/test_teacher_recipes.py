"""Every recipe on teachers of latent-space pipelines: three steps of each."""

import pytest
from latent import write, write_conditions
from latent_runs import PAIRS, RECIPES, TRAIN, content, images, run
from test_teacher_flux import embeddings as flux_embeddings
from test_teacher_flux import pipeline as flux

from distill.exchange import student_card
from distill.runs import results

pytestmark = pytest.mark.long


def flux_teacher(folder, guidance):
    rows, null = flux_embeddings(2), flux_embeddings(5)
    conditions = write_conditions(folder / "conditions.safetensors", rows, {k: v[:1] for k, v in null.items()})
    path = write(folder / "teacher", flux(guidance_embeds=guidance))
    return {"path": str(path), "size": [16, 24], "conditions": conditions}


TEACHERS = {
    "flux dev": lambda folder: flux_teacher(folder, True),
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_three_steps(tmp_path, teacher, recipe):
    given = TEACHERS[teacher](tmp_path)
    done = run(tmp_path, content(given, images(tmp_path / "data", 3, 16, 24), [recipe]))
    card = student_card.verify(done.student(recipe.partition("/")[2]))
    assert card.images == 12


EVALUATED = ["reflow/reflow", "consistency/consistency", "reflow/caf"]  # a student of each kind


@pytest.mark.parametrize("teacher", TEACHERS)
def test_pairs_step_times_and_evaluations(tmp_path, teacher):
    """Students of each kind are measured beside their teacher, guided, at uniform and at optimal step times."""
    given = TEACHERS[teacher](tmp_path)
    spec = content(given, images(tmp_path / "data", 3, 16, 24), EVALUATED)
    names = [recipe.partition("/")[2] for recipe in EVALUATED]
    spec["stages"] |= {
        "best": {**PAIRS, "paths": "trajectories", "optimal_times": 2, "guidance_scale": 2.0},
        "again": {**TRAIN, "recipe": "reflow/reflow", "teacher": "reflow", "pairs": "more"},
        "measure": {
            "kind": "evaluate", "students": dict.fromkeys([*names, "again"], [1, 2]), "samples": 16, "block": 8,
            "teacher_steps": [1], "baselines": ["ab3"], "fine_steps": 2, "guidance_scale": 2.0,
            "times": {"teacher": ["optimal"]},
        },
    }  # fmt: skip
    spec["stages"]["more"] = {**PAIRS, "teacher": "reflow"}
    spec["stages"]["again"] = spec["stages"].pop("again")
    spec["stages"]["measure"] = spec["stages"].pop("measure")
    done = run(tmp_path, spec)
    found = results.load_results(done.stage("measure"))
    assert {row.network for row in found.rows} == {"teacher", *names, "again"}
    assert all(row.rms < 10 for row in found.rows)
    assert next(row for row in found.rows if row.fine).rms == 0
