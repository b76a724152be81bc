"""Data that cannot be used: one message that says what was given, what is valid and what to do.

To add a case, add a line to CASES: a function that writes files into the current folder, the section `data` of a spec,
and the message. {tmp} is replaced by the current folder, and {set} by its folder `set`.
"""

import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save_file
from test_tars import GOOD, LAST, sample, write

from distill import data
from distill.core.errors import InputError
from distill.data import streams
from distill.execution import sources
from distill.spec import specfile
from distill.spec.model import LatentsData
from distill.teachers import LoadedTeacher
from distill.teachers.analytic import GaussianField


def refusal(section: dict[str, object]) -> str:
    """The message about a section `data` of a spec."""
    with pytest.raises(InputError) as caught:
        spec = specfile.located(specfile.validate({"name": "x", "stages": {}, "data": section}, "spec"), [Path.cwd()])
        if mistakes := list(spec.data.mistakes()):
            raise InputError(specfile.join("spec", mistakes))
        data.load_data(spec.data, 0)
        data.load_prompts(spec.data)
    return str(caught.value)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "PAUSES", ())


def nothing() -> None: ...


# --- tars ---


def tars(path: str, **fields) -> dict[str, object]:
    return {"kind": "tars", "path": path, "size": 8, **fields}


def bucketed(size: object = (32, 48), **fields: object) -> dict[str, object]:
    return {"kind": "images", "path": "x", "size": list(size) if isinstance(size, tuple) else size, "buckets": fields}


def wide() -> None:
    Path("y").mkdir()
    Image.new("L", (65000, 1)).save("y/wide.png")


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


# --- latents ---

Z = np.zeros((4, 2, 8, 8), np.float32)


def latents(path: str, **fields) -> dict[str, object]:
    return {"kind": "latents", "path": path, "scaled": True, **fields}


