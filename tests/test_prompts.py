"""Prompts in two arrays: texts, digests, numbering in order of first appearance, and checks of captions."""

import hashlib
import random

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from distill.core.errors import InputError
from distill.data import index, prompts
from distill.data.images import ImageData
from distill.data.index import FoundImages
from distill.data.prompts import CaptionFault, Captions, Prompts
from distill.data.rows import FileRows
from distill.spec.model import ImagesData

TEXTS = ["a cat", "Grüße 猫", "a cat", "x", "🐈‍⬛", "Grüße 猫"]


def test_prompts_are_the_texts():
    found = Prompts.of(TEXTS)
    assert (list(found), len(found)) == (TEXTS, 6)
    assert (found[-1], found[1:4], found[::-2]) == (TEXTS[-1], TEXTS[1:4], TEXTS[::-2])
    with pytest.raises(IndexError):
        found[6]
    assert list(Prompts.of([])) == []


def test_the_digest_covers_texts_and_borders():
    expected = hashlib.sha256(np.array([1, 3], "<i8").tobytes() + b"abc").hexdigest()
    assert Prompts.of(["a", "bc"]).digest == expected
    assert Prompts.of(["ab", "c"]).digest != expected
    assert Prompts.of(iter(["a", "bc"])).digest == expected


def test_unique_numbers_texts_in_order_of_first_appearance():
    found, labels = prompts.unique(TEXTS)
    assert list(found) == ["a cat", "Grüße 猫", "x", "🐈‍⬛"]
    assert labels.tolist() == [0, 1, 0, 2, 3, 1] and labels.dtype == np.int64
    assert [each.tolist() for each in (prompts.unique([])[1], prompts.unique(["a"])[1])] == [[], [0]]


def test_unique_over_chunks_equals_a_dictionary(monkeypatch):
    monkeypatch.setattr(prompts, "CHUNK", 7)
    draw = random.Random(1)
    texts = [f"prompt {draw.randrange(40)} é" for _ in range(200)]
    found, labels = prompts.unique(iter(texts))
    assert list(found) == list(dict.fromkeys(texts))
    assert [found[label] for label in labels.tolist()] == texts


def test_arrays_of_a_file_are_checked(monkeypatch):
    monkeypatch.setattr(prompts, "CHUNK", 2)
    found = Prompts.of(dict.fromkeys(TEXTS))
    assert prompts.are_valid(found.content, found.ends)
    inside = found.ends.copy()
    inside[0] += 3  # within "ü"; the whole is still UTF-8
    wrong = found.content.copy()
    wrong[-1] = 0xFF
    cases = [(found.content, inside), (wrong, found.ends), (found.content[:-1], found.ends)]
    cases += [(found.content, np.sort(found.ends)[::-1]), (found.content, found.ends * 0), (found.content, inside[:0])]
    assert not any(prompts.are_valid(*case) for case in cases)


def test_captions_without_usable_text_get_the_reason_as_label():
    found = Captions.of(["b", None, " a\n", b"\xef\xbb\xbfb", b"\xff", "\t", "a\x1b[31m", "two\nlines", "\ud800"])
    assert list(found.prompts) == ["b", "a", "two\nlines"]
    faults = [CaptionFault.ABSENT, CaptionFault.NOT_UTF8, CaptionFault.EMPTY, CaptionFault.CONTROL]
    absent, not_utf8, empty, control = (-int(fault) for fault in faults)
    assert found.labels.tolist() == [0, absent, 1, 0, not_utf8, empty, control, 2, control]


# --- in the index of images ---


def found_images(root, stored):
    """Grey images of levels 0, 10, 20 ... with these captions."""
    names = [f"{i}.png" for i in range(len(stored))]
    for i, name in enumerate(names):
        Image.new("L", (2, 2), 10 * i).save(root / name)
    stats = [(root / name).stat() for name in names]
    return FoundImages(FileRows(root, len(names), names.__getitem__), names, stats, None, None, "", Captions.of(stored))


def loaded(root, stored, **options):
    found = found_images(root, stored)
    spec = ImagesData(kind="images", path=str(root), size=2, channels=1, **options)
    return ImageData("set", found.rows, index.make(found, None, 0), spec, 0)


def test_labels_of_captioned_images_are_numbers_of_their_prompts(tmp_path):
    data = loaded(tmp_path, ["b", "a", " b "])
    assert (list(data.prompts), data.num_classes, len(data)) == (["b", "a"], 2, 3)
    assert data.items(0, [2, 1, 0]).labels.tolist() == [0, 1, 0]


def test_the_digest_covers_the_captions(tmp_path):
    digests = {loaded(tmp_path, stored).digest for stored in (["b", "a"], ["a", "b"], ["b", "c"], ["b", "b"])}
    assert len(digests) == 4
    assert loaded(tmp_path, ["b\n", "a"]).digest == loaded(tmp_path, ["b", "a"]).digest


def test_images_without_a_usable_caption_are_skipped_and_named(tmp_path, capfd):
    stored = ["b", None, b"\xff", "", "a"]
    data = loaded(tmp_path, stored, max_unreadable=3)
    named = (
        f"set: 3 of 5 images cannot be used and are skipped: {tmp_path}/1.png (row 1): no caption, {tmp_path}/2.png "
        f"(row 2): a caption that is not UTF-8, {tmp_path}/3.png (row 3): an empty caption"
    )
    assert capfd.readouterr().err == f"warning: {named}\n"
    items = data.items(0, [0, 1])
    assert items.labels.tolist() == [0, 1]
    assert ((items.samples[:, 0, 0, 0] + 1) * 127.5).round().tolist() == [0, 40]
    with pytest.raises(InputError) as error:
        loaded(tmp_path, stored, max_unreadable=2)
    expected = named.replace(" and are skipped", "")
    assert str(error.value) == f"{expected}; repair or remove them, or increase data.max_unreadable (now 2)"


def test_an_index_with_captions_is_read_as_it_was_written_unless_it_is_damaged(tmp_path):
    path = tmp_path / "index.safetensors"
    index.write(path, made := index.make(found_images(tmp_path, ["b", None, "a"]), None, 0))
    read = index.read(path)
    assert list(read.captions.prompts) == ["b", "a"] and read.labels.tolist() == made.labels.tolist() == [0, -1, 1]
    assert read.num_classes == 2
    arrays, head = load_file(path), {"index": read.head.model_dump_json()}
    wrong = {
        "labels": np.array([0, 1, 2]),
        "prompts": np.frombuffer(b"\xff\xfe", np.uint8),
        "prompt_ends": np.array([2, 1]),
        "caption_files": np.zeros((2, 3), np.int64),
    }
    for name, value in wrong.items():
        save_file({**arrays, name: value}, path, metadata=head)
        assert index.read(path) is None, name
    save_file({name: value for name, value in arrays.items() if name != "prompts"}, path, metadata=head)
    assert index.read(path) is None
    save_file({**arrays, "labels": np.array([0, -7, 1])}, path, metadata=head)
    assert index.read(path) is None
