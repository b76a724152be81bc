"""Buckets of images: their sizes, which image belongs to which, and what their samples are."""

import functools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import test_teacher_dit as dit
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from latent import ddim, write, write_conditions
from latent_runs import RECIPES, content, run
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from distill import data
from distill.cli import arguments
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSource, indexed
from distill.data.aspects import nearest
from distill.execution import preflight, sources, stages
from distill.flow.draws import Rows
from distill.networks.edm_unet import DhariwalUNet2DModel
from distill.networks.second_time import SecondTime
from distill.networks.two_times import TwoTimes
from distill.networks.velocity_mlp import VelocityMLP
from distill.runs.run_store import RunPaths
from distill.spec import bucketing, checks, specfile
from distill.spec.model import ImagesData
from distill.teachers.sample_sizes import obstacle
from distill.training import micro_batch

# The sizes of SDXL (Podell et al. 2023, appendix I), from the widest to the square, as height and width.
SDXL = [
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664)),
    *((640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280)),
    *((832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.setattr(indexed, "_LOADED", {})


def images(path: Path, **fields) -> ImagesData:
    buckets = {"step": 8, "max_aspect": 4.0}
    return ImagesData(kind="images", path=str(path), **{"size": 32, "buckets": buckets, "channels": 1, **fields})


def folder(root: Path, *sizes: tuple[int, int]) -> Path:
    """Grey pictures of these sizes (width, height), each with its row times 10 in all pixels."""
    root.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        Image.new("L", size, 10 * i).save(root / f"{i:02}.png")
    return root


def test_the_sizes_of_sdxl_and_their_transposes():
    assert bucketing.sizes((1024, 1024), 64, 4.0) == SDXL + [(width, height) for height, width in SDXL[-2::-1]]


@pytest.mark.parametrize(
    ("size", "step", "most", "expected"),
    [
        ((256, 256), 64, 2.0, [(192, 320), (256, 256), (320, 192)]),
        ((8, 8), 2, 2.0, [(6, 10), (8, 8), (10, 6)]),
        ((512, 768), 128, 1.5, [(512, 768), (768, 512)]),
        ((60, 60), 20, 3.0, [(60, 60)]),
        (
            (30, 30),
            1,
            1.04,
            [(28, 29), (29, 30), (30, 30), (30, 29), (29, 28)],
        ),  # not 29x29: its aspect ratio is that of 30x30
    ],
)
def test_sizes_have_nearly_the_area_of_the_data_and_the_sides_and_aspects_that_are_allowed(size, step, most, expected):
    assert bucketing.sizes(size, step, most) == expected


def test_an_image_belongs_to_the_nearest_aspect_ratio_and_of_two_to_the_squarer():
    sizes = [(8, 32), (16, 16), (32, 8)]  # aspect ratios 1/4, 1, 4
    sides = [(1, 9), (100, 201), (100, 200), (50, 100), (100, 199), (7, 7), (200, 100), (2001, 1000), (1, 1000), (0, 0)]
    assert nearest(np.array(sides, np.int32), sizes).tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 0, 0]
    assert nearest(np.array([(5, 5), (4, 5), (5, 4)], np.int32), [(4, 9), (9, 4)]).tolist() == [0, 0, 1]
    draws = np.random.default_rng(0).integers(1, 5000, (500, 2), dtype=np.int32)
    sizes = bucketing.sizes((1024, 1024), 64, 4.0)
    for (height, width), found in zip(draws.tolist(), nearest(draws, sizes).tolist(), strict=True):
        distances = [abs(math.log(height / width) - math.log(h / w)) for h, w in sizes]
        assert distances[found] == pytest.approx(min(distances), abs=1e-8)


def test_every_image_is_in_the_bucket_of_its_aspect_ratio(tmp_path):
    spec = images(folder(tmp_path, (32, 32), (100, 50), (9, 40), (400, 200), (31, 30), (10, 40)))
    loaded = data.load_data(spec, 0)
    assert loaded.shape == (1, 32, 32) and len(loaded) == 6
    found = {each.shape: each.items.tolist() for each in loaded.buckets if len(each.items)}
    assert found == {(1, 24, 40): [1, 3], (1, 32, 32): [0, 4], (1, 64, 16): [2, 5]}
    assert (
        [each.shape[1:] for each in loaded.buckets] == spec.sizes == [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)]
    )
    for shape, items in found.items():
        samples = loaded.items(0, items).samples
        assert samples.shape == (len(items), *shape)
        assert ((samples + 1) * 127.5).flatten(1).round().unique(dim=1).flatten().tolist() == [10 * i for i in items]
    with pytest.raises(ValueError, match=r"images of several buckets were asked for: \[\(1, 24, 40\), \(1, 32, 32\)\]"):
        loaded.items(0, [0, 1])


