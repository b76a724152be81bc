"""The image index: its content, when it is made again, and which errors are found only when images are read."""

import hashlib
import io
import json
import os
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import load_file, save_file

from distill import data
from distill.cli import start
from distill.core.errors import InputError, RunError
from distill.data import decoding, folders, index, indexed
from distill.data.arrays import ArrayData
from distill.data.images import ImageData
from distill.data.index import State
from distill.data.rows import FileRows, UsableRows
from distill.execution import preflight  # noqa: F401  (imported here, so that no test waits for it)
from distill.spec import specfile
from distill.spec.model import HfData, ImagesData

SIDE = 64
BYTES = SIDE * SIDE * 3  # about those of a picture of noise as PNG
PNG_END = 12  # bytes of the chunk IEND


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.setattr(indexed, "_LOADED", {})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, len(mode)), dtype=np.uint8)
    return Image.fromarray(pixels)


def folder(root: Path, count: int = 8) -> Path:
    """Pictures of noise in two classes, that were there long before the index is made."""
    for i in range(count):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(i).save(path)
        os.utime(path, (1e9, 1e9))
    return root


def images(path: Path, **fields) -> ImagesData:
    return ImagesData(kind="images", path=str(path), **{"size": SIDE, **fields})


def kept(store: Path, spec: ImagesData | HfData) -> index.ImageIndex:
    found = index.read(store / spec.index_file)
    assert found is not None
    return found


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def again(spec: ImagesData | HfData, store: Path, monkeypatch) -> int:
    """Bytes read by a new process that looks whether an index is that of the images as they are."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    before = bytes_read()
    data.update_index(spec, store)
    return bytes_read() - before


def values(loaded: data.DataSet) -> torch.Tensor:
    return loaded.items(0, range(len(loaded)))[0]


# --- what it keeps ---


def test_an_index_knows_sizes_states_labels_and_checksums(tmp_path):
    spec = images(folder(tmp_path / "set", 3), max_unreadable=1)
    noise(9, "RGBA").save(tmp_path / "set" / "a" / "z.png")
    (tmp_path / "set" / "b" / "z.png").write_bytes(b"no image")
    data.update_index(spec, tmp_path)
    found = kept(tmp_path, spec)
    names = ["a/0.png", "a/2.png", "a/z.png", "b/1.png", "b/z.png"]
    assert [found.name(row) for row in range(5)] == names
    assert found.state.tolist() == [State.FINE] * 4 + [State.BROKEN]
    assert found.sides.tolist() == [[SIDE, SIDE]] * 4 + [[0, 0]]
    assert found.labels.tolist() == [0, 0, 0, 1, 1] and found.head.num_classes == 2
    assert found.alpha.tolist() == [0, 0, 1, 0, 0]
    checksums = [hashlib.sha256((tmp_path / "set" / name).read_bytes()).digest() for name in names]
    assert [row.tobytes() for row in found.sha256] == checksums


def test_the_digest_is_of_the_bytes_the_labels_and_the_options(tmp_path):
    root = folder(tmp_path / "set", 3)
    for fields, options in (({}, (SIDE, 3, "center", False)), ({"size": [8, 16]}, ((8, 16), 3, "center", False))):
        content = hashlib.sha256(repr(options).encode())
        for name in ("a/0", "a/2", "b/1"):
            content.update(hashlib.sha256((root / f"{name}.png").read_bytes()).digest())
        content.update(bytes([1, 1, 1]) + b"".join(label.to_bytes(8, "little") for label in (0, 0, 1)))
        assert data.load_data(images(root, **fields), 0).digest == content.hexdigest()


def test_images_are_read_once_for_all_processes(tmp_path, monkeypatch):
    spec = images(folder(tmp_path / "set"))
    assert again(spec, tmp_path, monkeypatch) > 8 * BYTES
    first = kept(tmp_path, spec)
    assert again(spec, tmp_path, monkeypatch) < BYTES
    assert again(spec.model_copy(update={"size": 8, "flip": True}), tmp_path, monkeypatch) < BYTES
    assert kept(tmp_path, spec).head == first.head  # nor written again
    before = bytes_read()
    rank = data.load_data(spec, 0, tmp_path, indexed=True)
    assert bytes_read() - before < BYTES
    assert rank.digest == data.load_data(spec, 0).digest


def test_only_what_has_changed_is_read_again(tmp_path, monkeypatch):
    root = folder(tmp_path / "set")
    spec = images(root)
    data.update_index(spec, tmp_path)
    digests = [data.load_data(spec, 0, tmp_path, indexed=True).digest]
    for change in (
        lambda: noise(99).save(root / "a" / "0.png"),
        lambda: (root / "a" / "2.png").rename(root / "b" / "2.png"),
        lambda: (root / "b" / "1.png").unlink(),
        lambda: noise(98).save(root / "a" / "new.png"),
    ):
        change()
        for path in root.rglob("*.png"):
            if path.stat().st_mtime != 1e9:
                os.utime(path, (1e9, 1e9))
        assert again(spec, tmp_path, monkeypatch) < 3 * BYTES
        digests.append(data.load_data(spec, 0, tmp_path, indexed=True).digest)
        assert digests[-1] == data.load_data(spec, 0).digest
    assert len(set(digests)) == 5


def test_a_file_written_as_it_was_indexed_is_not_trusted(tmp_path, monkeypatch):
    spec = images(folder(tmp_path / "set"))
    noise(50).save(tmp_path / "set" / "a" / "0.png")
    data.update_index(spec, tmp_path)
    assert BYTES < again(spec, tmp_path, monkeypatch) < 3 * BYTES


def test_an_index_has_the_time_before_the_files_were_listed(tmp_path):
    """A caption that changes between the listing and the images would not be read again otherwise."""
    spec, listed = images(folder(tmp_path / "set")), []

    def found(*given: object) -> index.FoundImages:
        listed.append(time.time_ns())
        return folders.found(*given)

    before = time.time_ns()
    replace(folders.LOADER, found=found).update_index(spec, tmp_path, None)
    assert before <= kept(tmp_path, spec).head.written <= listed[0]


@pytest.mark.parametrize("damage", ["half", "garbage", "labels", "lengths", "version", "types", "sides", "shapes"])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    spec = images(folder(tmp_path / "set"))
    data.update_index(spec, tmp_path)
    path = tmp_path / spec.index_file
    whole, arrays = path.read_bytes(), load_file(path)
    head = {"format": 3, "num_classes": 2, "stamp": "", "written": 0}
    match damage:
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "garbage":
            path.write_bytes(b"\xff" * 1000)
        case "labels":
            save_file({**arrays, "labels": arrays["labels"] + 10**12}, path, {"index": json.dumps(head)})
        case "lengths":
            save_file({**arrays, "ends": arrays["ends"] + 1}, path, {"index": json.dumps(head)})
        case "types":
            save_file({**arrays, "alpha": arrays["alpha"].astype(np.float16)}, path, {"index": json.dumps(head)})
        case "sides":
            save_file({**arrays, "sides": -arrays["sides"]}, path, {"index": json.dumps(head)})
        case "shapes":
            save_file({**arrays, "names": arrays["names"][None]}, path, {"index": json.dumps(head)})
        case "version":
            save_file(arrays, path, {"index": json.dumps({**head, "format": 4})})
    assert index.read(path) is None
    data.update_index(spec, tmp_path)
    assert (kept(tmp_path, spec).sha256 == arrays["sha256"]).all()


def test_a_run_keeps_its_own_index(tmp_path, monkeypatch):
    """Another run indexes the set as it has become since; the ranks of this one read what it began with."""
    root, store, run = folder(tmp_path / "set"), tmp_path / "runs", tmp_path / "runs" / "r"
    spec = images(root)
    run.mkdir(parents=True)
    data.update_index(spec, store, run)
    before = (run / spec.index_file).stat()
    first = data.load_data(spec, 0, run, indexed=True)
    (root / "b" / "1.png").unlink()
    again(spec, store, monkeypatch)
    assert len(kept(store, spec)) == 7
    later = data.load_data(spec, 0, run, keep=False, indexed=True)
    assert (later.digest, len(later)) == (first.digest, 8)
    assert (run / spec.index_file).stat() == before
    monkeypatch.setattr(indexed, "_INDEXES", {})
    (store / spec.index_file).unlink()
    data.update_index(spec, store, run)  # the run goes on: then its index is of the images as they are now
    assert len(kept(run, spec)) == len(kept(store, spec)) == 7


def test_a_run_that_goes_on_keeps_an_index_that_is_still_right(tmp_path, monkeypatch):
    spec, store, run = images(folder(tmp_path / "set")), tmp_path / "runs", tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    data.update_index(spec, store, run)
    before = (run / spec.index_file).stat()
    for damage in (lambda path: path.write_bytes(b""), Path.unlink):
        damage(store / spec.index_file)
        monkeypatch.setattr(indexed, "_INDEXES", {})
        read = bytes_read()
        data.update_index(spec, store, run)
        assert bytes_read() - read < BYTES
        assert (run / spec.index_file).stat() == before


def test_a_fifo_or_a_link_in_the_store_is_no_index_and_waits_for_nobody(tmp_path):
    spec = images(folder(tmp_path / "set"))
    data.update_index(spec, tmp_path)
    path, count = tmp_path / spec.index_file, len(kept(tmp_path, spec))
    path.rename(tmp_path / "moved")
    for put in (os.mkfifo, lambda place: place.symlink_to(tmp_path / "moved")):
        put(path)
        assert index.read(path) is None
        data.update_index(spec, tmp_path)
        assert path.is_file() and not path.is_symlink() and len(kept(tmp_path, spec)) == count
        path.unlink()


def test_a_store_that_cannot_keep_an_index_is_no_obstacle(tmp_path, capfd):
    store, run = tmp_path / "runs", tmp_path / "runs" / "r"
    run.mkdir(parents=True)
    (store / "indexes").write_text("")
    spec = images(folder(tmp_path / "set"))
    data.update_index(spec, store, run)
    said = (
        f"warning: cannot create {store}/indexes: File exists; nothing was changed; without an index of "
        "the data in the store, "
    )
    assert capfd.readouterr().err == said + "each new run reads all files again\n"
    assert data.load_data(spec, 0, run, indexed=True).digest == data.load_data(spec, 0).digest


def test_rows_of_a_table_are_indexed_too(tmp_path, monkeypatch):
    root = folder(tmp_path / "set", 4)
    paths = [str(path) for path in sorted(root.rglob("*.png"))]
    encoded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths[:2]]
    rows = [*encoded, *({"bytes": None, "path": path} for path in paths[2:])]
    datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 1, 0]}).save_to_disk(tmp_path / "saved")
    spec = HfData(kind="hf", path=str(tmp_path / "saved"), size=SIDE, label_column="label")
    data.update_index(spec, tmp_path)
    first, loaded = kept(tmp_path, spec), data.load_data(spec, 0, tmp_path, indexed=True)
    assert [first.name(row) for row in range(4)] == ["", "", *paths[2:]]
    assert torch.equal(values(loaded), values(data.load_data(images(root), 0)))
    again(spec, tmp_path, monkeypatch)
    assert kept(tmp_path, spec).head == first.head
    noise(9).save(paths[3])
    again(spec, tmp_path, monkeypatch)
    assert (kept(tmp_path, spec).sha256 == first.sha256).all(1).tolist() == [True, True, True, False]


def test_a_run_refuses_a_table_that_has_changed_since_it_was_indexed(tmp_path):
    folder(tmp_path / "set", 4)
    encoded = [{"bytes": path.read_bytes(), "path": None} for path in sorted((tmp_path / "set").rglob("*.png"))]
    spec = HfData(kind="hf", path=str(tmp_path / "set.parquet"), size=SIDE)
    for changed, how in ((encoded[::-1], "its files are not the same"), (encoded[:3], "it had 4 rows and has 3")):
        datasets.Dataset.from_dict({"image": encoded}).to_parquet(spec.path)
        os.utime(spec.path, (1e9, 1e9))
        data.update_index(spec, tmp_path, tmp_path / "run")
        assert len(data.load_data(spec, 0, tmp_path / "run", indexed=True)) == 4
        datasets.Dataset.from_dict({"image": changed}).to_parquet(spec.path)
        with pytest.raises(RunError) as error:
            data.load_data(spec, 0, tmp_path / "run", indexed=True)
        assert str(error.value) == (
            f"data.path={spec.path} (split 'train') has changed since the data was indexed: {how}; restore "
            "the old files, then resume. If several machines train together, HF_DATASETS_CACHE must be one folder that "
            "they all share"
        )


# --- found when images are used ---


def test_nothing_is_decoded_before_images_are_used(tmp_path, monkeypatch):
    root = tmp_path / "set"
    root.mkdir()
    shown = np.zeros((8, 8, 4), np.uint8)
    shown[:, :4] = (51, 51, 51, 255)
    Image.fromarray(shown).save(root / "a.png")
    palette = Image.fromarray(np.where(np.arange(8) < 4, 1, 0).astype(np.uint8)[None].repeat(8, 0), "P")
    palette.putpalette([0, 0, 0, 51, 51, 51])
    palette.save(root / "b.png", transparency=0)
    palette.save(root / "c.gif", transparency=0)
    Image.fromarray(np.full((8, 8), 102 * 257, np.uint16)).save(root / "d.png")
    Image.fromarray(np.full((8, 8), 0.4, np.float32)).save(root / "e.tiff")
    Image.new("RGB", (8, 8), (153, 153, 153)).save(root / "f.bmp")
    turned, exif, file = np.zeros((8, 16, 3), np.uint8), Image.Exif(), io.BytesIO()
    turned[:, 8:] = 204
    exif[0x0112] = 6  # the left side is the top
    Image.fromarray(turned).save(file, "PNG", exif=exif)
    (root / "g.png").write_bytes(exif_last(file.getvalue()))
    for name in ("h.png", "i.jpg"):
        noise(0).save(root / name)
        (root / name).write_bytes((root / name).read_bytes()[:-1000])
    Image.new("RGB", (8, 8), (0, 0, 0)).save(root / "j.png")
    spec = images(root, size=8, background="white", max_unreadable=2)
    with monkeypatch.context() as patched:
        for kind in (Image.Image, ImageFile.ImageFile):
            patched.setattr(kind, "load", lambda image: pytest.fail("decoded"))
        data.update_index(spec, tmp_path)
        loaded = data.load_data(spec, 0, tmp_path, indexed=True)
    made = kept(tmp_path, spec)
    assert (len(loaded), made.state.tolist(), made.alpha.tolist()) == (10, [State.FINE] * 10, [1] * 3 + [0] * 7)
    assert loaded.unusable(9) == (0, [])
    found = loaded.items(0, range(10))
    corners = found.samples[:, :, [0, 0, -1], [0, -1, 0]]  # top left, top right, bottom left
    expected = [*([-0.6, 1, -0.6] for _ in range(3)), *([-0.2] * 3 for _ in range(2)), [0.2] * 3, [-1, -1, 0.6]]
    expected += [[-1] * 3] * 3  # j.png takes the places of h.png and i.jpg
    assert torch.allclose(corners, torch.tensor(expected)[:, None].expand(10, 3, 3), atol=1e-6)
    assert found.sizes[6, :2].tolist() == [16, 8]
    assert loaded.unusable(9) == (2, [f"{root}/h.png (row 7)", f"{root}/i.jpg (row 8)"])


def spoil(path: Path) -> None:
    """Damage in the middle of a file, which its header and its end do not tell."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))


