"""Pairs: known ends, byte-identical files after any interruption, refusals, and a stream without gaps."""

import dataclasses
import json
import os
import resource
import signal
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distill.core.errors import InputError, RunError, Stopped
from distill.core.stop import StopRequest
from distill.flow import draws, solvers
from distill.flow.draws import Rows
from distill.flow.fields import Counted
from distill.flow.interpolants import like, linear
from distill.pairs import PairSet, PairSource, generate
from distill.runs.progress import Progress
from distill.spec.model import GaussianTeacher, PairsStage
from distill.teachers.analytic import gaussian_teacher
from distill.testing.closed_form import class_gaussian_teacher

CPU = torch.device("cpu")
VECTOR = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[0.7, -1.0], std=[0.5, 2.0]))
CLASSES = class_gaussian_teacher(torch.arange(3.0)[:, None].expand(3, 4), torch.full((4,), 0.5), torch.full((4,), 0.3))
SMALL = {"count": 22, "solver": "heun", "steps": 4, "block": 4, "shard": 8}  # shards of 8, 8 and 6


def make(folder, teacher=VECTOR, *, seed=11, stop=None, **options):
    stage = PairsStage(kind="pairs", **{**SMALL, **options})
    with Progress("pairs", stage.count, "pairs", None) as progress:
        generate(teacher, stage, folder, seed=seed, device=CPU, progress=progress, stop=stop or StopRequest())
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(folder, number):
    return folder / f"shard-{number:05}.safetensors"


# --- what is made ---


def test_pairs_are_ends_of_the_teachers_paths(tmp_path):
    make(tmp_path, steps=256)
    pairs = PairSet.open(tmp_path, VECTOR.digest)
    data = torch.cat([pairs.load(n).data for n in range(3)])
    noise = draws.sample_noise(11, range(22), (2,))
    truth = torch.tensor([0.7, -1.0]) + torch.tensor([0.5, 2.0]) * noise
    assert (data - truth).abs().max() < 1e-4
    assert len(pairs) == 22 and pairs.shape == (2,)


def test_stored_data_solves_bitwise_from_the_regenerated_noise(tmp_path):
    make(tmp_path)
    manifest = PairSet.open(tmp_path, None).manifest
    for n, start in ((0, 4), (2, 20)):  # the last block is solved whole, though two of its pairs are not kept
        block = range(start, start + manifest.block)
        noise = draws.sample_noise(manifest.seed, block, manifest.shape)
        again = solvers.solve(VECTOR.field, noise, {}, solver=manifest.solver, steps=manifest.steps)
        stored = load_file(shard(tmp_path, n))["data"][start - 8 * n :][:4]
        assert torch.equal(stored, again[: len(stored)])


def test_the_numbers_do_not_depend_on_where_the_count_ends(tmp_path):
    short, long = make(tmp_path / "short"), make(tmp_path / "long", count=24)
    assert contents(short)["shard-00000.safetensors"] == contents(long)["shard-00000.safetensors"]
    a, b = (load_file(shard(folder, 2))["data"] for folder in (short, long))
    assert len(a) == 6 and torch.equal(a, b[:6])


def test_classes_guidance_and_calls(tmp_path):
    """Guided Gaussian classes are Gaussians around null + scale (mean - null)."""
    counted = dataclasses.replace(CLASSES, field=Counted(CLASSES.field))
    make(tmp_path, counted, guidance_scale=2.0, steps=128, count=12, block=12, shard=12)
    pairs = PairSet.open(tmp_path, CLASSES.digest)
    stored = pairs.load(0)
    assert stored.labels.tolist() == [0, 1, 2] * 4
    centre = 0.5 + 2.0 * (stored.labels[:, None] - 0.5)
    assert (stored.data - centre - 0.3 * draws.sample_noise(11, range(12), (4,))).abs().max() < 1e-3
    assert pairs.manifest.nfe == counted.field.rows / 12 == 2 * (2 * 128 - 1)


