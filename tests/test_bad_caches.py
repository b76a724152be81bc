"""Caches that cannot be made or used: one message that says what was given, what is valid and what to do.

To add a case, add a line to CACHES: a function that fails in the current folder, and the message. {tmp} is replaced by
the current folder.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill import caches
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSet
from distill.data.arrays import ArrayData
from distill.flow.codecs import PIXELS
from distill.protocols import Codec
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage
from distill.teachers import conditions
from distill.teachers.codecs import LatentCodec


def codec(name: str = "AutoencoderKL", folder: str = "vae", digest: str = "0" * 64) -> LatentCodec:
    """An autoencoder by its config alone. digest: in place of that of its weights."""
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps({"_class_name": name, "latent_channels": 1}))
    found = LatentCodec.of(Path(folder))
    found.__dict__["digest"] = digest
    return found


def entry(start: int, stop: int, **fields) -> dict[str, object]:
    return {"start": start, "stop": stop, "size": 3 * 10**6, "sha256": "0" * 64, "sizes": False, **fields}


def latents(shards: object = None, prompts: bool = False, **fields) -> Path:
    """A folder with the manifest of a cache of three images or prompts in two files, which are empty."""
    folder, names = Path("cache").absolute(), ["shard-00000.safetensors", "shard-00001.safetensors"]
    folder.mkdir()
    rows = {"rows": {"states": [3, 2]}}
    known = {"count": 3, "block": 2, "shard": 2, "done": True}
    if prompts:
        known |= {
            "encoder_digest": "0" * 64, "prompts_digest": "0" * 64, "negative": "", "encoder_dtype": "float32",
            "dtypes": {"states": "float32"}, "null_rows": {"states": [2, 2]}, "null_sha256": "0" * 64,
        }  # fmt: skip
    else:
        known |= {
            "data": "x", "data_digest": "0" * 64, "codec_digest": "0" * 64, "latents": "mean", "mirrored": False,
            "seed": None, "dtype": "float32", "shape": [1, 2, 2], "num_classes": None,
        }  # fmt: skip
    entries = {name: {k: v for k, v in entry(*at).items() if not prompts or k != "sizes"} | (rows if prompts else {})
               for name, at in zip(names, [(0, 2), (2, 3)], strict=True)}  # fmt: skip
    content = {**known, "shards": entries if shards is None else shards, **fields}
    (folder / "manifest.json").write_text(json.dumps(content))
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(3 * 10**6)
    return folder


def opened(shards: object = None, digest: str | None = None, **fields) -> None:
    caches.open_latents(latents(shards, **fields), 0, codec_digest=digest)


def planned(autoencoder: Codec, data: DataSet | None = None, seed: int = 0, **fields) -> caches.LatentManifest:
    given = ArrayData("x", torch.zeros(3, 3, 8, 8), None, None) if data is None else data
    return caches.latents.plan(given, autoencoder, CacheStage(kind="cache", **fields), seed=seed)


def with_file(name: str, content: bytes = b"x") -> Callable[[], None]:
    def refuse() -> None:
        folder = latents()
        (folder / name).write_bytes(content)
        caches.open_latents(folder, 0)

    return refuse


def generated() -> None:
    """Latents of another seed in a folder."""
    folder = latents()
    Path(folder, "manifest.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    planned(codec(), latents="sample", seed=1).save(folder)
    given = ArrayData("x", torch.zeros(3, 3, 8, 8), None, None)
    with Progress("cache", 3, "images", None) as progress:
        caches.latents.generate(
            given, codec(), CacheStage(kind="cache", latents="sample"), folder, seed=2, device=torch.device("cpu"),
            progress=progress, stop=StopRequest(),
        )  # fmt: skip


def metadata() -> None:
    save_file({"states": torch.zeros(1, 2)}, "c.safetensors", {conditions.ENCODER: "\x1b[2Jabc"})
    conditions.read(Path("c.safetensors"))


class LatentsOfOthers(ArrayData):
    encoded = True


AGAIN = "delete unknown files, then run `distill cache`: missing and damaged ones are made again"
DELETE = "delete {tmp}/cache and make it again"
CACHES: dict[str, tuple[Callable[[], object], str]] = {
    "no cache": (
        lambda: caches.open_latents(Path("cache").absolute(), 0),
        "{tmp}/cache contains no images (no manifest.json); run `distill cache` to make them",
    ),
    "no cache to verify": (
        lambda: caches.verify(Path("cache").absolute()),
        "{tmp}/cache contains no cache (no manifest.json); run `distill cache` to make it",
    ),
    "pairs instead of a cache": (
        lambda: caches.verify(latents(kind="pairs")),
        "{tmp}/cache/manifest.json is damaged or is not of a cache; delete {tmp}/cache and make the cache again",
    ),
    "prompts instead of latents": (
        lambda: opened(kind="prompts"),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (kind: Input should be 'latents'); "
        + DELETE,
    ),
    "a manifest that is cut": (
        with_file("manifest.json", b'{"format": 1'),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: Invalid JSON: EOF while parsing "
        "an object at line 1 column 12); " + DELETE,
    ),
    "a shard elsewhere": (
        lambda: opened({"../x.safetensors": entry(0, 2)}),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: shards: '../x.safetensors' is "
        "not a file of this set); " + DELETE,
    ),
    "a shard with images of another one": (
        lambda: opened({"shard-00001.safetensors": entry(1, 3)}),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: shards: shard-00001.safetensors "
        "has images 1 to 3, not 2 to 3); " + DELETE,
    ),
    "a shard that is too small": (
        lambda: opened({"shard-00001.safetensors": entry(2, 3, size=15)}),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: shards: shard-00001.safetensors "
        "has 15 bytes, too few for its images); " + DELETE,
    ),
    "buckets of other images": (
        lambda: opened(buckets=[{"shape": [1, 2, 2], "count": 2}]),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: buckets have 2 items, count is "
        "3); " + DELETE,
    ),
    "an incomplete cache": (
        lambda: opened({"shard-00001.safetensors": entry(2, 3)}, done=False),
        "{tmp}/cache is incomplete: 1 of 2 shards exist; run `distill cache` again to finish it",
    ),
    "a cache of another autoencoder": (
        lambda: opened(digest="1" * 64),
        "{tmp}/cache has latents of another autoencoder (digest 000000000000) than the teacher's (111111111111); run "
        "`distill cache` with this teacher",
    ),
    "latents for a teacher on pixels": (
        lambda: opened(digest=""),
        "{tmp}/cache has latents of another autoencoder (digest 000000000000) than the teacher's (none: pixels); run "
        "`distill cache` with this teacher",
    ),
    "a shard that is cut": (
        with_file("shard-00001.safetensors"),
        "{tmp}/cache: shard-00001.safetensors is damaged (1 bytes, expected 3000000); " + AGAIN,
    ),
    "a file that is no shard of the cache": (
        with_file("shard-00002.safetensors"),
        "{tmp}/cache: shard-00002.safetensors does not belong to this set; " + AGAIN,
    ),
    "prompts without the unconditional row": (
        lambda: conditions.read(latents(prompts=True)),
        "{tmp}/cache: null.safetensors cannot be read (No such file or directory); " + AGAIN,
    ),
    "prompts with other fields": (
        lambda: conditions.read(latents(prompts=True, dtypes={"pooled": "float32"})),
        "{tmp}/cache/manifest.json is damaged or was not written by distill (the file: null_rows and dtypes have "
        "different fields); delete {tmp}/cache and make it again",
    ),
    "latents of another seed": (
        generated,
        "{tmp}/cache contains images with other settings: seed is 1, expected 2; delete the folder, or use another "
        "folder or run name",
    ),
    "a digest of encoders that is none": (
        metadata,
        "c.safetensors: its metadata has distill.encoder=\ufffd[2Jabc, which is no SHA-256; make it again",
    ),
    "moments of an autoencoder without variance": (
        lambda: planned(codec("AutoencoderDC"), latents="moments"),
        "latents: moments given, but the teacher's autoencoder gives no variance; valid: mean",
    ),
    "a sample of an autoencoder without variance": (
        lambda: planned(codec("VQModel"), latents="sample"),
        "latents: sample given, but the teacher's autoencoder gives no variance; valid: mean",
    ),
    "pixels for a teacher on latents": (
        lambda: planned(codec(), latents="pixels"),
        "latents: pixels given, but the teacher works on latents; valid: moments, sample, mean",
    ),
    "a data type of pixels": (
        lambda: planned(PIXELS, dtype="float16"),
        "dtype: float16 given, but it has no effect: the teacher works on pixels, which are stored as uint8, and the "
        "data has no prompts; remove it",
    ),
    "latents for a teacher without an autoencoder": (
        lambda: planned(PIXELS, latents="mean"),
        "latents: mean given, but the teacher works on pixels and has no autoencoder; valid: pixels",
    ),
    "latents that are latents already": (
        lambda: planned(codec(), LatentsOfOthers("x", torch.zeros(3, 1, 8, 8), None, None)),
        "data 'x' has latents already, so there is nothing to encode; remove the cache stage",
    ),
    "shards that are no whole blocks": (
        lambda: planned(codec(), block=32, shard=100),
        "shard: 100 is not a multiple of block (32); nearest: 96",
    ),
    "a negative prompt without prompts": (
        lambda: planned(codec(), prompts=False, negative="rain"),
        "negative: has no effect with prompts: false; remove it",
    ),
}


@pytest.mark.parametrize("case", CACHES)
def test_a_cache_is_refused_with_exactly_this_message(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    refuse, message = CACHES[case]
    with pytest.raises(InputError) as caught:
        refuse()
    assert str(caught.value) == message.replace("{tmp}", str(tmp_path))