def test_damage_within_a_file_is_named_when_the_image_is_used(tmp_path):
    spoil(folder(tmp_path / "set") / "a" / "2.png")
    loaded = data.load_data(images(tmp_path / "set"), 0)
    assert len(loaded) == 8 and loaded.unusable(9) == (0, [])
    said = r"set: 1 of 8 images cannot be decoded: .*a/2.png \(row 1\); repair or remove them, or .* \(now 0\)"
    with pytest.raises(InputError, match=said):
        loaded.items(0, [0, 1])


def test_the_next_image_takes_the_place_of_a_damaged_one(tmp_path, capfd):
    root = folder(tmp_path / "set")
    spoil(root / "a" / "6.png")
    spec = images(root, max_unreadable=1)
    whole, labels, _ = data.load_data(images(root), 0).items(0, [0, 1, 2, 4])
    for order in ([3, 2], [2, 3]):  # in whichever order processes come upon it
        loaded = data.load_data(spec, 0, keep=False)
        found, own, _ = loaded.items(0, order)
        assert own.tolist() == [1 if i == 3 else 0 for i in order]
        assert torch.equal(found[order.index(3)], whole[3]) and torch.equal(found[order.index(2)], whole[2])
    assert labels.tolist() == [0, 0, 0, 1]
    said = f"warning: set: 1 of 8 images cannot be decoded and are skipped: {root}/a/6.png (row 3)\n"
    assert capfd.readouterr().err == said, "one line, once for a process"