def test_batches_of_a_source_are_of_one_bucket(tmp_path):
    loaded = data.load_data(images(folder(tmp_path, (32, 32), (100, 50), (9, 40), (400, 200), (31, 30), (10, 40))), 0)
    source, shapes = DataSource(loaded, 4, 0), []
    for step in range(6):
        batch = source.batch(step, Rows(0, 4, 4))
        values = ((batch.data + 1) * 127.5).flatten(1).round()
        assert values[:, 0].unique().numel() == 2  # both images of the bucket, twice each
        shapes.append(tuple(batch.data.shape[1:]))
    assert sorted(shapes) == [(1, 24, 40)] * 2 + [(1, 32, 32)] * 2 + [(1, 64, 16)] * 2  # after four epochs


def test_a_damaged_image_is_replaced_by_one_of_its_bucket(tmp_path):
    folder(tmp_path, (32, 32), (100, 50), (40, 40), (400, 200), (33, 33), (200, 100))
    noise = np.random.default_rng(0).integers(0, 256, (50, 100), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "03.png")
    content = bytearray((tmp_path / "03.png").read_bytes())
    content[2000:2100] = bytes(100)  # in the middle: the header and the end are fine
    (tmp_path / "03.png").write_bytes(content)
    loaded = data.load_data(images(tmp_path, max_unreadable=1), 0)
    samples = loaded.items(0, [1, 3, 5]).samples
    assert ((samples[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [10, 50, 50]


def test_the_digest_is_that_of_the_sizes(tmp_path):
    folder(tmp_path, (32, 32), (100, 50))
    digests = [
        data.load_data(images(tmp_path, buckets=buckets), 0).digest
        for buckets in (
            None,
            {"step": 8, "max_aspect": 4.0},
            {"step": 8, "max_aspect": 3.9},
            {"step": 8},
            {"step": 16, "max_aspect": 4.0},
        )
    ]
    assert len(set(digests)) == 4 and digests[2] != digests[1]  # with 3.9 and 4, there are 3 and 5 sizes


def test_sizes_of_samples_are_those_before_and_after_resizing_and_cropping(tmp_path):
    ramp = np.tile(np.arange(100, dtype=np.uint8), (50, 1))  # columns of one value
    Image.fromarray(ramp).save(tmp_path / "a.png")
    whole = data.load_data(images(tmp_path), 0).items(0, [0])
    assert whole.sizes.tolist() == [[50, 100, 0, 4, 24, 40]]  # 24x48 in the middle
    assert whole.sizes.dtype == torch.int64
    flipped = data.load_data(images(tmp_path, flip=True), 0)
    assert all(torch.equal(flipped.items(epoch, [0]).sizes, whole.sizes) for epoch in range(4))  # as a cache keeps them
    loaded = data.load_data(images(tmp_path, crop="random", flip=True), 0)
    values = (loaded.items(0, [0]).samples + 1) * 127.5
    seen = set()
    for epoch in range(40):
        sample, _, sizes = loaded.items(epoch, [0])
        values = ((sample[0, 0, 0] + 1) * 127.5).tolist()
        flipped = values[0] > values[-1]
        left = sizes[0, 3].item()
        # Column c of the resized image, 48 wide, has about the value 100 (c + 1/2) / 48 - 1/2; flipped, that of 47 - c.
        column = 47 - left if flipped else left
        assert values[0] == pytest.approx(100 * (column + 0.5) / 48 - 0.5, abs=1.1)
        assert sizes.tolist() == [[50, 100, 0, left, 24, 40]]
        seen.add((flipped, left))
    assert len(seen) > 10


# --- networks, stages and memory ---

TRAIN = {"kind": "train", "recipe": "pretrain/flow_matching", "images": 60, "batch_size": 4, "optimizer": {"lr": 1e-3}}
UNET = {"kind": "unet", "channels": [8, 8], "layers_per_block": 1, "norm_groups": 4, "attention": False}


def spec(path: Path, stages: dict[str, object], **fields: object) -> dict[str, object]:
    given = {"kind": "images", "path": str(path), "size": 8, "channels": 1, "buckets": {"step": 2}}
    return {"name": "run", "data": {**given, **fields.pop("data", {})}, "stages": stages, **fields}


def test_networks_take_the_sizes_that_they_can_halve_or_that_their_pipeline_allows():
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(4, 4, 4), norm_num_groups=2, add_attention=False, **blocks)
    assert obstacle(unet, (1, 8, 12)) is None
    with torch.no_grad():
        assert unet(torch.zeros(1, 1, 8, 12), 0.5).sample.shape == (1, 1, 8, 12)
    wrong = "its network (UNet2DModel) takes sides that are multiples of 4, and 8x10 are not"
    assert obstacle(unet, (1, 8, 10)) == wrong
    edm = DhariwalUNet2DModel(sample_size=8, base_channels=4, channel_multipliers=[1, 2], layers_per_block=1)
    assert obstacle(edm, (3, 6, 10)) is None
    with torch.no_grad():
        assert edm(torch.zeros(1, 3, 6, 10), torch.tensor([0.5])).sample.shape == (1, 3, 6, 10)
    assert obstacle(edm, (3, 6, 9)).endswith("takes sides that are multiples of 2, and 6x9 are not")
    assert obstacle(VelocityMLP(dim=64), (1, 8, 8)) == "its network (VelocityMLP) takes samples of one size"
    square = "height and width give latents of 6x10, but the network (config.json) makes squares only"
    assert obstacle(dit.pipeline().transformer, (4, 6, 10)) == square
    network = sd3.pipeline().transformer
    for wrapped in (TwoTimes(network, ["time_text_embed"], SecondTime(8, [])), network):
        assert obstacle(wrapped, (4, 10, 6)) is None
        assert "has positions for" in obstacle(wrapped, (4, 200, 6))
        assert "works on patches of 2x2" in obstacle(wrapped, (4, 9, 6))


def test_training_on_buckets_and_an_evaluation_in_one_size(tmp_path):
    """Every batch has one size; an evaluation compares with images of data.size, as without buckets."""
    place = folder(tmp_path / "images", *[(8, 8), (20, 12), (6, 10), (16, 16), (40, 23)] * 3)
    evaluation = {"kind": "evaluate", "teacher": "train", "students": {}, "teacher_steps": [], "samples": 16,
                  "block": 8, "fine_steps": 1}  # fmt: skip
    stages_of = {"train": {**TRAIN, "network": UNET}, "eval": evaluation}
    resolved = checks.check(specfile.validate(spec(place, stages_of), "spec"), tmp_path)
    preflight.check(resolved)
    paths, shapes = RunPaths(tmp_path / "run"), []
    paths.root.mkdir()

    def seen(module, inputs):
        if isinstance(module, UNet2DModel):
            shapes.append(tuple(inputs[0].shape))

    hook = register_module_forward_pre_hook(seen)
    try:
        stages.run(paths, resolved.spec, ["train"], StopRequest())
    finally:
        hook.remove()
    trained = [shape for shape in shapes if shape[0] == 4]
    assert Counter(trained) == {(4, 1, 6, 10): 6, (4, 1, 8, 8): 6, (4, 1, 10, 6): 3}  # four epochs
    loaded = sources.load(paths, resolved, "eval", torch.device("cpu"), indexed=False).data
    assert loaded.buckets is None
    assert loaded.digest == data.load_data(spec_of(place, None), 0).digest


def spec_of(path: Path, buckets: object) -> ImagesData:
    return ImagesData(kind="images", path=str(path), size=8, channels=1, buckets=buckets)


def test_a_micro_batch_is_tried_with_the_largest_samples(tmp_path):
    folder(tmp_path, *[(20, 12)] * 30, (8, 8))
    source = DataSource(data.load_data(spec_of(tmp_path, {"step": 2}), 0), 4, 0)
    assert source.largest_step > 0
    tried = micro_batch.OneBatch(source, source.largest_step)
    for step in (0, 1, 7):
        assert tried.batch(step, Rows(1, 3, 4)).data.shape == (2, 1, 8, 8)
    assert source.batch(0, Rows(0, 4, 4)).data.shape == (4, 1, 6, 10)


PAIRS = {"kind": "pairs", "count": 8, "paths": "segments", "times": [1, 0.5, 0], "teacher": "train"}
ON_BOTH = {**TRAIN, "recipe": "reflow/reflow", "options": {"data_weight": 0.5}, "pairs": "pairs", "teacher": "train"}
BACKWARD = {"kind": "pairs", "count": 8, "teacher": "train"}
TRAINED = {**TRAIN, "network": UNET}
DEEP = {**UNET, "channels": [8] * 4}


@pytest.mark.parametrize(
    ("stages_of", "fields", "said"),
    [
        (
            {"train": TRAINED, "pairs": PAIRS},
            {},
            "data.buckets: the pairs of stages.pairs start from the data, and pairs have one size; remove buckets",
        ),
        (
            {"train": TRAINED, "pairs": BACKWARD, "both": ON_BOTH},
            {},
            "data.buckets: stages.both trains on data and pairs, and pairs have one size; remove buckets",
        ),
        (
            {"eval": {"kind": "evaluate", "students": {}, "teacher_steps": []}},
            {"teacher": {"kind": "gaussian", "mean": [0.0], "std": [1.0]}},
            "data.buckets: no stage trains on the data, so they have no effect; remove them",
        ),
        (
            {"train": {**TRAIN, "network": DEEP}},
            {},
            "stages.train.network.channels: 4 resolutions halve the images 3 times, but their side of 6 is not "
            "divisible by 8; give fewer resolutions\n  stages.train.network.channels: 4 resolutions halve the images 3 "
            "times, but their side of 10 is not divisible by 8; give fewer resolutions",
        ),
    ],
)
def test_stages_that_need_one_size_refuse_buckets(tmp_path, stages_of, fields, said):
    with pytest.raises(InputError) as caught:
        checks.check(specfile.validate(spec(tmp_path, stages_of, **fields), "spec"), tmp_path)
    assert str(caught.value).endswith(said), str(caught.value)


def test_commands_for_one_size_refuse_buckets():
    with pytest.raises(InputError) as caught:
        arguments.data("{kind: images, path: x, size: 8, buckets: {step: 2}}")
    said = "--data: buckets have no effect here, because only training uses them; remove them"
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (
            4,
            "stages.train: data.buckets: DiTTransformer2DModel from dit takes no images of 12x20 (height x width): "
            "height and width give latents of 6x10, but the network (config.json) makes squares only; change "
            "data.buckets.step or data.buckets.max_aspect",
        ),
        (
            1,
            "stages.train: data.buckets: images of 15x17 (height x width) cannot be encoded: {root}/dit/vae: height "
            "and width must be multiples of 2, and 15x17 are not; give other sides",
        ),
    ],
)
def test_a_teacher_that_cannot_take_a_bucket_is_named_with_it(tmp_path, step, said):
    teacher = write(tmp_path / "dit", dit.pipeline(num_embeds_ada_norm=1))
    folder(tmp_path / "images" / "0", (16, 16), (40, 24) if step == 4 else (17, 15))
    train = {**TRAIN, "recipe": "score/dmd2"}
    given = {"size": 16, "channels": 3, "buckets": {"step": step}}
    given = spec(tmp_path / "images", {"train": train}, data=given, teacher={"path": str(teacher)})
    with pytest.raises(InputError) as caught:
        preflight.check(checks.check(specfile.validate(given, "spec"), tmp_path))
    assert str(caught.value) == said.replace("{root}", str(tmp_path))


