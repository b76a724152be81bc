"""Data of kind videos: folders of frames."""

import json
import os
import shutil

import numpy as np
import pytest
import test_teacher_ltx as ltx
import test_teacher_wan as wan
import torch
from diffusers import AutoencoderKLWan
from latent import load, seeded, write, write_conditions
from latent_runs import BATCH, TRAIN, run
from PIL import Image

from distill import caches, data
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data import DataSource, index, indexed, overview, videos
from distill.data.source import Skipping
from distill.flow.codecs import PIXELS
from distill.flow.draws import Rows, uniforms
from distill.runs.progress import Progress
from distill.spec import checks, specfile
from distill.spec.model import CacheStage, VideosData

HEIGHT, WIDTH = 6, 10


def frame(video: int, number: int) -> np.ndarray:
    """[6, 10, 3]: the value of a pixel tells video, frame, row and column."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0] = 40 * video + number
    pixels[..., 1] = np.arange(HEIGHT)[:, None]
    pixels[..., 2] = np.arange(WIDTH)
    return pixels


def save(path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make(root, counts, name="{}/{}.png"):
    """Videos with these numbers of frames, in folders 0, 1, ..."""
    for video, count in enumerate(counts):
        for number in range(count):
            save(root / name.format(video, number), frame(video, number))
    return root


def spec(root, **fields) -> VideosData:
    return VideosData(**{"kind": "videos", "path": str(root), "size": (3, HEIGHT, WIDTH), **fields})


def loaded(root, **fields):
    return data.load_data(spec(root, **fields), 5)


def read(samples) -> torch.Tensor:
    """The value that each pixel tells, [n, 3, F, H, W] of uint8."""
    return ((samples + 1) * 127.5).round().to(torch.int64)


def test_frames_are_taken_from_the_middle_in_the_order_of_their_numbers(tmp_path):
    found = loaded(make(tmp_path / "set", [12, 3, 5]))
    assert isinstance(found, data.DataSet) and isinstance(found, Skipping)
    assert (found.name, len(found), found.shape, found.num_classes) == ("set", 3, (3, 3, HEIGHT, WIDTH), None)
    got = read(found.items(0, [2, 0, 1]).samples)
    assert got[:, 0, :, 0, 0].tolist() == [[81, 82, 83], [4, 5, 6], [40, 41, 42]], "not 0, 1, 10, 11, 2 ..."
    assert torch.equal(got[:, 1, :, :, 0], torch.arange(HEIGHT).expand(3, 3, -1))
    assert torch.equal(got[:, 2, :, 0], torch.arange(WIDTH).expand(3, 3, -1))
    assert found.items(0, [0]).labels is None and found.items(0, [0]).sizes is None
    every_third = loaded(tmp_path / "set", stride=3, max_unreadable=2)
    assert read(every_third.items(0, [0]).samples)[0, 0, :, 0, 0].tolist() == [2, 5, 8]


def test_the_same_random_crop_and_flip_for_all_frames(tmp_path):
    found = loaded(make(tmp_path, [9, 4]), size=(3, 4, 5), crop="random", flip=True)
    firsts, lefts, flips = set(), set(), set()
    for epoch in range(40):
        for video, count in ((0, 9), (1, 4)):
            got, u = read(found.items(epoch, [video]).samples)[0], uniforms(3, 5, epoch, video)
            number = int(uniforms(1, "first frame", 5, epoch, video)[0] * (count - 2))
            assert got[0, :, 0, 0].tolist() == [40 * video + number + k for k in range(3)]
            # 6 x 10 just covers 4 x 5 as 4 x 7; columns are told apart by their order
            is_flipped = bool(got[2, 0, 0, 0] > got[2, 0, 0, -1])
            assert is_flipped == (u[2] < 0.5) and (got[1:] == got[1:, :1]).all()
            whole = read(loaded(tmp_path, size=(3, 4, 7)).items(0, [video]).samples)[0]
            left = int(u[1] * 3)
            expected = whole[1:, 0, :, left : left + 5]
            assert torch.equal(got[1:, 0], expected.flip(2) if is_flipped else expected)
            firsts.add((video, number))
            lefts.add(left)
            flips.add(is_flipped)
    assert (len(firsts), lefts, flips) == (7 + 2, {0, 1, 2}, {False, True})


def test_captions_lie_beside_the_folders(tmp_path):
    make(tmp_path, [4, 3, 4, 5], name="some/{}/{}.png")
    for name, text in (("0", "a dog"), ("1", " a cat \n"), ("3", "a dog")):
        (tmp_path / "some" / f"{name}.txt").write_text(text)
    (tmp_path / "some" / "notes.txt").write_text("no caption")
    found = loaded(tmp_path, captions=True, max_unreadable=1)
    assert list(found.prompts) == ["a dog", "a cat"] and found.num_classes == 2 and len(found) == 3
    assert found.items(0, [2, 1, 0]).labels.tolist() == [0, 1, 0]
    digest = found.digest
    (tmp_path / "some" / "1.txt").write_text("a bird")
    assert loaded(tmp_path, captions=True, max_unreadable=1).digest != digest


def test_a_caption_of_a_video_that_is_too_long_is_named_as_such(tmp_path):
    make(tmp_path, [3, 3])
    (tmp_path / "0.txt").write_text("x" * 300_000)
    (tmp_path / "1.txt").write_text("a cat")
    found = loaded(tmp_path, captions=True, max_unreadable=1)
    assert found.unusable(9) == (1, ["0: a caption of more than 65,536 characters"])


def test_videos_that_cannot_be_used_are_skipped(tmp_path, capfd):
    make(tmp_path, [3, 2, 4, 3, 3, 3], name="{}\x1b/{}.png")
    save(tmp_path / "2\x1b" / "3.png", frame(0, 0)[:5])
    (tmp_path / "3\x1b" / "1.png").write_bytes(b"no image")
    save(tmp_path / "4\x1b" / "2.png", np.full((HEIGHT, WIDTH, 4), 255, np.uint8))  # all pixels are opaque
    told = (
        f"{tmp_path.name}: 4 of 6 videos cannot be used: 1\ufffd: 2 frames, 3 are needed, 2\ufffd: its frames have "
        "different sizes, 3\ufffd: frame 1.png cannot be decoded, 4\ufffd: frame 2.png has an alpha channel (set "
        "data.background)"
    )
    with pytest.raises(InputError) as error:
        loaded(tmp_path, max_unreadable=3)
    assert str(error.value) == f"{told}; repair or remove them, or increase data.max_unreadable (now 3)"
    found = loaded(tmp_path, max_unreadable=4)
    assert capfd.readouterr().err == (
        told.replace("cannot be used:", "cannot be used and are skipped:").join(["warning: ", "\n"])
    )
    assert read(found.items(0, [0, 1]).samples)[:, 0, 0, 0, 0].tolist() == [0, 200]
    assert len(loaded(tmp_path, max_unreadable=4, background="white")) == 3
    assert overview.of(spec(tmp_path), found, None).lines() == [
        "data: 2 videos of [3, 3, 6, 10]",
        "  skipped 4: " + told.partition("cannot be used: ")[2],
    ]


def test_a_frame_that_is_found_damaged_later_costs_its_video(tmp_path):
    make(tmp_path, [3, 3, 3])
    path = tmp_path / "1" / "1.png"
    content = bytearray(path.read_bytes())
    content[50] ^= 0xFF  # in the middle: the header and the end are fine
    path.write_bytes(content)
    found = loaded(tmp_path, max_unreadable=1)
    assert len(found) == 3 and found.skipped == []
    assert read(found.items(0, [1, 0]).samples)[:, 0, 0, 0, 0].tolist() == [80, 0]
    assert found.skipped == [1]
    other = loaded(tmp_path, max_unreadable=0)
    with pytest.raises(InputError) as error:
        other.skip([1])
    assert str(error.value) == (
        f"{tmp_path.name}: 1 of 3 videos cannot be used: 1: a frame cannot be decoded; repair or remove them, or "
        "increase data.max_unreadable (now 0)"
    )


def test_a_truncated_frame_is_found_when_its_video_is_used(tmp_path, capfd):
    make(tmp_path, [3, 3, 3])
    for video in ("0", "2"):
        path = tmp_path / video / "1.png"
        path.write_bytes(path.read_bytes()[:60])
    for order in ([2, 0, 1], [1, 0, 2]):  # in whichever order processes come upon them
        found = loaded(tmp_path, max_unreadable=2)
        assert len(found) == 3 and found.unusable(9) == (0, [])
        assert read(found.items(0, order).samples)[:, 0, 0, 0, 0].tolist() == [40] * 3
        told = [f"{video}: a frame cannot be decoded" for video in order if video != 1]
        assert found.unusable(9) == (len(told), told)
    capfd.readouterr()


def test_a_frame_with_values_out_of_range_is_named_when_its_video_is_used(tmp_path):
    for number in range(3):
        (tmp_path / "0").mkdir(exist_ok=True)
        Image.fromarray(np.full((HEIGHT, WIDTH), number - 1, np.float32)).save(tmp_path / "0" / f"{number}.tiff")
    with pytest.raises(InputError) as error:
        loaded(tmp_path).items(0, [0])
    assert str(error.value) == (
        f"{tmp_path}/0/0.tiff (row 0) has values from -1 to -1; floating-point images must be finite and within 0 to 1"
    )


def test_headers_are_read_once_per_run(tmp_path, monkeypatch):
    root = make(tmp_path / "set", [4, 3])
    given = spec(root)
    for path in root.rglob("*.png"):
        os.utime(path, ns=(0, 10**18))
    data.update_index(given, tmp_path / "store", tmp_path / "run")
    digest = data.load_data(given, 0).digest
    indexed._INDEXES.clear()
    monkeypatch.setattr(index, "read_all", lambda rows, wanted: pytest.fail("read") if len(wanted) else ())
    found = data.load_data(given, 0, tmp_path / "run", indexed=True)
    assert found.digest == digest == data.load_data(given, 0, tmp_path / "store").digest
    shutil.copy(root / "0" / "0.png", root / "0" / "2.png")
    with pytest.raises(RunError) as error:
        found.items(0, [0])
    assert str(error.value) == (
        f"{root / '0' / '2.png'} (row 2) has changed since the data was indexed; restore the old file, then resume"
    )


def test_the_digest_belongs_to_frames_order_and_options(tmp_path):
    digests = [loaded(make(tmp_path / "a", [4, 4]), **fields).digest for fields in (
        {}, {"stride": 1}, {"size": (2, HEIGHT, WIDTH)}, {"size": (2, HEIGHT, WIDTH), "stride": 2}, {"flip": True},
        {"crop": "random"}, {"channels": 1},
    )]  # fmt: skip
    assert digests[0] == digests[1] and len(set(digests)) == 6
    assert loaded(shutil.copytree(tmp_path / "a", tmp_path / "b")).digest == digests[0]
    (tmp_path / "b" / "0" / "3.png").rename(tmp_path / "b" / "1" / "9.png")
    assert loaded(tmp_path / "b").digest != digests[0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_the_first_frame_of_each_video_is_found_in_the_names(monkeypatch, chunk):
    monkeypatch.setattr(videos, "CHUNK", chunk)
    names = [b"a/1", b"a/2", b"b/1", b"b/c/1", b"b/c/2", b"b/d/1", b"bb/1", b"x", b"y"]
    row, content = np.zeros((len(names), 3), np.uint8), np.frombuffer(b"".join(names), np.uint8)
    head = index._Head(num_classes=None, stamp="", written=0)
    ends = np.cumsum([len(name) for name in names])
    made = index.ImageIndex(
        head, row[:, 0], row[:, :2].astype(np.int32), row[:, 0], row.astype(np.int64), row, np.empty(0, np.int64),
        content, ends,
    )  # fmt: skip
    assert videos._first_rows(made).tolist() == [0, 2, 3, 5, 6, 7]


def teacher(made, folder, size):
    """The folder of a tiny pipeline with its autoencoder, and the spec of the teacher."""
    if made is wan:
        vae = seeded(lambda: AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], attn_scales=[],
            latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0],
        ))  # fmt: skip
    else:
        vae = ltx.autoencoder()
    rows = {name: each[:2] for name, each in ltx.ROWS.items()} if made is ltx else {"encoder_hidden_states": wan.ROWS}
    path = write_conditions(folder / "conditions.safetensors", rows)
    return {"path": str(write(folder / "teacher", made.pipeline(vae=vae))), "size": size, "conditions": path}


@pytest.mark.parametrize(("made", "size"), [(wan, [5, 16, 16]), (ltx, [3, 16, 16])], ids=["Wan", "LTX"])
def test_video_teachers_are_trained_on_what_their_autoencoder_makes_of_the_videos(tmp_path, made, size):
    make(tmp_path / "set", [6, 5, 7])
    for video, text in enumerate(["a dog", "a cat", "a dog"]):
        (tmp_path / "set" / f"{video}.txt").write_text(text)
    section = {"kind": "videos", "path": str(tmp_path / "set"), "size": size, "captions": True}
    given = teacher(made, tmp_path, size)
    found = load(given["path"], size=size, conditions=given["conditions"])
    real = data.load_data(spec(tmp_path / "set", size=tuple(size), captions=True), 0)
    assert found.codec.shape(real.shape) == found.shape
    if made is wan:
        stages = {"shortcut": {**TRAIN, "images": BATCH, "recipe": "shortcut/shortcut"}}
        done = run(tmp_path, {"name": "run", "teacher": given, "data": section, "stages": stages})
        states = [json.loads(path.read_text()) for path in done.stage("shortcut").root.rglob("*.json")]
        inputs = next(each["settings"] for each in states if "settings" in each)["inputs"]
        assert inputs["data"] == real.digest and inputs["autoencoder"] == found.codec.digest
    batch = DataSource(real, 3, 0).batch(0, Rows(0, 3, 3))
    latents = found.codec.encode(batch.data)
    assert latents.shape == (3, *found.shape) and latents.isfinite().all() and latents.std() > 0
    assert sorted(batch.cond["class_labels"].tolist()) == [0, 0, 1]


def test_a_cache_has_the_same_mirrored_videos(tmp_path):
    make(tmp_path / "set", [4, 3, 5])
    plain, flipped = (loaded(tmp_path / "set", flip=flip) for flip in (False, True))
    stage = CacheStage(kind="cache", latents="pixels", block=2, shard=2)
    with Progress("cache", 3, "images", None) as progress:
        caches.latents.generate(
            plain, PIXELS, stage, tmp_path / "cache", seed=5, device=torch.device("cpu"), progress=progress,
            stop=StopRequest(), mirrored=True,
        )  # fmt: skip
    cached = caches.open_latents(tmp_path / "cache", 5)
    assert cached.shape == plain.shape and not cached.encoded
    for epoch in range(5):
        got, expected = (each.items(epoch, [2, 0, 1]).samples for each in (cached, flipped))
        assert torch.equal(read(got), read(expected))
    content = {
        "name": "x", "teacher": {"path": str(tmp_path)},
        "data": {"kind": "videos", "path": str(tmp_path / "set"), "size": [3, 8, 8], "crop": "random"},
        "stages": {"cache": {"kind": "cache"}, "shortcut": {**TRAIN, "recipe": "shortcut/shortcut"}},
    }  # fmt: skip
    with pytest.raises(InputError, match="stages.cache: data.crop=random does not work with a cache"):
        checks.check(specfile.validate(content, "spec"), tmp_path)


def test_a_new_network_has_no_videos(tmp_path):
    make(tmp_path / "set", [3])
    stage = {"kind": "train", "recipe": "pretrain/flow_matching", "images": 4, "batch_size": 4}
    network = {"kind": "unet", "channels": [8], "norm_groups": 4}
    content = {
        "name": "x", "data": {"kind": "videos", "path": str(tmp_path / "set"), "size": [3, 8, 8]},
        "stages": {"teach": {**stage, "network": network}},
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        checks.check(specfile.validate(content, "spec"), tmp_path)
    assert str(error.value) == (
        "spec 'x': stages.teach.network: a new network is for images or vectors, but the data has videos; start from a "
        "teacher"
    )
