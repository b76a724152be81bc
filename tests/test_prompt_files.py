"""Data of kind prompts: what is read, what is kept, and which specs may use it."""

import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file, save_file

from distill import data
from distill.cli import arguments
from distill.core.errors import InputError
from distill.data import promptfiles, promptindex
from distill.spec import checks, specfile
from distill.spec.dataspec import PromptsData

TEXTS = ["a cat", "Grüße 猫", "a cat", "two  words"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(promptfiles, "_READ", {})


def spec(path, **fields) -> PromptsData:
    return PromptsData(kind="prompts", path=str(path), **fields)


def lines(path, *texts: str) -> PromptsData:
    """A text file that was there long before it is read."""
    path.write_text("".join(f"{text}\n" for text in texts))
    os.utime(path, (1e9, 1e9))
    return spec(path)


def test_all_formats_give_the_same_prompts_with_repetitions(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeff a cat\r\nGrüße 猫\na cat\ntwo  words".encode())
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps({'id': 1, 'prompt': text})}\n" for text in TEXTS))
    parquet.write_table(pa.table({"n": [1, 2, 3, 4], "p": TEXTS, "q": TEXTS[::-1]}), tmp_path / "a.parquet")
    (tmp_path / "set" / "more").mkdir(parents=True)
    parquet.write_table(pa.table({"p": TEXTS[:1]}), tmp_path / "set" / "a.parquet")
    parquet.write_table(
        pa.table({"p": pa.array(TEXTS[1:], pa.large_string())}), tmp_path / "set" / "more" / "b.parquet"
    )
    chosen = [spec(tmp_path / "a.txt"), spec(tmp_path / "a.jsonl"), spec(tmp_path / "a.parquet", column="p")]
    found = [data.load_prompts(each) for each in [*chosen, spec(tmp_path / "set")]]
    assert [list(each) for each in found] == [TEXTS] * 4
    assert len({each.digest for each in found}) == 1
    assert data.load_data(chosen[0], 0) is None


def test_lines_without_a_prompt_are_skipped_and_named(tmp_path, capfd):
    lines(tmp_path / "a.txt", "a", "", "b")
    assert list(data.load_prompts(spec(tmp_path / "a.txt", max_unreadable=1))) == ["a", "b"]
    expected = "1 of 3 prompts cannot be used and are skipped: line 2: an empty prompt"
    assert capfd.readouterr().err == f"warning: {tmp_path}/a.txt: {expected}\n"


def test_prompts_are_read_once_until_the_file_changes(tmp_path, monkeypatch):
    chosen, store = lines(tmp_path / "a.txt", *TEXTS), tmp_path / "store"
    data.update_index(chosen, store, store / "run")
    monkeypatch.setattr(promptfiles, "_READ", {})
    with monkeypatch.context() as patch:
        patch.delattr(promptfiles, "_read")
        assert list(data.load_prompts(chosen, store)) == TEXTS
        data.update_index(chosen, store, store / "other")
    lines(tmp_path / "a.txt", "changed")
    monkeypatch.setattr(promptfiles, "_READ", {})
    assert list(data.load_prompts(chosen, store / "run", indexed=True)) == TEXTS
    monkeypatch.setattr(promptfiles, "_READ", {})
    assert list(data.load_prompts(chosen, store)) == ["changed"]


def test_damaged_copies_are_replaced(tmp_path, monkeypatch):
    chosen, store = lines(tmp_path / "a.txt", "a", "bc"), tmp_path / "store"
    data.update_index(chosen, store)
    path = store / chosen.index_file
    arrays, head = load_file(path), promptindex.read(path).head
    for name, value in {"ends": np.array([3, 1]), "content": np.frombuffer(b"\xff\xfe\xfd", np.uint8)}.items():
        save_file({**arrays, name: value}, path, metadata={"prompts": head.model_dump_json()})
        assert promptindex.read(path) is None
    save_file(arrays, path, metadata={"prompts": head.model_copy(update={"total": 1}).model_dump_json()})
    assert promptindex.read(path) is None
    path.write_bytes(b"x")
    monkeypatch.setattr(promptfiles, "_READ", {})
    data.update_index(chosen, store)
    assert list(promptindex.read(path).prompts) == ["a", "bc"]


@pytest.mark.long
def test_memory_is_about_the_bytes_of_the_prompts(tmp_path):
    count, path = 200_000, tmp_path / "a.txt"
    path.write_text("".join(f"prompt number {i:08}\n" for i in range(count)))
    tracemalloc.start()
    found = data.load_prompts(spec(path))
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(found), found[count - 1]) == (count, f"prompt number {count - 1:08}")
    assert kept < 1.1 * count * (22 + 8) and most < 3 * count * (22 + 8) + 16e6


