"""Networks that are conditioned on the sizes of images get those of the training images, as their pipelines give them.

A row of sizes: height and width of the original image, top and left of the crop, height and width of the sample.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import test_teacher_cogview4 as cogview4
import test_teacher_hunyuan_dit as hunyuan
import test_teacher_pixart as pixart
import test_teacher_unet_condition as sd
import torch
from latent import ddim, load, normal, same, vp_grid, write, write_conditions
from PIL import Image
from torch import nn

from distill.data import load_data
from distill.execution import batches
from distill.flow.conditioning import ClassLabels, ConditionTable, HeldRows, Unconditional
from distill.flow.draws import Rows, StepDraw
from distill.flow.fields import Rescheduled, start
from distill.flow.interpolants import linear
from distill.flow.solvers import integrate
from distill.protocols import Batch
from distill.runs.run_store import RunPaths
from distill.spec import registry
from distill.spec.model import ImagesData, TrainStage
from distill.testing import exact
from distill.training.engine import StepContext

SIZES = torch.tensor([[640, 480, 3, 5, 16, 24], [16, 24, 0, 0, 16, 24]])


def table(folder, module, stock, size=(16, 24), **given):
    """The teacher of a pipeline with two or three prompts, and a null condition."""
    rows, null = module.embeddings(2, **given), module.embeddings(5, **given)
    path = write_conditions(folder / "c.safetensors", rows, {name: each[:1] for name, each in null.items()})
    return load(write(folder / "teacher", stock), size=list(size), conditions=path), rows, null


def seen(network: nn.Module, call) -> dict[str, torch.Tensor]:
    """The keyword arguments with which `call` calls the network first."""
    found = []
    hook = network.register_forward_pre_hook(lambda _, args, kwargs: found.append(kwargs), with_kwargs=True)
    call()
    hook.remove()
    return found[0] | (found[0].get("added_cond_kwargs") or {})


@torch.no_grad()
def test_sdxl_is_called_with_the_sizes_and_so_is_its_unconditional_call(tmp_path):
    stock = sd.pipeline(ddim(**sd.SD), xl=True)
    teacher, rows, null = table(tmp_path, sd, stock, xl=True)
    noise, scale, null = normal(3, 4, 8, 12), 3.0, {name: each[:1].expand_as(each) for name, each in null.items()}
    expected = sd.stock_latents(
        stock, noise, rows, null, scale,
        original_size=(640, 480), crops_coords_top_left=(3, 5), target_size=(16, 24),
    )  # fmt: skip
    cond = teacher.conditioning.collate(torch.arange(3), SIZES[:1].expand(3, 6))
    assert cond["time_ids"].tolist() == [[640, 480, 3, 5, 16, 24]] * 3 and cond["time_ids"].dtype == torch.float32
    assert torch.equal(
        cond["time_ids"][:1],
        stock._get_add_time_ids((640, 480), (3, 5), (16, 24), torch.float32, text_encoder_projection_dim=12),
    )
    same(sampled(teacher.guided(scale), vp_grid(stock.scheduler).double(), noise, cond), expected)


def sampled(field, grid: torch.Tensor, noise: torch.Tensor, cond) -> torch.Tensor:
    """Like `latent.ours`, for a given condition."""
    sigma = grid[:1] / (1 - grid[:1])
    c = field.interpolant.path(field.interpolant.time_of(sigma))
    x = start(field, noise) / (1.0 if sigma.isinf() else (c.alpha + c.sigma).item())
    return integrate("euler", Rescheduled(field, linear()), x, grid, cond)


def cogview(stock, rows, null) -> None:
    stock(
        height=32, width=48, num_inference_steps=1, output_type="latent", guidance_scale=1.0,
        latents=normal(1, 4, 16, 24), prompt_embeds=rows["encoder_hidden_states"][:1], original_size=(640, 480),
        crops_coords_top_left=(3, 5),
    )  # fmt: skip


def hunyuan_dit(stock, rows, null) -> None:
    given = partial(stock, original_size=(640, 480), crops_coords_top_left=(3, 5))
    hunyuan.stock_latents(given, normal(3, 4, 8, 12), rows, null, 3.0)


def pix_art(stock, rows, null) -> None:
    pixart.stock_latents(stock, normal(3, 4, 8, 12), rows, null, 3.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "call", "options", "size", "original", "names"),
    [
        (cogview4, cogview, {}, (32, 48), (640, 480), ["original_size", "target_size", "crop_coords"]),
        (hunyuan, hunyuan_dit, hunyuan.LENGTHS, (64, 96), (640, 480), ["image_meta_size", "style"]),
        (pixart, pix_art, {"version": "alpha"}, (16, 24), (16, 24), ["resolution", "aspect_ratio"]),
    ],
    ids=["cogview4", "hunyuan", "pixart"],
)
def test_networks_are_called_with_the_sizes_as_by_their_pipeline(
    tmp_path, module, call, options, size, original, names
):
    """PixArt's pipeline knows no other original size than that of the sample."""
    stock = module.pipeline(**options)
    teacher, rows, null = table(tmp_path, module, stock, size)
    found = seen(stock.transformer, lambda: call(stock, rows, null))
    crop = (0, 0) if module is pixart else (3, 5)
    cond = teacher.conditioning.collate(torch.arange(2), torch.tensor([[*original, *crop, *size], [1, 2, 3, 4, 5, 6]]))
    for name in names:
        expected = found[name][0]
        assert torch.equal(cond[name][0], expected) and cond[name].dtype == expected.dtype, name
    null = teacher.conditioning.null(cond)
    assert all(torch.equal(null[name], cond[name]) for name in names)  # both halves of the pipeline's batch are equal
    if len(found[names[0]]) > 3:
        assert torch.equal(*found[names[0]].chunk(2))


