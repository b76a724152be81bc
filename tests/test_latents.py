"""Latents that others have computed: .npy and safetensors files as data."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import test_teacher_dit as dit
import test_teacher_flux2 as flux2
import test_teacher_ltx as ltx
import torch
from latent import edit, load, normal, write
from latent_runs import content, run
from safetensors.torch import save_file

from distill import data
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data import DataSource, latent_index, latents
from distill.data.arrays import ArrayData
from distill.data.encoded import DecodedData, codec_of, scaled_for
from distill.evaluation import measuring
from distill.evaluation.metrics import features
from distill.evaluation.tally import FeatureSums
from distill.execution.solving import Solving
from distill.flow.codecs import PIXELS
from distill.flow.draws import Rows, key, sample_noise
from distill.pairs import PairSet, PairSource
from distill.runs.progress import Progress
from distill.spec.model import LatentsData, PairsStage
from distill.teachers.codecs import LatentCodec

CPU = torch.device("cpu")
LATENTS = normal(7, 4, 8, 8, seed=5)


def spec(path, **fields) -> LatentsData:
    return LatentsData(**{"kind": "latents", "path": str(path), "scaled": True, **fields})


def loaded(path, **fields):
    return data.load_data(spec(path, **fields), 3)


def save(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array.numpy() if isinstance(array, torch.Tensor) else array)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("one file", {}),
        ("shards", {}),
        ("one per file", {}),
        ("big-endian", {}),
        ("Fortran order, one per file", {}),
        ("float64", {}),
        ("safetensors", {"labels": "labels"}),
        ("safetensors shards", {"key": "z"}),
        ("labels of a file", {"labels": "ids.npy"}),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_layouts(tmp_path, monkeypatch, kind, options):
    monkeypatch.chdir(tmp_path)
    folder, expected, ids = tmp_path / "latents", LATENTS, torch.tensor([2, 0, 1, 1, 0, 2, 0])
    match kind:
        case "one file" | "labels of a file":
            folder = tmp_path / "all.npy"
            save(folder, LATENTS)
            save(tmp_path / "ids.npy", ids.to(torch.uint8))
        case "shards":
            save(folder / "b" / "1.npy", LATENTS[:2])
            save(folder / "b.npy", LATENTS[2:2])
            save(folder / "c.npy", LATENTS[2:])
            save(folder / ".hidden.npy", LATENTS)
        case "one per file":
            for i, each in enumerate(LATENTS):
                save(folder / f"{i:02}.npy", each)
        case "Fortran order, one per file":
            for i, each in enumerate(LATENTS):
                save(folder / f"{i:02}.npy", np.asfortranarray(each.numpy()))
        case "big-endian":
            save(folder / "a.npy", LATENTS.numpy().astype(">f2"))
            expected = LATENTS.half().float()
        case "float64":
            save(folder / "a.npy", LATENTS.double())
        case "safetensors":
            folder = tmp_path / "all.safetensors"
            save_file({"latents": LATENTS.bfloat16(), "other": torch.ones(1), "labels": ids}, folder)
            expected = LATENTS.bfloat16().float()
        case "safetensors shards":
            folder.mkdir()
            save_file({"z": LATENTS[:3], "more": torch.ones(3)}, folder / "0.safetensors")
            save_file({"z": LATENTS[3:]}, folder / "1.safetensors")
    found = loaded(folder, **options)
    assert (found.name, len(found), found.shape, found.encoded) == (folder.stem, 7, (4, 8, 8), True)
    got = found.items(0, [6, 0, 3, 3])
    assert torch.equal(got.samples, expected[[6, 0, 3, 3]]) and got.samples.dtype == torch.float32
    assert found.num_classes == (3 if "labels" in options else None)
    assert got.labels is None if "labels" not in options else torch.equal(got.labels, ids[[6, 0, 3, 3]])
    again = pickle.loads(pickle.dumps(found))  # noqa: S301  (as worker processes get it)
    assert torch.equal(again.items(0, [1, 5]).samples, expected[[1, 5]]) and again.digest == found.digest


def test_videos_and_vectors(tmp_path):
    videos, vectors = normal(3, 4, 2, 8, 8), normal(5, 6)
    save(tmp_path / "many.npy", videos)
    save(tmp_path / "vectors" / "0.npy", vectors[:3])
    save(tmp_path / "vectors" / "1.npy", vectors[3:])
    for i, each in enumerate(videos):
        save(tmp_path / "one" / f"{i}.npy", each)
    assert torch.equal(loaded(tmp_path / "many.npy").items(0, [2]).samples, videos[[2]])
    assert torch.equal(loaded(tmp_path / "one", one_per_file=True).items(0, [2]).samples, videos[[2]])
    assert loaded(tmp_path / "one").shape == (2, 8, 8), "four dimensions are many samples of three"
    assert torch.equal(loaded(tmp_path / "vectors").items(0, [4]).samples, vectors[[4]])


def test_moments_are_sampled_anew_in_each_epoch(tmp_path):
    moments = normal(4, 8, 4, 4)
    moments[0, 4:] = 1000.0  # limited like in diffusers
    save(tmp_path / "m.npy", moments)
    found = loaded(tmp_path / "m.npy", moments=True)
    mean, log_variance = moments.chunk(2, 1)
    noise = sample_noise(key("latents", 3, 1), range(4), (4, 4, 4))
    expected = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
    assert found.shape == (4, 4, 4)
    assert torch.equal(found.items(1, [3, 0, 1]).samples, expected[[3, 0, 1]])
    assert not torch.equal(found.items(2, [3]).samples, expected[[3]])


def test_half_of_the_draws_are_mirrored(tmp_path):
    save_file({"latents": LATENTS, "flipped": -LATENTS}, tmp_path / "a.safetensors")
    found = loaded(tmp_path / "a.safetensors", mirrored_key="flipped")
    drawn = torch.stack([found.items(epoch, range(7)).samples for epoch in range(60)])
    mirrored = (drawn == -LATENTS).flatten(2).all(2)
    assert torch.equal(drawn, torch.where(mirrored[..., None, None, None], -LATENTS, LATENTS))
    assert 0.4 < mirrored.double().mean() < 0.6
    assert torch.equal(found.items(5, [4, 2]).samples, drawn[5, [4, 2]]), "by (epoch, index)"
    assert found.digest != loaded(tmp_path / "a.safetensors", key="latents").digest


def test_the_digest_is_that_of_the_files_and_labels(tmp_path):
    save(tmp_path / "a" / "0.npy", LATENTS[:3])
    save(tmp_path / "a" / "1.npy", LATENTS[3:])
    save(tmp_path / "ids.npy", torch.arange(7) % 2)
    labels = str(tmp_path / "ids.npy")
    first = loaded(tmp_path / "a", labels=labels).digest
    content = hashlib.sha256(b"((4, 8, 8), '', None, False)")
    for name in ("0.npy", "1.npy"):
        content.update(hashlib.sha256((tmp_path / "a" / name).read_bytes()).digest())
    content.update((torch.arange(7) % 2).numpy().tobytes())
    assert first == content.hexdigest()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert loaded(tmp_path / "b", labels=labels).digest == first
    save(tmp_path / "ids.npy", torch.arange(7) % 3)
    assert loaded(tmp_path / "a", labels=labels).digest != first


def settle(path, seconds=100) -> None:
    """Sets the mtime of a file back, so that its index may be trusted."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns - seconds * 10**9))