def test_files_that_change_while_they_are_used_end_the_run(tmp_path):
    root = folder(tmp_path / "set")
    loaded = data.load_data(images(root), 0)
    noise(99).save(root / "a" / "0.png")
    with pytest.raises(
        RunError, match=r"a/0.png \(row 0\) has changed since the data was indexed; restore the old file"
    ):
        loaded.items(0, [0])
    (root / "a" / "2.png").unlink()
    with pytest.raises(
        RunError, match=r"a/2.png \(row 1\) cannot be read any more: No such file or directory; restore"
    ):
        loaded.items(0, [1])


def test_ends_that_are_missing_are_found_in_every_common_format(tmp_path, capfd):
    for end in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        noise(0).save(tmp_path / f"whole.{end}")
        content = (tmp_path / f"whole.{end}").read_bytes()
        (tmp_path / f"half.{end}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"more.{end}").write_bytes(content + b"something behind the end")
    loaded = data.load_data(images(tmp_path, max_unreadable=6), 0)
    found = values(loaded)
    assert "6 of 18 images cannot be decoded and are skipped: " in capfd.readouterr().err.splitlines()[-1]
    assert sorted(Path(name.split(" (")[0]).name for name in loaded.unusable(9)[1]) == [
        f"half.{end}" for end in ("bmp", "gif", "jpg", "png", "tiff", "webp")
    ]
    assert len(loaded) == len(found) == 17  # of half.webp, not even the header can be read
    assert torch.equal(found[:5], found[5:6].expand(5, -1, -1, -1))  # half.bmp to half.tiff: more.bmp in their places


# --- background and size ---


@pytest.mark.parametrize(("given", "expected"), [("white", 1.0), ("black", -1.0), ([0, 255, 0], None)])
def test_a_background_shows_through(tmp_path, given, expected):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (51, 51, 51, 255)
    Image.fromarray(pixels).save(tmp_path / "half.png")
    Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / "opaque.png")
    loaded = data.load_data(images(tmp_path, size=8, background=given), 0)
    found = values(loaded)
    assert torch.allclose(found[0, :, :, :4], torch.tensor(-0.6)) and torch.allclose(found[1], torch.tensor(-0.6))
    shown = found[0, :, 0, 7].tolist()
    assert shown == ([expected] * 3 if expected is not None else [-1.0, 1.0, -1.0])
    other = data.load_data(images(tmp_path, size=8, background=[1, 2, 3]), 0)
    assert loaded.digest != other.digest