def test_pixart_is_trained_with_the_resolution_of_the_original():
    found = pixart.ARCHITECTURE.of_sizes(SIZES)
    assert found["resolution"].tolist() == [[640, 480], [16, 24]]
    assert torch.equal(found["aspect_ratio"], torch.full((2, 1), 16 / 24))


def test_without_sizes_images_are_as_large_as_the_samples_and_a_file_decides_before_all(tmp_path):
    stock = sd.pipeline(ddim(**sd.SD), xl=True)
    teacher, rows, null = table(tmp_path, sd, stock, xl=True)
    plain = teacher.conditioning.collate(torch.arange(2))
    assert plain["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
    assert torch.equal(teacher.conditioning.null(plain)["time_ids"], plain["time_ids"])
    own = torch.arange(18.0).reshape(3, 6)
    path = write_conditions(
        tmp_path / "own.safetensors",
        rows | {"time_ids": own},
        {k: v[:1] for k, v in null.items()} | {"time_ids": -own[:1]},
    )
    given = load(tmp_path / "teacher", size=[16, 24], conditions=path).conditioning
    cond = given.collate(torch.tensor([2, 0]), SIZES)
    assert torch.equal(cond["time_ids"], own[[2, 0]])
    assert torch.equal(given.null(cond)["time_ids"], -own[:1].expand(2, 6))


def test_stable_diffusion_without_sizes_gets_none(tmp_path):
    teacher, *_ = table(tmp_path, sd, sd.pipeline(ddim(**sd.SD)), xl=False)
    assert teacher.conditioning.collate(torch.arange(2), SIZES).keys() == {"encoder_hidden_states"}


# --- batches ---


def pictures(folder, *sizes: tuple[int, int]):
    for i, size in enumerate(sizes):
        (folder / str(i)).mkdir(parents=True)
        Image.new("RGB", size, (i, 0, 0)).save(folder / str(i) / "a.png")
    return load_data(ImagesData(kind="images", path=str(folder), size=(16, 24)), 0)


STAGE = TrainStage(
    kind="train", recipe="pretrain/flow_matching", images=8, batch_size=4, optimizer={"lr": 1e-3}, network=None
)


def test_batches_have_the_sizes_of_their_images_only_for_networks_that_take_them(tmp_path):
    images = pictures(tmp_path / "images", (24, 16), (100, 32), (30, 64))
    stock = sd.pipeline(ddim(**sd.SD), xl=True)
    teacher, rows, _ = table(tmp_path, sd, stock, xl=True)

    def conditions(conditioning):
        source, _ = batches.of_stage(
            RunPaths(tmp_path), STAGE, seed=0, data=images, conditioning=conditioning, teacher_digest=None
        )
        found = [source.batch(step, Rows(0, 4, 4)) for step in range(3)]
        return [{name: torch.cat([each.cond[name] for each in found]) for name in found[0].cond}, found]

    cond, found = conditions(teacher.conditioning)
    labels = torch.cat([((each.data[:, 0, 0, 0] + 1) * 127.5).round().long() for each in found])
    expected = {0: [16, 24, 0, 0, 16, 24], 1: [32, 100, 0, 13, 16, 24], 2: [64, 30, 17, 0, 16, 24]}
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert cond["time_ids"].tolist() == [expected[label] for label in labels.tolist()]
    assert torch.equal(cond["text_embeds"], rows["text_embeds"][labels])
    assert conditions(ClassLabels(3, 3))[0].keys() == {"class_labels"}
    assert conditions(Unconditional())[0] == {}


# --- dropped conditions ---

LENGTHS = {"states": torch.float32, "mask": torch.int64}


class Recorder(nn.Module):
    """A student that records the conditions with which it is called. Implements `protocols.VelocityField`."""

    interpolant, t_range = linear(), (0.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x_t, t, cond):
        self.seen.append(cond)
        return self.scale * x_t


@dataclass(frozen=True)
class OfTable(exact.Given):
    """Networks that take the conditions of a table."""

    table: ConditionTable | None = None

    @property
    def conditioning(self):
        return self.table

    def null(self, cond):
        return self.table.null(cond)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("pretrain/flow_matching", {"label_dropout": 0.5}),
        ("reflow/perflow", {"label_dropout": 0.5, "windows": 2}),
        ("reflow/perflow", {"label_dropout": 0.5, "windows": 2, "guidance_sync": True}),
    ],
)
def test_dropped_rows_get_the_null_row_of_every_field_and_keep_their_sizes(recipe, options):
    rows = {"states": normal(5, 3, 2), "mask": torch.arange(15).reshape(5, 3)}
    null = {"states": torch.full((1, 3, 2), 7.0), "mask": torch.full((1, 3), -1)}
    given = ConditionTable(
        HeldRows(rows), null, {"sizes": torch.zeros(6)}, of_sizes=lambda sizes: {"sizes": sizes.float()}
    )
    student, teacher = Recorder(), Recorder()
    module = registry.load(recipe, Path("x"))
    config = registry.configure(recipe, module, options, "options")
    made = module.Recipe(config, replace(exact.teacher(teacher, (1, 2, 2)), given=given))
    made.networks(OfTable(student, num_classes=5, table=given))
    sizes, indices = torch.arange(48).reshape(8, 6), torch.arange(8) % 5
    cond = given.collate(indices, sizes)
    draw = StepDraw(0, 3, 0, Rows(0, 8, 8))
    (turn,) = made.turns(3, 0)
    batch = Batch(normal(8, 1, 2, 2), None, cond)
    turn.loss({"student": student}, batch, StepContext(3, 0, draw, {}))
    dropped = draw.uniform("dropped", batch.data) < 0.5
    assert 0 < dropped.sum() < 8
    (seen,) = student.seen
    for name in rows:
        expected = torch.where(dropped.reshape(-1, *[1] * (rows[name].ndim - 1)), null[name], rows[name][indices])
        assert torch.equal(seen[name], expected) and seen[name].dtype == LENGTHS[name]
    assert torch.equal(seen["sizes"], sizes.float())
    for other in teacher.seen:
        assert all(torch.equal(other[name], (seen if options.get("guidance_sync") else cond)[name]) for name in other)