def test_the_index_is_kept_and_files_are_read_once(tmp_path, monkeypatch):
    given = spec(tmp_path / "a", labels="labels")
    (tmp_path / "a").mkdir()
    for name, part, ids in (("0", slice(0, 3), [0, 1, 2]), ("1", slice(3, 7), [2, 1, 0, 1])):
        save_file(
            {"latents": LATENTS[part].clone(), "labels": torch.tensor(ids)}, tmp_path / "a" / f"{name}.safetensors"
        )
        settle(tmp_path / "a" / f"{name}.safetensors")
    read = []
    sha256 = latent_index._sha256
    monkeypatch.setattr(latent_index, "_sha256", lambda path, *more: read.append(path.name) or sha256(path, *more))
    for store, run_folder, expected in (
        ("s", None, ["0.safetensors", "1.safetensors"]),
        ("s", "r", []),
        ("t", "r", []),
    ):
        latents._INDEXES.clear()
        read.clear()
        data.update_index(given, tmp_path / store, None if run_folder is None else tmp_path / run_folder)
        assert read == expected
    latents._INDEXES.clear()
    before = data.load_data(given, 0, tmp_path / "r", indexed=True)
    assert read == [] and before.digest == data.load_data(given, 0, tmp_path / "s").digest

    (tmp_path / "a" / "0.safetensors").rename(tmp_path / "a" / "2.safetensors")  # the other order
    save_file({"latents": LATENTS[:1].clone(), "labels": torch.tensor([1])}, tmp_path / "a" / "0.safetensors")
    after = data.load_data(given, 0, tmp_path / "s")
    assert read == ["0.safetensors", "2.safetensors"], "a renamed file is another one"
    assert torch.equal(after.items(0, range(8)).labels, torch.tensor([1, 2, 1, 0, 1, 0, 1, 2]))
    assert torch.equal(after.items(0, range(8)).samples, LATENTS[[0, 3, 4, 5, 6, 0, 1, 2]])
    assert data.load_data(given, 0, tmp_path / "r", indexed=True).digest == before.digest
    with pytest.raises(RunError) as error:
        before.items(0, [0])
    assert str(error.value) == (
        f"{tmp_path / 'a' / '0.safetensors'} has changed since the data was indexed; restore the old file, then resume"
    )


