"""Streams of parquet files: the same samples as the data set that is downloaded, over HTTP, with few bytes read."""

import io
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hub import Commit, Hub, pictures, python
from PIL import Image
from pyarrow import parquet

from distill import data
from distill.cli import start
from distill.core.errors import InputError, RunError
from distill.data import indexed, overview, streamindex, streaming, streamrows, streams
from distill.data.order import Ranges
from distill.data.source import DataSource
from distill.data.streamdata import StreamData
from distill.execution import prefetch
from distill.flow.draws import Rows
from distill.spec import specfile
from distill.spec.model import HfData, RunSpec

SIDE = 8


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.setattr(indexed, "_LOADED", {})
    monkeypatch.setattr(streaming, "_KNOWN", {})
    monkeypatch.setattr(streams, "PAUSES", ())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def image(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE + i % 3, SIDE, 3), dtype=np.uint8)).save(
        file, "png"
    )
    return file.getvalue()


def noise(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def table(rows: range, **changed) -> pa.Table:
    """Rows with an image, a class id and a caption. changed: columns, by name."""
    images = [{"bytes": image(i), "path": None} for i in rows]
    columns = {"image": images, "label": [i % 3 for i in rows], "text": [f"text {i % 4}" for i in rows], **changed}
    return pa.table(columns)


def write(root: Path, files: int = 3, rows: int = 10, group: int = 4) -> Path:
    """A folder with row groups of four rows, four rows and two rows in each file."""
    for n in range(files):
        path = root / "data" / f"train-{n:05}-of-{files:05}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(table(range(n * rows, (n + 1) * rows)), path, row_group_size=group)
    return root


def hf(path: Path | str, **fields) -> HfData:
    return HfData(kind="hf", path=str(path), **{"size": SIDE, "stream": True, **fields})


def url(hub: Hub, file: str = "data/train-00000-of-00001.parquet") -> str:
    return f"{hub.url}/datasets/org/x/resolve/main/{file}"


@pytest.mark.parametrize("columns", [{}, {"label_column": "label"}, {"caption_column": "text"}])
def test_a_stream_gives_the_samples_of_the_data_set(tmp_path, columns):
    root = write(tmp_path / "x")
    options = {"size": [4, 6], "crop": "random", "flip": True, **columns}
    stream = data.load_data(hf(root, **options), 3)
    whole = data.load_data(hf(root, stream=False, **options), 3)
    first = data.load_data(hf(root, limit=7, **options), 3)
    ours, theirs, some = stream.items(2, range(30)), whole.items(2, range(30)), first.items(2, range(7))
    for part, rows in ((ours, 30), (some, 7)):
        assert torch.equal(part.samples, theirs.samples[:rows])
        assert torch.equal(part.sizes, theirs.sizes[:rows])
        assert (part.labels is None) == (not columns) and (
            not columns or torch.equal(part.labels, theirs.labels[:rows])
        )
    assert (len(first), stream.num_classes, list(stream.prompts or [])) == (
        7,
        whole.num_classes,
        list(whole.prompts or []),
    )
    assert [len(each) for each in stream.shards[0]] == [4, 4, 2] * 3
    assert first.shards[0][:] == [range(4), range(4, 7)]
    assert len({stream.digest, whole.digest, first.digest}) == 3


def test_batches_take_a_few_row_groups_at_a_time(tmp_path, monkeypatch):
    root = write(tmp_path / "x", files=4)
    loaded = data.load_data(hf(root, label_column="label"), 0)
    reads: list[int] = []
    load = streamrows.StreamRows._load
    monkeypatch.setattr(streamrows.StreamRows, "_load", lambda self, group: reads.append(group) or load(self, group))
    source = DataSource(loaded, 8, seed=1)
    batches = [source.batch(step, Rows(0, 8, 8)) for step in range(5)]
    assert sorted(reads) == list(range(12))  # an epoch of 40 rows reads each row group once
    assert len(loaded._rows._groups) <= streamrows.MAX_GROUPS
    everything = torch.cat([each.data for each in batches]).flatten(1)
    assert len(everything.unique(dim=0)) == 40
    again = data.load_data(hf(root, label_column="label"), 0)
    halves = [DataSource(again, 8, 1).batch(3, Rows(a, a + 4, 8)) for a in (0, 4)]
    assert torch.equal(torch.cat([each.data for each in halves]), batches[3].data)
    assert torch.equal(torch.cat([each.cond["class_labels"] for each in halves]), batches[3].cond["class_labels"])


def test_ranges_end_with_the_last_item():
    assert Ranges(np.array([4, 8, 10]), 10)[:] == [range(4), range(4, 8), range(8, 10)]
    assert Ranges(np.array([4, 8, 10]), 8)[:] == [range(4), range(4, 8)]
    assert Ranges(np.array([4, 8, 10]), 5)[:] == [range(4), range(4, 5)]


def test_images_without_a_caption_and_damaged_ones_are_skipped_within_the_limit(tmp_path, capsys):
    images = [{"bytes": image(i), "path": None} for i in range(6)]
    images[3] = {"bytes": b"no image", "path": None}
    images[4] = {"bytes": None, "path": "elsewhere.png"}
    texts = pa.array([b"a", None, b" ", b"b", b"\xff", b"c"], pa.binary()).cast(pa.binary())
    texts = pa.StringArray.from_buffers(6, *[texts.buffers()[i] for i in (1, 2)], texts.buffers()[0])
    path = tmp_path / "a.parquet"
    parquet.write_table(table(range(6), image=images, text=texts), path)
    loaded = data.load_data(hf(path, caption_column="text", max_unreadable=4), 0)
    assert len(loaded) == 3 and list(loaded.prompts) == ["a", "b", "c"]
    told = "a: 3 of 6 images cannot be used and are skipped: "
    rows = [f"row {i} ({path}): {why}" for i, why in ((1, "no caption"), (2, "an empty caption"))]
    assert told + ", ".join(rows) in capsys.readouterr().err
    planned = overview.of(hf(path, caption_column="text", max_unreadable=4), loaded, None)
    assert planned.lines()[-1] == f"  skipped 3: {', '.join(rows)}, row 4 ({path}): a caption that is not UTF-8"
    found = loaded.items(0, [0, 1, 2])
    assert found.labels.tolist() == [0, 2, 2] and loaded.skipped == [3]
    assert torch.equal(found.samples[1], found.samples[2])
    said = r"row 3 \(.*\): no image, a damaged one, or an extreme aspect ratio, row 1 .*; remove"
    with pytest.raises(InputError, match=f"a: 4 of 6 images cannot be used: {said}"):
        data.load_data(hf(path, caption_column="text", max_unreadable=3), 0).items(0, [1])


def test_an_image_that_would_fill_the_memory_is_skipped(tmp_path, capsys):
    file, path = io.BytesIO(), tmp_path / "a.parquet"
    Image.new("L", (1, 3_000_000)).save(file, "png")
    images = [{"bytes": each, "path": None} for each in (image(0), file.getvalue())]
    parquet.write_table(pa.table({"image": images}), path)
    loaded = data.load_data(hf(path, max_unreadable=1), 0)
    found = loaded.items(0, [0, 1]).samples
    assert torch.equal(found[0], found[1]) and loaded.skipped == [1]
    said = f"row 1 ({path}): no image, a damaged one, or an extreme aspect ratio"
    assert capsys.readouterr().err == f"warning: a: 1 of 2 images cannot be used and are skipped: {said}\n"


def test_an_image_with_an_alpha_channel_needs_a_background(tmp_path):
    (tmp_path / "x").mkdir()
    file, path = io.BytesIO(), tmp_path / "x" / "a.parquet"
    Image.new("RGBA", (SIDE, SIDE), (51, 51, 51, 255)).save(file, "png")
    images = [{"bytes": image(0), "path": None}, {"bytes": file.getvalue(), "path": None}]
    parquet.write_table(pa.table({"image": images}), path)
    loaded = data.load_data(hf(tmp_path / "x", max_unreadable=1), 0)
    assert len(loaded.items(0, [0]).samples) == 1
    with pytest.raises(InputError) as error:
        loaded.items(0, [1])
    assert str(error.value) == (
        f"row 1 ({path}) has an alpha channel; set the colour behind transparent pixels: data.background=white, black "
        "or [red, green, blue]; opaque pixels keep their colours"
    )
    found = data.load_data(hf(tmp_path / "x", background="white"), 0).items(0, [1]).samples
    assert torch.allclose(found, torch.tensor(-0.6))


def test_a_url_is_read_by_ranges_and_its_index_once(tmp_path):
    root, path = tmp_path / "x", tmp_path / "x" / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    images = [{"bytes": noise(i), "path": None} for i in range(40)]
    parquet.write_table(table(range(40), image=images), path, row_group_size=8)
    size = path.stat().st_size  # about 800 kB
    with Hub({"datasets/org/x": {"main": root}}) as hub:
        spec = hf(url(hub), label_column="label")
        data.update_index(spec, tmp_path, tmp_path / "run")
        assert hub.sent < size / 4  # the last 64 kB of the file, and the labels
        streaming._KNOWN.clear()
        asked, sent = len(hub.requests), hub.sent
        loaded = data.load_data(spec, 0, tmp_path / "run", indexed=True)
        assert len(hub.requests) == asked
        found = loaded.items(0, [9, 10])
        assert 0 < hub.sent - sent < size / 2  # one of five row groups, and the end of the file
        whole = data.load_data(hf(root, stream=False, label_column="label"), 0)
        assert torch.equal(found.samples, whole.items(0, [9, 10]).samples)
        assert found.labels.tolist() == [0, 1]


def test_a_source_that_ends_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "PAUSES", (0, 0.01))
    root = write(tmp_path / "x", files=1)
    with Hub({"datasets/org/x": {"main": root}}) as hub:
        loaded = data.load_data(hf(url(hub)), 0)
        first = loaded.items(0, [0]).samples
    with pytest.raises(RunError) as caught:
        loaded.items(0, [9])
    where = f"data.path={url(hub)}: rows 8 to 9 ({url(hub)})"
    assert str(caught.value).startswith(f"{where} cannot be read any more: ")
    assert str(caught.value).endswith("; once the source can be reached, resume the run")
    assert capsys.readouterr().err.count(f"{where} could not be read (") == 2
    assert torch.equal(loaded.items(0, [0]).samples, first)  # still in memory