# --- in a spec ---


def mistakes(tmp_path, **content: object) -> str:
    lines(tmp_path / "a.txt", "a")
    whole = {"name": "x", "data": {"kind": "prompts", "path": str(tmp_path / "a.txt")}, **content}
    with pytest.raises(InputError) as error:
        checks.check(specfile.validate(whole, "spec"), tmp_path)
    return str(error.value)


def test_prompts_are_no_images(tmp_path):
    train = {"kind": "train", "recipe": "pretrain/flow_matching", "images": 64, "batch_size": 32}
    network = {"kind": "unet", "channels": [8]}
    assert mistakes(tmp_path, stages={"s": {**train, "network": network}}) == (
        "spec 'x': 2 mistakes\n"
        "  stages.s: pretrain/flow_matching needs data, but the spec has only prompts; e.g. data: {kind: digits}\n"
        "  data: no stage uses a teacher that takes prompts, so they have no effect; remove it"
    )
    captions = {"kind": "images", "path": str(tmp_path), "size": 8, "captions": True}
    assert mistakes(tmp_path, data=captions, stages={"s": {**train, "network": network}}) == (
        "spec 'x': stages.s.network: a new network takes class labels, but no captions; remove the captions from data, "
        "or start from a network that takes prompts (init)"
    )
    with pytest.raises(InputError) as error:
        arguments.data(f"{{kind: prompts, path: {tmp_path}/a.txt}}")
    assert str(error.value) == "--data: kind prompts has no images; give data with images"


def test_a_first_object_whose_prompt_is_null_does_not_hide_the_others(tmp_path, capfd):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": null, "id": 1}\n{"prompt": "a cat", "id": 2}\n')
    assert list(data.load_prompts(PromptsData(kind="prompts", path=str(path), max_unreadable=1))) == ["a cat"]
    assert (
        capfd.readouterr().err == f"warning: {path}: 1 of 2 prompts cannot be used and are skipped: line 1: no prompt\n"
    )


def test_the_first_thousand_objects_decide_which_columns_have_texts(tmp_path):
    def found(*rows: dict[str, object], column: str | None = None) -> list[str]:
        path = tmp_path / "x.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        promptfiles._READ.clear()
        return list(data.load_prompts(PromptsData(kind="prompts", path=str(path), max_unreadable=999, column=column)))

    assert found({"id": 7}, {"id": 8, "prompt": "a cat"}) == ["a cat"]
    assert found({"id": "7", "prompt": "a dog"}, {"id": 8, "prompt": "a cat"}) == ["a dog", "a cat"]
    assert found({"note": None, "prompt": "a dog"}, {"prompt": "a cat"}) == ["a dog", "a cat"]
    empty = [{"id": "7", "prompt": None}] * 999
    assert found(*empty, {"id": "8", "prompt": "a cat"}, column="prompt") == ["a cat"]
    with pytest.raises(InputError, match="has 2 columns with texts; choose one with data.column: id, prompt"):
        found(*empty, {"id": "8", "prompt": "a cat"})


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet"])
def test_a_fifo_is_refused_instead_of_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError) as error:
        data.load_prompts(spec(tmp_path / name))
    assert str(error.value) == f"{tmp_path / name} cannot be read: it is a FIFO, not a file"