def test_a_bucket_of_which_no_image_can_be_decoded_is_an_error(tmp_path):
    folder(tmp_path, (32, 32), (40, 40))
    noise = np.random.default_rng(0).integers(0, 256, (50, 100), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "03.png")
    content = bytearray((tmp_path / "03.png").read_bytes())
    content[2000:2100] = bytes(100)
    (tmp_path / "03.png").write_bytes(content)
    loaded = data.load_data(images(tmp_path, max_unreadable=1), 0)
    with pytest.raises(InputError) as caught:
        loaded.items(0, [2])
    said = "none of the 1 images of the bucket 24x40 (height x width) can be decoded; repair or remove them"
    assert str(caught.value) == f"{tmp_path.name}: {said}"


OF_DATA = [name for name in RECIPES if name.partition("/")[0] in ("consistency", "shortcut", "score", "pretrain")]
OF_DATA += ["reflow/perflow", "reflow/proreflow", "reflow/consistency_fm"]


@pytest.mark.long
def test_every_recipe_that_trains_on_data_trains_on_buckets_with_the_sizes_of_the_images(tmp_path, monkeypatch):
    """An SDXL whose images belong to three buckets; also evaluated."""
    rows, null = sd.embeddings(2, xl=True), sd.embeddings(5, xl=True)
    conditions = write_conditions(tmp_path / "c.safetensors", rows, {name: each[:1] for name, each in null.items()})
    place = write(tmp_path / "sdxl", sd.pipeline(ddim(**sd.SD), xl=True))
    teacher = {"path": str(place), "size": [16, 16], "conditions": conditions}
    for label in range(3):
        folder(tmp_path / "images" / str(label), (20, 12), (16, 16), (12, 20), (24, 24), (30, 50))
    given = {"kind": "images", "path": str(tmp_path / "images"), "size": 16, "buckets": {"step": 4}}
    evaluation = {"kind": "evaluate", "students": {"flow_matching": [1]}, "teacher_steps": [], "samples": 16,
                  "block": 8, "fine_steps": 1}  # fmt: skip
    made = content(teacher, given, OF_DATA, {"eval": evaluation})
    for stage in made["stages"].values():
        if stage["kind"] == "train":
            stage["images"] = 24
    shapes, forward = set(), UNet2DConditionModel.forward

    @functools.wraps(forward)
    def seen(self, sample, *args, **kwargs):
        sizes = kwargs["added_cond_kwargs"]["time_ids"]
        assert (sizes[:, 4:] == torch.tensor(sample.shape[2:]) * 2).all()
        shapes.add((tuple(sample.shape[2:]), sizes[:, :2].eq(16).all().item()))
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", seen)
    run(tmp_path, made)
    assert {shape for shape, _ in shapes} == {(6, 10), (8, 8), (10, 6)}
    assert len(shapes) > 3, "some images were larger than their samples"
