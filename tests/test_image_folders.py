"""Folders of images: which have classes, which are refused, and the hints in the messages."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill import data
from distill.core.errors import InputError
from distill.spec import imagefolder, specfile
from distill.spec.model import HfData, ImagesData


def folder(root: Path, *names: str) -> Path:
    """A folder with these files, each a picture of its own if its name says so."""
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (8, 8), (i, 0, 0)).save(path)
        else:
            path.write_text("a cat")
    return root


def edm(root: Path, labels: object, *names: str) -> Path:
    """A folder as EDM's dataset_tool writes it."""
    folder(root, *(names or ("00000/img00000000.png", "00000/img00000001.png", "00001/img00001000.png")))
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


LABELS = [["00000/img00000000.png", 2], ["00000/img00000001.png", 0], ["00001/img00001000.png", 2]]


def read(path: Path) -> tuple[list[str], list[int] | None, int | None]:
    found = imagefolder.read(str(path))
    assert imagefolder.has_classes(path) == (found.labels is not None)
    return found.names, found.labels, found.num_classes


def refused(path: Path | str) -> str:
    with pytest.raises(InputError) as error:
        imagefolder.read(str(path))
    return str(error.value)


# --- classes ---


def test_dataset_json_gives_the_labels(tmp_path):
    names = [name for name, _ in LABELS]
    assert read(edm(tmp_path / "labelled", LABELS[::-1])) == (names, [2, 0, 2], 3)
    assert read(edm(tmp_path / "null", None)) == (names, None, None)
    loaded = data.load_data(ImagesData(kind="images", path=str(tmp_path / "labelled"), size=8), 0)
    images, labels, _ = loaded.items(0, [0, 1, 2])
    assert labels.tolist() == [2, 0, 2] and loaded.num_classes == 3
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (LABELS[:2], "the file does not list 1 images of the folder (00001/img00001000.png)"),
        (
            [*LABELS, ["x.png", 1]],
            "the folder does not contain 1 images that the file lists (x.png); copy the whole data set, or",
        ),
        ([*LABELS, ["00000/img00000000.png", 1]], "gives 00000/img00000000.png the classes 2 and 1; remove one"),
        ([["00000/img00000000.png", -1]], "labels[0][1]: Input should be greater than or equal to 0; valid: {"),
        ([["00000/img00000000.png", 10**12]], "labels[0][1]: Input should be less than 1000000; valid: {"),
        ([["00000/img00000000.png", "cat"]], "labels[0][1]: Input should be a valid integer; valid: {"),
        ([["00000/img00000000.png", [0.5, 1]]], "labels[0][1]: Input should be a valid integer; valid: {"),
        (
            [[*LABELS[0]], [*LABELS[1]], ["00001/img00001000.png", 5000]],
            "3 images have class ids from 0 to 5000; valid",
        ),
        ("cat", "labels: Input should be a valid array; valid: {"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, said):
    assert said in refused(edm(tmp_path, labels))


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 100_000])
def test_a_dataset_json_that_is_none(tmp_path, content):
    folder(tmp_path, "00000/1.png")
    (tmp_path / "dataset.json").write_text(content)
    assert f"{tmp_path / 'dataset.json'}" in refused(tmp_path)
    (tmp_path / "dataset.json").unlink()
    os.mkfifo(tmp_path / "dataset.json")
    assert "dataset.json is not a file" in refused(tmp_path)


def test_what_archives_and_systems_leave_behind_is_no_class(tmp_path):
    folder(tmp_path, "a/1.png", "b/1.png", "__MACOSX/a/._1.png", "__MACOSX/a/1.png", ".cache/1.png", "a/._1.png")
    assert read(tmp_path) == (["a/1.png", "b/1.png"], [0, 1], 2)


def test_files_come_in_the_order_of_their_names(tmp_path):
    folder(tmp_path, "b/1.png", "a/x/1.png", "a/x.png", "a/y.png", "a/x.a.png", "a b/1.png", "é/1.png", "B/1.png")
    expected = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))]
    names, labels, _ = read(tmp_path)
    assert names == expected
    assert labels == [0, 1, 1, 1, 1, 2, 3, 4]  # of B, a, a b, b, é


