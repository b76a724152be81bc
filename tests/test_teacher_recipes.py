"""Every recipe on every teacher of the most used latent-space pipelines: three steps of each, pairs, evaluations."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import test_teacher_wan as wan
import torch
from diffusers import AutoencoderKLWan, DDIMScheduler
from latent import normal, seeded, write, write_conditions
from latent_runs import PAIRS, RECIPES, TRAIN, content, images, run
from safetensors.torch import load_file
from torch import Tensor

from distill.data.arrays import ArrayData
from distill.exchange import student_card
from distill.runs import results

pytestmark = pytest.mark.long


@dataclass(frozen=True)
class Tiny:
    """A tiny random pipeline. rows: of three conditions, and null: of one; both empty for class labels."""

    pipeline: Callable[[], object]
    rows: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    size: tuple[int, ...] = (16, 24)
    options: Mapping[str, object] = ()

    def write(self, folder: Path) -> dict[str, object]:
        """The `teacher` of a spec."""
        path = str(write(folder / "teacher", self.pipeline()))
        given = {"path": path, "size": list(self.size), **dict(self.options)}
        if self.rows:
            given["conditions"] = write_conditions(folder / "conditions.safetensors", dict(self.rows), dict(self.null))
        return given


def first(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each[:1].clone() for name, each in rows.items()}


def ddim(**options) -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)


def videos() -> AutoencoderKLWan:
    return seeded(
        lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1] * 4, latents_std=[0.9] * 4,
        )
    )  # fmt: skip


WAN_ROWS = {"encoder_hidden_states": normal(3, 7, 16, seed=2)}
WAN = {"rows": WAN_ROWS, "null": first(WAN_ROWS), "size": (5, 16, 32)}
TEACHERS = {
    "sd 1": Tiny(lambda: sd.pipeline(ddim()), sd.embeddings(2, xl=False), first(sd.embeddings(5, xl=False))),
    "sd 2, zero snr": Tiny(
        lambda: sd.pipeline(ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
        sd.embeddings(2, xl=False),
        first(sd.embeddings(5, xl=False)),
    ),
    "sdxl": Tiny(lambda: sd.pipeline(ddim(), xl=True), sd.embeddings(2, xl=True), first(sd.embeddings(5, xl=True))),
    "sd 3": Tiny(sd3.pipeline, sd3.embeddings(2), first(sd3.embeddings(5))),
    "flux dev": Tiny(
        lambda: flux.pipeline(guidance_embeds=True), flux.embeddings(2), first(flux.embeddings(5)),
        options={"embedded_guidance": 2.0},
    ),
    "flux schnell": Tiny(
        lambda: flux.pipeline(guidance_embeds=False), flux.embeddings(2), first(flux.embeddings(5))
    ),
    "dit": Tiny(lambda: dit.pipeline(num_embeds_ada_norm=3), {}, {}, size=(16, 16)),
    "wan 2.1": Tiny(lambda: wan.pipeline(vae=videos()), **WAN),
    "wan 2.2": Tiny(
        lambda: wan.pipeline(vae=videos(), transformer_2=wan.network(1), boundary_ratio=0.6), **WAN
    ),
}  # fmt: skip


def clips() -> ArrayData:
    """Nine videos [3, 5, 16, 32] of three classes, without files. Data of kind videos has captions, but no classes."""
    return ArrayData("clips", normal(9, 3, 5, 16, 32, seed=4).tanh(), torch.arange(9) % 3, 3)


def go(folder: Path, teacher: str, recipes: list[str], launch=None, **stages):
    tiny = TEACHERS[teacher]
    data = clips() if len(tiny.size) == 3 else None
    of_spec = {"kind": "digits"} if data is not None else images(folder / "data", 3, *tiny.size)
    return run(folder, content(tiny.write(folder), of_spec, recipes, stages) | {"launch": launch or {}}, data)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_three_steps(tmp_path, teacher, recipe):
    done = go(tmp_path, teacher, [recipe])
    card = student_card.verify(done.student(recipe.partition("/")[2]))
    assert card.images == 12


@pytest.mark.parametrize("recipe", ["reflow/reflow", "reflow/caf", "shortcut/meanflow", "score/dmd2"])
@pytest.mark.parametrize("teacher", ["sd 1", "flux dev"])
def test_students_of_a_teacher_in_16_bits_are_trained_in_float32(tmp_path, teacher, recipe):
    given = {**TEACHERS[teacher].write(tmp_path), "dtype": "bfloat16"}
    done = run(tmp_path, content(given, images(tmp_path / "data", 3, 16, 24), [recipe], {}))
    folder = done.student(recipe.partition("/")[2])
    assert student_card.verify(folder).images == 12
    for path in folder.rglob("*.safetensors"):
        assert {each.dtype for each in load_file(path).values()} == {torch.float32}


EVALUATED = ["reflow/reflow", "consistency/consistency", "reflow/caf"]  # a student of each kind


@pytest.mark.parametrize("teacher", TEACHERS)
def test_pairs_step_times_and_evaluations(tmp_path, teacher):
    """Students of each kind are measured beside their teacher, guided, at uniform and at optimal step times."""
    names = [recipe.partition("/")[2] for recipe in EVALUATED]
    done = go(
        tmp_path, teacher, EVALUATED,
        best={**PAIRS, "paths": "trajectories", "optimal_times": 2, "guidance_scale": 2.0},
        more={**PAIRS, "teacher": "reflow"},
        again={**TRAIN, "recipe": "reflow/reflow", "teacher": "reflow", "pairs": "more"},
        measure={
            "kind": "evaluate", "students": dict.fromkeys([*names, "again"], [1, 2]), "samples": 16, "block": 8,
            "teacher_steps": [1], "baselines": ["ab3"], "fine_steps": 2, "guidance_scale": 2.0,
            "times": {"teacher": ["optimal"]},
        },
    )  # fmt: skip
    found = results.load_results(done.stage("measure"))
    assert {row.network for row in found.rows} == {"teacher", *names, "again"}
    assert next(row for row in found.rows if row.fine).rms == 0
    assert all(row.rms < 100 for row in found.rows)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_bfloat16_with_recomputed_activations(tmp_path, teacher):
    """The losses of the first step are those in float32, up to the precision of bfloat16."""
    found = []
    for name, fields in {"plain": {}, "rounded": {"precision": "bf16"}}.items():
        (tmp_path / name).mkdir()
        stages = {
            "straight": {**TRAIN, "recipe": "reflow/reflow", "pairs": "pairs", **fields},
            "mapped": {**TRAIN, "recipe": "shortcut/shortcut", **fields},
        }
        done = go(tmp_path / name, teacher, [], launch={"activation_checkpointing": bool(fields)}, **stages)
        events = [
            json.loads(line) for path in (done.root / "events").iterdir() for line in path.read_text().splitlines()
        ]
        found.append([each["logs"]["loss"] for each in events if each.get("logs")])
    assert len(found[0]) == len(found[1]) == 6
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=1e-4)