def test_a_connection_that_breaks_is_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "PAUSES", (0, 0.01))
    root = write(tmp_path / "x", files=1)
    with Hub({"datasets/org/x": {"main": root}}) as hub:
        loaded = data.load_data(hf(url(hub)), 0)
        hub.cuts = 2
        found = loaded.items(0, [9]).samples
        assert hub.cuts == 0 and capsys.readouterr().err.count("could not be read (") == 2
        hub.cuts = 3
        with pytest.raises(
            RunError, match=r"rows 0 to 3 .* cannot be read any more: .*; once the source can be reached, "
        ):
            loaded.items(0, [0])
    assert torch.equal(found, data.load_data(hf(root), 0).items(0, [9]).samples)


def _child(loaded: StreamData, queue: Any) -> None:
    queue.put(loaded.items(0, [9, 1]).samples.numpy())


@pytest.mark.process
def test_a_process_that_was_forked_reads_over_its_own_connection(tmp_path):
    root = write(tmp_path / "x", files=1)
    with Hub({"datasets/org/x": {"main": root}}) as hub:
        loaded = data.load_data(hf(url(hub)), 0)
        ours = loaded.items(0, [9, 1]).samples
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_child, args=(loaded, queue))
        child.start()
        theirs = queue.get(timeout=60)
        child.join()
        assert np.array_equal(theirs, ours.numpy())
        assert torch.equal(loaded.items(0, [5]).samples, data.load_data(hf(root), 0).items(0, [5]).samples)


