"""Tars of WebDataset: the same samples as a folder of images, whatever the format of the tar; damage is counted and
skipped; what is unchanged is not read again.
"""

import errno
import io
import multiprocessing
import os
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill import data
from distill.core.errors import InputError, RunError
from distill.data import index, indexed, rows
from distill.data.source import DataSource
from distill.flow.draws import Rows
from distill.spec.model import ImagesData, TarsData
from distill.spec.specfile import located, validate

SIDE = 8
LONG = "a folder with a name that does not fit into the hundred bytes of a header/" * 2 + "ü" * 40


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.setattr(indexed, "_LOADED", {})


def image(i: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG" if kind == "jpg" else kind)
    return file.getvalue()


def write(path: Path, members: Sequence[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """A tar that was written long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    os.utime(path, (1e9, 1e9))
    return path


def sample(key: str, i: int, **more: str) -> list[tuple[str, bytes]]:
    """One sample: its image, and other files by ending."""
    return [(f"{key}.png", image(i)), *((f"{key}.{ending}", text.encode()) for ending, text in more.items())]


def spec(path: Path | str, **fields) -> TarsData:
    return TarsData(kind="tars", path=str(path), **{"size": SIDE, **fields})


def values(loaded: data.DataSet) -> torch.Tensor:
    return loaded.items(0, range(len(loaded))).samples


# --- the same as a folder ---


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_every_format_give_the_samples_of_a_folder(tmp_path, kind):
    keys = [f"{i:04}" for i in range(6)]
    keys += (
        [f"{LONG}{i}" for i in range(2)]
        if kind != tarfile.USTAR_FORMAT
        else [f"{'x' * 90}/{'y' * 90}{i}" for i in "ab"]
    )
    kinds = ["png", "jpg", "webp", "bmp"]
    files = [(f"{key}.{kinds[i % 4]}", image(i, kinds[i % 4])) for i, key in enumerate(keys)]
    for name, content in files:
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "set" / "dataset.json").write_text('{"labels": null}')
    files.sort()
    write(tmp_path / "tars" / "a.tar", files[:3], kind)
    write(tmp_path / "tars" / "b.tar", files[3:], kind)
    options = {"size": [4, 6], "crop": "random", "flip": True}
    folder = data.load_data(ImagesData(kind="images", path=str(tmp_path / "set"), **options), 3)
    tars = data.load_data(spec(tmp_path / "tars", **options), 3)
    assert len(tars) == len(folder) == 8
    assert torch.equal(tars.items(5, range(8)).samples, folder.items(5, range(8)).samples)
    assert tars.digest == folder.digest


def test_captions_and_class_ids_come_from_the_files_of_the_same_name(tmp_path):
    members = [
        *sample("1", 1, txt=" a cat\n", cls="2", json='{"text": "ein Kätzchen", "label": 1}'),
        *sample("2", 2, txt="a dog", cls=" 0\n", json='{"text": "ein Hund", "label": 0}'),
        *sample("3", 3, txt="a cat", cls="1", json='{"text": "ein Hund", "label": 1}'),
    ]
    path = write(tmp_path / "a.tar", members)
    found = {key: data.load_data(spec(path, caption_key=key), 0) for key in ("txt", "json.text")}
    assert list(found["txt"].prompts) == ["a cat", "a dog"] and found["txt"].num_classes == 2
    assert found["txt"].items(0, range(3)).labels.tolist() == [0, 1, 0]
    assert list(found["json.text"].prompts) == ["ein Kätzchen", "ein Hund"]
    assert found["json.text"].items(0, range(3)).labels.tolist() == [0, 1, 1]
    for key, labels in (("cls", [2, 0, 1]), ("json.label", [1, 0, 1])):
        loaded = data.load_data(spec(path, label_key=key), 0)
        assert loaded.items(0, range(3)).labels.tolist() == labels
        assert loaded.num_classes == max(labels) + 1 and loaded.prompts is None
    plain = data.load_data(spec(path), 0)
    assert plain.num_classes is None and plain.items(0, range(3)).labels is None
    assert torch.equal(values(plain), values(found["txt"]))


def test_keys_end_at_the_first_dot_and_other_endings_are_not_images(tmp_path):
    members = [
        ("./x.y/1.jpg", image(1, "jpg")), ("./x.y/1.mask.png", image(8)), ("x.y/1.txt", b"one"),
        ("x.y/2.PNG", image(2)), ("x.y/2.TXT", b"two"), ("._x.png", b"of macOS"), ("LICENSE", b"free"),
    ]  # fmt: skip
    loaded = data.load_data(spec(write(tmp_path / "a.tar", members), caption_key="txt"), 0)
    assert list(loaded.prompts) == ["one", "two"]
    only = [("1.jpg", image(1, "jpg")), ("2.png", image(2))]
    assert torch.equal(values(loaded), values(data.load_data(spec(write(tmp_path / "b.tar", only)), 0)))


def test_patterns_are_those_of_a_shell(tmp_path, monkeypatch):
    for name in ("00", "01", "02", "10"):
        write(tmp_path / "x" / f"{name}.tar", sample(name, int(name)))
    whole = data.load_data(spec(tmp_path / "x"), 0)
    for pattern in ("x/{00..02}.tar", "{x,x}/{00,01,02}.tar", "x/0{0..2}.tar"):
        assert torch.equal(values(data.load_data(spec(f"{tmp_path}/{pattern}"), 0)), values(whole)[:3])
    monkeypatch.chdir(tmp_path)
    content = {"name": "x", "stages": {}, "data": {"kind": "tars", "path": "x/{00..02}.tar", "size": 8}}
    moved = located(validate(content, "x"), [tmp_path])
    assert moved.data.path == f"{tmp_path}/x/{{00..02}}.tar"


def test_a_pattern_without_a_folder_is_of_the_folder_that_has_its_first_tar(tmp_path):
    def moved(*names: str, pattern: str = "{00..03}.tar") -> str:
        for name in names:
            write(tmp_path / name, sample("1", 1))
        content = {"name": "x", "stages": {}, "data": {"kind": "tars", "path": pattern, "size": 8}}
        return located(validate(content, "x"), [tmp_path / "spec", tmp_path / "here"]).data.path

    for name in ("spec", "here"):
        (tmp_path / name).mkdir()
    assert moved() == f"{tmp_path}/spec/{{00..03}}.tar"  # there is none yet
    assert moved("here/00.tar") == f"{tmp_path}/here/{{00..03}}.tar"
    assert moved("spec/x/0.tar", "here/x/00.tar", pattern="x/{00..03}.tar") == f"{tmp_path}/here/x/{{00..03}}.tar"
    assert moved("spec/00.tar") == f"{tmp_path}/spec/{{00..03}}.tar"


def test_a_pattern_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    names = [f"{i:050}" for i in range(8)]
    for i, name in enumerate(names):
        write(tmp_path / f"{name}.tar", sample(str(i), i))
    pattern = f"{{{','.join(names)}}}.tar"
    monkeypatch.chdir(tmp_path)
    chosen = located(validate({"name": "x", "stages": {}, "data": spec(pattern).model_dump()}, "x"), [tmp_path]).data
    assert chosen.path == f"{tmp_path}/{pattern}" and len(pattern) > 255
    for each in (chosen, spec(pattern)):
        data.update_index(each, tmp_path / "store")
        assert len(data.load_data(each, 0, tmp_path / "store")) == 8
    with pytest.raises(InputError, match="1 of 1 tars do not exist"):
        data.load_data(spec(f"{'x' * 300}{{1..1}}.tar"), 0)


def test_an_epoch_reads_one_group_of_tars_after_the_other(tmp_path):
    for i in range(8):
        write(
            tmp_path / "x" / f"{i}.tar", [each for k in range(5) for each in sample(f"{i}{k}", 10 * i + k, cls=str(i))]
        )
    (tmp_path / "x" / "0.tar").write_bytes((tmp_path / "x" / "0.tar").read_bytes()[:-11000])
    loaded = data.load_data(spec(tmp_path / "x", label_key="cls", max_unreadable=1), 0)
    assert loaded.shards[0][:3] == [
        range(len(loaded) - 35),
        *(range(n, n + 5) for n in range(len(loaded) - 35, len(loaded) - 25, 5)),
    ]
    source = DataSource(loaded, len(loaded), seed=2)
    labels = source.batch(0, Rows(0, len(loaded), len(loaded))).cond["class_labels"].tolist()
    first = set(labels[: len(labels) // 2 - 4])
    assert len(first) == 4 and first.isdisjoint(labels[len(labels) // 2 + 4 :])


# --- damage ---


def link(key: str) -> bytes:
    member = tarfile.TarInfo(f"{key}.png")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member.tobuf()


def raw(members: Sequence[tuple[str, bytes]]) -> bytes:
    """A tar without its end."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        return file.getvalue()


END = bytes(1024)
GOOD = raw(sample("good", 0, txt="good", cls="0"))
LAST = raw(sample("last", 1, txt="last", cls="1"))
SPARSE = tarfile.TarInfo("s.png")
SPARSE.type = tarfile.GNUTYPE_SPARSE


def bad(**changed: Mapping[str, str | None]) -> bytes:
    """A sample `bad` of which files are changed or left out."""
    files = {"png": image(5), "txt": b"bad", "cls": b"0", **changed}
    return raw([(f"bad.{ending}", content) for ending, content in files.items() if content is not None])


DAMAGE = {
    "no image": (bad(png=None), "bad", "no image"),
    "two images": (bad(jpg=image(6, "jpg")), "bad", "several images"),
    "broken image": (bad(png=b"no image"), "bad.png", None),
    "empty image": (bad(png=b""), "bad.png", None),
    "no caption": (bad(txt=None), "bad.png", "no caption"),
    "empty caption": (bad(txt=b" \n"), "bad.png", "an empty caption"),
    "not UTF-8": (bad(txt=b"caf\xe9"), "bad.png", "a caption that is not UTF-8"),
    "repeated": (bad(txt=b"x") + GOOD + bad(txt=b"y"), "bad.png", "its key occurs again in the tar"),
    "repeated file": (bad() + raw([("bad.txt", b"again")]), "bad", "its key occurs again in the tar"),
    "link": (link("bad"), "bad", "a link or a sparse file, which is not read"),
    "sparse": (SPARSE.tobuf(tarfile.GNU_FORMAT), "s", "a link or a sparse file, which is not read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_sample_is_named_and_skipped(tmp_path, capsys, case):
    content, name, reason = DAMAGE[case]
    path = tmp_path / "a.tar"
    path.write_bytes((content if case == "repeated" else GOOD + content) + LAST + END)
    loaded = data.load_data(spec(path, caption_key="txt", max_unreadable=2), 0)
    assert list(loaded.prompts) == ["good", *(["bad"] if reason is None else []), "last"]
    assert torch.equal(
        values(loaded), values(data.load_data(spec(write(tmp_path / "b.tar", [*sample("1", 0), *sample("2", 1)])), 0))
    )
    count = 2 if case == "repeated" else 1
    row = 0 if case == "repeated" else 1
    shown = f"{path}: {name} (row {row})" + (f": {reason}" if reason else "")
    assert f"a.tar: {count} of {2 + count} images cannot be used and are skipped: {shown}" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"a.tar: . of . images cannot be used: "):
        data.load_data(spec(path, caption_key="txt", max_unreadable=count - 1), 0)


@pytest.mark.parametrize("label", ["-1", "1.0", "cat", "", "9" * 30, None])
def test_a_class_id_that_is_no_number_is_named_and_skipped(tmp_path, capsys, label):
    path = tmp_path / "a.tar"
    path.write_bytes(GOOD + bad(cls=None if label is None else label.encode()) + LAST + END)
    loaded = data.load_data(spec(path, label_key="cls", max_unreadable=1), 0)
    assert loaded.items(0, [0, 1]).labels.tolist() == [0, 1]
    assert f"{path}: bad (row 1): no class id" in capsys.readouterr().err


CUTS = {
    "in the data of the image": (len(GOOD) + 600, 1),
    "in a header": (len(GOOD) + 100, 1),
    "after the image": (len(GOOD) + 1024, 1),
    "in the last class id": (len(GOOD + LAST) - 512, 2),
    "before the end": (len(GOOD + LAST), 2),
    "between samples": (len(GOOD), 1),
    "everything": (0, 0),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_tar_that_is_cut_keeps_its_complete_samples(tmp_path, capsys, case):
    size, complete = CUTS[case]
    write(tmp_path / "x" / "a.tar", sample("1", 3, txt="first"))
    (tmp_path / "x" / "b.tar").write_bytes((GOOD + LAST + END)[:size])
    loaded = data.load_data(spec(tmp_path / "x", caption_key="txt", max_unreadable=1), 0)
    assert list(loaded.prompts) == ["first", "good", "last"][: 1 + complete]
    told = f"x: 1 of {2 + complete} images cannot be used and are skipped: {tmp_path}/x/b.tar (row {1 + complete})"
    assert f"{told}: the tar is cut" in capsys.readouterr().err


def huge() -> bytes:
    """A header that announces a long name of a terabyte."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**40
    return member.tobuf(tarfile.GNU_FORMAT)


def negative() -> bytes:
    """A header with a negative size, which would lead back to the beginning of the tar."""
    header = bytearray(tarfile.TarInfo("bad.png").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def nested() -> bytes:
    """A hundred thousand global headers, each of which tarfile reads by a call inside the call before."""
    member = tarfile.TarInfo("g")
    member.type = tarfile.XGLTYPE
    return member.tobuf() * 3000


BROKEN = {
    "text": b"<html>404</html>".ljust(2048),
    "after its end": GOOD + END + GOOD + END,
    "bad checksum": GOOD + bytearray(LAST[:10]) + b"!" + LAST[11:] + END,
    "long name": GOOD + huge() + END,
    "negative size": GOOD + negative() + END,
    "nested": GOOD + nested() + LAST + END,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_ends_a_tar(tmp_path, capsys, case):
    write(tmp_path / "x" / "a.tar", sample("1", 3))
    (tmp_path / "x" / "b.tar").write_bytes(BROKEN[case])
    loaded = data.load_data(spec(tmp_path / "x", max_unreadable=1), 0)
    count = 1 if case == "text" else 2
    assert len(loaded) == count
    assert f"{tmp_path}/x/b.tar (row {count}): a header of the tar is broken" in capsys.readouterr().err


# --- the index ---


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def again(chosen: TarsData, store: Path, monkeypatch) -> int:
    """Bytes read by a new process that looks whether an index is up to date."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    before = bytes_read()
    data.update_index(chosen, store)
    return bytes_read() - before


def big(path: Path, first: int) -> Path:
    noise = np.random.default_rng(first).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    members = []
    for i, pixels in enumerate(noise):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "bmp")
        members += [(f"{i}.bmp", file.getvalue()), (f"{i}.txt", f"text {first + i}".encode())]
    return write(path, members)


def test_only_tars_that_changed_are_read_again(tmp_path, monkeypatch):
    chosen = spec(tmp_path / "x", caption_key="txt", max_unreadable=1)
    size = big(tmp_path / "x" / "b.tar", 0).stat().st_size
    big(tmp_path / "x" / "c.tar", 4)
    (tmp_path / "x" / "c.tar").write_bytes((tmp_path / "x" / "c.tar").read_bytes()[:-3000])
    os.utime(tmp_path / "x" / "c.tar", (1e9, 1e9))
    assert again(chosen, tmp_path, monkeypatch) >= 2 * size - 10_000
    assert again(chosen, tmp_path, monkeypatch) < 20_000
    before = data.load_data(chosen, 0, tmp_path)
    big(tmp_path / "x" / "a.tar", 8)
    assert size <= again(chosen, tmp_path, monkeypatch) < size + 60_000
    loaded = data.load_data(chosen, 0, tmp_path)
    fresh = data.load_data(chosen, 0)
    assert loaded.digest == fresh.digest != before.digest
    assert (
        list(loaded.prompts)
        == list(fresh.prompts)
        == [f"text {i}" for i in [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]][: len(fresh.prompts)]
    )
    assert torch.equal(values(loaded), values(fresh)) and torch.equal(values(loaded)[4:], values(before))


def test_captions_that_cannot_be_used_are_those_of_the_index_while_their_tar_is_unchanged(
    tmp_path, monkeypatch, capsys
):
    texts = {"no": {}, "empty": {"txt": " "}, "control": {"txt": "a\0b"}, "long": {"txt": "x" * 70_000}}
    members = [each for key, more in texts.items() for each in sample(key, 1, **more)]
    write(tmp_path / "x" / "b.tar", [*members, *sample("not-utf8", 2), ("not-utf8.txt", b"\xff")])
    write(tmp_path / "x" / "a.tar", sample("fine", 3, txt="a cat"))
    chosen = spec(tmp_path / "x", caption_key="txt", max_unreadable=5)
    again(chosen, tmp_path, monkeypatch)
    first = data.load_data(chosen, 0, tmp_path)
    write(tmp_path / "x" / "c.tar", sample("new", 4, txt="a dog"))
    again(chosen, tmp_path, monkeypatch)
    loaded = data.load_data(chosen, 0, tmp_path)
    assert loaded.unusable(9) == first.unusable(9) and len(loaded.unusable(9)[1]) == loaded.unusable(0)[0] == 5
    assert list(loaded.prompts) == ["a cat", "a dog"] and loaded.items(0, [0, 1]).labels.tolist() == [0, 1]


def test_a_run_reads_only_its_index_and_refuses_a_tar_that_has_changed(tmp_path):
    path = write(tmp_path / "x" / "a.tar", [*sample("1", 1, txt="one"), *sample("2", 2, txt="two")])
    chosen = spec(tmp_path / "x", caption_key="txt")
    data.update_index(chosen, tmp_path, tmp_path / "run")
    content = path.read_bytes()
    write(tmp_path / "x" / "0.tar", sample("0", 0, txt="zero"))  # not part of the run
    loaded = data.load_data(chosen, 0, tmp_path / "run", indexed=True)
    assert list(loaded.prompts) == ["one", "two"]
    assert loaded.items(0, [1]).labels.tolist() == [1]
    path.unlink()
    write(path, sample("1", 1, txt="one"))
    os.utime(path, (2e9, 2e9))
    rows._OPEN._forget()
    with pytest.raises(
        RunError, match=rf"{path}: 1.png \(row 0\) has changed since the data was indexed; restore the old"
    ):
        loaded.items(0, [0])
    path.write_bytes(content[:600])
    with pytest.raises(
        RunError, match=r"1.png \(row 0\) cannot be read any more: it ends before the end of this image; restore it"
    ):
        loaded.items(0, [0])


def test_an_image_that_cannot_be_read_in_its_tar_is_skipped_and_read_again_later(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "a.tar", [*sample("1", 1), *sample("2", 2)])
    chosen, real = spec(path, max_unreadable=1), rows.TarRows.read

    def read(tar: rows.TarRows, row: int) -> rows.Encoded:
        if row == 1:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(tar, row)

    with monkeypatch.context() as patched:
        patched.setattr(rows.TarRows, "read", read)
        data.update_index(chosen, tmp_path)
        assert len(data.load_data(chosen, 0, tmp_path)) == 1
    told = f"a.tar: 1 of 2 images cannot be used and are skipped: {path}: 2.png (row 1)"
    assert capsys.readouterr().err == f"warning: {told}: not a regular file, or a read error\n"
    first = index.read(tmp_path / chosen.index_file)
    assert first.state.tolist() == [index.State.FINE, index.State.UNREAD]
    assert first.file[1].tolist() == first.file[0].tolist() != [0, 0, 0]
    again(chosen, tmp_path, monkeypatch)
    assert index.read(tmp_path / chosen.index_file).state.tolist() == [index.State.FINE] * 2
    assert data.load_data(chosen, 0, tmp_path).digest == data.load_data(chosen, 0).digest


def test_a_tar_that_changes_while_it_is_indexed_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", sample("1", 1))
    real = rows.TarRows.read
    monkeypatch.setattr(rows.TarRows, "read", lambda tar, row: (os.utime(path, (2e9, 2e9)), real(tar, row))[1])
    with pytest.raises(RunError) as error:
        data.load_data(spec(path), 0)
    said = "changed while the data was indexed; start again once it is complete"
    assert str(error.value) == f"{path}: 1.png (row 0) {said}"


def test_an_index_with_wrong_arrays_is_made_again(tmp_path, monkeypatch):
    chosen = spec(write(tmp_path / "x" / "a.tar", sample("1", 1)))
    data.update_index(chosen, tmp_path)
    place = tmp_path / chosen.index_file
    good = place.read_bytes()
    stops = index.read(place).tar_stops.tobytes()
    for wrong in (struct.pack("<q", 2), struct.pack("<q", -1)):
        assert good.count(stops) >= 1
        damaged = good.replace(stops, wrong)
        place.write_bytes(damaged)
        assert index.read(place) is None
    monkeypatch.setattr(indexed, "_INDEXES", {})
    data.update_index(chosen, tmp_path)
    assert index.read(place) is not None


def test_an_image_beyond_the_end_of_its_tar_takes_no_memory(tmp_path):
    size = write(tmp_path / "a.tar", sample("0", 0)).stat().st_size
    names = rows.FileNames.of([b"a.tar"])
    for member in ([0, 2**62], [2**62, 2**62], [size, 1], [1, size]):
        found = rows.TarRows(tmp_path, names, np.array([1]), np.array([member]), names)
        with pytest.raises(OSError, match="it ends before the end of this image"):
            found.read(0)
    whole = rows.TarRows(tmp_path, names, np.array([1]), np.array([[0, size]]), names)
    assert whole.read(0).content == (tmp_path / "a.tar").read_bytes()


def _child(chosen: TarsData, run: Path, queue) -> None:
    queue.put(values(data.load_data(chosen, 0, run, indexed=True, keep=False)).numpy())


@pytest.mark.process
def test_processes_that_were_forked_open_their_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_OPEN", 2)
    for i in range(5):
        write(tmp_path / "x" / f"{i}.tar", sample(str(i), i))
    chosen = spec(tmp_path / "x")
    data.update_index(chosen, tmp_path, tmp_path / "run")
    ours = values(data.load_data(chosen, 0, tmp_path / "run", indexed=True, keep=False))
    assert len(rows._OPEN._files) == 2
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(chosen, tmp_path / "run", queue))
    child.start()
    theirs = queue.get(timeout=60)
    child.join()
    assert np.array_equal(theirs, ours.numpy())