def test_a_damaged_index_is_made_again(tmp_path):
    save(tmp_path / "a.npy", LATENTS)
    settle(tmp_path / "a.npy")
    given, place = spec(tmp_path / "a.npy"), tmp_path / spec(tmp_path / "a.npy").index_file
    data.update_index(given, tmp_path)
    digest, good = data.load_data(given, 0, tmp_path).digest, place.read_bytes()
    assert latent_index.read(place).head.shape == (4, 8, 8)
    for damage in (good[:-40], good.replace(b'"key', b'"kex'), good.replace(b"counts", b"countx"), b"", good + b"1"):
        place.write_bytes(damage)
        assert latent_index.read(place) is None
        assert data.load_data(given, 0, tmp_path).digest == digest


def test_large_files_show_their_progress(tmp_path, monkeypatch, capfd):
    save(tmp_path / "a.npy", np.zeros((300, 4, 32, 32), np.float32))
    loaded(tmp_path / "a.npy")
    assert capfd.readouterr().err == ""
    latents._INDEXES.clear()
    monkeypatch.setattr(latent_index, "LONG", 1000)
    loaded(tmp_path / "a.npy")
    assert "checksums of the latents  4/5 MB" in capfd.readouterr().err


def test_ctrl_c_ends_the_threads_that_read_files(tmp_path):
    whole = np.lib.format.open_memmap(tmp_path / "many.npy", "w+", np.float32, (10**9, 4))  # 16 GB of zeros, a hole
    del whole
    timer, began = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)), time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        loaded(tmp_path / "many.npy")
    assert time.monotonic() - began < 5


# --- scaling ---


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("latents") / "dit", dit.pipeline(num_embeds_ada_norm=3))
    edit(folder / "vae" / "config.json", scaling_factor=0.36, shift_factor=0.1)
    return load(folder)


def test_latents_are_scaled_as_the_codec_scales_them(teacher, tmp_path):
    """What the autoencoder returns, stored by others, trains the network on what the codec would have encoded."""
    pixels = normal(4, 3, 16, 16).tanh()
    with torch.no_grad():
        raw = teacher.codec._read.encode(pixels).latent_dist
    save(tmp_path / "raw.npy", raw.mode())
    save(tmp_path / "moments.npy", raw.parameters)
    encoded = teacher.codec.encode(pixels)
    found = scaled_for(loaded(tmp_path / "raw.npy", scaled=False), teacher.codec)
    assert codec_of(found, teacher.codec) is PIXELS
    assert torch.equal(found.items(0, range(4)).samples, encoded)
    assert torch.equal(encoded, (raw.mode() - 0.1) * 0.36)
    sampled = scaled_for(loaded(tmp_path / "moments.npy", scaled=False, moments=True), teacher.codec)
    noise = sample_noise(key("latents", 3, 0), range(4), (4, 8, 8))
    assert (sampled.items(0, range(4)).samples - (raw.mean + raw.std * noise - 0.1) * 0.36).abs().max() < 1e-6
    plain = loaded(tmp_path / "raw.npy")
    assert scaled_for(plain, teacher.codec) is plain and plain.digest != found.digest
    decoded = DecodedData(found, teacher.codec, CPU)
    assert decoded.shape == (3, 16, 16)
    assert torch.equal(decoded.items(0, range(4)).samples, teacher.codec.decode(encoded))


def test_scaling_needs_the_config_only(teacher, tmp_path):
    folder = shutil.copytree(teacher.codec.folder, tmp_path / "vae")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    found = load(teacher.codec.folder.parent, vae=str(folder)).codec.scaling()
    assert (found.shift.tolist(), found.scale.tolist()) == ([pytest.approx(0.1)], [pytest.approx(0.36)])
    assert found.digest == teacher.codec.scaling().digest