def test_a_file_that_has_changed_is_refused(tmp_path):
    root = write(tmp_path / "x", files=1)
    spec = hf(root / "data" / "train-00000-of-00001.parquet")
    data.update_index(spec, tmp_path, tmp_path / "run")
    size = Path(spec.path).stat().st_size
    for rows in (range(5), range(10, 20)):  # fewer rows; as many, of other images
        parquet.write_table(table(rows), spec.path, row_group_size=4)
        now = Path(spec.path).stat().st_size
        loaded = data.load_data(spec, 0, tmp_path / "run", indexed=True)
        with pytest.raises(
            RunError,
            match=f"changed since the run began, the file had {size:,} bytes and has {now:,}; start a new run",
        ):
            loaded.items(0, [0])
    parquet.write_table(table(range(5)), spec.path, row_group_size=3)
    index = streamindex.read(tmp_path / "run" / spec.index_file)
    same_size = replace(index, sizes=np.array([Path(spec.path).stat().st_size]))
    for row, count in ((0, 3), (9, 0)):
        with pytest.raises(RunError, match=f"changed since the run began, there are now {count} rows; start a new run"):
            StreamData("x", same_size, spec, 0).items(0, [row])


def test_an_index_that_is_not_valid_is_made_again(tmp_path):
    spec = hf(write(tmp_path / "x"), caption_column="text")
    data.update_index(spec, tmp_path)
    place = tmp_path / spec.index_file
    good = place.read_bytes()
    index = streamindex.read(place)
    assert index.digest == streaming._KNOWN[spec.index_file].digest
    faults = [("stops", 31), ("groups", 9), ("labels", 4), ("labels", -9), ("prompt_ends", 13)]
    arrays = {array: getattr(index, array).copy() for array, _ in faults}  # the index itself is mapped from the file
    for array, wrong in faults:
        old = arrays[array]
        new = old.copy().reshape(-1)
        new[0] = wrong
        assert good.count(old.tobytes()) == 1
        place.write_bytes(good.replace(old.tobytes(), new.tobytes()))
        assert streamindex.read(place) is None
    place.write_bytes(good[:-10])
    assert streamindex.read(place) is None
    streaming._KNOWN.clear()
    data.update_index(spec, tmp_path)
    assert place.read_bytes() == good