def test_shards_say_what_they_hold(tmp_path):
    make(tmp_path, CLASSES)
    with safe_open(shard(tmp_path, 2), "pt") as file:
        said = json.loads(file.metadata()["distill"])
        assert file.get_tensor("class_labels").tolist() == [1, 2, 0, 1, 2, 0]  # pairs 16 ... 21
    assert said == {"start": 16, "stop": 22, "seed": 11, "teacher": CLASSES.digest}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["done"] and manifest["num_classes"] == 3 and manifest["nfe"] == 7
    assert list(manifest["shards"]) == [f"shard-{n:05}.safetensors" for n in range(3)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision_is_of_the_file_only(tmp_path, dtype):
    make(tmp_path / "full")
    make(tmp_path / "half", dtype=dtype)
    full, half = (load_file(shard(tmp_path / name, 0))["data"] for name in ("full", "half"))
    assert half.dtype == getattr(torch, dtype) and torch.equal(half, full.to(half.dtype))
    batch = PairSource(PairSet.open(tmp_path / "half", None), 4, 0).batch(0, Rows(0, 4, 4))
    assert batch.pairs.data.dtype == torch.float32


class LinearField:
    """A field with a matrix product, which autocast touches."""

    interpolant, t_range = linear(), (0.0, 1.0)

    def __call__(self, x_t, t, cond):
        self.seen = torch.nn.functional.linear(x_t, torch.eye(2) / 3)
        return self.seen.to(x_t.dtype) + 0 * like(t, x_t).to(x_t.dtype)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_of_the_networks(tmp_path, precision, dtype):
    field = LinearField()
    make(tmp_path, dataclasses.replace(VECTOR, field=field), precision=precision, solver="euler")
    assert field.seen.dtype == dtype
    assert load_file(shard(tmp_path, 0))["data"].dtype == torch.float32


# --- interruptions ---


def test_only_what_is_missing_or_damaged_is_made_again(tmp_path, capsys):
    whole = contents(make(tmp_path))
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    shard(tmp_path, 0).unlink()
    damaged = bytearray(whole["shard-00002.safetensors"])
    damaged[-1] ^= 1
    shard(tmp_path, 2).write_bytes(damaged)
    (tmp_path / ".shard-00001.safetensors.tmp-123").write_bytes(b"of a process that was killed")
    make(tmp_path)
    assert contents(tmp_path) == whole
    assert shard(tmp_path, 1).stat().st_ino == inodes["shard-00001.safetensors"]
    said = capsys.readouterr().err
    assert "shard-00000.safetensors is missing; regenerating it" in said
    assert "shard-00002.safetensors is damaged (checksum mismatch); regenerating it" in said
    inodes = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
    make(tmp_path)  # nothing is missing, nothing is written
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == inodes


def test_a_signal_stops_after_the_block_and_the_rest_is_made_later(tmp_path):
    whole = contents(make(tmp_path / "whole"))
    folder = tmp_path / "stopped"

    class Interrupting(Counted):
        """Gets a real signal in the middle of the second shard's first block."""

        def __call__(self, x_t, t, cond):
            if self.calls == 2 * 7 + 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(x_t, t, cond)

    with StopRequest() as stop, pytest.raises(Stopped, match=r"SIGTERM; saved: 1 of 3 shards in .*stopped"):
        make(folder, dataclasses.replace(VECTOR, field=Interrupting(VECTOR.field)), stop=stop)
    assert shard(folder, 0).exists() and not shard(folder, 1).exists()
    with pytest.raises(InputError, match=r"is incomplete: 1 of 3 shards exist; run its pairs stage again to finish it"):
        PairSet.open(folder, None)
    assert contents(make(folder)) == whole


def test_a_signal_in_a_shards_last_block_comes_after_the_shard(tmp_path):
    class Interrupting(Counted):
        def __call__(self, x_t, t, cond):
            if self.calls == 7 + 3:  # the second of the first shard's two blocks
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(x_t, t, cond)

    with StopRequest() as stop, pytest.raises(Stopped, match="SIGTERM; saved: 1 of 3 shards in"):
        make(tmp_path, dataclasses.replace(VECTOR, field=Interrupting(VECTOR.field)), stop=stop)
    assert shard(tmp_path, 0).exists()


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"pairs cannot be written to .*file.*: (File exists|Not a directory); name"):
        make(tmp_path / "file" / below)


