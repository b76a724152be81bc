"""Damaged or malicious folders of pairs: each gives one message that names the file, and nothing blocks."""

import hashlib
import json
import os
import re

import pytest
import torch
from runs import folder_bytes
from safetensors.torch import load_file, save_file

from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.flow.draws import Rows
from distill.pairs import PairSet, PairSource, generate, manifest
from distill.pairs.numbers import Rounding
from distill.runs.progress import Progress
from distill.spec import layout
from distill.spec.model import PairsStage
from distill.testing.closed_form import class_gaussian_teacher

TEACHER = class_gaussian_teacher(torch.arange(3.0)[:, None].expand(3, 4), torch.full((4,), 0.5), torch.full((4,), 0.3))
STATES = {"paths": "trajectories", "times": [1.0, 0.5, 0.0], "steps": 2}


def make(folder, **options):
    options = {"count": 22, "solver": "euler", "steps": 1, "block": 4, "shard": 8, **options}
    part = options.pop("part", None)
    stage = PairsStage(kind="pairs", **options)
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(
            TEACHER,
            stage,
            folder,
            seed=5,
            device=torch.device("cpu"),
            progress=progress,
            stop=StopRequest(),
            part=part,
        )
    return folder


def edit(path, **changes):
    """Change fields of a file of JSON; a name like a/b is of a field within."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *above, last = name.split("/")
        at = content
        for each in above:
            at = at[each]
        at[last] = value
    path.write_text(json.dumps(content))


FIRST = "shards/shard-00000.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 10**18}, r"count: Input should be less than or equal to 104857600000"),
        ({"count": -1}, r"count: Input should be greater than 0"),
        ({"count": "22"}, r"count: Input should be a valid integer"),
        ({"shard": 0}, r"shard: Input should be greater than 0"),
        ({"shard": 10**12}, r"shard: Input should be less than or equal to 1048576"),
        ({"count": 10**9}, r"the file: count 1,000,000,000 in files of 8: more than 100,000 files"),
        ({"count": 16}, r"the file: shards: 'shard-00002\.safetensors' is not a file of this set"),
        ({"seed": 2**63}, r"seed: Input should be less than 9223372036854775808"),
        ({"seed": -1}, r"seed: Input should be greater than or equal to 0"),
        ({"shape": []}, r"shape: Tuple should have at least 1 item"),
        ({"shape": [10**9]}, r"shards: shard-00000\.safetensors has \d+ bytes, too few for its pairs"),
        ({"shape": [0]}, r"shape\.0: Input should be greater than 0"),
        ({"num_classes": 0}, r"num_classes: Input should be greater than 0"),
        ({"nfe": float("nan")}, r"nfe: Input should be a finite number"),
        ({"guidance_scale": float("inf")}, r"guidance_scale: Input should be a finite number"),
        ({"steps": 10**9}, r"steps: Input should be less than or equal to 10000"),
        ({"block": 2**40}, r"block: Input should be less than or equal to 1048576"),
        ({"times": [1.0, 0.0]}, r"times must not be given with paths: backward"),
        ({"paths": "segments"}, r"times must be given with paths: segments"),
        ({"dtype": "float64"}, r"dtype: Input should be 'float32', 'float16', 'bfloat16' or 'uint8'"),
        ({"noise_sha256": "../x"}, r"noise_sha256: String should match pattern"),
        ({}, None),
        ({f"{FIRST}/sha256": "0"}, r"shards\.shard-00000\.safetensors\.sha256: String should match pattern"),
        ({f"{FIRST}/size": -5}, r"shards\.shard-00000\.safetensors\.size: Input should be greater than 0"),
        ({f"{FIRST}/start": 8}, r"shards: shard-00000\.safetensors has pairs 8 to 8, not 0 to 8"),
        ({f"{FIRST}/stop": 22}, r"shards: shard-00000\.safetensors has pairs 0 to 22, not 0 to 8"),
        ({f"{FIRST}/rounding/signal": -1}, r"rounding\.signal: Input should be greater than or equal to 0"),
        ({"\x1b[2J": 1}, "\ufffd\\[2J: Extra inputs are not permitted"),
    ],
)
def test_a_manifest_is_validated_where_it_is_read(tmp_path, changes, message):
    make(tmp_path)
    if message is None:  # a name that leads out of the folder
        path = tmp_path / "manifest.json"
        content = json.loads(path.read_text())
        content["shards"]["../shard-00000.safetensors"] = content["shards"]["shard-00000.safetensors"]
        path.write_text(json.dumps(content))
        message = r"shards: '\.\./shard-00000\.safetensors' is not a file of this set"
    else:
        edit(tmp_path / "manifest.json", **changes)
    for read in (lambda: PairSet.open(tmp_path, None), lambda: make(tmp_path)):
        with pytest.raises(
            InputError,
            match=rf"manifest\.json is damaged or was not written by distill \(.*{message}.*\); delete .* and",
        ):
            read()


@pytest.mark.parametrize(
    ("times", "message"),
    [([1.0, 1.0, 0.0], "do not decrease"), ([2.0, 0.5, 0.0], "do not decrease"), ([1.0], "at least 2 items")],
)
def test_times_of_states_are_validated(tmp_path, times, message):
    make(tmp_path, **STATES)
    edit(tmp_path / "manifest.json", times=times)
    with pytest.raises(InputError, match=message):
        PairSet.open(tmp_path, None)


def put(path, kind):
    """Something else than a file of the right content at a path."""
    path.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "nested":
            path.write_text("[" * 100_000)
        case "bytes":
            path.write_bytes(b"\xff\xfe{")
        case "large":
            with path.open("wb") as file:
                os.truncate(file.fileno(), 10**12)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pipe", r"manifest\.json is not a file; delete .* and make it again"),
        ("folder", r"manifest\.json is not a file; delete .* and make it again"),
        ("loop", r"manifest\.json cannot be read \(Too many levels of symbolic links"),
        (
            "nested",
            r"manifest\.json is damaged or was not written by distill \(the file: Invalid JSON: "
            r"recursion limit exceeded",
        ),
        ("bytes", r"manifest\.json is damaged or was not written by distill \(the file: Invalid JSON"),
        ("large", r"manifest\.json has 1,000,000,000,000 bytes, at most 268,435,456 are expected; delete"),
    ],
)
def test_what_is_no_manifest_is_named_at_once(tmp_path, kind, message):
    make(tmp_path)
    put(tmp_path / "manifest.json", kind)
    for read in (lambda: PairSet.open(tmp_path, None), lambda: make(tmp_path)):
        with pytest.raises(InputError, match=message):
            read()
    assert layout.listed(tmp_path) is None


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_no_shard(tmp_path, kind):
    make(tmp_path)
    put(tmp_path / "shard-00001.safetensors", kind)
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is not a file; delete damaged and unknown files"):
        PairSet.open(tmp_path, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: put(path, "pipe"), r"shard-00000\.json is not a file; regenerating it"),
        (
            lambda path: put(path, "nested"),
            r"shard-00000\.json has 100,000 bytes, at most 65,536 are expected; regenerating it",
        ),
        (lambda path: path.write_text("{"), r"shard-00000\.json is damaged \(the file: Invalid JSON"),
        (lambda path: edit(path, size=-1), r"shard-00000\.json is damaged \(size: Input should be greater than 0\)"),
        (lambda path: edit(path, stop=9), r"shard-00000\.json has pairs 0 to 9, not 0 to 8; regenerating it"),
    ],
)
def test_a_shard_with_a_damaged_record_is_made_again(tmp_path, capsys, change, said):
    whole = folder_bytes(make(tmp_path / "whole"))
    folder = make(tmp_path / "parts", part=(0, 2))
    change(folder / "shard-00000.json")
    with pytest.raises(InputError, match="is incomplete: 1 of 3 shards exist"):
        PairSet.open(folder, None)
    capsys.readouterr()
    assert folder_bytes(make(folder)) == whole
    assert re.search(said, capsys.readouterr().err)


def test_a_record_is_newer_than_the_manifest(tmp_path):
    """A set that was complete, of which a shard was made again on another device when the process was killed."""
    folder = make(tmp_path)
    listed = manifest.read(folder)
    name = "shard-00001.safetensors"
    other = {**load_file(folder / name), "data": load_file(folder / name)["data"] + 1}
    save_file(other, folder / name, {"distill": "{}"})
    content = (folder / name).read_bytes()
    file = listed.shards[name].model_copy(update={"size": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    (folder / "shard-00001.json").write_text(file.model_dump_json())
    make(folder)
    assert (folder / name).read_bytes() == content and not (folder / "shard-00001.json").exists()
    assert manifest.read(folder).shards[name] == file and PairSet.open(folder, None)


def forge(folder, name, tensors):
    """A shard of other tensors, and a manifest that vouches for it."""
    save_file(tensors, folder / name, {"distill": "{}"})
    content = (folder / name).read_bytes()
    changes = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(folder / "manifest.json", **{f"shards/{name}/{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": torch.full((8,), 10**12)}, r"has labels outside 0 \.\.\. 2, the classes of its manifest"),
        ({"class_labels": torch.full((8,), -1)}, r"has labels outside 0 \.\.\. 2, the classes of its manifest"),
        (
            {"data": torch.zeros(8, 5)},
            r"contains class_labels int64 \[8\], data float32 \[8, 5\], but its manifest\.json lists class_labels "
            r"int64 \[8\], data float32 \[8, 4\]",
        ),
        ({"data": torch.zeros(9, 4)}, r"contains .*data float32 \[9, 4\], but"),
        ({"data": torch.zeros(8, 4).double()}, r"contains .*data float64 \[8, 4\], but"),
        ({"more": torch.zeros(8, 4)}, r"contains .*more float32 \[8, 4\], but"),
    ],
)
def test_a_shard_that_its_checksum_fits_must_hold_what_the_manifest_says(tmp_path, change, message):
    folder, name = make(tmp_path), "shard-00000.safetensors"
    forge(folder, name, {**load_file(folder / name), **change})
    source = PairSource(PairSet.open(folder, None), 22, 0)
    with pytest.raises(RunError, match=rf"shard-00000\.safetensors {message}"):
        source.batch(0, Rows(0, 22, 22))


def test_numbers_whose_squares_are_too_large_for_float32_are_described():
    """A manifest with infinity in it could not be read again."""
    values = torch.full((4, 2), 1e30)
    assert Rounding.of(values, "float32").signal == pytest.approx(1e60, rel=1e-6)
    assert Rounding.of(values, "bfloat16").error == pytest.approx(1e60 * 2.0**-18, rel=1)


def test_names_and_sizes_are_listed_without_tensors(tmp_path):
    folder = make(tmp_path)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert layout.listed(folder) == sizes and len(sizes) == 3
    assert layout.listed(tmp_path / "none") is None
    edit(folder / "manifest.json", shards={"../x": {"size": 1}})
    assert layout.listed(folder) is None