def test_a_limit_beyond_the_first_file_takes_the_rows_of_the_next_files(tmp_path):
    for files, limit, used in ((3, 5, 3), (20, 19, 10)):
        root = write(tmp_path / str(files), files=files, rows=2)
        spec = hf(root, label_column="label", limit=limit)
        loaded = data.load_data(spec, 0)
        whole = data.load_data(hf(root, label_column="label"), 0).items(0, range(limit))
        found = loaded.items(0, range(limit))
        assert len(loaded) == limit and found.labels.tolist() == [row % 3 for row in range(limit)]
        assert torch.equal(found.samples, whole.samples)
        names = [f"train-{n:05}-of-{files:05}.parquet" for n in range(used)]
        assert [Path(name).name for name in streaming._KNOWN[spec.index_file].files] == names


def test_an_index_of_format_1_is_used_unless_a_limit_spans_several_files(tmp_path):
    root = write(tmp_path / "x", rows=2)
    commit = "0123456789abcdef" * 2 + "01234567"
    for limit, is_used in ((None, True), (1, True), (5, False)):
        streaming._KNOWN.clear()
        spec, run = hf(root, limit=limit), tmp_path / f"run-{limit}"
        data.update_index(spec, tmp_path)
        index = streamindex.read(tmp_path / spec.index_file)
        assert index.head.format == 2 and len(index.files) == (1 if limit == 1 else 3)
        old = replace(index, head=index.head.model_copy(update={"format": 1, "commit": commit}))
        streamindex.write(run / spec.index_file, old)
        assert data.streamed_commit(spec, run) == (commit if is_used else None)
        data.update_index(spec, tmp_path, run)
        assert streamindex.read(run / spec.index_file).head.format == (1 if is_used else 2)


# --- runs ---


def test_a_new_run_has_the_index_and_a_submit_downloads_nothing(tmp_path, capsys):
    stage = {"kind": "train", "recipe": "reflow/reflow", "images": 1}
    content = {"name": "x", "stages": {"teach": stage}, "data": hf(write(tmp_path / "x")).model_dump(mode="json")}
    spec = RunSpec.model_validate(content)
    run = start.create(tmp_path / "store", specfile.SpecSource(spec, tmp_path, "x"))
    place = run.root / spec.data.index_file
    assert place.read_bytes() == (tmp_path / "store" / spec.data.index_file).read_bytes()
    start.say_stream(spec, run)
    assert capsys.readouterr().out == ""  # it is a folder of this machine
    remote = RunSpec.model_validate({**content, "data": {**content["data"], "path": "org/x"}})
    assert remote.hub_inputs == set() and prefetch.resolve(remote, tmp_path / "store") == []
    commit = "0123456789abcdef" * 2 + "01234567"
    index = streamindex.read(place)
    named = replace(index, head=index.head.model_copy(update={"commit": commit}))
    streamindex.write(run.root / remote.data.index_file, named)
    start.say_stream(remote, run)
    start.say_stream(remote)
    at = "is streamed, not downloaded: each process that trains needs the network"
    assert capsys.readouterr().out == f"data org/x (commit 0123456789ab) {at}\ndata org/x {at}\n"


