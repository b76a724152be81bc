"""Data that cannot be used: one message that says what was given, what is valid and what to do.

To add a case, add a line to CASES: a function that writes files into the current folder, the section `data` of a spec,
and the message. {tmp} is replaced by the current folder.
"""

import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_tars import GOOD, LAST, sample, write

from distill import data
from distill.core.errors import InputError
from distill.spec import checks, specfile


def refusal(section: dict[str, object]) -> str:
    """The message about a section `data` of a spec."""
    with pytest.raises(InputError) as caught:
        spec = specfile.located(specfile.validate({"name": "x", "stages": {}, "data": section}, "spec"), [Path.cwd()])
        if mistakes := list(checks.data_mistakes(spec.data)):
            raise InputError(specfile.join("spec", mistakes))
        data.load_data(spec.data, 0)
    return str(caught.value)


def nothing() -> None: ...


# --- tars ---


def tars(path: str, **fields) -> dict[str, object]:
    return {"kind": "tars", "path": path, "size": 8, **fields}


def one() -> None:
    write(Path("a.tar"), sample("1", 1, txt="one", cls="0", json='{"id": 3, "text": "one"}'))


def folder(*names: str) -> Callable[[], None]:
    def make() -> None:
        for name in names:
            Path("x", name).parent.mkdir(parents=True, exist_ok=True)
            Path("x", name).write_bytes(b"")

    return make


def cut() -> None:
    Path("a.tar").write_bytes((GOOD + LAST)[:-600])


def escapes() -> None:
    write(Path("a.tar"), [("\x1b[2J.txt", b"text"), *sample("2", 2)])


def compressed(name: str, content: bytes) -> Callable[[], None]:
    return lambda: Path(name).write_bytes(content) and None


CASES = {
    "no tars": (
        nothing,
        tars("x"),
        "data.path=x does not exist; give a .tar file, a folder of them, or a pattern like shards/{00000..00127}.tar",
    ),
    "empty folder": (
        folder("a.jpg"),
        tars("x"),
        "data.path={tmp}/x contains no .tar files; give a folder with .tar files",
    ),
    "splits": (
        folder("train/0.tar", "val/0.tar"),
        tars("x"),
        "data.path={tmp}/x contains no .tar files; the folder train has some: give one folder",
    ),
    "compressed folder": (
        folder("0.tar", "1.tar.gz", "2.tgz"),
        tars("x"),
        "data.path={tmp}/x contains compressed tars (1.tar.gz, 2.tgz), whose images cannot be read in random "
        "order; decompress them, or remove them",
    ),
    "gzip": (
        compressed("a.tar", gzip.compress(GOOD)),
        tars("a.tar"),
        "data.path: {tmp}/a.tar is compressed with gzip, so its images cannot be read in random order; decompress "
        "it with `gunzip`, and give the .tar file",
    ),
    "xz": (
        compressed("a.tar", lzma.compress(GOOD)),
        tars("a.tar"),
        "data.path: {tmp}/a.tar is compressed with xz, so its images cannot be read in random order; decompress it "
        "with `unxz`, and give the .tar file",
    ),
    "url": (
        nothing,
        tars("https://host/{0..9}.tar"),
        "data.path=https://host/{0..9}.tar: tars are read from files of this machine; download them, and give "
        "their folder",
    ),
    "missing of a pattern": (
        folder("1.tar"),
        tars("x/{0..9}.tar"),
        "data.path={tmp}/x/{0..9}.tar: 9 of 10 tars do not exist (0.tar, 2.tar, 3.tar, ...); correct the pattern, "
        "or copy them",
    ),
    "backward range": (
        folder("1.tar"),
        tars("x/{9..0}.tar"),
        "data.path: the pattern {9..0}.tar has the range {9..0}; valid: ranges like {00000..00127} and lists like "
        "{a,b}",
    ),
    "nested braces": (
        folder("1.tar"),
        tars("x/{a,{b,c}}.tar"),
        "data.path: the pattern {a,{b,c}}.tar has nested braces, or one without the other; valid: ranges like "
        "{00000..00127} and lists like {a,b}",
    ),
    "huge range": (
        folder("1.tar"),
        tars("x/{0..9}{0..9999999}.tar"),
        "data.path: the pattern {0..9999999}.tar has the range {0..9999999}; valid: ranges like {00000..00127} and "
        "lists like {a,b}",
    ),
    "FIFO": (
        lambda: os.mkfifo("a.tar"),
        tars("{a,a}.tar"),
        "data.path: {tmp}/a.tar cannot be read: it is a FIFO, not a file",
    ),
    "caption_key": (
        one,
        tars("a.tar", caption_key="caption"),
        "spec: data.caption_key: 'caption' given; must be txt or json.FIELD",
    ),
    "label_key": (
        one,
        tars("a.tar", label_key="json."),
        "spec: data.label_key: 'json.' given; must be cls or json.FIELD",
    ),
    "both keys": (
        one,
        tars("a.tar", caption_key="txt", label_key="cls"),
        "spec: data: caption_key and label_key are both given; samples have captions or classes, so remove one of them",
    ),
    "cut": (
        cut,
        tars("a.tar", max_unreadable=0),
        "a.tar: 1 of 3 images cannot be used: {tmp}/a.tar (row 2): the tar is cut; repair or remove them, or "
        "increase data.max_unreadable (now 0)",
    ),
    "no such field": (
        one,
        tars("a.tar", caption_key="json.caption", max_unreadable=9),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1.png (row 0): no caption; repair or remove them, or "
        "increase data.max_unreadable (now 9)",
    ),
    "field of another type": (
        one,
        tars("a.tar", caption_key="json.id"),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1.png (row 0): no caption; repair or remove them, or "
        "increase data.max_unreadable (now 0)",
    ),
    "text as class id": (
        one,
        tars("a.tar", label_key="json.text"),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1 (row 0): no class id; repair or remove them, or "
        "increase data.max_unreadable (now 0)",
    ),
    "no images": (
        escapes,
        tars("a.tar"),
        "a.tar: 1 of 2 images cannot be used: {tmp}/a.tar: \ufffd[2J (row 0): no image; repair or remove them, or "
        "increase data.max_unreadable (now 0)",
    ),
    "not a tar": (
        compressed("a.tar", b"<html>" * 1000),
        tars("a.tar"),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar (row 0): a header of the tar is broken; repair or remove "
        "them, or increase data.max_unreadable (now 0)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_data_is_refused_with_exactly_this_message(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, section, message = CASES[case]
    make()
    assert refusal(section) == message.replace("{tmp}", str(tmp_path))
