"""A store with invalid or malicious content: it does not affect other students, and is reported once."""

import json
import os
import re
import socketserver
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import yaml
from commands import command
from flaky import Flaky
from markdown_it import MarkdownIt
from runs import folder_bytes, make_run
from students import PICTURE, WEIGHTS, card, edit_card, make, put, tensors
from test_report import make_results

from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.core.regular_files import open_regular, read_regular
from distill.exchange import contents, manifest, published, publishing, pulling, student_card, transfer, transports, web
from distill.exchange.student_card import Publication, TrainingCost
from distill.exchange.transports import at

DISTILL = "distill.json"
ONE_LINE = "must be one line of text without control characters"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(transfer, "PAUSES", (0.0,))
    monkeypatch.setattr(pulling, "PAUSES", (0.0,))


@pytest.fixture
def store(tmp_path):
    """With one student that is in order: digits:v1."""
    put(make(tmp_path / "s"), tmp_path / "runs", "digits")
    return tmp_path / "runs"


@pytest.fixture
def student(tmp_path):
    return make(tmp_path / "student")


def get(place, dest):
    return pulling.pull(at(place), dest)


def error_of(call, *arguments, error=InputError):
    with pytest.raises(error) as caught:
        call(*arguments)
    return str(caught.value)


# --- cards ---