# --- folders that are no classes ---


@pytest.mark.parametrize(
    "names",
    [
        ["train", "val"],
        ["Train", "test"],
        ["train2017", "val2017", "extra"],
        ["train"],
        ["training_set", "test_set"],
        ["train_images", "val-images"],
    ],
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path, names):
    folder(tmp_path, *(f"{name}/{label}/1.png" for name in names for label in "ab"))
    said = refused(tmp_path)
    assert f"contains the splits of a data set ({', '.join(names[:2])}), which are not classes" in said
    assert f"choose one of them: data.path={tmp_path} with data.split={names[0]}" in said
    assert read(tmp_path / names[0])[1:] == ([0, 1], 2)
    chosen = imagefolder.read(str(tmp_path), split=names[0])
    assert (chosen.root, chosen.names, chosen.labels) == (tmp_path / names[0], ["a/1.png", "b/1.png"], [0, 1])


def test_the_parts_of_a_data_set_in_the_one_folder_it_was_unpacked_into_are_no_classes(tmp_path):
    folder(tmp_path, *(f"imagenet/{part}/{label}/1.png" for part in ("train", "val") for label in "ab"))
    said = refused(tmp_path)
    assert (
        f"data.path={tmp_path}/imagenet contains the splits of a data set (train, val), which are not classes" in said
    )
    assert f"choose one of them: data.path={tmp_path}/imagenet with data.split=train" in said


def test_classes_of_another_split_have_the_ids_of_train(tmp_path, capfd):
    folder(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/b/1.png", "val/c/1.png", "val/c/2.png")
    spec = ImagesData(kind="images", path=str(tmp_path), size=8, split="val")
    loaded = data.load_data(spec, 0)
    assert (loaded.name, len(loaded), loaded.num_classes) == (f"{tmp_path.name}-val", 3, 3)
    images, labels, _ = loaded.items(0, [0, 1, 2])
    assert labels.tolist() == [1, 2, 2]
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [3, 4, 5]
    assert capfd.readouterr().err == (
        "warning: data.split=val has no images of 1 of the 3 classes of train (a); class ids are those of train\n"
    )
    whole = data.load_data(spec.model_copy(update={"split": "train"}), 0)
    alone = data.load_data(ImagesData(kind="images", path=str(tmp_path / "train"), size=8), 0)
    assert whole.digest == alone.digest != loaded.digest


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["00000/00007.png", "01000/01234.png", "69000/69999.png"], "00000, 01000, 69000"),
        (["00000/img00000007.png", "00001/img00001234.png"], "00000, 00001"),
    ],
    ids=["FFHQ", "EDM"],
)
def test_folders_of_a_thousand_images_each_are_no_classes(tmp_path, names, shown):
    said = refused(folder(tmp_path, *names))
    assert f"{shown} group the images by number and are not classes; create" in said
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert read(tmp_path)[1:] == (None, None)
    other = folder(tmp_path / "classes", "00000/00001.png", "00001/00002.png", "00001/img00000003.png")
    assert read(other)[1:] == ([0, 1, 1], 2)


def test_a_class_may_be_called_train(tmp_path):
    assert read(folder(tmp_path, "bus/1.png", "train/1.png"))[1:] == ([0, 1], 2)


def test_folders_of_kohya_are_no_classes(tmp_path):
    folder(tmp_path / "one", "10_cat/1.png")
    said = refused(tmp_path / "one")
    assert "10_cat are named like folders of kohya's trainers" in said
    assert f"give one of these folders (data.path={tmp_path}/one/10_cat), or rename them if they are" in said
    assert "kohya" in refused(folder(tmp_path / "same", "10_cat/1.png", "10_dog/1.png"))
    assert read(folder(tmp_path / "numbered", "0_cat/1.png", "1_dog/1.png"))[1:] == ([0, 1], 2)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["1.png", "1.txt", "2.png"], "1.txt"),
        (["a/1.png", "a/1.caption", "b/1.png"], "a/1.caption"),
        (["10_cat/1.png", "10_cat/1.txt", "20_dog/1.png"], "10_cat/1.txt"),
        (["1.png", "metadata.jsonl"], "metadata.jsonl"),
        (["a/1.png", "b/1.png", "metadata.csv"], "metadata.csv"),
        ([f"{i}.{end}" for i in range(4) for end in ("png", "txt")], "0.txt, 1.txt, 2.txt, ..."),
    ],
)
def test_captions_are_not_lost_in_silence(tmp_path, names, shown):
    said = refused(folder(tmp_path, *names))
    assert f"has captions ({shown}); set data.captions=true to train on them, or give a folder with only" in said