def test_a_background_needs_no_other_index(tmp_path, monkeypatch):
    spec = images(folder(tmp_path / "set"))
    noise(9, "RGBA").save(tmp_path / "set" / "a" / "z.png")
    os.utime(tmp_path / "set" / "a" / "z.png", (1e9, 1e9))
    data.update_index(spec, tmp_path)
    white = images(tmp_path / "set", background="white")
    assert white.index_file == spec.index_file
    assert again(white, tmp_path, monkeypatch) < BYTES
    assert len(data.load_data(white, 0, tmp_path)) == 9


def test_a_check_that_fails_keeps_the_index_unless_it_would_create_a_store(tmp_path, monkeypatch):
    folder(tmp_path / "set")
    noise(9, "RGBA").save(tmp_path / "set" / "a" / "z.png")
    os.utime(tmp_path / "set" / "a" / "z.png", (1e9, 1e9))
    train = {"kind": "train", "recipe": "pretrain/flow_matching", "images": 64, "batch_size": 32}
    stage = {**train, "network": {"kind": "unet", "channels": [8]}}
    content = {"name": "x", "data": images(tmp_path / "set").model_dump(), "stages": {"teach": stage}}
    source, store = specfile.SpecSource(specfile.validate(content, "x"), tmp_path, "x"), tmp_path / "store"

    def read(check) -> int:
        monkeypatch.setattr(indexed, "_INDEXES", {})
        before = bytes_read()
        with pytest.raises(InputError, match=r"set: 1 of 9 images have an alpha channel: .*z.png \(row 4\)"):
            check()
        return bytes_read() - before

    start.checked(replace(source, spec=specfile.validate({**content, "data": {"kind": "digits"}}, "x")))  # imports
    assert read(lambda: start.checked(source, store=store)) > 8 * BYTES and not store.exists()
    assert read(lambda: start.begin(store, source)) > 8 * BYTES
    assert [path.name for path in store.iterdir()] == ["indexes"] and len(kept(store, source.spec.data)) == 9
    assert read(lambda: start.begin(store, source)) < 2 * BYTES
    shutil.rmtree(store / "indexes")
    assert read(lambda: start.checked(source, store=store)) > 8 * BYTES  # as `distill plan` does
    assert len(kept(store, source.spec.data)) == 9