CARDS = {
    "no JSON": (b"{", "distill.json cannot be used: it is not JSON"),
    "another format": ({"format": 2}, "format: 2 given; input should be 1"),
    "NaN": ({"metrics": {"FD@1": float("nan")}}, "metrics.FD@1: NaN given; input should be a finite number"),
    "infinity": ({"guidance_scale": float("inf")}, "guidance_scale: Infinity given; input should be a finite number"),
    "two lines": (
        {"license": "mit\ntags: x"},
        'license: "mit\\ntags: x" given; ' + ONE_LINE,
    ),
    "escape": (
        {"recipe": "\x1b[2J"},
        'recipe: "\\u001b[2J" given; ' + ONE_LINE,
    ),
    "metric name": ({"metrics": {"\x1b[2J@1": 1.0}}, ONE_LINE),
    "backwards": (
        {"teacher": "a\u202eb"},
        'teacher: "a\\u202eb" given; ' + ONE_LINE,
    ),
    "long": ({"summary": "x" * 1001}, "given; string should have at most 1000 characters"),
    "no size": ({"images": -1}, "images: -1 given; input should be greater than or equal to 0"),
    "bytes": (b"\xff\xfe", "it is not JSON"),
    "a word for a number": ({"images": "5"}, 'images: "5" given; input should be a valid integer'),
    "a path": (
        {"name": "/home/u/models/sd_xl"},
        'name: "/home/u/models/sd_xl" given; valid: without / and \\, because files are named after the student',
    ),
    "another path": ({"name": "..\\x"}, 'name: "..\\\\x" given; valid: without / and \\'),
    "no steps": ({"stock": {"steps": []}}, "stock.steps: [] given; list should have at least 1 item"),
    "10^400": (b'"size": %d' % 10**400, "given; input should be"),
    "2^63": (b'"size": %d' % 2**63, "size: 9223372036854775808 given; input should be less than 9223372036854775808"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_broken_card_is_refused_where_it_is_read(student, case):
    change, said = CARDS[case]
    path = student / DISTILL
    if isinstance(change, dict):
        edit_card(student, lambda content: content.update(change))
    elif change.startswith(b'"size"'):
        path.write_bytes(re.sub(rb'"size": \d+', change, path.read_bytes(), count=1))
    else:
        path.write_bytes(change)
    for call in (student_card.read, pulling.verify, lambda folder: put(folder, folder.parent / "runs", "x")):
        assert said in error_of(call, student)
    assert not list(student.parent.glob("runs/registry/x/*"))


def test_a_name_with_spaces_is_still_read(student):
    """As cards of older versions may have."""
    edit_card(student, lambda content: content.update(name="my student, 2nd"))
    assert student_card.read(student).name == pulling.verify(student).name == "my student, 2nd"


def broken_entries(registry):
    """A hostile entry of every kind in a registry: their names, with a word of why each is skipped."""
    made = {}

    def entry(name, why):
        made[name] = why
        (registry / name / "v1").mkdir(parents=True)
        return registry / name / "v1" / DISTILL

    entry("brace", "it is not JSON").write_text("{")
    entry("format", "format: 2 given; input should be 1").write_text('{"format": 2}')
    entry("folder", "it is a folder, not a file").mkdir()
    os.mkfifo(entry("fifo", "it is a FIFO, not a file"))
    entry("link", "it is a link; links are not followed").symlink_to("/etc/passwd")
    entry("device", "it is a link; links are not followed").symlink_to("/dev/zero")
    with entry("huge", "it has more than 1,048,576 bytes").open("wb") as file:
        file.truncate(1 << 40)
    good = json.loads((registry / "digits" / "v1" / DISTILL).read_text())
    entry("nan", "metrics.x: Infinity given; input should be a finite number").write_text(
        json.dumps(good | {"metrics": {"x": 1e999}})
    )
    outside = {"files": {"../x.json": {"sha256": "0" * 64, "size": 1}}}
    entry("outside", "a path that leads out of the folder").write_text(json.dumps(good | outside))
    most = {"files": {f"{n}.md": {"sha256": "0" * 64, "size": 2**63 - 1} for n in range(2)}}
    entry("most", "lists more bytes than any disk has").write_text(json.dumps(good | most))
    (registry / "away").symlink_to("/etc")
    return made | {"away": "it is a link; links are not followed"}


def test_broken_entries_are_named_once_and_the_others_go_on(capfd, tmp_path, store, student):
    made = broken_entries(store / "registry")
    (store / "registry" / "a file").touch()
    (store / "registry" / os.fsdecode(b"\xff\xfe")).mkdir()
    begin = time.process_time()
    listed, pulled = command(capfd, "students"), command(capfd, "pull", "digits", "got")
    assert (listed.code, pulled.code, "digits:v1" in listed.out) == (0, 0, True)
    assert "warning: " not in pulled.err, "what is wrong with others does not concern who pulls this one"
    new = publishing.publish(student, store, "other", None, Publication("other"), b"")
    assert new.entry.label == "other:v1"
    for said in (listed.err.splitlines(), [f"warning: {each}" for each in new.skipped]):
        warnings = [each for each in said if each.startswith("warning: ")]
        assert len(warnings) == len(made)
        for name, why in made.items():
            (warning,) = [each for each in warnings if f"/registry/{name}" in each]
            assert why in warning
    assert time.process_time() - begin < 10
    assert folder_bytes(tmp_path / "got") == folder_bytes(store / "registry" / "digits" / "v1")
    index = json.loads((store / "registry" / "_index.json").read_bytes())
    assert [each["name"] for each in index["students"]] == ["digits", "other"]
    for name, why in made.items():  # none can be pulled, and each says why at once
        for given in (name, f"{name}:v1"):
            done = command(capfd, "pull", given, f"got-{name}")
            assert (done.code, done.err.count("\n")) == (2, 1)
            assert done.err.startswith(f"error: runs/registry/{name}")
            assert f" cannot be used: {why}" in done.err or why in done.err
    assert not list(tmp_path.glob("got-*"))


def test_many_broken_entries_are_counted(capfd, store):
    for number in range(30):
        (store / "registry" / f"x{number}" / "v1").mkdir(parents=True)
        (store / "registry" / f"x{number}" / "v1" / DISTILL).write_text("{")
    done = command(capfd, "students")
    assert (done.code, done.err.count("is skipped:")) == (0, 20)
    assert done.err.endswith("warning: 10 more entries of the store are skipped\n")


def test_a_store_that_is_no_folder_within(capfd, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "registry").touch()
    done = command(capfd, "students")
    assert (done.code, done.err) == (2, "error: runs/registry cannot be read: Not a directory\n")


def test_an_index_that_cannot_be_written_is_said(tmp_path, store, student):
    (store / "registry" / "_index.json").unlink()
    (store / "registry" / "_index.json").mkdir()
    said = error_of(put, student, store, "other", error=RunError)
    assert "Is a directory" in said and "the student is published, but users who read this store over http" in said
    assert (store / "registry" / "other" / "v1").is_dir()


def test_a_number_that_is_too_long_takes_no_version_away(store, student):
    (store / "registry" / "digits" / f"v{'9' * 63}").mkdir()
    (store / "registry" / "digits" / "v\u00b2").mkdir()
    assert put(make(student.parent / "t", seed=5), store, "digits").label == "digits:v2"


def test_nothing_is_published_through_a_link(tmp_path, store, student):
    (tmp_path / "private").mkdir()
    (store / "registry" / "other").symlink_to(tmp_path / "private")
    assert "other is a link; distill does not publish through links" in error_of(put, student, store, "other")
    assert list((tmp_path / "private").iterdir()) == []


def test_an_evaluation_without_finite_numbers_leaves_a_card_that_can_be_read(student):
    student_card.add_metrics(student, {"FD@4": float("nan"), "FD@8": 3.0})
    assert student_card.verify(student).metrics == {"FD-digits@1": 12.5, "FD-digits@2": 8.25, "FD@8": 3.0}


# --- files that are none ---


def test_only_files_are_opened_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"123")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "file", 3) == read_regular(tmp_path / "link", 3, follow=True) == b"123"
    for path, said in [("fifo", "it is a FIFO"), ("link", "it is a link"), ("", "it is a folder")]:
        with pytest.raises(OSError, match=said):
            open_regular(tmp_path / path)
    with pytest.raises(OSError, match="it is a device"):
        open_regular(tmp_path.__class__("/dev/zero"))
    with pytest.raises(OSError, match="it has more than 2 bytes"):
        read_regular(tmp_path / "file", 2)


def test_a_fifo_in_place_of_a_file_stops_nobody(capfd, tmp_path, student):
    (student / "unet" / "config.json").unlink()
    os.mkfifo(student / "unet" / "config.json")
    for line in (["verify", "student"], ["pull", "student", "s"], ["publish", "student", "x"]):
        done = command(capfd, *line)
        assert (done.code, "unet/config.json" in done.err, "it is a FIFO, not a file" in done.err) == (2, True, True)
    assert not (tmp_path / "s").exists()