def test_a_text_that_belongs_to_no_image_is_no_caption(tmp_path):
    assert read(folder(tmp_path, "1.png", "readme.txt", "license.txt")) == (["1.png"], None, None)


# --- links, and files that cannot be used ---


def test_links_to_folders_are_followed(tmp_path):
    folder(tmp_path / "there", "cats/1.png", "cats/more/2.png", "dogs/1.png")
    here = folder(tmp_path / "here", "birds/1.png")
    (here / "cats").symlink_to(tmp_path / "there" / "cats")
    (here / "birds" / "x").symlink_to("../../there/dogs")
    names = ["birds/1.png", "birds/x/1.png", "cats/1.png", "cats/more/2.png"]
    assert read(here) == (names, [0, 0, 1, 1], 2)
    (tmp_path / "link").symlink_to(here)
    assert read(tmp_path / "link") == (names, [0, 0, 1, 1], 2)


def test_a_link_to_a_folder_around_it_is_passed_over(tmp_path):
    folder(tmp_path / "set", "a/1.png", "b/1.png")
    (tmp_path / "set" / "loop").symlink_to(".")
    (tmp_path / "set" / "up").symlink_to("..")
    (tmp_path / "set" / "a" / "self").symlink_to(".")
    (tmp_path / "set" / "b" / "root").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "b" / "itself").symlink_to("itself")
    assert read(tmp_path / "set") == (["a/1.png", "b/1.png"], [0, 1], 2)


def test_a_folder_is_not_counted_twice(tmp_path):
    folder(tmp_path, "a/1.png")
    (tmp_path / "b").symlink_to("a")
    assert "b and a link to the same folder, so its images would be used twice; remove one of the links" in refused(
        tmp_path
    )


def unreadable(path: Path, limit: int = 0) -> str:
    with pytest.raises(InputError) as error:
        data.load_data(ImagesData(kind="images", path=str(path), size=8, max_unreadable=limit), 0)
    return str(error.value)