def test_pairs_without_room_are_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.core.space.free", lambda folder: 100)
    with pytest.raises(
        RunError,
        match=r"not enough disk space for \d+ pairs: \S+ k?B needed, but only 100 B free in .*distill clean RUN",
    ):
        make(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_full_disk_leaves_complete_shards(tmp_path):
    """A limit on the size of files stands in for the disk: the write itself fails."""
    whole = contents(make(tmp_path / "whole", CLASSES, count=4000, block=1000, shard=1000))
    folder = make(tmp_path / "full", CLASSES, count=4000, block=1000, shard=1000)
    for n in (2, 3):
        shard(folder, n).unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write .*shard-00002\.safetensors: .*; nothing was changed"):
            make(folder, CLASSES, count=4000, block=1000, shard=1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(contents(folder)) == {"manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"}
    assert contents(make(folder, CLASSES, count=4000, block=1000, shard=1000)) == whole


class BadAt:
    """Not a number for the class 2 of 3."""

    interpolant, t_range = linear(), (0.0, 1.0)

    def __call__(self, x_t, t, cond):
        bad = like((cond["class_labels"] == 2).float(), x_t)
        return torch.where(bad > 0, torch.nan, x_t)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(
        RunError, match=r"pair 2 of shard-00000\.safetensors contains NaN or infinity as float32 after 4 steps of heun"
    ):
        make(tmp_path / "nan", dataclasses.replace(CLASSES, field=BadAt()))
    far = gaussian_teacher(GaussianTeacher(kind="gaussian", mean=[1e6], std=[1.0]))
    with pytest.raises(RunError, match=r"pair 0 of shard-00000\.safetensors contains NaN or infinity as float16"):
        make(tmp_path / "far", far, dtype="float16")
    for name in ("nan", "far"):
        assert set(contents(tmp_path / name)) == {"manifest.json"}


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"solver": "euler"}, r"solver is heun, expected euler, nfe is 7\.0, expected 4\.0"),
        ({"steps": 5}, r"steps is 4, expected 5, nfe is 7\.0, expected 9\.0"),
        ({"seed": 12}, r"seed is 11, expected 12, noise_sha256 is "),
        ({"guidance_scale": 2.0}, r"nfe is 7\.0, expected 14\.0, guidance_scale is 1\.0, expected 2\.0"),
        ({"count": 30}, r"count is 22, expected 30"),
        ({"teacher": VECTOR}, r"teacher_digest .*, shape is \(4,\), expected \(2,\), num_classes is 3, expected None"),
    ],
)
def test_a_folder_of_other_pairs_is_refused(tmp_path, change, named):
    whole = contents(make(tmp_path, CLASSES))
    with pytest.raises(InputError, match=f"contains pairs with other settings: {named}"):
        make(tmp_path, **{"teacher": CLASSES, **change})
    assert contents(tmp_path) == whole


def test_generate_refuses_strangers_and_blocks_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"shard: 10 is not a multiple of block \(4\); nearest: 8"):
        make(tmp_path / "odd", shard=10)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other.safetensors").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"contains shards that do not belong to this set: other\.safetensors; remove them"
    ):
        make(tmp_path / "a")
    (tmp_path / "a" / "other.safetensors").rename(tmp_path / "a" / "shard-00000.safetensors")
    with pytest.raises(
        InputError, match=r"contains shards, but no manifest\.json, so they cannot be used; delete the "
    ):
        make(tmp_path / "a")
    with pytest.raises(InputError, match=r"the Gaussian teacher .* has no class id for the unconditional call"):
        make(tmp_path / "guided", guidance_scale=3.0)
    assert not (tmp_path / "guided").exists() and not (tmp_path / "odd").exists()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "manifest.json").unlink(),
            r"contains no pairs \(no manifest\.json\); run the pairs stage first",
        ),
        (
            lambda f: shard(f, 1).unlink(),
            r"shard-00001\.safetensors is missing; delete damaged and unknown files, then resume",
        ),
        (lambda f: flip(shard(f, 1), -3), r"shard-00001\.safetensors is damaged \(checksum mismatch\)"),
        (lambda f: os.truncate(shard(f, 2), 100), r"shard-00002\.safetensors is damaged \(100 bytes, expected \d+\)"),
        (
            lambda f: shard(f, 0).rename(shard(f, 7)),
            r"00000\.safetensors is missing, shard-00007\.safetensors does not belong to this set",
        ),
        (
            lambda f: shard(f, 0).replace(shard(f, 1)),
            r"00000\.safetensors is missing, shard-00001\.safetensors is damaged",
        ),
        (
            lambda f: edit_manifest(f, noise_sha256="0" * 64),
            r"on this machine, seed 11 gives other noise than the noise of the pairs",
        ),
        (
            lambda f: edit_manifest(f, extra=1),
            r"manifest\.json is damaged or was not written by distill \(extra: Extra inputs",
        ),
        (
            lambda f: os.truncate(f / "manifest.json", 50),
            r"manifest\.json is damaged or was not written by distill \(the file: Invalid JSON",
        ),
        (lambda f: edit_manifest(f, done=False), r"is incomplete: 3 of 3 shards exist"),
        (lambda f: edit_manifest(f, shards={}), r"is incomplete: 0 of 3 shards exist"),
    ],
)
def test_open_names_what_is_wrong(tmp_path, damage, message):
    damage(make(tmp_path))
    with pytest.raises(InputError, match=message):
        PairSet.open(tmp_path, None)