def test_a_background_without_effect_is_refused(tmp_path):
    spec = images(folder(tmp_path), background="white")
    with pytest.raises(
        InputError, match="data.background=white has no effect: none of the 8 images of .* has an alpha"
    ):
        data.load_data(spec, 0)


def test_images_that_are_not_square(tmp_path):
    columns = np.repeat(np.arange(64, dtype=np.uint8) * 4, 4).reshape(1, -1).repeat(32, 0)  # 256 wide, 32 high
    Image.fromarray(columns).save(tmp_path / "wide.png")
    Image.fromarray(columns.T.copy()).save(tmp_path / "x_tall.png")
    loaded = data.load_data(images(tmp_path, size=[8, 16], channels=1), 0)
    assert loaded.shape == (1, 8, 16)
    wide, tall = values(loaded)[:, 0]
    expected = torch.arange(24, 40) * 4 / 127.5 - 1  # resized by 1/4 to 64 x 8, then columns 24 to 39
    assert (wide - expected).abs().max() < 0.05
    rows = torch.linspace(60.0, 63.0, 2)  # resized by 1/2 to 16 x 128, then rows 60 to 67, of two values each
    assert tall.shape == (8, 16) and (tall - tall[:, :1]).abs().max() < 0.02
    assert abs((tall[0, 0] + 1) * 127.5 - 4 * rows[0] / 2) < 3
    assert images(tmp_path, size=[8, 8]) == images(tmp_path, size=8)