def test_names_that_are_not_utf8_are_shown_as_what_they_are_not(capfd, student):
    (student / os.fsdecode(b"\xff\x1b[2J.md")).touch()
    for line in (["verify", "student"], ["pull", "student", "s"]):
        done = command(capfd, *line)
        assert done.code == 2
        assert done.err.endswith(
            "error: student: files that distill.json does not list: \ufffd\ufffd[2J.md; remove them\n"
        )


def test_a_size_that_is_wrong_is_said_without_reading_the_file(student):
    with (student / WEIGHTS).open("ab") as file:
        file.truncate(1 << 42)
    assert "is damaged: 4398046511104 bytes, expected 4096" in error_of(pulling.verify, student)


def test_folders_without_end_are_no_student(student):
    folder = student
    for _ in range(20):
        folder /= "a"
        folder.mkdir()
    assert "16 levels of folders, so it is not a student" in error_of(pulling.verify, student)


# --- what files hold ---


def index(**parts):
    named = {"_class_name": ["pipeline", "DistilledPipeline"], "unet": ["diffusers", "UNet2DModel"]}
    return json.dumps(named | parts).encode()


def shards(name):
    return json.dumps({"metadata": {}, "weight_map": {"w": name}}).encode()


PICKLE = b"\x80\x04\x95" + b"x" * 50
SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
LIES = {
    "a pickle as a picture": ("unet/weights.png", PICKLE, "unet/weights.png is not a PNG file"),
    "a pickle behind a picture": ("x.png", PICTURE + PICKLE, "x.png is not a PNG file"),
    "a picture that ends": ("x.png", PICTURE[:-5], "x.png is not a PNG file"),
    "a signature alone": ("x.png", b"\x89PNG\r\n\x1a\n", "x.png is not a PNG file"),
    "a pickle as text": ("x.txt", PICKLE, "x.txt is not UTF-8 text"),
    "a zero in text": ("x.md", b"a\0b", "x.md contains control characters"),
    "an escape in text": ("x.txt", b"\x1b[2J", "x.txt contains control characters"),
    "a pickle as JSON": ("x.json", PICKLE, "x.json is not UTF-8 text"),
    "JSON in UTF-16": ("x.json", "{}".encode("utf-16"), "x.json is not UTF-8 text"),
    "JSON without bottom": ("x.json", b"[" * 100_000, "x.json is not valid JSON"),
    "weights without a header": ("x.safetensors", PICKLE, "x.safetensors is not a safetensors file"),
    "half a header": ("x.safetensors", tensors(4096, 0)[:100], "x.safetensors is not a safetensors file"),
    "a header of words": ("x.safetensors", (20).to_bytes(8, "little") + b"{" + b"x" * 19, "not a safetensors file"),
    "more than its tensors": ("x.safetensors", tensors(4096, 0) + PICKLE, "x.safetensors is not a safetensors file"),
    "a header without end": ("x.safetensors", b"\xff" * 8 + b"{}", "x.safetensors is not a safetensors file"),
    "a shard that is a picture": (SHARDS, shards("weights.png"), f'{SHARDS} refers to weights in "weights.png"; '
        f'valid:'),
    "a shard elsewhere": (SHARDS, shards("../x.safetensors"), f'{SHARDS} refers to weights in '
        f'"../x.safetensors"; valid:'),
    "a shard that is not listed": (SHARDS, shards("y.safetensors"), 'refers to weights in "y.safetensors"; valid:'),
    "a shard that is no name": (SHARDS, shards(["y"]), 'refers to weights in ["y"]; valid:'),
    "an index of another name": ("unet/x.json", shards("x.bin"), 'unet/x.json refers to weights in "x.bin"; valid:'),
    "an index without shards": ("unet/m.bin.index.json", b"{}", "is an index of weights without a valid weight_map"),
    "a pipeline within": ("unet/model_index.json", index(), "would load a second pipeline inside the pipeline"),
    "a part that is a pipeline": (
        "model_index.json", index(unet=["diffusers", "DiffusionPipeline"]), "unet is ["),
    "a part that looks for its class": (
        "model_index.json", index(unet=["diffusers", "AutoModel"]), "unet is ["),
    "a part of transformers": ("model_index.json", index(x=["transformers", "AutoModel"]), "x is ["),
    "a pipeline of its own choice": (
        "model_index.json", index(_class_name="StableDiffusionPipeline"), '_class_name is "Stable'),
    "a part of two letters": ("model_index.json", index(unet="ab"), 'unet is "ab"; valid: [null, null], a model or'),
    "a part that is a table": ("model_index.json", index(unet={"0": "os"}), 'unet is {"0": "os"}; valid: '),
    "another key": ("model_index.json", index(_module="x"), '_module is "x"'),
    "an escape in a name": (
        "model_index.json", index(**{"\x1b[2J": ["os", "system"]}), '\ufffd[2J is ["os", "system"]'),
    "code elsewhere, deep": ("unet/config.json", b'{"a": [{"auto_map": {}}]}', "(auto_map)"),
    "weights that unpack themselves": (
        "unet/config.json", b'{"quantization_config": {}}', "unet/config.json refers to code or weights elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_what_a_file_is_not_is_refused_by_pull_verify_and_publish(tmp_path, case):
    name, content, said = LIES[case]
    student = make(tmp_path / "student", files={name: content})
    for call in (
        pulling.verify,
        lambda folder: pulling.pull(at(folder), tmp_path / "s"),
        lambda folder: put(folder, tmp_path / "runs", "x"),
    ):
        assert said in error_of(call, student)
    assert not (tmp_path / "s").exists() and not list(tmp_path.glob(".s.part-*")), "nothing of it is kept"
    assert list((tmp_path / "runs" / "registry" / "x").iterdir()) == []


def test_a_program_that_is_shown_is_the_one_that_runs(tmp_path):
    student = make(tmp_path / "student", files={"pipeline.py": b"# coding: utf-7\n# +AAo-import os\n"})
    said = error_of(lambda: pulling.pull(at(student), tmp_path / "s", show=lambda name, text: None))
    assert (
        said == "pipeline.py is Python code that is not encoded in UTF-8; the student is not loaded because it may "
        "be unsafe or damaged"
    )


@pytest.mark.parametrize("name", ["pipeline.PY", "unet/w.SAFETENSORS", "x.Json"])
def test_kinds_are_written_in_small_letters(tmp_path, name):
    student = make(tmp_path / "student", files={name: b"{}"})
    assert "a file type that students do not have" in error_of(pulling.verify, student)


def test_shards_and_pictures_that_are_right_are_taken(tmp_path):
    files = {"unet/a-1.safetensors": tensors(300, 1), SHARDS: shards("a-1.safetensors"), "x.png": PICTURE,
             "notes.txt": "Ünïcödé\ttext\r\n".encode()}  # fmt: skip
    student = make(tmp_path / "student", files=files)
    pulling.pull(at(student), tmp_path / "s")
    assert pulling.verify(tmp_path / "s") == student_card.read(student)


def test_distills_own_pictures_are_pictures(tmp_path):
    from PIL import Image

    Image.new("RGB", (3000, 20), "red").save(tmp_path / "x.png")
    contents.refuse_picture((tmp_path / "x.png").read_bytes(), "x.png")


# --- model cards ---

HOSTILE = [
    "<script>alert(1)</script>",
    "</td><img src=x onerror=alert(1)>",
    "# heading",
    "--- ",
    "1. list",
    "- list",
    "> quote",
    "![x](https://evil.example/x.png)",
    "[x](javascript:alert(1))",
    "https://evil.example www.evil.example me@evil.example",
    "**bold** _italic_ ~~gone~~ `code` $x$",
    "a | b | c",
    "trailing \\",
    "&lt;script&gt; &#60;",
    "``` fence",
    "{{ 7 * 7 }} {% raw %}",
    "[ref]: https://evil.example",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_foreign_text_in_a_model_card_is_text(text):
    """As CommonMark with tables and links of plain addresses renders it: the same elements as of a harmless word."""
    renderer = MarkdownIt("gfm-like", {"linkify": False, "html": True})

    def rendered(word):
        about = Publication(
            "digits",
            "samples.png",
            word,
            ["", word],
            [["**this student**", "1"]],
            [TrainingCost(word, word, "0:01", word)],
        )
        facts = card(recipe=word, summary=word, teacher=word, data=word, license=word, metrics={f"{word}@1": 1.0})
        texts = [student_card.readme(facts, about), student_card.readme(facts), student_card.readme(card(name=word))]
        return [each.split("\n---\n", 1) for each in texts]

    ours, harmless = rendered(text), rendered("harmless")
    for (head, body), (_, expected) in zip(ours, harmless, strict=True):
        assert yaml.safe_load(head)["license"] in (text, "other")
        html = renderer.render(body)
        tags = re.findall(r"<[^>]+>", html)
        plain = [tag for tag in re.findall(r"<[^>]+>", renderer.render(expected)) if tag not in ("<code>", "</code>")]
        assert [tag for tag in tags if tag not in ("<code>", "</code>")] == plain
        assert not re.search(r"(?<!\\):(?=//evil)|www\.evil|me@evil", body), "an address that becomes a link by itself"


@pytest.mark.parametrize("license", ["no", "mit: x", "a #b", "'", "[x]", "!!python/object:x", "x" * 1000, "Größe"])
def test_a_licence_is_one_value_of_the_head(license):
    text = student_card.readme(card(license=license))
    head = yaml.safe_load(text.split("\n---\n", 1)[0])
    assert head == {"library_name": "diffusers", "license": license, "tags": [
        "distillation", "flow-matching", "image-generation"]}  # fmt: skip


def test_a_licence_with_a_line_break_reaches_no_model_card():
    with pytest.raises(ValueError, match=ONE_LINE):
        card(license="mit\n---\n# Owned")


# --- pictures of runs ---


@pytest.fixture
def measured(tmp_path):
    """A run whose evaluation names `picture`."""

    def make_with(picture):
        run = make_run(tmp_path / "store", "one")
        content = make_results().model_dump(mode="json")
        content["rows"][-1]["picture"] = picture
        root = run.stage("evaluate").root
        root.mkdir(parents=True)
        (root / "results.json").write_text(json.dumps(content))
        return root, publishing.ChosenStudent(run, "reflow")

    return make_with


@pytest.mark.parametrize("picture", ["../../../../secret.png", "/etc/passwd", "a/../../x.png", ".x.png", "x.txt"])
def test_a_picture_is_a_png_file_below_its_stage(tmp_path, measured, picture):
    (tmp_path / "secret.png").write_bytes(PICTURE)
    root, chosen = measured(picture)
    (root / "x.txt").write_text("secret")
    assert "picture" in error_of(publishing.samples, chosen)


def test_a_picture_is_taken_through_no_link(tmp_path, measured):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "x.png").write_bytes(PICTURE)
    root, chosen = measured("pictures/x.png")
    (root / "pictures").symlink_to(tmp_path / "private")
    assert "pictures/x.png cannot be used: it links out of its folder" in error_of(publishing.samples, chosen)
    (root / "pictures").unlink()
    (root / "pictures").mkdir()
    (root / "pictures" / "x.png").symlink_to(tmp_path / "secret.txt")
    assert "pictures/x.png cannot be used: it links out of its folder" in error_of(publishing.samples, chosen)
    (root / "pictures" / "x.png").unlink()
    assert publishing.samples(chosen) == b""
    (root / "pictures" / "x.png").write_bytes(PICTURE)
    assert publishing.samples(chosen) == PICTURE


# --- places ---


@pytest.mark.parametrize(
    "url", ["ftp://user:pw@host/x", "data://x", "dir://x", "jupyter://user:pw@host/x", "memory://x", "github://a:pw@b/c",
            "zip://x", "local:///x", "smb://u:pw@h/x", "javascript://x", "reference://x"],
)  # fmt: skip
def test_only_documented_schemes_are_taken(capfd, url):
    for line in (
        ["pull", url],
        ["students", "--store", url],
        ["config", "store", url],
        ["publish", "x", "x", "--store", url],
        ["publish", url, "x"],
        ["list", "--store", url],
        ["verify", url],
    ):
        done = command(capfd, *line)
        assert (done.code, done.out, "pw" in done.err) == (2, "", False)
        scheme = url.partition(":")[0]
        assert done.err.endswith(f"unknown scheme '{scheme}'; valid: file, http, https, s3, hf, ssh\n")


@pytest.mark.parametrize("given", ["data:x", "dir:x", "jupyter:x", "file:x"])
def test_a_name_that_looks_like_a_scheme_is_a_name(capfd, store, given):
    done = command(capfd, "pull", given)
    assert (done.code, done.err) == (
        2, f"error: runs has no published student '{given.partition(':')[0]}'; valid: digits\n"
    )  # fmt: skip


PASSWORDS = ["http://me:pw@127.0.0.1:9/x", "http://me:pw@[::1", "http://me:p/pw@host/x", "https://host/x?token=pw",
             "https://host/x#pw", "hf://me:pw@org/x", "ssh://me:pw@host/x", "ftp://me:pw@host", "http://me:pw@",
             "file://me:pw@host/x", "http://me:pw@127.0.0.1:9", "s3://me:pw@bucket/x", "S3://me:pw@bucket",
             "simplecache::http://me:pw@host/x", "a::http://me:pw@b::s3://me:pw@c",
             " http://me:pw@host/x", "x=ftp://me:pw@host/x"]  # fmt: skip


@pytest.mark.parametrize("url", PASSWORDS)
def test_passwords_are_never_shown(capfd, url):
    for line in (
        ["pull", url],
        ["pull", "x", "--store", url],
        ["students", "--store", url],
        ["publish", url, "x"],
        ["publish", "x", "x", "--store", url],
        ["verify", url],
        ["list", "--store", url],
    ):
        done = command(capfd, *line)
        assert done.code in (1, 2)
        assert "pw" not in done.out + done.err, line
        assert done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("given", ["me:pw@host:x", "me:pw@host://x"])
def test_what_may_hold_a_password_is_no_name(capfd, given):
    done = command(capfd, "pull", given)
    assert (done.code, "pw" in done.err) == (2, False) and done.err.startswith("error: ")


def test_a_password_of_the_store_is_kept_and_not_shown(capfd, tmp_path):
    assert "pw" not in command(capfd, "config", "store", "https://me:pw@host/x").out
    assert "me:pw@" in (tmp_path / "config" / "distill" / "config.yaml").read_text()
    assert "pw" not in command(capfd, "config").out


class Answers(socketserver.BaseRequestHandler):
    """Sends what it is given, then goes on byte by byte for as long as somebody listens."""

    def handle(self):
        self.request.recv(65536)
        try:
            self.request.sendall(self.server.first)
            while self.server.drip:
                self.request.sendall(self.server.drip)
                time.sleep(0.02)
        except OSError:
            pass


@contextmanager
def answering(first, drip=b""):
    """The URL of a server that answers everything so."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads, server.block_on_close = True, False
        server.first, server.drip = first, drip
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.drip = b""
        server.shutdown()


@pytest.fixture
def hasty(monkeypatch):
    """Whoever is waited for has a second instead of minutes."""
    monkeypatch.setattr(pulling, "SMALL", 0.3)
    monkeypatch.setattr(web, "ANSWER", 0.3)
    monkeypatch.setattr(web, "GATHER", 0.1)
    monkeypatch.setattr(transfer, "WINDOW", 0.3)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 900000\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (OK, "is too slow: "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n", "is too slow: "),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Long: ", "no answer within 0 s", marks=pytest.mark.long),
        (b"", "no answer within 0 s"),
    ],
)
def test_a_server_that_drips_is_left(capfd, hasty, first, said):
    with answering(first, b"x") as url:
        for line in (["pull", f"{url}/s"], ["students", "--store", url]):
            begin = time.monotonic()
            done = command(capfd, *line)
            assert done.code == 1
            assert said in done.err and "try again later" in done.err
            assert time.monotonic() - begin < 20


def test_a_file_that_drips_is_left_and_kept(tmp_path, hasty):
    record, tally = student_card.FileRecord(sha256="0" * 64, size=900_000), transfer.Tally()
    with answering(OK, b"x") as url:
        said = error_of(transfer.fetch, replace(at(url), retries=1), "w", record, tmp_path / "w", tally, error=RunError)
    assert "too slow: " in said and "bytes in 0 s; the part received so far is kept" in said
    assert tally.bytes == (tmp_path / "w.part").stat().st_size > 0


def test_what_is_passed_over_must_come_too(tmp_path, monkeypatch):
    """A server without ranges sends all from the beginning; slowly, where a part is here already."""
    monkeypatch.setattr(web, "GATHER", 0.1)
    monkeypatch.setattr(web, "SILENCE", 0.3)
    late = pytest.raises(transports.Broken, match="too slow: .* bytes in 0 s")
    with answering(OK, b"x") as url, late, at(url).open("w", 800_000):
        pass


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("file:///etc/passwd", "redirects to file:///etc/passwd; redirects from http may only lead to http and https"),
        ("ftp://me:pw@host/x", "redirects to ftp://host/x; redirects from http may only lead to http and https"),
        ("/again", "Exceeded 10 redirects."),
        ("http://[x", "Invalid IPv6 URL"),
    ],
)
def test_redirections_stay_on_the_web_and_end(capfd, target, said):
    head = f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with answering(head.encode()) as url:
        done = command(capfd, "pull", f"{url}/s")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err and "pw" not in done.err


def test_redirections_from_https_stay_there():
    import requests

    response = requests.Response()
    response.status_code, response.url = 302, "https://host/x"
    response.headers["Location"] = "http://host/x"
    session = web._session()()
    assert "http://host/x; redirects from https may only lead to https" in error_of(
        session.get_redirect_target, response, error=transports.Refused
    )
    response.headers["Location"] = "https://other/x"
    assert session.get_redirect_target(response) == "https://other/x"


def test_what_a_server_says_is_one_line_without_control_characters(capfd):
    for first, said in [
        (b"HTTP/1.1 403 \x1b[2J\x1b]0;x\x07" + b"y" * 500 + b"\r\n\r\n", "403 \ufffd[2J\ufffd]0;x\ufffdyyy"),
        (b"HTTP/1.1 206 OK\r\nContent-Range: \x1b[2J\r\n\r\n", "byte 0 was requested, the answer has \ufffd[2J"),
        (b"\x1b[2J\r\n\r\n", "\ufffd[2J"),
    ]:
        with answering(first) as url:
            done = command(capfd, "pull", f"{url}/s")
        assert done.code in (1, 2)
        assert said in done.err and "\x1b" not in done.err and done.err.count("\n") == 1
        assert len(done.err) < 500


def test_a_folder_that_somebody_else_made_is_not_worked_in(tmp_path, student):
    """As a link to a folder of this user's, where a pull would leave its files."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "mine.txt").touch()
    digest = manifest.digest((student / DISTILL).read_bytes())
    (tmp_path / f".got.part-{digest[:16]}.{Owner.this().label}").symlink_to(tmp_path / "private")
    assert "belongs to another user; remove it" in error_of(get, student, tmp_path / "got", error=RunError)
    assert [path.name for path in (tmp_path / "private").iterdir()] == ["mine.txt"]
    assert not (tmp_path / "got").exists()


def test_a_long_text_leaves_the_table_readable(capfd, tmp_path, store):
    put(make(tmp_path / "t", license="x" * 1000), store, "long")
    done = command(capfd, "students")
    assert done.out.count("x" * 10) < 20 and "..." in done.out


# --- the index ---


def test_reading_an_index_takes_time_in_proportion_to_its_size(tmp_path):
    """CPU seconds of 8 times as much, in one process; by the square they would be 64 times as many."""

    def seconds(size):
        (tmp_path / "big").write_bytes(b" " * size)
        begin = time.process_time()
        assert len(pulling.read(server_source, "big", 64 << 20)) == size
        return time.process_time() - begin

    with Flaky(tmp_path) as server:
        server_source = at(server.url)
        seconds(1 << 20)
        small, large = min(seconds(2 << 20) for _ in range(3)), min(seconds(16 << 20) for _ in range(2))
    assert large < 28 * max(small, 0.005)


def test_an_index_of_a_broken_entry_and_of_too_many(capfd, tmp_path, store, monkeypatch):
    with Flaky(tmp_path) as server:
        path, url = store / "registry" / "_index.json", f"{server.url}/runs"
        content = json.loads(path.read_text())
        good = content["students"][0]
        for change, said in [
            ({"size": 10**400}, "size: 1000"),
            ({"metrics": {"FD": float("nan")}}, "metrics.FD: NaN given; input should be a finite number"),
            (
                {"license": "\x1b[2J"},
                'license: "\\u001b[2J" given; ' + ONE_LINE,
            ),
            ({"name": "../x"}, 'name: "../x" given; string should match pattern'),
            ({"size": "1"}, 'size: "1" given; input should be a valid integer'),
            ({"digest": "x"}, 'digest: "x" given; string should match pattern'),
        ]:
            path.write_text(json.dumps(content | {"students": [good | change, good | {"later": 1}]}))
            done = command(capfd, "students", "--store", url)
            assert (done.code, done.err.count("\n")) == (0, 1)
            assert done.err.startswith(f"warning: entry 1 of {url}/registry/_index.json is skipped: {said}")
            assert "digits:v1" in done.out
            assert command(capfd, "pull", "digits", f"got-{len(said)}", "--store", url).code == 0
        for text in (b'{"students":[' + b"{}," * 1_000_000 + b"{}]}", b"[" * 1_000_000, b"{}" * 1_000_000):
            path.write_bytes(text)
            done = command(capfd, "students", "--store", url)
            said = "_index.json is too large: an index can have at most 50,000 entries"
            assert (done.code, done.err) == (2, f"error: {url}/registry/{said}\n")
        monkeypatch.setattr(published, "MAX_INDEX", 1_000_000)
        done = command(capfd, "students", "--store", url)
        assert (done.code, "_index.json is larger than the limit of 1,000,000 bytes" in done.err) == (2, True)


CROWDED = {f"{'[' * 190}{n}@1": 1.0 for n in range(980)}


def test_a_card_of_very_many_metrics_takes_little_of_the_index(capfd, tmp_path, store):
    put(make(tmp_path / "t", metrics={**CROWDED, **{f"FD[{{:,{n}@1": float(n) for n in range(20)}}), store, "many")
    with Flaky(tmp_path) as server:
        done = command(capfd, "students", "--json", "--store", f"{server.url}/runs")
    assert (done.code, done.err) == (0, "")
    _, many = json.loads(done.out)
    assert many["metrics"] == {f"FD[{{:,{n}@1": float(n) for n in range(16)}
    content = json.loads((store / "registry" / "_index.json").read_bytes())
    content["students"][1]["metrics"] = CROWDED  # as older versions wrote it
    (store / "registry" / "_index.json").write_text(json.dumps(content, indent=2))
    with Flaky(tmp_path) as server:
        done = command(capfd, "students", "--store", f"{server.url}/runs")
    assert (done.code, done.err, "many:v1" in done.out) == (0, "", True)


def test_a_card_that_the_index_has_no_room_for_is_not_published_and_not_read(capfd, tmp_path, store):
    student = make(tmp_path / "t", recipe="\N{PILE OF POO}" * 1000)
    why = "its entry in the index would take 4,2"
    assert why in error_of(put, student, store, "emoji")
    assert list((store / "registry" / "emoji").iterdir()) == []
    student.rename(store / "registry" / "emoji" / "v1")
    done = command(capfd, "students")
    assert (done.code, "digits:v1" in done.out) == (0, True)
    assert done.err.startswith(f"warning: runs/registry/emoji/v1 is skipped: {why}")
    assert "valid: at most 4,096. Shorten recipe and license in distill.json" in done.err


def test_a_full_index_keeps_the_newest_and_says_so(tmp_path, store, capfd, monkeypatch):
    os.utime(store / "registry" / "digits" / "v1" / DISTILL, (1e9, 1e9))
    put(make(tmp_path / "b", seed=2), store, "a")
    whole = (store / "registry" / "_index.json").stat().st_size
    monkeypatch.setattr(published, "MAX_INDEX", whole - 1)
    capfd.readouterr()
    assert [entry.label for entry in published.write_index(store).students] == ["a:v1", "digits:v1"]
    assert capfd.readouterr().err == (
        f"warning: {store}/registry/_index.json is full: the oldest 1 of 2 students are not in it; over http "
        f"they can be pulled only by NAME:VERSION\n"
    )
    assert [each["name"] for each in json.loads((store / "registry" / "_index.json").read_bytes())["students"]] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        b'{"students":[' + b"1," * 3_000_001 + b"1]}",
        b'{"students":[' + b'"",' * 3_000_001 + b'""]}',
        b'{"later":[' + b"1," * 3_000_001 + b'1], "students":[]}',
        b'{"later":{' + b'"":1,' * 1_500_001 + b'"":1}, "students":[]}',
        b'{"later":"\\"", "students":[' + b"[]," * 200_001 + b"[]]}",
    ],
    ids=["numbers", "texts", "what nothing reads", "keys", "lists"],
)
def test_what_would_fill_the_memory_is_not_parsed(capfd, tmp_path, store, text):
    (store / "registry" / "_index.json").write_bytes(text)
    with Flaky(tmp_path) as server:
        done = command(capfd, "students", "--store", f"{server.url}/runs")
    assert (done.code, "is too large: an index can have at most 50,000 entries" in done.err) == (2, True)