def test_open_refuses_pairs_of_another_teacher(tmp_path):
    make(tmp_path)
    with pytest.raises(
        InputError, match=r"pairs of another teacher: the Gaussian teacher in 2 dimensions, digest \w{12}, expected "
    ):
        PairSet.open(tmp_path, CLASSES.digest)


def test_a_shard_that_vanishes_later_is_named(tmp_path):
    pairs = PairSet.open(make(tmp_path), None)
    shard(tmp_path, 1).write_bytes(struct.pack("<Q", 1 << 40))
    with pytest.raises(RunError, match=r"shard-00001\.safetensors was complete at the start, but cannot be read now"):
        pairs.load(1)


# --- the stream ---


class Watched(PairSet):
    """Notes every load, and what the source held at that moment."""

    def load(self, number):
        self.loads = [*getattr(self, "loads", []), (number, len(self.source.held))]
        return super().load(number)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """53 pairs in shards of 8, the last of 5, with classes."""
    return make(tmp_path_factory.mktemp("stream"), CLASSES, count=53, steps=2, solver="euler")


def source(stored, batch_size=10, seed=3, group=2):
    pairs = Watched.open(stored, None)
    pairs.source = PairSource(pairs, batch_size, seed, group)
    return pairs.source


@pytest.fixture(scope="module")
def truth(stored):
    """The data of every index, and an index for every data."""
    data = torch.cat([load_file(shard(stored, n))["data"] for n in range(7)])
    return data, {tuple(row): i for i, row in enumerate(data.tolist())}


def indices(batch, truth):
    return [truth[1][tuple(row)] for row in batch.pairs.data.tolist()]


def stream(made, truth, steps, batch_size=10):
    return [i for step in steps for i in indices(made.batch(step, Rows(0, batch_size, batch_size)), truth)]


def test_every_pair_comes_once_in_an_epoch(stored, truth):
    order = stream(source(stored), truth, range(16))
    epochs = [order[i : i + 53] for i in (0, 53, 106)]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    assert stream(source(stored, seed=4), truth, range(3)) != order[:30]


def test_noise_and_labels_belong_to_the_data(stored, truth):
    """T23: the noise of a pair is its own in any order and at any place of a batch."""
    made = source(stored)
    for step in (0, 5, 17):
        batch = made.batch(step, Rows(2, 9, 10))
        at = indices(batch, truth)
        assert torch.equal(batch.pairs.noise, draws.sample_noise(11, at, (4,)))
        assert batch.cond["class_labels"].tolist() == [i % 3 for i in at]


def test_processes_and_micro_batches_share_one_stream(stored, truth):
    whole = source(stored).batch(5, Rows(0, 10, 10))  # step 5 crosses from one epoch into the next
    parts = [source(stored).batch(5, Rows(a, b, 10)) for a, b in ((0, 3), (3, 4), (4, 10))]
    assert torch.equal(whole.pairs.data, torch.cat([part.pairs.data for part in parts]))
    assert torch.equal(whole.pairs.noise, torch.cat([part.pairs.noise for part in parts]))
    assert torch.equal(whole.cond["class_labels"], torch.cat([part.cond["class_labels"] for part in parts]))
    assert stream(source(stored, 10), truth, range(6)) == stream(source(stored, 20), truth, range(3), 20)


def test_any_step_can_be_asked_for_at_any_time(stored, truth):
    made, order = source(stored), stream(source(stored), truth, range(12))
    for step in (11, 0, 6, 5, 5, 10):
        assert stream(made, truth, [step]) == order[10 * step : 10 * step + 10]


def test_memory_is_one_group_and_a_shard_is_read_once_in_an_epoch(stored):
    made = source(stored)
    for step in range(53):  # ten epochs
        made.batch(step, Rows(0, 10, 10))
        assert len(made.held) <= 2
    loads = made.pairs.loads
    assert max(held for _, held in loads) < 2  # the old group goes before the new one comes
    assert len(loads) <= 10 * 7
    everything = source(stored, group=7)
    for step in range(53):
        everything.batch(step, Rows(0, 10, 10))
    assert len(everything.pairs.loads) == 7  # a set of one group is read once


def test_a_batch_larger_than_the_set_wraps_around(stored, truth):
    order = stream(source(stored, 120), truth, [0], 120)
    assert order == stream(source(stored, 10), truth, range(12))