def test_files_that_cannot_be_read_are_named_and_nothing_hangs(tmp_path, capfd):
    folder(tmp_path, "1.png", "2.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    said = unreadable(tmp_path)
    assert f"3 of 5 images cannot be decoded: {tmp_path}/fifo.png (row 2): not a regular" in said
    assert "gone.png (row 3): no such file, " in said and "loop.png (row 4): no such file; repair or remove" in said
    loaded = data.load_data(ImagesData(kind="images", path=str(tmp_path), size=8, max_unreadable=3), 0)
    assert "3 of 5 images cannot be decoded and are skipped" in capfd.readouterr().err
    assert len(loaded) == 2


def test_damage_of_any_kind_is_of_one_image(tmp_path, capfd):
    """Whatever Pillow raises. AVIF: RuntimeError."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    for i in range(2):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.avif")
    whole = (tmp_path / "1.avif").read_bytes()
    start = whole.rindex(b"mdat") + 4
    (tmp_path / "1.avif").write_bytes(whole[:start] + bytes(8) + whole[start + 8 :])
    spec = ImagesData(kind="images", path=str(tmp_path), size=8)
    with pytest.raises(InputError) as error:
        data.load_data(spec, 0).items(0, [1])
    told = f"{tmp_path.name}: 1 of 2 images cannot be decoded"
    assert str(error.value) == (
        f"{told}: {tmp_path}/1.avif (row 1); repair or remove them, or increase data.max_unreadable (now 0)"
    )
    samples = data.load_data(spec.model_copy(update={"max_unreadable": 1}), 0).items(0, [0, 1]).samples
    assert torch.equal(samples[0], samples[1])
    assert capfd.readouterr().err == f"warning: {told} and are skipped: {tmp_path}/1.avif (row 1)\n"


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
@pytest.mark.parametrize("kind", ["EPS", "IM"])
def test_formats_whose_readers_cannot_be_trusted_are_not_opened(tmp_path, monkeypatch, kind):
    """Whatever the name of the file says: a picture of EPS would be drawn by Ghostscript."""
    folder(tmp_path / "set", "1.png", f"2.{kind.lower()}")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "0.png", kind)
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    assert read(tmp_path / "set")[0] == ["0.png", "1.png"]
    said = unreadable(tmp_path / "set")
    assert f"1 of 2 images cannot be decoded: {tmp_path}/set/0.png (row 0); repair" in said
    assert not (tmp_path / "started").exists()


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder of a user who may not read everything, as root may."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            yield Path(name)
        finally:
            os.seteuid(user)


def test_what_may_not_be_read_is_named():
    with as_nobody() as root:
        folder(root, "a/1.png", "b/1.png")
        (root / "a" / "1.png").chmod(0)
        assert "a/1.png (row 0): no permission to read it" in unreadable(root)
        (root / "b").chmod(0)
        assert f"data.path={root}: the folder 'b' cannot be read: Permission denied" in unreadable(root)
        assert f"data.path={root}/b cannot be read: Permission denied" in unreadable(root / "b")
        assert f"data.path={root}/b/x cannot be read: Permission denied" in unreadable(root / "b" / "x")


def test_a_name_that_is_too_long_is_refused(tmp_path):
    for kind in (ImagesData, HfData):
        with pytest.raises(InputError, match=r"data.path=x{300} cannot be read: File name too long; give another"):
            data.load_data(kind(kind="images" if kind is ImagesData else "hf", path="x" * 400, size=8), 0)


def test_names_that_are_not_utf8(tmp_path):
    tmp_path, store = tmp_path / "images", tmp_path / "runs"
    folder(tmp_path, "a/1.png", "b/1.png")
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xff")  # noqa: PTH104  (a Path cannot be of bytes)
    os.rename(tmp_path / "b" / "1.png", os.fsencode(tmp_path) + b"/b/\xfe\x1b.png")  # noqa: PTH104
    spec = ImagesData(kind="images", path=str(tmp_path), size=8)
    data.update_index(spec, store)
    loaded = data.load_data(spec, 0, store, indexed=True)
    assert loaded.items(0, [0, 1])[1].tolist() == [0, 1]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b/\xfe\x1b.png")).write_text("no image")
    assert f"{tmp_path}/b/\ufffd\ufffd.png (row 0)" in unreadable(tmp_path)


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    folder(tmp_path, "a.png")
    Image.new("L", (1, 3_000_000)).save(tmp_path / "long.png")
    said = unreadable(tmp_path)
    assert said == (
        f"{tmp_path.name}: 1 of 2 images cannot be used: {tmp_path}/long.png (row 1): an extreme aspect ratio: 1 x "
        "3000000 pixels would be resized to 8 x 24000000, more than 67,108,864 pixels; crop, repair or remove them, or "
        "increase data.max_unreadable (now 0)"
    )


def test_an_image_that_would_fill_the_memory_is_skipped_within_the_limit(tmp_path, capfd):
    folder(tmp_path, "a.png", "c.png")
    Image.new("LA", (1, 3_000_000)).save(tmp_path / "b.png")
    options = {"kind": "images", "path": str(tmp_path), "size": 8}
    with pytest.raises(InputError, match=r"increase data.max_unreadable \(now 0\)"):
        data.load_data(ImagesData(**options), 0)
    loaded = data.load_data(ImagesData(**options, max_unreadable=1), 0)
    told = (
        f"{tmp_path}/b.png (row 1): an extreme aspect ratio: 1 x 3000000 pixels would be resized to 8 x 24000000, more "
        "than 67,108,864 pixels"
    )
    said = f"warning: {tmp_path.name}: 1 of 3 images cannot be used and are skipped: {told}\n"
    assert capfd.readouterr().err == said
    assert len(loaded) == 2 and loaded.unusable(9) == (1, [told]) and loaded.skipped == []
    shape, sizes = loaded.items(0, [0, 1]).samples.shape, loaded.items(0, [0, 1]).sizes[:, :2].tolist()
    assert shape == (2, 3, 8, 8) and [3_000_000, 1] not in sizes
    content = hashlib.sha256(repr((8, 3, "center", False)).encode())
    for name in ("a.png", "b.png", "c.png"):
        content.update(hashlib.sha256((tmp_path / name).read_bytes()).digest())
    content.update(bytes([1, 0, 1]))
    assert loaded.digest == content.hexdigest()


# --- what is no folder of images ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.tar", "is a tar archive, which is not read; unpack it with `tar -xf`, and give the folder of these files"),
        ("x.tar.gz", "is a tar archive"),
        ("x.ZIP", "is a zip archive, which is not read; unpack it with `unzip`"),
        ("x.npz", "is a file of NumPy arrays, which is not read; save each with PIL.Image.fromarray(array).save(NAME)"),
        ("data.mdb", "is an LMDB database"),
        ("x.mp4", "is a video, which is not read; write its frames to files with `ffmpeg -i VIDEO FOLDER/%06d.png`"),
    ],
)
def test_containers_are_refused_with_the_way_to_files(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"x")
    hf = HfData(kind="hf", path=str(tmp_path / name), size=8)
    for path in (tmp_path / name, tmp_path):
        found = refused(path)
        assert f"data.path: {tmp_path / name} {said}" in found and "data.kind=images" in found
        with pytest.raises(InputError) as error:
            data.load_data(hf.model_copy(update={"path": str(path)}), 0)
        assert str(error.value) == found


# --- what a spec's file says, where types are taken strictly ---


def of_file(tmp_path, *changes):
    (tmp_path / "spec.yaml").write_text(
        "name: a\nteacher: {kind: gaussian, mean: [0, 0], std: [1, 1]}\ndata: {kind: images, path: here, size: 8}\n"
        "stages:\n  t: {kind: train, recipe: pretrain/flow_matching, images: 64, "
        "network: {kind: unet, channels: [8]}}\n"
    )
    return specfile.load(tmp_path / "spec.yaml", changes).spec.data


def test_lists_of_a_spec_are_sizes_and_colours(tmp_path):
    assert of_file(tmp_path, "data.size=[16, 8]").height_width == (16, 8)
    assert of_file(tmp_path, "data.size=[16, 16]").size == 16
    assert of_file(tmp_path, "data.background=[255, 0, 9]").background == (255, 0, 9)
    again = of_file(tmp_path, "data.size=[16, 8]", "data.background=[255, 0, 9]")
    assert type(again).model_validate_json(again.model_dump_json(), strict=True) == again
    for change, valid in (
        ("data.size=[16, 8, 3]", "N or [height, width], whole numbers from 1 to 16384"),
        ("data.size=[0, 8]", "N or [height, width], whole numbers from 1 to 16384"),
        ("data.background=[255, 0]", "white, black or [red, green, blue], whole numbers from 0 to 255"),
        ("data.background=[256, 0, 0]", "white, black or [red, green, blue], whole numbers from 0 to 255"),
    ):
        with pytest.raises(InputError, match=re.escape(f"given; must be {valid}")):
            of_file(tmp_path, change)


def test_a_class_that_is_a_dead_link_is_named(tmp_path):
    folder(tmp_path, "a/0.png", "a/1.png")
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    assert refused(tmp_path) == f"data.path={tmp_path}: the link b is broken; repair or remove it"
    with pytest.raises(InputError, match="the link b is broken"):
        imagefolder.has_classes(tmp_path)
    (tmp_path / "b").rename(tmp_path / "a" / "b")
    assert "the link a/b is broken" in refused(tmp_path)