def test_what_stands_in_texts_is_no_structure():
    inside = b'{"a":"' + rb"[{:,\"[{:,\\" * 300_000 + b'"}'
    assert json.loads(inside)["a"].count("[") == 600_000
    assert not published._fills_memory(inside) and not published._fills_memory(inside * 2)


# --- versions that readers would skip ---


def test_a_card_that_is_too_large_takes_no_version(tmp_path, store):
    """It is small enough as it was given, but not once it is written for people."""
    student = make(tmp_path / "t")
    steps = 70_000
    grid = [1.0, *((steps - n) / steps for n in range(1, steps)), 0.0]
    edit_card(student, lambda content: content.update(t_grids={str(steps): [float(f"{t:.6f}") for t in grid]}))
    assert (student / DISTILL).stat().st_size < student_card.MAX_CARD
    assert "the card of large has 1," in error_of(put, student, store, "large")
    assert list((store / "registry" / "large").iterdir()) == []


def test_texts_of_a_card_are_written_as_they_are(tmp_path, store):
    """Six letters for one would make more of it than a card may have."""
    student = make(tmp_path / "t", metrics={190 * "\u00e9" + f"{n}@1": 1.0 for n in range(1000)})
    assert put(student, store, "long").label == "long:v1"
    path = store / "registry" / "long" / "v1" / DISTILL
    assert path.stat().st_size < student_card.MAX_CARD and "\u00e9" in path.read_text()