# --- by hub id ---

BY_ID = """
import hashlib, json, sys
from pathlib import Path
from distill import data
from distill.core.errors import InputError
from distill.data import streaming
from distill.spec.model import HfData

for run, section in json.loads(sys.argv[1]):
    streaming._KNOWN.clear()
    try:
        spec = HfData(kind="hf", size=8, stream=True, **section)
        data.update_index(spec, Path("store"), Path(run))
        loaded = data.load_data(spec, 0, Path(run), indexed=True)
        found = loaded.items(0, range(len(loaded)))
        values = hashlib.sha256(found.samples.numpy().tobytes()).hexdigest()
        print(json.dumps([len(loaded), found.labels.tolist(), values, data.streamed_commit(spec, Path(run))]))
    except InputError as error:
        print(json.dumps(str(error)))
"""


@pytest.mark.process
@pytest.mark.long
def test_a_hub_id_is_streamed_at_the_commit_that_a_run_began_with(tmp_path):
    old, new = pictures(tmp_path / "old", [0, 3, 1]), pictures(tmp_path / "new", [2, 2])
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x.jsonl").write_text('{"image": 1}')
    labelled = {"path": "org/x", "label_column": "label"}

    def ask(hub: Hub, *asked: tuple[str, dict[str, object]], offline: bool = False) -> list[object]:
        done = python(BY_ID, json.dumps(asked), hub=hub, cwd=tmp_path / "work", offline=offline)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with Hub({"datasets/org/x": {"main": old, "v2": new}, "datasets/org/plain": {"main": tmp_path / "plain"}}) as hub:
        commits = {name: commit.sha for name, commit in hub.commits["datasets/org/x"].items()}
        first, second, other = ask(
            hub, ("a", labelled), ("b", {**labelled, "revision": "v2"}), ("c", {"path": "org/plain"})
        )
        assert first[:2] == [3, [0, 3, 1]] and first[3] == commits["main"]
        assert second[:2] == [2, [2, 2]] and second[3] == commits["v2"]
        assert other == (
            "data.path=org/plain has no parquet files but files like x.jsonl, which cannot be streamed; use "
            "data.stream=false"
        )
        files = [each for each in hub.requests if "parquet" in each and "/resolve/" in each]
        assert {each.split("/resolve/")[1].split("/")[0] for each in files} == set(commits.values())
        hub.commits["datasets/org/x"]["main"] = hub.commits["datasets/org/x"]["v2"]
        hub.commits["datasets/org/x"]["older"] = Commit(old)
        hub.requests.clear()
        again, offline = ask(hub, ("a", labelled), ("e", labelled), offline=True)  # as in a job
        assert again == first
        assert all("/resolve/" in each for each in hub.requests)  # nothing is asked about the repository
        (newest,) = ask(hub, ("d", labelled))
        assert newest == second
    assert offline == (
        "data.path=org/x (split 'train') cannot be streamed: HF_HUB_OFFLINE=1 forbids it, but a stream needs the "
        "network; valid: a hub id that can be reached, or a file, folder or URL of parquet"
    )
    assert not list((tmp_path / "home").rglob("*.parquet"))


def test_images_that_are_only_paths_cannot_be_streamed(tmp_path):
    file = tmp_path / "x.parquet"
    images = [{"bytes": None, "path": f"{i}.png"} for i in range(10)]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    parquet.write_table(table(range(10), image=pa.array(images, kind)), file, row_group_size=4)
    with pytest.raises(InputError) as caught:
        data.load_data(hf(file), 0)
    assert str(caught.value) == (
        f"data.image_column=image: {file} has the paths of images, not the images, so it cannot be streamed; write the "
        "images themselves into the files, or use data.stream=false"
    )
    some = pa.array([{"bytes": image(0), "path": None}, *images[1:]], kind)
    parquet.write_table(table(range(10), image=some), file, row_group_size=4)
    said = r"row 1 \(.*x.parquet\): no image, a damaged one, or an extreme aspect ratio; remove them"
    with pytest.raises(InputError, match=said):
        data.load_data(hf(file), 0).items(0, [1])


def test_a_stream_that_is_gone_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(InputError, match="cannot be streamed: there is no such file or folder; valid: a hub id"):
        data.load_data(hf(tmp_path / "gone"), 0)
