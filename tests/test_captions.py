"""Images with captions: where captions are read from, when they are read again, and what that does to digests."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from distill import data
from distill.data import captions, indexed, overview
from distill.execution.batches import CollatedBatches
from distill.flow.conditioning import ConditionTable, HeldRows
from distill.flow.draws import Rows
from distill.spec.dataspec import PromptsData
from distill.spec.model import DigitsData, HfData, ImagesData, NoData

NAMES = ["a.png", "b.jpg", "x/a.png", "x/c.png"]
TEXTS = ['a cat, "sitting"', "a dog", "Grüße 猫", "a dog"]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.setattr(indexed, "_LOADED", {})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def images(root: Path) -> Path:
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 10 * i).save(root / name)
        os.utime(root / name, (1e9, 1e9))
    return root


def beside(root: Path, suffix: str = ".txt") -> Path:
    """Captions in a file for each image, as old as the images."""
    for name, text in zip(NAMES, TEXTS, strict=True):
        path = (images(root) / name).with_suffix(suffix)
        path.write_text(f"{text}\n")
        os.utime(path, (1e9, 1e9))
    return root


def spec(root: Path, **fields) -> ImagesData:
    return ImagesData(kind="images", path=str(root), size=4, channels=1, captions=True, **fields)


def seen(loaded: data.DataSet) -> list[tuple[int, str]]:
    """The grey level and the caption of each item."""
    samples, labels, _ = loaded.items(0, range(len(loaded)))
    levels = ((samples[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    return list(zip(levels, [loaded.prompts[label] for label in labels.tolist()], strict=True))


EXPECTED = list(zip([0, 10, 20, 30], TEXTS, strict=True))


def test_captions_beside_images_and_in_tables_are_the_same_data(tmp_path):
    found = [data.load_data(spec(beside(tmp_path / end, end)), 0) for end in (".txt", ".caption")]
    rows = list(zip(NAMES, TEXTS, strict=True))
    jsonl = images(tmp_path / "jsonl")
    (jsonl / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": text, "n": 1}) + "\n" for name, text in reversed(rows))
    )
    quoted = "".join(f'"{name}","{text.replace(chr(34), chr(34) * 2)}"\r\n' for name, text in rows)
    (images(tmp_path / "csv") / "metadata.csv").write_bytes(f"\ufefffile_name,caption\r\n{quoted}".encode())
    table = {"caption": pa.array(TEXTS).dictionary_encode(), "file_name": [f"./{name}" for name in NAMES]}
    parquet.write_table(pa.table(table), images(tmp_path / "parquet") / "metadata.parquet")
    split = images(tmp_path / "split")
    (split / "metadata.csv").write_text("file_name,text\n" + quoted.splitlines()[0] + "\nb.jpg,a dog\n")
    (split / "x" / "metadata.csv").write_text("text,file_name\nGrüße 猫,a.png\na dog,c.png\n")
    found += [data.load_data(spec(tmp_path / kind), 0) for kind in ("jsonl", "csv", "parquet", "split")]
    for each in found:
        assert seen(each) == EXPECTED
        assert (each.num_classes, list(each.prompts)) == (3, [TEXTS[0], TEXTS[1], TEXTS[2]])
    assert len({each.digest for each in found}) == 1


def test_a_first_object_without_a_caption_and_an_empty_column_do_not_matter(tmp_path):
    root, rows = images(tmp_path / "set"), list(zip(NAMES, TEXTS, strict=True))
    first = [{"file_name": rows[0][0]}, {"file_name": rows[1][0], "caption": rows[1][1], "text": None}]
    lines = [*first, *({"file_name": name, "caption": text} for name, text in rows[2:])]
    (root / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert seen(data.load_data(spec(root, max_unreadable=1), 0)) == EXPECTED[1:]
    (root / "metadata.jsonl").unlink()
    quoted = "".join(f'"{name}","{text.replace(chr(34), chr(34) * 2)}"\n' for name, text in rows)
    (root / "metadata.csv").write_bytes(f'\ufeff"file_name","text"\n{quoted}'.encode())
    assert seen(data.load_data(spec(root), 0)) == EXPECTED


def test_a_changed_caption_changes_the_digest_and_only_that_file_is_read_again(tmp_path, monkeypatch):
    read, real = [], captions.read_regular
    monkeypatch.setattr(
        captions, "read_regular", lambda path, *args, **kw: read.append(path) or real(path, *args, **kw)
    )
    chosen = spec(beside(tmp_path / "set"))
    data.update_index(chosen, tmp_path / "store")
    first = data.load_data(chosen, 0, tmp_path / "store")
    assert sorted(read) == sorted((tmp_path / "set" / name).with_suffix(".txt") for name in NAMES)
    read.clear()
    monkeypatch.setattr(indexed, "_INDEXES", {})
    assert data.load_data(chosen, 0, tmp_path / "store").digest == first.digest and read == []
    changed = tmp_path / "set" / "b.txt"
    changed.write_text("a cow")
    monkeypatch.setattr(indexed, "_INDEXES", {})
    second = data.load_data(chosen, 0, tmp_path / "store")
    assert (read, second.digest == first.digest) == ([changed], False)
    assert seen(second) == [*EXPECTED[:1], (10, "a cow"), *EXPECTED[2:]]


def test_a_run_reads_its_own_copy_of_the_captions(tmp_path):
    chosen = spec(beside(tmp_path / "set"))
    data.update_index(chosen, tmp_path / "store", tmp_path / "store" / "run")
    for name in NAMES:
        (tmp_path / "set" / name).with_suffix(".txt").unlink()
    loaded = data.load_data(chosen, 0, tmp_path / "store" / "run", indexed=True)
    assert seen(loaded) == EXPECTED


def test_captions_of_a_split(tmp_path):
    beside(tmp_path / "train")
    images(tmp_path / "val")
    assert seen(data.load_data(spec(tmp_path, split="train"), 0)) == EXPECTED
    plain = ImagesData(kind="images", path=str(tmp_path / "train"), size=4)
    assert spec(tmp_path / "train").index_file == spec(tmp_path, split="train").index_file
    assert plain.index_file != spec(tmp_path / "train").index_file


def test_images_without_captions_are_skipped_and_those_that_get_one_are_read(tmp_path, monkeypatch):
    root = beside(tmp_path / "set")
    (root / "b.txt").unlink()
    chosen = spec(root, max_unreadable=1)
    data.update_index(chosen, tmp_path)
    assert seen(data.load_data(chosen, 0, tmp_path)) == [EXPECTED[0], *EXPECTED[2:]]
    (root / "b.txt").write_text("a dog")
    monkeypatch.setattr(indexed, "_INDEXES", {})
    assert seen(data.load_data(chosen, 0, tmp_path)) == EXPECTED


def test_captions_of_a_column(tmp_path, monkeypatch):
    root = images(tmp_path / "set")
    rows = [{"bytes": (root / name).read_bytes(), "path": None} for name in NAMES]
    table = pa.table({"image": rows, "words": pa.array(TEXTS, pa.large_string())})
    parquet.write_table(table, tmp_path / "set.parquet")
    chosen = HfData(kind="hf", path=str(tmp_path / "set.parquet"), size=4, channels=1, caption_column="words")
    data.update_index(chosen, tmp_path)
    first = data.load_data(chosen, 0, tmp_path)
    assert seen(first) == EXPECTED
    assert first.digest == data.load_data(spec(beside(tmp_path / "set")), 0).digest
    monkeypatch.setattr(indexed, "_INDEXES", {})
    monkeypatch.delattr("distill.data.tables._captions")  # they come from the index
    assert data.load_data(chosen, 0, tmp_path).digest == first.digest


def test_what_a_plan_shows_of_the_data(tmp_path):
    root = beside(tmp_path / "set")
    (root / "b.txt").unlink()
    chosen = spec(root, max_unreadable=1)
    found = overview.of(chosen, data.load_data(chosen, 0), None)
    assert found.lines() == [
        "data: 3 images of [1, 4, 4], 3 prompts",
        '  prompt 0: a cat, "sitting"',
        "  prompt 1: Grüße 猫",
        "  prompt 2: a dog",
        f"  skipped 1: {root}/b.jpg (row 1): no caption",
    ]
    (tmp_path / "a.txt").write_text("a\n\n\u202eb\nc\nd\n")
    alone = PromptsData(kind="prompts", path=str(tmp_path / "a.txt"), max_unreadable=1)
    assert overview.of(alone, None, None).lines() == [
        "data: 4 prompts",
        "  prompt 0: a",
        "  prompt 1: \ufffdb",
        "  prompt 2: c",
        "  skipped 1: line 2: an empty prompt",
    ]
    digits = DigitsData(kind="digits")
    assert overview.of(digits, data.load_data(digits, 0), None).lines() == [
        "data: 1,797 images of [1, 8, 8], 10 classes"
    ]
    assert overview.of(NoData(kind="none"), None, None) is None


def test_each_image_of_a_batch_comes_with_the_row_of_its_prompt(tmp_path):
    loaded = data.load_data(spec(beside(tmp_path / "set")), 0)
    table = ConditionTable(HeldRows({"embedding": torch.tensor([[0.5], [1.5], [2.5]])}))
    source = CollatedBatches.of(data.DataSource(loaded, 4, 3), table, 3)
    for step in range(3):
        found = source.batch(step, Rows(0, 4, 4))
        levels = ((found.data[:, 0, 0, 0] + 1) * 12.75).round().int().tolist()
        assert sorted(levels) == [0, 1, 2, 3]
        assert found.cond["embedding"][:, 0].tolist() == [[0.5, 1.5, 2.5, 1.5][level] for level in levels]
