"""Caches of latents: equal to encoding in the loop, the same bytes by any number of processes, verified, read flat."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_teacher_flux2 as flux2
import test_teacher_ltx as ltx
import torch
from diffusers import Flux2Pipeline
from latent import autoencoder, normal
from PIL import Image
from runs import folder_bytes
from safetensors.torch import load_file

from distill import data
from distill.caches import CachedLatents, LatentManifest, latents, open_latents, verify
from distill.caches.manifest import LatentShard
from distill.core.errors import InputError, RunError, Stopped
from distill.core.stop import StopRequest
from distill.data import DataSource
from distill.data.arrays import ArrayData
from distill.data.source import Bucket, Items
from distill.flow import draws
from distill.flow.codecs import PIXELS, Pixels
from distill.flow.draws import Rows
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage
from distill.spec.dataspec import ImagesData
from distill.spec.layout import Layout, listed
from distill.teachers.codecs import LatentCodec

CPU = torch.device("cpu")
BLOCK = 4
IMAGES = ArrayData("images", normal(22, 3, 8, 8, seed=4).tanh(), torch.arange(22) % 3, 3)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    autoencoder(shift_factor=0.3, scaling_factor=0.5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def codec(vae) -> LatentCodec:
    return LatentCodec.of(vae)


def stage(**fields) -> CacheStage:
    return CacheStage(kind="cache", **{"block": BLOCK, "shard": 8, "prompts_shard": 8, **fields})


def make(folder: Path, codec, given=IMAGES, part=None, stop=None, warnings=None, mirrored=False, seed=5, **fields):
    with Progress("cache", len(given), "images", None) as progress:
        progress.warn = print if warnings is None else warnings.append
        latents.generate(
            given, codec, stage(**fields), folder, seed=seed, device=CPU, progress=progress, stop=stop or StopRequest(),
            part=part, mirrored=mirrored,
        )  # fmt: skip
    return folder


def pictures(folder: Path, count: int = 6, sides: tuple[int, int] = (8, 8)) -> Path:
    for i in range(count):
        name = folder / "ab"[i % 2] / f"{i}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", sides, bytes((7 * i + k * k) % 256 for k in range(3 * sides[0] * sides[1]))).save(name)
    return folder


# --- what is stored ---


@pytest.mark.parametrize("flip", [False, True])
def test_the_means_are_those_of_encoding_in_the_loop_bit_for_bit(tmp_path, codec, flip):
    spec = ImagesData(kind="images", path=str(pictures(tmp_path / "set")), size=8, flip=flip)
    inloop = data.load_data(spec, 7)
    plain = data.load_data(spec.model_copy(update={"flip": False}), 7)
    found = open_latents(make(tmp_path / "cache", codec, plain, mirrored=flip, latents="mean"), 7)
    assert (len(found), found.num_classes, found.shape, found.encoded) == (6, 2, (4, 4, 4), True)
    for epoch in (0, 3):
        for indices in ([0, 1, 2, 3], [5, 2, 4]):
            expected, got = inloop.items(epoch, indices), found.items(epoch, indices)
            assert torch.equal(got.samples, codec.encode(expected.samples))
            assert torch.equal(got.labels, expected.labels) and torch.equal(got.sizes, expected.sizes)
    flipped = [not torch.equal(*(each.items(0, [i]).samples for each in (inloop, plain))) for i in range(6)]
    assert any(flipped) == flip and not all(flipped)


def test_pixels_are_those_of_the_data_bit_for_bit(tmp_path):
    spec = ImagesData(kind="images", path=str(pictures(tmp_path / "set")), size=8, flip=True)
    plain = data.load_data(spec.model_copy(update={"flip": False}), 7)
    found = open_latents(make(tmp_path / "cache", PIXELS, plain, mirrored=True), 7)
    assert not found.encoded and found.manifest.dtype == "uint8"
    assert torch.equal(found.items(2, range(6)).samples, data.load_data(spec, 7).items(2, range(6)).samples)


@dataclass(frozen=True)
class Known(Pixels):
    """A codec whose posterior is known: N(mean of the pixels of a row, 0.25)."""

    digest: str = "e" * 64
    is_identity: bool = False
    has_spread: bool = True

    def shape(self, pixels):
        return (2, *pixels[1:])

    def encode(self, pixels):
        return self.moments(pixels)[0]

    def moments(self, pixels):
        mean = pixels[:, :2]
        return mean, torch.full_like(mean, 0.25).log()


def z_test(samples: torch.Tensor, mean: torch.Tensor) -> None:
    """samples [n, ...] of N(mean, 0.25), independent."""
    z = ((samples - mean) / 0.5).double()
    assert abs(z.mean().item()) < 4 / z.numel() ** 0.5
    assert abs(z.var().item() - 1) < 4 * (2 / z.numel()) ** 0.5


def test_moments_are_sampled_anew_in_each_epoch_from_the_posterior(tmp_path):
    found = open_latents(make(tmp_path, Known()), 3)
    assert found.manifest.latents == "moments"
    mean = IMAGES.items(0, range(22)).samples[:, :2]
    epochs = torch.stack([found.items(epoch, range(22)).samples for epoch in range(40)])
    z_test(epochs, mean)
    assert torch.equal(found.items(7, [20, 3]).samples, epochs[7][[20, 3]])  # wherever they are asked for
    noise = draws.sample_noise(draws.key(3, "latents", 7), [20], (2, 8, 8))
    assert torch.equal(epochs[7][20], (mean[20] + (0.5 * torch.tensor(0.25).log()).exp() * noise)[0])
    other = open_latents(tmp_path, 4).items(0, range(22)).samples
    assert not torch.isclose(other, epochs[0]).any(), "another seed gives other samples"


def test_one_sample_is_kept_for_each_image_and_its_mirror_image(tmp_path):
    found = open_latents(make(tmp_path / "a", Known(), latents="sample", mirrored=True), 3)
    tensors = [load_file(tmp_path / "a" / found.manifest.layout.name(n)) for n in range(3)]
    images = IMAGES.items(0, range(22)).samples[:, :2]
    for name, mean in {"sample": images, "mirrored_sample": images.flip(-1)}.items():
        z_test(torch.cat([each[name] for each in tensors]), mean)
    assert torch.equal(found.items(1, [4]).samples, found.items(1, [4]).samples)
    both = {found.items(epoch, [4]).samples.sum().item() for epoch in range(12)}
    assert both == {tensors[0][name][4].sum().item() for name in ("sample", "mirrored_sample")}
    assert folder_bytes(tmp_path / "a") != folder_bytes(
        make(tmp_path / "b", Known(), latents="sample", mirrored=True, seed=6)
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_latents_are_rounded_to_the_data_type(tmp_path, dtype):
    found = open_latents(make(tmp_path, Known(), latents="mean", dtype=dtype), 0)
    mean = IMAGES.items(0, range(22)).samples[:, :2]
    assert torch.equal(found.items(0, range(22)).samples, mean.to(getattr(torch, dtype)).float())


def test_moments_are_scaled_as_the_network_takes_them(codec, vae):
    pixels = IMAGES.items(0, range(3)).samples
    posterior = codec._vae(CPU).encode(pixels).latent_dist
    mean, log_variance = codec.moments(pixels)
    assert torch.equal(mean, codec.encode(pixels)) and torch.equal(mean, (posterior.mean - 0.3) * 0.5)
    assert torch.allclose((0.5 * log_variance).exp(), 0.5 * posterior.std, rtol=1e-6, atol=0)


def test_moments_of_patches_and_of_channels_with_scales_of_their_own(tmp_path):
    flux2.pipeline(Flux2Pipeline).vae.save_pretrained(tmp_path / "flux2")
    ltx.autoencoder().save_pretrained(tmp_path / "ltx")
    images, video = normal(2, 3, 8, 16, seed=3).tanh(), normal(1, 3, 3, 32, 32, seed=3).tanh()
    for folder, pixels in {"flux2": images, "ltx": video}.items():
        found = LatentCodec.of(tmp_path / folder)
        mean, log_variance = found.moments(pixels)
        assert torch.equal(mean, found.encode(pixels)) and mean.shape[1:] == found.shape(tuple(pixels.shape[1:]))
        posterior = found._vae(CPU).encode(pixels).latent_dist
        noise = normal(*posterior.mean.shape, seed=8)
        expected = found.scaling()(posterior.mean + posterior.std * noise)
        ours = torch.nn.functional.pixel_unshuffle(noise, 2) if folder == "flux2" else noise
        assert torch.allclose(latents.sampled(mean, log_variance, ours), expected, atol=1e-5)


def test_the_digest_of_an_autoencoder_is_that_of_its_files_and_needs_no_network(vae, codec, monkeypatch):
    from distill.teachers import weights

    _, digests = weights.network(vae, codec.config, codec._class, codec.paths)
    config = {k: v for k, v in codec.config.items() if k not in ("_diffusers_version", "_name_or_path")}
    known = __import__("hashlib").sha256(json.dumps({"config": config, "weights": digests}, sort_keys=True).encode())
    monkeypatch.setattr(weights, "network", None)
    assert LatentCodec.of(vae).digest == known.hexdigest()


# --- by several processes, again after damage ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory, codec) -> Path:
    return make(tmp_path_factory.mktemp("whole"), codec)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_the_bytes_are_the_same_by_any_number_of_processes(tmp_path, codec, whole, parts):
    for i in reversed(range(parts)):
        assert listed(tmp_path) in (None, {})
        make(tmp_path, codec, part=(i, parts))
    found = folder_bytes(tmp_path)
    records = {f"shard-{n:05}.json" for n in range(3)}
    assert {name: each for name, each in found.items() if name not in records} == folder_bytes(whole)
    assert open_latents(tmp_path, 0).digest == open_latents(whole, 1).digest


def test_two_runs_can_make_the_same_cache_at_once(tmp_path, codec, whole):
    with ThreadPoolExecutor(2) as threads:
        for made in [threads.submit(make, tmp_path, codec) for _ in range(2)]:
            made.result()
    assert folder_bytes(tmp_path) == folder_bytes(whole)


def test_shards_that_another_run_makes_in_the_meantime_are_taken_over(tmp_path, codec, whole):
    read = []

    class Slow(ArrayData):
        def items(self, epoch, indices):
            if not read:
                make(tmp_path, codec)  # all of them, by another run
            read.extend(indices)
            return super().items(epoch, indices)

    make(tmp_path, codec, Slow("images", IMAGES._images, IMAGES._labels, 3))
    assert sorted(read) == list(range(8)), "only the first of three shards"
    assert folder_bytes(tmp_path) == folder_bytes(whole)


def test_processes_that_mend_a_complete_set_keep_each_others_checksums(tmp_path, codec):
    """Also if the device of one rounds otherwise."""

    class Other:
        def __getattr__(self, name):
            return getattr(codec, name)

        def moments(self, pixels):
            mean, log_variance = codec.moments(pixels)
            return mean * (1 + 1e-5), log_variance

    class Slow(ArrayData):
        def items(self, epoch, indices):
            if indices[0] == 0:
                make(tmp_path, Other(), part=(1, 3))  # meanwhile, by the second process
            return super().items(epoch, indices)

    make(tmp_path, codec)
    for name in ("shard-00000.safetensors", "shard-00001.safetensors"):
        (tmp_path / name).unlink()
    make(tmp_path, codec, Slow("images", IMAGES._images, IMAGES._labels, 3), part=(0, 3))
    verify(tmp_path)
    assert open_latents(tmp_path, 0).manifest.done


def test_interrupted_work_is_continued_to_the_same_bytes(tmp_path, codec, whole):
    stop = StopRequest()

    class Stopping(ArrayData):
        def items(self, epoch, indices):
            stop.signal = "SIGTERM" if indices[0] == 8 else stop.signal  # in the second shard
            return super().items(epoch, indices)

    given = Stopping("images", IMAGES._images, IMAGES._labels, 3)
    with pytest.raises(Stopped, match=f"stopped by SIGTERM; saved: 1 of 3 shards in {tmp_path}"):
        make(tmp_path, codec, given, stop=stop)
    with pytest.raises(InputError) as caught:
        open_latents(tmp_path, 0)
    assert str(caught.value) == (
        f"{tmp_path} is incomplete: 1 of 3 shards exist; run `distill cache` again to finish it"
    )
    assert folder_bytes(make(tmp_path, codec)) == folder_bytes(whole)


def test_damaged_and_missing_shards_are_made_again(tmp_path, codec, whole):
    make(tmp_path, codec)
    path, inode = tmp_path / "shard-00001.safetensors", (tmp_path / "shard-00000.safetensors").stat().st_ino
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(InputError, match="shard-00002.safetensors is missing; delete unknown"):
        open_latents(tmp_path, 0)
    with pytest.raises(InputError) as caught:
        verify(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: shard-00001.safetensors is damaged (checksum mismatch), shard-00002.safetensors is missing; "
        "delete unknown files, then run `distill cache`: missing and damaged ones are made again"
    )
    verify(tmp_path, 0, 3)  # only shard 0
    warnings = []
    assert folder_bytes(make(tmp_path, codec, warnings=warnings)) == folder_bytes(whole)
    assert warnings == [
        f"{path} is damaged (checksum mismatch); regenerating it",
        f"{tmp_path}/shard-00002.safetensors is missing; regenerating it",
    ]
    assert (tmp_path / "shard-00000.safetensors").stat().st_ino == inode
    verify(tmp_path)


# --- sizes, and images that cannot be read ---


class Bucketed:
    """Images of 8x8 and 8x16, mixed."""

    name, shape, num_classes, digest, encoded, prompts = "sizes", (3, 8, 8), None, "d" * 64, False, None
    buckets = [
        Bucket((3, 8, 8), torch.arange(0, 14, 2).numpy()),
        Bucket((3, 4, 4), range(0)),
        Bucket((3, 8, 16), range(1, 14, 2)),
    ]

    def __len__(self):
        return 14

    def items(self, epoch, indices):
        width = 16 if indices[0] % 2 else 8
        samples = torch.stack([torch.full((3, 8, width), i / 14) for i in indices])
        return Items(samples, None, torch.tensor([[i, 0, 0, 0, 8, width] for i in indices]))


def test_a_shard_has_images_of_one_size_and_the_batches_too(tmp_path):
    found = open_latents(make(tmp_path, Known(), Bucketed(), latents="mean", block=2, shard=4), 0)
    assert [list(each.items) for each in found.buckets] == [list(range(7)), list(range(7, 14))]
    assert [each.shape for each in found.buckets] == [(2, 8, 8), (2, 8, 16)]
    assert found.shards == [[range(4), range(4, 7)], [range(7, 11), range(11, 14)]]
    assert found.items(0, [8, 7, 13]).sizes[:, 0].tolist() == [3, 1, 13]  # items of the data, bucket by bucket
    source, seen = DataSource(found, 7, 1, sizes=True), []
    for step in range(2):
        batch = source.batch(step, Rows(0, 7, 7))
        assert torch.equal(batch.data[:, 0, 0, 0], batch.cond["sizes"][:, 0] / 14)
        seen.append(sorted(batch.cond["sizes"][:, 0].tolist()))
    assert sorted(seen) == [list(range(0, 14, 2)), list(range(1, 14, 2))]


def broken(folder: Path) -> Path:
    """Six images, of which the fourth and the last turn out to be damaged when they are decoded."""
    pictures(folder)
    for name in ("b/1.png", "b/5.png"):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[80:120] = bytes(40)  # in the middle: the header and the end are fine
        path.write_bytes(content)
    return folder


def test_unreadable_images_are_skipped_alike_and_counted_over_all_processes(tmp_path, codec):
    spec = ImagesData(kind="images", path=str(broken(tmp_path / "set")), size=8, max_unreadable=2)
    found = open_latents(make(tmp_path / "whole", codec, data.load_data(spec, 7), block=1, shard=1, latents="mean"), 7)
    expected = data.load_data(spec, 7).items(0, range(6))
    assert torch.equal(found.items(0, range(6)).labels, expected.labels)
    together = torch.cat([codec.encode(each[None]) for each in expected.samples])
    assert torch.equal(found.items(0, range(6)).samples, together)
    for i in (1, 0, 2):  # each finds other images first
        make(tmp_path / "parts", codec, data.load_data(spec, 7, keep=False), (i, 3), block=1, shard=1, latents="mean")
    files = folder_bytes(tmp_path / "parts")
    assert {k: v for k, v in files.items() if k in folder_bytes(tmp_path / "whole")} == folder_bytes(tmp_path / "whole")
    assert {row for n in range(6) for row in json.loads(files[f"shard-{n:05}.json"])["skipped"]} == {3, 5}

    strict, folder = data.load_data(spec.model_copy(update={"max_unreadable": 1}), 7, keep=False), tmp_path / "strict"
    for i in (0, 1):
        make(folder, codec, data.load_data(spec, 7, keep=False), (i, 3), block=1, shard=1, latents="mean")
    with pytest.raises(InputError) as caught:  # one found it above, and the other one now
        make(folder, codec, strict, (2, 3), block=1, shard=1, latents="mean")
    assert str(caught.value) == (
        f"set: 2 of 6 images cannot be decoded: {tmp_path}/set/b/5.png (row 5), {tmp_path}/set/b/1.png (row 3); repair "
        "or remove them, or increase data.max_unreadable (now 1)"
    )


# --- reading ---


def test_every_image_comes_once_in_an_epoch_whatever_the_batch_size(whole):
    found = open_latents(whole, 0)
    of = {tuple(each.flatten().tolist()): i for i, each in enumerate(found.items(0, range(22)).samples)}
    assert len(of) == 22
    for size in (4, 11, 30):
        source = DataSource(found, size, 3)
        order = [e for step in range(33) for e in source._order.items(step, Rows(0, size, size))]
        for epoch in range(3):
            items = [i for at, indices in order for i in indices if at == epoch]
            assert sorted(items) == list(range(22)) and items != list(range(22))
    batch = DataSource(found, 4, 3).batch(0, Rows(0, 4, 4))
    ((_, indices),) = DataSource(found, 4, 3)._order.items(0, Rows(0, 4, 4))
    assert [of[tuple(each.flatten().tolist())] for each in batch.data] == indices


def test_a_shard_that_does_not_fit_the_manifest_is_found_when_it_is_read(tmp_path, codec):
    make(tmp_path, codec, latents="mean")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shape": [4, 2, 8]}))
    with pytest.raises(RunError) as caught:
        open_latents(tmp_path, 0).items(0, [3])
    assert str(caught.value) == (
        f"{tmp_path}/shard-00000.safetensors contains labels int64 [8], mean float32 [8, 4, 4, 4], but its "
        "manifest.json lists labels int64 [8], mean float32 [8, 4, 2, 8]"
    )


def synthetic(count: int, shard: int) -> CachedLatents:
    """A cache whose files are not read."""
    layout = Layout(count, shard)
    entries = {
        layout.name(n): LatentShard(
            start=layout.indices(n).start, stop=layout.indices(n).stop, size=10**9, sha256="0" * 64, sizes=False
        )
        for n in range(layout.files)
    }
    manifest = LatentManifest(
        data="x", data_digest="0" * 64, codec_digest="0" * 64, latents="mean", mirrored=False, seed=None,
        dtype="float32",
        count=count, block=1, shard=shard, shape=(1,), num_classes=None, shards=entries, done=True,
    )  # fmt: skip
    found = CachedLatents(Path("x"), manifest, 0)
    found._shards.load = lambda number: {"mean": torch.zeros(len(layout.indices(number)), 1)}
    return found


def test_memory_does_not_grow_with_the_number_of_images():
    peaks = []
    for count in (10_000, 1_000_000):
        tracemalloc.start()
        source = DataSource(synthetic(count, count // 100), 8, 0)
        for step in range(3):
            source._order.items(step * count // 16, Rows(0, 8, 8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0]


def test_batches_of_sorted_classes_have_many_of_them(tmp_path):
    """Images are stored in the order of the data, which is often one class after the other."""
    classes = torch.arange(64) // 4
    given = ArrayData("sorted", classes.float()[:, None, None, None].expand(64, 1, 1, 1) / 8 - 1, classes, 16)
    found = open_latents(make(tmp_path / "cache", PIXELS, given, shard=4), 0)
    source = DataSource(found, 16, 0)
    batches = [source.batch(step, Rows(0, 16, 16)).cond["class_labels"] for step in range(4)]
    assert [len(each.unique()) for each in batches] == [10, 9, 10, 10]
    assert torch.equal(torch.cat(batches).sort().values, classes)