def test_random_crops_of_images_that_are_not_square(tmp_path):
    noise(0).save(tmp_path / "0.png")
    loaded = data.load_data(images(tmp_path, size=[16, 48], crop="random"), 0)
    crops = {loaded.items(epoch, [0])[0].numpy().tobytes() for epoch in range(8)}
    assert len(crops) > 4 and loaded.shape == (3, 16, 48)


# --- labels ---


@pytest.mark.parametrize("label", [10**12, 5000])
def test_labels_that_would_make_a_table_of_terabytes_are_refused(tmp_path, label):
    rows = {"image": [{"bytes": b"", "path": None}] * 3, "label": [0, 1, label]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "x.parquet")
    said = rf"data.label_column=label: 3 images have class ids from 0 to {label}; valid: 0 to 999 .* number the classes"
    with pytest.raises(InputError, match=said):
        data.load_data(HfData(kind="hf", path=str(tmp_path / "x.parquet"), size=8, label_column="label"), 0)


def test_labels_of_arrays_are_within_their_classes():
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=r"data 'x': class ids from .*, but there are 3 classes"):
            ArrayData("x", torch.zeros(2, 1, 2, 2), torch.tensor([0, wrong]), 3)


# --- orientation ---


def exif_last(content: bytes) -> bytes:
    """A PNG file with its EXIF data after its pixels."""
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
    return content[:start] + content[stop:-PNG_END] + content[start:stop] + content[-PNG_END:]