@pytest.mark.parametrize("made", ["FLUX.2", "LTX"])
def test_numbers_of_scaling_in_the_weights(tmp_path, made):
    """They are read without the rest; 2x2 patches of FLUX.2's latents become channels."""
    vae = ltx.autoencoder() if made == "LTX" else flux2.pipeline(flux2.Flux2KleinPipeline).vae
    vae.save_pretrained(tmp_path)
    codec = LatentCodec.of(tmp_path)
    scaling = codec.scaling()
    assert "_read" not in vars(codec), "the autoencoder is not loaded"
    if made == "LTX":
        z = normal(2, 4, 2, 3, 3)
        sides = (1, 4, 1, 1, 1)
        expected = (z - vae.latents_mean.reshape(sides)) * 0.8 / vae.latents_std.reshape(sides)
    else:
        z = normal(2, 2, 4, 6)
        patches = z.reshape(2, 2, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 8, 2, 3)
        mean, variance = (each.reshape(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
        expected = (patches - mean) / (variance + vae.config.batch_norm_eps).sqrt()
    assert scaling.shape(tuple(z.shape[1:])) == tuple(expected.shape[1:])
    assert (scaling(z) - expected).abs().max() < 1e-5
    assert (scaling.inverse(scaling(z)) - z).abs().max() < 1e-5
    with pytest.raises(InputError, match="have 6 channels; valid for the teacher's autoencoder: "):
        scaling.shape((6, *z.shape[2:]))


# --- runs ---


def test_a_network_is_trained_on_the_latents(teacher, tmp_path):
    """The batches are the scaled latents; the run names them by digest, and no autoencoder."""
    folder = teacher.codec.folder.parent
    save(tmp_path / "raw.npy", LATENTS)
    save(tmp_path / "ids.npy", torch.arange(7) % 3)
    given = {
        "kind": "latents", "path": str(tmp_path / "raw.npy"), "scaled": False, "labels": str(tmp_path / "ids.npy")
    }  # fmt: skip
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    try:
        done = run(tmp_path, content({"path": str(folder)}, given, ["shortcut/shortcut"]))
    finally:
        (tmp_path / "weights").rename(folder / "vae" / "diffusion_pytorch_model.safetensors")
    states = [json.loads(path.read_text()) for path in done.stage("shortcut").root.rglob("*.json")]
    inputs = next(each["settings"] for each in states if "settings" in each)["inputs"]
    found = scaled_for(data.load_data(LatentsData(**given), 0), teacher.codec)
    assert inputs["data"] == found.digest and "autoencoder" not in inputs
    batch = DataSource(found, 4, 0).batch(0, Rows(0, 4, 4))
    near = (batch.data[:, None] - (LATENTS - 0.1) * 0.36).abs().flatten(2).amax(2)
    assert (near.min(1).values < 1e-6).all() and torch.equal(near.argmin(1) % 3, batch.cond["class_labels"])


def test_paths_start_from_the_latents(teacher, tmp_path):
    save(tmp_path / "raw.npy", LATENTS)
    save(tmp_path / "ids.npy", torch.arange(7) % 3)
    stage = PairsStage(kind="pairs", count=8, block=4, shard=4, steps=2, solver="euler", paths="forward")
    real = loaded(tmp_path / "raw.npy", scaled=False, labels=str(tmp_path / "ids.npy"))
    made = Solving.of(teacher, stage, tmp_path, seed=3, device=CPU, data=real, law=None)
    with Progress("pairs", 8, "pairs", None) as progress:
        made.generate(tmp_path / "pairs", progress, StopRequest(), None)
    found = PairSource(PairSet.open(tmp_path / "pairs", None), 8, 0).batch(0, Rows(0, 8, 8))
    near = (found.pairs.data[:, None] - (LATENTS - 0.1) * 0.36).abs().flatten(2).amax(2)
    assert (near.min(1).values < 1e-6).all() and torch.equal(near.argmin(1) % 3, found.cond["class_labels"])
    assert made.data_digest == scaled_for(real, teacher.codec).digest


def test_an_evaluation_decodes_the_latents(teacher, tmp_path, capfd, monkeypatch):
    """Distances are those to the decoded images; without an autoencoder, there are none."""
    monkeypatch.setattr(features, "TRAIN_IMAGES", 512)
    codec = teacher.codec
    save(tmp_path / "z.npy", codec.encode(normal(12, 3, 16, 16).tanh()))
    save(tmp_path / "ids.npy", torch.arange(12) % 3)
    real = loaded(tmp_path / "z.npy", labels=str(tmp_path / "ids.npy"))
    found = measuring.of_images(measuring.pixels_of(real, codec, CPU), tmp_path)
    images = ArrayData("z", codec.decode(real.items(0, range(12)).samples).clamp(-1, 1), torch.arange(12) % 3, 3)
    assert found.name == "FD-z" and found.values.shape == (12, 64)
    embedded = FeatureSums.of(found.embed(images.items(0, range(12)).samples))
    assert found.measure(embedded)["precision"] == 1.0
    assert capfd.readouterr().err == ""
    assert measuring.pixels_of(real, PIXELS, CPU) is None
    assert capfd.readouterr().err == (
        "note: data 'z' has latents, which the teacher has no autoencoder to decode: samples are compared with those "
        "of the teacher only\n"
    )