def arrays(**files: object) -> Callable[[], None]:
    """Writes .npy files; `a/b` is given as a__b."""

    def make() -> None:
        for name, array in files.items():
            path = Path(name.replace("__", "/") + ".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)

    return make


def tensors(name: str = "a", **named: object) -> Callable[[], None]:
    return lambda: save_file({key: np.ascontiguousarray(each) for key, each in named.items()}, f"{name}.safetensors")


def cut_arrays() -> None:
    arrays(a=Z)()
    Path("a.npy").write_bytes(Path("a.npy").read_bytes()[:-100])


def cut_tensors() -> None:
    tensors(latents=Z)()
    Path("a.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:-100])


def longer() -> None:
    arrays(a=Z)()
    Path("a.npy").write_bytes(Path("a.npy").read_bytes() + b"12345")


def both() -> None:
    arrays(x__a=Z)()
    tensors("x/b", latents=Z)()


LATENTS = {
    "no latents": (
        nothing,
        latents("x"),
        "data.path=x does not exist; give a .npy or .safetensors file, or a folder of them",
    ),
    "folder without latents": (
        folder("a.png"),
        latents("x"),
        "data.path={tmp}/x contains no .npy and no .safetensors files; give a folder with files of one of these types",
    ),
    "both types": (
        both,
        latents("x"),
        "data.path={tmp}/x contains .npy and .safetensors files (a.npy, b.safetensors, ...); give a folder with files "
        "of one type",
    ),
    "archive of arrays": (
        compressed("a.npz", b""),
        latents("a.npz"),
        "data.path={tmp}/a.npz is an archive of arrays; save each with np.save",
    ),
    "pickled tensors": (
        compressed("a.pt", b""),
        latents("a.pt"),
        "data.path={tmp}/a.pt is a pickled file, which is never unpickled; save its tensors with "
        "safetensors.torch.save_file",
    ),
    "scaled is missing": (
        nothing,
        {"kind": "latents", "path": "x"},
        "spec: data.scaled: missing (whether they are scaled as the network takes them; false: as the teacher's "
        "autoencoder returns them)",
    ),
    "mixed shapes": (
        arrays(x__a=Z, x__b=Z[..., :4], x__c=Z[:, :1]),
        latents("x"),
        "data.path={tmp}/x: 2 of 3 files have samples of another shape than [2, 8, 8], the shape of the others: b.npy "
        "[2, 8, 4], c.npy [1, 8, 8]; give latents of one shape",
    ),
    "pickled array": (
        arrays(a=np.array([{}], object)),
        latents("a.npy"),
        "{tmp}/a.npy contains Python objects, which are never unpickled; save an array of numbers: np.save(FILE, "
        "np.stack(LIST))",
    ),
    "cut npy": (
        cut_arrays,
        latents("a.npy"),
        "{tmp}/a.npy is not a .npy file, or is damaged or cut (mmap length is greater than file size); copy or make it "
        "again",
    ),
    "longer npy": (
        longer,
        latents("a.npy"),
        "{tmp}/a.npy has 2,181 bytes, but its header says 2,176: it is damaged or cut; copy or make it again",
    ),
    "cut safetensors": (
        cut_tensors,
        latents("a.safetensors"),
        "{tmp}/a.safetensors is not a safetensors file, or is damaged or cut (Error while deserializing header: "
        "incomplete metadata, file not fully covered); copy or make it again",
    ),
    "two bad files": (
        lambda: arrays(x__a=Z, x__b=Z.astype(int), x__c=Z[0, 0, 0, 0])(),
        latents("x"),
        "2 of 3 files of data.path={tmp}/x: {tmp}/x/b.npy has the data type int64; latents are float16, bfloat16, "
        "float32 or float64; {tmp}/x/c.npy has shape []; valid: [N, C, h, w], [N, C, F, h, w] or [N, d]",
    ),
    "complex numbers": (
        arrays(a=Z.astype(np.complex64)),
        latents("a.npy"),
        "{tmp}/a.npy has the data type <c8; valid: float16, float32, float64, bool and whole numbers (bfloat16 only in "
        "safetensors files)",
    ),
    "Fortran order": (
        arrays(a=np.asfortranarray(Z)),
        latents("a.npy"),
        "{tmp}/a.npy is in Fortran order, so that reading one sample would read the whole file; save it with "
        "np.save(FILE, np.ascontiguousarray(ARRAY))",
    ),
    "dimensions": (
        arrays(a=Z[0]),
        latents("a.npy", one_per_file=False),
        "{tmp}/a.npy has shape [2, 8, 8]; valid with data.one_per_file: false: [N, C, h, w], [N, C, F, h, w] or [N, d]",
    ),
    "empty latents": (
        arrays(a=Z[:0]),
        latents("a.npy"),
        "data.path={tmp}/a.npy contains no samples; give files with latents",
    ),
    "odd moments": (
        arrays(a=Z[:, :1]),
        latents("a.npy", moments=True),
        "{tmp}/a.npy has samples of shape [1, 8, 8]; with data.moments: true, half of the channels is the mean and "
        "half the log variance, so their number must be even",
    ),
    "key of npy": (
        arrays(a=Z),
        latents("a.npy", key="latents"),
        "data.key=latents is the name of a tensor, but data.path={tmp}/a.npy has .npy files, whose arrays have no "
        "names; remove it",
    ),
    "several tensors": (
        tensors(z=Z, y=Z),
        latents("a.safetensors"),
        "{tmp}/a.safetensors has the tensors y, z; name the latents in data.key",
    ),
    "unknown key": (
        tensors(z=Z, y=Z),
        latents("a.safetensors", key="x"),
        "data.key=x: {tmp}/a.safetensors has no such tensor; valid: y, z",
    ),
    "mirrored of another shape": (
        tensors(z=Z, y=Z[:1]),
        latents("a.safetensors", mirrored_key="y"),
        "{tmp}/a.safetensors, tensor y has shape [1, 2, 8, 8], but z [4, 2, 8, 8]; data.mirrored_key needs a mirrored "
        "one for each sample",
    ),
    "labels of another length": (
        arrays(a=Z, b=np.arange(3)),
        latents("a.npy", labels="b.npy"),
        "{tmp}/b.npy has shape [3], but there are 4 samples; give one class id for each sample, in the order of the "
        "files: [4]",
    ),
    "labels that are no ids": (
        tensors(z=Z, y=np.zeros(4)),
        latents("a.safetensors", labels="y"),
        "{tmp}/a.safetensors, tensor y has the data type float64; class ids are whole numbers",
    ),
    "negative labels": (
        arrays(a=Z, b=np.arange(4) - 1),
        latents("a.npy", labels="b.npy"),
        "data.labels={tmp}/b.npy: 4 samples have class ids from -1 to 2; valid: 0 to 999 (the number of classes is the "
        "highest id + 1); number the classes 0, 1, 2 ...",
    ),
}
# --- videos ---


def frames(names: list[str], **fields: object) -> tuple[Callable[[], object], dict[str, object]]:
    """A folder x with these images, and texts for names that end with .txt."""
    files = {name: "text" if name.endswith(".txt") else None for name in names}
    return lambda: written(Path("x"), files), {"kind": "videos", "path": "x", "size": [2, 4, 4], **fields}


VIDEOS = {
    "no folder of videos": (
        *frames([], path="y"),
        "data.path=y is not a folder; give a folder with one sub-folder for each video",
    ),
    "video file": (
        *frames(["a/1.png"], path="clip.mp4"),
        "data.path: clip.mp4 is a video, which is not read; write its frames to files with `ffmpeg -i VIDEO "
        "FOLDER/%06d.png`, and give the folder of these files with data.kind=videos",
    ),
    "video file among folders": (
        lambda: written(Path("x"), {"a/1.png": None, "b.mkv": b""}),
        frames([])[1],
        "data.path: {tmp}/x/b.mkv is a video, which is not read; write its frames to files with `ffmpeg -i VIDEO "
        "FOLDER/%06d.png`, and give the folder of these files with data.kind=videos",
    ),
    "no videos": (
        *frames(["a/note.txt"]),
        "data.path={tmp}/x contains no videos; valid: a sub-folder for each video, with its frames as files like "
        "000001.png",
    ),
    "frames of one video": (
        *frames(["1.png", "2.png"]),
        "data.path={tmp}/x contains images (1.png, ...), but each of its sub-folders must be a video with its frames; "
        "give the folder above, or move the images into a folder for each video",
    ),
    "short videos": (
        *frames(["a/1.png", "a/2.png", "b/1.png"], stride=2),
        "x: 2 of 2 videos cannot be used: a: 2 frames, 3 are needed, b: 1 frames, 3 are needed; repair or remove them",
    ),
    "size of images": (
        *frames(["a/1.png"], size=[4, 4]),
        "spec: data.size: [4, 4] given; must be [frames, height, width], whole numbers from 1 to 16384",
    ),
    "captions that are not used": (
        *frames(["a/1.png", "a.txt", "b.txt"]),
        "data.path={tmp}/x has captions (a.txt); set data.captions=true to use them, or remove them",
    ),
    "no captions of videos": (
        *frames(["a/1.png", "b.txt"], captions=True),
        "data.captions=true, but data.path={tmp}/x has no captions; valid: NAME.txt beside the folder NAME of each "
        "video",
    ),
    "video without caption": (
        *frames(["a/1.png", "a/2.png", "b/1.png", "b/2.png", "b.txt"], captions=True),
        "x: 1 of 2 videos cannot be used: a: no caption; repair or remove them, or increase "
        "data.max_unreadable (now 0)",
    ),
    "background of videos": (
        *frames(["a/1.png", "a/2.png"], background="white"),
        "data.background=white has no effect: no frame of x has an alpha channel; remove it",
    ),
    "narrow frames": (
        lambda: (written(Path("x"), {"a/note.txt": ""}), Image.new("L", (9000, 1)).save("x/a/1.png")),
        {**frames([])[1], "size": [1, 9000, 9000]},
        "x: 1 of 1 videos cannot be used: a: an extreme aspect ratio: frames would be resized to 81000000 x 9000; "
        "repair or remove them",
    ),
}
CASES = {
    **LATENTS,
    **VIDEOS,
    "step of buckets": (
        nothing,
        bucketed(step=24),
        "spec: data.buckets: step=24 does not divide the sides of data.size, 32x48; change either",
    ),
    "buckets of a narrower aspect ratio": (
        nothing,
        bucketed(step=8, max_aspect=1.4),
        "spec: data.buckets: max_aspect=1.4 is less than the aspect ratio of data.size, 32x48; increase it",
    ),
    "one bucket": (
        nothing,
        bucketed(step=16, max_aspect=1.6, size=32),
        "spec: data.buckets: step=16 and max_aspect=1.6 allow only the size 32x32, so there is one bucket; decrease "
        "step, increase max_aspect, or remove buckets",
    ),
    "too many buckets": (
        nothing,
        bucketed(step=1, size=1024),
        "spec: data.buckets: step=1 gives more than 1,000 sizes; increase it",
    ),
    "buckets of squares": (
        nothing,
        bucketed(max_aspect=1),
        "spec: data.buckets.max_aspect: 1 given; must be greater than 1",
    ),
    "buckets without a mapping": (
        nothing,
        {**tars("x"), "buckets": True},
        "spec: data.buckets: true given; must be a mapping",
    ),
    "unknown option of buckets": (
        nothing,
        bucketed(aspect=2),
        "spec: data.buckets.aspect: unknown key; did you mean 'max_aspect'? valid: max_aspect, step",
    ),
    "extreme aspect ratio with buckets": (
        wide,
        {**bucketed((64, 96), step=16), "path": "y"},
        "y: 1 of 1 images cannot be used: {tmp}/y/wide.png (row 0): an extreme aspect ratio: 65000 x 1 pixels would be "
        "resized to 4160000 x 64, more than 67,108,864 pixels; crop, repair or remove them",
    ),
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
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1.png (row 0): no caption; repair or remove them",
    ),
    "field of another type": (
        one,
        tars("a.tar", caption_key="json.id"),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1.png (row 0): no caption; repair or remove them",
    ),
    "text as class id": (
        one,
        tars("a.tar", label_key="json.text"),
        "a.tar: 1 of 1 images cannot be used: {tmp}/a.tar: 1 (row 0): no class id; repair or remove them",
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
        "them",
    ),
}


# --- captions, splits and prompts ---

Files = dict[str, str | bytes | None]  # by name; None: an image
Case = tuple[Callable[[], object], dict[str, object]]


def written(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (4, 4), (len(name), 0, 0)).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def images(files: Files, **fields: object) -> Case:
    return lambda: written(Path("set"), files), {"kind": "images", "path": "set", "size": 4, **fields}


def captioned(files: Files, **fields: object) -> Case:
    return images(files, captions=True, **fields)


def metadata(*rows: object, **files: object) -> Case:
    lines = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    return captioned({"a.png": None, "b/c.png": None, "metadata.jsonl": lines, **files})


def table(columns: dict[str, object], **fields: object) -> Case:
    """A parquet file with as many images as there are values in the columns."""

    def make() -> None:
        count = len(next(iter(columns.values())))
        encoded = io.BytesIO()
        Image.new("RGB", (4, 4)).save(encoded, "PNG")
        rows = [{"bytes": encoded.getvalue(), "path": None}] * count
        parquet.write_table(pa.table({"image": rows, **columns}), "set.parquet")

    return make, {"kind": "hf", "path": "set.parquet", "size": 4, **fields}


BROKEN = pa.array([b"a", None, b" ", b"\xff"]).cast("string", safe=False)
SPLITS: Files = {"train/x/1.png": None, "train/y/2.png": None, "val/x/3.png": None}
TABLE = "{set}/metadata.jsonl"
CAPTIONS = {
    "captions that are not used": (
        *images({"a.png": None, "a.txt": "a"}),
        "data.path={set} has captions (a.txt); set data.captions=true to train on them, or give a folder with only "
        "the images, in one sub-folder per class if there are classes",
    ),
    "no captions": (
        *captioned({"a.png": None}),
        "data.captions=true, but data.path={set} has no captions: no image has a file NAME.txt or NAME.caption beside "
        "it, and there is no metadata.csv, metadata.jsonl or metadata.parquet; add captions, or remove data.captions",
    ),
    "captions and class labels": (
        *captioned({"a.png": None, "a.txt": "a", "dataset.json": '{"labels": [["a.png", 0]]}'}),
        "data.captions=true, but {set}/dataset.json has class labels; images have either captions or classes: remove "
        "data.captions or that file",
    ),
    "a caption without an image": (
        *captioned({"a.png": None, "a.txt": "a", "b/c.txt": "c"}),
        "data.path={set}: 1 caption files have no image (b/c.txt); add the images, or remove these files",
    ),
    "two captions": (
        *captioned({"a.png": None, "a.txt": "a", "a.caption": "a"}),
        "data.path={set}: a.png has two captions, a.caption and a.txt; remove one of them",
    ),
    "a caption of two images": (
        *captioned({"a.png": None, "a.bmp": None, "a.txt": "a"}),
        "data.path={set}: the caption a.txt belongs to two images, a.bmp and a.png; rename one of them",
    ),
    "captions in a table and beside images": (
        *captioned({"a.png": None, "a.txt": "a", "metadata.csv": "file_name,text\na.png,a\n"}),
        "data.path={set} has captions both in metadata.csv and beside the images (a.txt); remove one of both",
    ),
    "two tables": (
        *captioned({"a.png": None, "metadata.jsonl": "", "metadata.csv": ""}),
        "data.path={set} has several tables of captions in one folder (metadata.csv, metadata.jsonl); remove all but "
        "one",
    ),
    "images without captions": (
        *captioned({"a.png": None, "b.png": None, "b.txt": "b"}),
        "set: 1 of 2 images cannot be used: {set}/a.png (row 0): no caption; repair or remove them, or increase "
        "data.max_unreadable (now 0)",
    ),
    "captions that are empty, not UTF-8, with control characters, long": (
        *captioned(
            {f"{i}.png": None for i in range(4)}
            | {"0.txt": " \n", "1.txt": b"\xff\xfea\0", "2.txt": "a\x1b[2J", "3.txt": "a" * 70_000},
            max_unreadable=3,
        ),
        "set: 4 of 4 images cannot be used: {set}/0.png (row 0): an empty caption, {set}/1.png (row 1): a caption "
        "that is not UTF-8, {set}/2.png (row 2): a caption with control characters, {set}/3.png (row 3): a caption "
        "of more than 65,536 characters; repair or remove them",
    ),
    "a folder in place of a caption": (
        *captioned({"a.png": None, "a.txt/b.png": None, "a.txt/b.txt": "b"}),
        "set: 1 of 2 images cannot be used: {set}/a.png (row 0): no caption; repair or remove them, or increase "
        "data.max_unreadable (now 0)",
    ),
    "a row of a missing image": (
        *metadata({"file_name": "a.png", "text": "a"}, {"file_name": "c.png", "text": "c"}),
        TABLE + ": 1 rows name files that are not among the images (c.png in line 2); correct the paths, which are "
        "relative to the table, or add the images",
    ),
    "two rows of an image": (
        *metadata({"file_name": "b/c.png", "text": "a"}, {"file_name": "./b/c.png", "text": "c"}),
        TABLE + ", line 2: gives ./b/c.png a second caption, after line 1 of metadata.jsonl; remove one of both",
    ),
    "two tables of an image": (
        *metadata(
            {"file_name": "b/c.png", "text": "a"}, **{"b/metadata.jsonl": '{"file_name": "c.png", "text": "c"}\n'}
        ),
        TABLE + ", line 1: gives b/c.png a second caption, after line 1 of b/metadata.jsonl; remove one of both",
    ),
    "no file_name": (
        *metadata({"image": "a.png", "text": "a"}),
        TABLE + ": has no column 'file_name' with the paths of the images, only: image, text",
    ),
    "a row without file_name": (
        *metadata({"file_name": "a.png", "text": "a"}, {"text": "a"}),
        TABLE + ", line 2: has no 'file_name'; give the path of the image",
    ),
    "no column of captions": (
        *metadata({"file_name": "a.png", "title": "a"}),
        TABLE + ": has no column 'text' or 'caption' with the captions, only: file_name, title; rename one",
    ),
    "two columns of captions": (
        *metadata({"file_name": "a.png", "text": "a", "caption": "a"}),
        TABLE + ": has the columns 'text' and 'caption'; remove the one not to use",
    ),
    "another column of captions in a later row": (
        *metadata({"file_name": "a.png", "text": "a"}, {"file_name": "b/c.png", "caption": "a"}),
        TABLE + ", line 2: has 'caption', but earlier rows have 'text'; use one of both for all rows",
    ),
    "a caption that is no text": (
        *metadata({"file_name": "a.png", "text": ["a", "b"]}),
        TABLE + ", line 1: 'text' is of type list, but a caption must be a text",
    ),
    "a line that is not JSON": (
        *metadata({"file_name": "a.png", "text": "a"}, '{"file_name": '),
        TABLE + ", line 2: is not JSON (Expecting value: line 1 column 15 (char 14)); correct the line",
    ),
    "a line that is no object": (*metadata("[]"), TABLE + ', line 1: is not a JSON object, like {"text": ...}'),
    "commas in a CSV file": (
        *captioned({"a.png": None, "metadata.csv": "file_name,text\na.png,a cat, a dog\n"}),
        "{set}/metadata.csv, line 2: has 3 values, but there are 2 columns; put values with commas in double quotes",
    ),
    "an open quote in a CSV file": (
        *captioned({"a.png": None, "metadata.csv": 'file_name,text\na.png,"a cat\n'}),
        "{set}/metadata.csv, line 2: is not CSV (unexpected end of data); correct the line",
    ),
    "a CSV file whose header does not end": (
        *captioned({"a.png": None, "metadata.csv": "a" * 200_000}),
        "{set}/metadata.csv, line 1: is not CSV (field larger than field limit (131072)); correct the line",
    ),
    "two columns of captions in a CSV file": (
        *captioned({"a.png": None, "metadata.csv": "file_name,caption,text\na.png,a cat,a dog\n"}),
        "{set}/metadata.csv: has the columns 'text' and 'caption'; remove the one not to use",
    ),
    "a parquet file that is none": (
        *captioned({"a.png": None, "metadata.parquet": "file_name"}),
        "{set}/metadata.parquet cannot be read as parquet: Parquet magic bytes not found in footer. Either the file "
        "is corrupted or this is not a parquet file.",
    ),
    "splits of which none is chosen": (
        *images(SPLITS),
        "data.path={set} contains the splits of a data set (train, val), which are not classes; choose one of them: "
        "data.path={set} with data.split=train",
    ),
    "an unknown split": (
        *images(SPLITS, split="tain"),
        "data.split=tain: data.path={set} has no such folder; did you mean 'train'? valid: train, val",
    ),
    "a split where there are none": (
        *images({"cat/1.png": None, "dog/2.png": None}, split="cat"),
        "data.split=cat: data.path={set} has no folders that are splits, such as train and val; remove data.split",
    ),
    "a class that train does not have": (
        *images({**SPLITS, "val/z/4.png": None}, split="val"),
        "data.split=val: 1 class folders (z) are not in {set}/train, so their class ids are not known; rename or "
        "remove them",
    ),
    "a split with a slash": (
        *images(SPLITS, split="../x"),
        "data.split=../x: data.path={set} has no such folder; valid: train, val",
    ),
    "an unknown caption column": (
        *table({"text": ["a"]}, caption_column="texts"),
        "data.caption_column=texts: no such column; did you mean 'text'? valid: image, text",
    ),
    "a caption column without texts": (
        *table({"n": [1]}, caption_column="n"),
        "data.caption_column=n contains Value('int64'); valid: columns of texts (string)",
    ),
    "captions and labels of a table": (
        *table({"text": ["a"], "label": [0]}, caption_column="text", label_column="label"),
        "spec: data: caption_column and label_column are both given; images have captions or classes, so remove one of "
        "them",
    ),
    "rows without captions": (
        *table({"text": BROKEN}, caption_column="text", max_unreadable=2),
        "set: 3 of 4 images cannot be used: row 1: no caption, row 2: an empty caption, row 3: a caption that is "
        "not UTF-8; repair or remove them, or increase data.max_unreadable (now 2)",
    ),
    "folders of kohya with captions": (
        *captioned({"10_cat/1.png": None, "10_cat/1.txt": "a"}),
        "data.path={set}: 10_cat are named like folders of kohya's trainers (REPEATS_NAME), whose numbers of repeats "
        "are not applied; give one of these folders (data.path={set}/10_cat), or rename them to use each image once "
        "per epoch",
    ),
}


def prompts(files: Files, path: str = "set", **fields: object) -> Case:
    return lambda: written(Path("set"), files), {"kind": "prompts", "path": path, **fields}


def columns(**values: object) -> Case:
    """Prompts in set/a.parquet and set/b.parquet, which differ."""

    def make() -> None:
        Path("set").mkdir()
        parquet.write_table(pa.table(values), "set/a.parquet")
        parquet.write_table(pa.table({"other": ["a"]}), "set/b.parquet")

    return make, {"kind": "prompts", "path": "set"}


LINES = '{"a": "x", "b": "y", "n": 1}\n{"a": null, "b": "y"}\n'
MIXED = '{"a": "x", "b": "y", "n": 1}\n{"a": null, "b": ["y"]}\n'
PROMPTS = {
    "no prompts": (
        *prompts({}, "x.txt"),
        "data.path=x.txt does not exist; give a .txt file with one prompt on each line, a .jsonl or .parquet file, or "
        "a folder of parquet files",
    ),
    "a folder without parquet": (
        *prompts({"a.txt": "a"}),
        "data.path={set} contains no parquet files; give a .txt file with one prompt on each line, a .jsonl or "
        ".parquet file, or a folder of parquet files",
    ),
    "another kind of file": (
        *prompts({"a.md": "a"}, "set/a.md"),
        "data.path={set}/a.md: files of prompts end in .txt, .jsonl, .parquet; give a .txt file with one prompt on "
        "each line, a .jsonl or .parquet file, or a folder of parquet files",
    ),
    "an empty file": (
        *prompts({"a.txt": ""}, "set/a.txt"),
        "data.path={set}/a.txt has no prompts; give a file with one prompt on each line",
    ),
    "lines that are no prompts": (
        *prompts({"a.txt": b"a\n\n\xff\n\x1b[2J\r\nb\n"}, "set/a.txt", max_unreadable=2),
        "{set}/a.txt: 3 of 5 prompts cannot be used: line 2: an empty prompt, line 3: a prompt that is not UTF-8, line "
        "4: a prompt with control characters; correct or remove them, or increase data.max_unreadable (now 2)",
    ),
    "a column of a text file": (
        *prompts({"a.txt": "a"}, "set/a.txt", column="text"),
        "data.column=text has no effect: a .txt file has no columns; remove it",
    ),
    "several columns": (
        *prompts({"a.jsonl": LINES}, "set/a.jsonl"),
        "{set}/a.jsonl: has 2 columns with texts; choose one with data.column: a, b",
    ),
    "an unknown column": (
        *prompts({"a.jsonl": LINES}, "set/a.jsonl", column="c"),
        "data.column=c: {set}/a.jsonl has no such column; valid: a, b",
    ),
    "a column of numbers": (
        *prompts({"a.jsonl": LINES}, "set/a.jsonl", column="n"),
        "data.column=n: has no texts in {set}/a.jsonl; columns with texts: a, b",
    ),
    "a row without a prompt": (
        *prompts({"a.jsonl": LINES}, "set/a.jsonl", column="a"),
        "{set}/a.jsonl: 1 of 2 prompts cannot be used: line 2: no prompt; correct or remove them, or increase "
        "data.max_unreadable (now 0)",
    ),
    "a prompt that is no text": (
        *prompts({"a.jsonl": MIXED}, "set/a.jsonl", column="b"),
        "{set}/a.jsonl, line 2: 'b' is of type list, but a prompt must be a text",
    ),
    "no column with texts": (*columns(n=[1]), "{set}/a.parquet: has no column with texts, only: n"),
    "files with different columns": (
        *columns(text=["a"]),
        "{set}/b.parquet: has no column 'text' with texts, unlike a.parquet; give files with the same columns",
    ),
}
CASES |= CAPTIONS | PROMPTS


# --- streams ---


def streamed(path: str = "set", **fields: object) -> dict[str, object]:
    return {"kind": "hf", "path": path, "size": 8, "stream": True, **fields}


def rows(**columns: object) -> Callable[[], None]:
    """Writes two rows to set/train.parquet. columns: instead of the images, or beside them."""

    def make() -> None:
        Path("set").mkdir()
        image = sample("x", 1)[0][1]
        parquet.write_table(pa.table({"image": [{"bytes": image, "path": None}] * 2, **columns}), "set/train.parquet")

    return make


def truncated() -> None:
    rows()()
    Path("set/train.parquet").write_bytes(Path("set/train.parquet").read_bytes()[:-20])


STREAMS = {
    "a stream without parquet": (
        folder("0.jpg"),
        streamed("x"),
        "data.path={tmp}/x has no parquet files but files of other formats, which cannot be streamed; use "
        "data.stream=false",
    ),
    "fewer rows than the limit": (
        rows(),
        streamed(limit=3),
        "data.limit=3, but data.path={set} (split 'train') has 2 rows; lower the limit, or remove it",
    ),
    "a stream without rows": (
        rows(image=pa.array([], pa.binary())),
        streamed(),
        "data.path={set} (split 'train') has 0 rows; give a data set with rows",
    ),
    "a limit without a stream": (
        nothing,
        streamed(stream=False, limit=3),
        "spec: data.limit=3 has no effect without data.stream=true; add that, or remove the limit",
    ),
    "a limit of zero": (nothing, streamed(limit=0), "spec: data.limit: 0 given; must be at least 1"),
    "buckets of a stream": (
        nothing,
        streamed(size=32, buckets={"step": 8}),
        "spec: data.buckets: the sizes of streamed images are not known beforehand; remove data.buckets, or use "
        "data.stream=false",
    ),
    "a URL without a stream": (
        nothing,
        streamed("https://host/x.parquet", stream=False),
        "spec: data.path is a URL, which can only be streamed; add data.stream=true, or download the files",
    ),
    "the revision of a folder": (
        rows(),
        streamed(revision="v2"),
        "spec: data.revision=v2 has no effect: {set} is not a hub id; remove data.revision",
    ),
    "captions and labels of a stream": (
        rows(text=["a", "b"], label=[0, 1]),
        streamed(caption_column="text", label_column="label"),
        "spec: data: caption_column and label_column are both given; images have captions or classes, so remove one of "
        "them",
    ),
    "no such column in a stream": (
        rows(text=["a", "b"]),
        streamed(caption_column="txt"),
        "data.caption_column=txt: no such column; did you mean 'text'? valid: image, text",
    ),
    "no such split of a stream": (
        rows(),
        streamed(split="val"),
        "data.split=val: no such split; valid: train",
    ),
    "a stream of paths": (
        rows(image=["a.png", "b.png"]),
        streamed(),
        "data.image_column=image contains string; valid for a stream: columns of encoded images",
    ),
    "names as labels of a stream": (
        rows(label=["cat", "dog"]),
        streamed(label_column="label"),
        "data.label_column=label contains string, valid: class ids 0, 1, 2 ...; convert names with "
        "class_encode_column('label')",
    ),
    "numbers as captions of a stream": (
        rows(text=[1, 2]),
        streamed(caption_column="text"),
        "data.caption_column=text contains int64; valid: a column of texts",
    ),
    "negative labels of a stream": (
        rows(label=[0, -1]),
        streamed(label_column="label"),
        "data.label_column=label: 1 rows have no valid class id (the first is row 1), valid: 0 to 0; remove them",
    ),
    "a stream without captions": (
        rows(text=pa.array([None, " "], pa.string())),
        streamed(caption_column="text", max_unreadable=9),
        "data.caption_column=text: none of the 2 rows has a caption that can be used; give another column",
    ),
    "a stream of a file that is cut": (
        truncated,
        streamed(),
        "data.path={set} (split 'train') cannot be streamed: Parquet magic bytes not found in footer. Either the file "
        "is corrupted or this is not a parquet file.; valid: a hub id that can be reached, or a file, folder or URL of "
        "parquet",
    ),
    "a stream of a server that does not answer": (
        nothing,
        streamed("http://127.0.0.1:9/x.parquet"),
        "data.path=http://127.0.0.1:9/x.parquet (split 'train') cannot be streamed: there is no such file, or its "
        "server cannot be reached; valid: a hub id that can be reached, or a file, folder or URL of parquet",
    ),
}
CASES |= STREAMS


@pytest.mark.parametrize("case", CASES)
def test_data_is_refused_with_exactly_this_message(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, section, message = CASES[case]
    make()
    assert refusal(section) == message.replace("{tmp}", str(tmp_path)).replace("{set}", str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("make", "section", "message"),
    [
        (
            arrays(a=np.where(np.arange(4)[:, None, None, None] == 2, np.nan, Z)),
            latents("a.npy"),
            "{tmp}/a.npy contains NaN or infinity in sample 2 (rows count from 0); remove this sample, or make it "
            "again",
        ),
        (
            tensors(z=Z[0], y=np.full((2, 8, 8), np.inf)),
            latents("a.safetensors", mirrored_key="y"),
            "{tmp}/a.safetensors, tensor y contains NaN or infinity; remove this sample, or make it again",
        ),
    ],
)
def test_values_that_are_not_finite_are_refused_where_they_are_read(tmp_path, monkeypatch, make, section, message):
    monkeypatch.chdir(tmp_path)
    make()
    spec = specfile.located(specfile.validate({"name": "x", "stages": {}, "data": section}, "spec"), [Path.cwd()])
    found = data.load_data(spec.data, 0)
    with pytest.raises(InputError) as caught:
        for epoch in range(9):
            found.items(epoch, range(len(found)))
    assert str(caught.value) == message.replace("{tmp}", str(tmp_path))


FIELD = GaussianField(torch.zeros(1), torch.ones(1))  # it is not called


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ((4, 3, 8, 8), {}, "[3, 8, 8], but the teacher (a network) takes [4, 8, 8]; give latents of the teacher's "
         "autoencoder, or another teacher"),
        ((4, 8, 8, 8), {}, "[8, 8, 8], but the teacher (a network) takes [4, 8, 8]; set data.moments: true if these "
         "are mean and log variance"),
        ((4, 4, 8, 4), {}, "[4, 8, 4], but the teacher (a network) takes [4, 8, 8]; give latents of this size, or "
         "their size in pixels in teacher.size"),
        ((4, 4, 2, 8, 8), {}, "[4, 2, 8, 8], but the teacher (a network) takes [4, 8, 8]; data.one_per_file: false if "
         "each file holds many samples"),
        ((4, 8), {}, "[8], but the teacher (a network) takes [4, 8, 8]; data.one_per_file: true if each file holds one "
         "sample"),
    ],
)  # fmt: skip
def test_latents_of_another_teacher_are_refused(tmp_path, shape, fields, message):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    teacher = LoadedTeacher(FIELD, (4, 8, 8), None, None, "", "a network")
    given = data.load_data(LatentsData(**latents(str(tmp_path / "a.npy"))), 0)
    with pytest.raises(InputError) as caught:
        sources.check_shapes(teacher, given)
    assert str(caught.value) == f"data 'a' has latents of shape {message}"


def test_latents_of_unknown_scale_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", Z)
    given = data.load_data(LatentsData(kind="latents", path=str(tmp_path / "a.npy"), scaled=False), 0)
    with pytest.raises(InputError) as caught:
        sources.check_shapes(LoadedTeacher(FIELD, (2, 8, 8), None, None, "", "a network"), given)
    assert str(caught.value) == (
        "data.scaled=false: the latents of 'a' are not scaled, but the teacher has no autoencoder whose config says "
        "how its network takes them; give teacher.vae, or scaled latents and data.scaled: true"
    )