def test_what_stands_in_the_place_of_a_version_is_said(tmp_path, store):
    place = store / "registry" / "digits" / "final"
    place.symlink_to(tmp_path / "nowhere")
    student = make(tmp_path / "t", seed=4)
    said = error_of(put, student, store, "digits", "final")
    assert said == f"{place} is a link, not a published student; publish another version, or remove it"
    place.unlink()
    place.touch()
    assert "final is a file, not a published student" in error_of(put, student, store, "digits", "final")


@pytest.mark.parametrize("name", ["Distill.json", "DISTILL.JSON", "distill.json/x.json"])
def test_no_file_takes_the_place_of_the_card(student, name):
    edit_card(student, lambda content: content["files"].update({name: {"sha256": "0" * 64, "size": 1}}))
    said = error_of(pulling.describe, at(student))
    assert "distill.json" in said and (
        "the same file on some disks" in said or "a file type" in said or "folder" in said
    )


# --- what an evaluation names ---


def test_the_best_student_is_one_of_the_run(tmp_path, measured):
    """Not a folder elsewhere that results.json names."""
    root, chosen = measured("x.png")
    content = json.loads((root / "results.json").read_text())
    far = content["rows"][-1] | {"network": "../../../private/secret", "distance": 0.1}
    (root / "results.json").write_text(json.dumps(content | {"rows": [*content["rows"], far]}))
    make(tmp_path / "private" / "secret")
    assert publishing.choose(chosen.run, None, "best").stage == "one_step"
    for name in ("../../../private/secret", "..", "", "a/b", "a\nb"):
        for place in (chosen.run.stage, chosen.run.student):
            assert "that is not a valid stage name" in error_of(place, name)