def oriented(kind: str, orientation: int) -> bytes:
    """A picture stored with 8 columns and 4 rows, to be shown in this EXIF orientation."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 4), (200, 10, 10)).save(file, kind, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_a_header_has_the_sides_of_the_decoded_image(kind):
    for orientation in range(1, 9):
        encoded = oriented(kind, orientation)
        found = decoding.header(encoded)
        assert (found.height, found.width) == ((8, 4) if orientation > 4 else (4, 8))
        assert decoding.decode(encoded, "", (1, 1), 3).shape == ((3, 2, 1) if orientation > 4 else (3, 1, 2))


def test_an_orientation_after_the_pixels_of_a_png_and_one_in_xmp_are_seen():
    late = exif_last(oriented("PNG", 6))
    start = late.index(b"eXIf") - 4
    without = late[:start] + late[-PNG_END:]
    behind = without + late[start:-PNG_END]  # after the end of the image, so it does not count
    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>', zip=True)
    info.add_text("some", "text", zip=True)
    Image.new("RGB", (8, 4)).save(file, "PNG", pnginfo=info)
    xmp = file.getvalue()
    start, stop = xmp.index(b"iTXt") - 4, xmp.index(b"IDAT") - 4
    late_xmp = xmp[:start] + xmp[stop:-PNG_END] + xmp[start:stop] + xmp[-PNG_END:]
    no_end, cut = late[:-PNG_END], late[: -PNG_END - 6]  # Pillow decodes the one, and not the other
    for encoded in (late, xmp, late_xmp, no_end, without, behind):
        sides = (4, 8) if encoded in (without, behind) else (8, 4)
        found = decoding.header(encoded)
        assert (found.height, found.width) == sides
        assert decoding.decode(encoded, "", (1, 1), 3).shape[1] == sides[0] // 4
    assert decoding.header(cut) == decoding.header(without)
    with pytest.raises(OSError, match="Truncated File Read"):
        decoding.decode(cut, "", (1, 1), 3)


def test_data_after_the_pixels_of_a_png_that_is_damaged_makes_its_header_unreadable():
    late = bytearray(exif_last(oriented("PNG", 6)))
    late[-PNG_END - 1] ^= 1  # of the checksum of the EXIF data
    with pytest.raises(decoding.UNREADABLE, match="cannot identify image file"):
        decoding.header(bytes(late))


def test_a_transparent_colour_after_the_pixels_of_a_png_is_an_alpha_channel():
    file = io.BytesIO()
    Image.new("L", (8, 4), 7).save(file, "PNG", transparency=7)
    content = file.getvalue()
    start, stop = content.index(b"tRNS") - 4, content.index(b"tRNS") + 10
    late = content[:start] + content[stop:-PNG_END] + content[start:stop] + content[-PNG_END:]
    for encoded in (content, late):
        assert decoding.header(encoded).alpha
        assert (decoding.decode(encoded, "", (4, 8), 3, (1, 2, 3)) == np.array([1, 2, 3])[:, None, None]).all()
        with pytest.raises(InputError) as error:
            decoding.decode(encoded, "x.png", (4, 8), 3)
        assert str(error.value) == f"x.png has an alpha channel; {decoding.SET_BACKGROUND}"


def test_the_orientation_of_an_animated_png_is_that_of_its_first_frame():
    """Pillow does not read what comes after the pixels of the second frame when it decodes the first."""
    exif, file, frames = Image.Exif(), io.BytesIO(), [Image.new("RGB", (8, 4), (value, 0, 0)) for value in (1, 2)]
    exif[0x0112] = 6
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], exif=exif)
    for encoded, sides in ((file.getvalue(), (8, 4)), (exif_last(file.getvalue()), (4, 8))):
        found = decoding.header(encoded)
        assert (found.height, found.width) == sides
        assert decoding.decode(encoded, "", (1, 1), 3).shape[1] == sides[0] // 4


@pytest.mark.parametrize("older", [1, 2])
def test_an_index_of_an_older_format_is_made_again(tmp_path, older):
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.jpg").write_bytes(oriented("JPEG", 6))
    spec = images(root)
    data.update_index(spec, tmp_path)
    made, path = kept(tmp_path, spec), tmp_path / spec.index_file
    assert made.sides.tolist() == [[8, 4]]
    index.write(path, replace(made, head=made.head.model_copy(update={"format": older})))
    assert index.read(path) is None
    data.update_index(spec, tmp_path)
    assert kept(tmp_path, spec).head.format == 3


# --- many rows ---


def test_usable_rows_are_those_that_are_left():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        unusable = np.flatnonzero(draw.random(50) < draw.random())
        left = np.setdiff1d(np.arange(50), unusable)
        found = UsableRows(50, unusable)
        assert [found[i] for i in range(len(found))] == left.tolist()
        assert found.before(np.arange(51)).tolist() == np.searchsorted(left, np.arange(51)).tolist()


@pytest.mark.parametrize("buckets", [None, {"step": 64}])
def test_a_million_images_are_opened_with_little_memory(buckets):
    n = 10**6
    made = index.ImageIndex(
        index._Head(num_classes=None, stamp="", written=1),
        state=np.where(np.arange(n) % 1000 == 7, State.BROKEN, State.FINE).astype(np.uint8),
        sides=np.tile(np.array([[512, 512], [512, 1024]], np.int32), (n // 2, 1)),
        alpha=np.zeros(n, np.uint8),
        file=np.zeros((n, 3), np.int64),
        sha256=np.zeros((n, 32), np.uint8),
        labels=np.empty(0, np.int64),
        names=np.full(n, ord("a"), np.uint8),
        ends=np.arange(1, n + 1),
    )
    chosen = images(Path("x"), size=512, buckets=buckets, max_unreadable=1000)
    tracemalloc.start()
    try:
        opened = ImageData("many", FileRows(Path("x"), n, made.name), made, chosen, 0)
        left, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(opened) == n - 1000 and opened.unusable(2) == (1000, ["x/a (row 7)", "x/a (row 1007)"])
    of_buckets = 0 if buckets is None else 10 * n  # the row of each image, and its size
    assert left < of_buckets + n / 10 and most < 2 * of_buckets + 8 * n