@pytest.mark.parametrize("which", ["step-" + "9" * 5000, "step-\u0663", "step-", "step--1", "x" * 5000])
def test_a_step_is_a_number(measured, which):
    _, chosen = measured("x.png")
    said = error_of(publishing.choose, chosen.run, None, which)
    assert said.endswith("valid: best, step-N (N: the step of a checkpoint)") and len(said) < 300


@pytest.mark.parametrize("url", ["file:///tmp/a%00b", "file:///tmp/a%0Ab", "file:///tmp/%1B[2J"])
def test_an_address_holds_no_hidden_characters(capfd, monkeypatch, url):
    said = f"error: {url}: the path contains a control character; give another folder\n"
    assert command(capfd, "pull", url).err == said
    monkeypatch.setenv("DISTILL_STORE", url)
    assert command(capfd, "students").err == said
    assert command(capfd, "pull", "digits").err == said


def test_what_another_host_left_is_taken_over_after_a_day(tmp_path):
    left = tmp_path / ".s.part-abc.7,1,boot,elsewhere"
    (left / "unet").mkdir(parents=True)
    (left / "unet" / "w.part").touch()
    with pulling.workplace(tmp_path / "s", "abc") as here:
        assert list(here.iterdir()) == []
        here.rmdir()
    for each in (left, left / "unet"):
        os.utime(each, (0, 0))
    with pulling.workplace(tmp_path / "s", "abc") as here:
        assert list(here.iterdir()) == [], "a file was written lately"
        here.rmdir()
    os.utime(left / "unet" / "w.part", (0, 0))
    with pulling.workplace(tmp_path / "s", "abc") as here:
        assert [path.name for path in here.iterdir()] == ["unet"]


def test_a_model_card_counts_the_calls_of_its_sampler():
    assert ", in few steps: one network call per step.\n" in student_card.readme(card())
    fields = {"kind": "acceleration", "sampler": "accelerated"}
    assert ", in few steps: N + 1 network calls in N steps.\n" in student_card.readme(card(**fields))
