"""Caches of prompts: the rows of `distill encode`, in shards, of one encoder; and which encoders conditions are of."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from latent import edit, load, normal, write
from runs import folder_bytes
from safetensors.torch import load_file
from test_encode import OfTheirLengths, stock

from distill.caches import prompts as cache
from distill.caches import verify
from distill.core.errors import InputError, RunError
from distill.core.stop import StopRequest
from distill.data.prompts import Prompts
from distill.runs.progress import Progress
from distill.spec.cachespec import CacheStage
from distill.spec.model import CheckpointTeacher
from distill.teachers import conditions, encoder_files, encoding

CPU = torch.device("cpu")
PROMPTS = Prompts.of([*"abcdef", "a dog", "two dogs", "a hill", "x" * 12, "y"])
STAGE = {"block": 2, "shard": 4, "prompts_shard": 4, "negative": "rain"}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("teachers") / "flux", stock())


@pytest.fixture(scope="module")
def encoders(flux) -> encoding.TextEncoders:
    return encoding.load(CheckpointTeacher(path=str(flux)), CPU, torch.float32)


@pytest.fixture(scope="module")
def lengths(encoders) -> encoding.TextEncoders:
    """Encoders whose rows are as long as the longest prompt that is encoded with them."""
    return encoding.TextEncoders(encoders.pipeline, OfTheirLengths(), encoders.facts, encoders.digest)


def make(folder: Path, encoders, prompts=PROMPTS, part=None, **fields) -> Path:
    with Progress("cache", len(prompts), "prompts", None) as progress:
        cache.generate(
            prompts, encoders, CacheStage(kind="cache", **{**STAGE, **fields}), folder, progress=progress,
            stop=StopRequest(), part=part,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lengths) -> Path:
    return make(tmp_path_factory.mktemp("whole"), lengths)


def test_a_teacher_takes_the_folder_as_it_takes_the_file_of_encode(tmp_path, flux, encoders):
    texts = ["a cat", "two dogs on a hill", "a red house"]
    rows, null = encoders.encode(texts, "rain", 2, lambda done: None)
    conditions.write(tmp_path / "file.safetensors", rows, null, encoders.digest, texts)
    make(tmp_path / "folder", encoders, texts, prompts_shard=2)
    verify(tmp_path / "folder")
    teachers = [load(flux, size=[16, 24], conditions=str(tmp_path / name)) for name in ("file.safetensors", "folder")]
    assert teachers[0].conditioning.prompts == teachers[1].conditioning.prompts == tuple(texts)
    indices, x, t = torch.tensor([2, 0, 1, 2]), normal(4, 4, 8, 12), torch.full((4,), 0.5)
    of_file, of_folder = (each.conditioning.collate(indices) for each in teachers)
    assert of_file.keys() == of_folder.keys() and teachers[1].conditioning.count == 3
    assert all(torch.equal(of_file[name], of_folder[name]) for name in of_file)
    assert torch.equal(*(each.guided(3.0)(x, t, of_file) for each in teachers))  # the null row


def test_a_shard_is_as_long_as_its_longest_prompt_and_rows_are_padded_when_they_are_read(whole):
    assert [load_file(whole / f"shard-{n:05}.safetensors")["encoder_hidden_states"].shape[1] for n in range(3)] == [
        1,
        8,
        12,
    ]
    found = conditions.read(whole).rows
    assert found.fields["encoder_hidden_states"] == ((12, 32), torch.float32) and len(found) == 11
    indices = torch.tensor([7, 0, 9, 10])
    states = found.take(indices)["encoder_hidden_states"]
    for row, i in zip(states, indices.tolist(), strict=True):
        length = max(len(PROMPTS[j]) for j in (i, i ^ 1) if j < len(PROMPTS))  # of its block
        assert (row[:length] == len(PROMPTS[i])).all() and not row[length:].any()
    null = conditions.read(whole).null_rows["encoder_hidden_states"][0]
    assert (null[:4] == 4).all() and not null[4:].any() and null.shape == (12, 32)


@pytest.mark.parametrize("parts", [2, 5])
def test_the_bytes_are_the_same_by_any_number_of_processes(tmp_path, lengths, whole, parts):
    for i in range(parts):
        make(tmp_path, lengths, part=(i, parts))
    found = folder_bytes(tmp_path)
    assert {name: each for name, each in found.items() if not name.startswith("shard-0000") or name.endswith("s")} == (
        folder_bytes(whole)
    )
    assert conditions.read(tmp_path).digest == conditions.read(whole).digest


def test_damage_is_found_and_made_again(tmp_path, lengths, whole):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("null.safetensors", "shard-00001.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError) as caught:
        verify(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: shard-00001.safetensors is damaged (checksum mismatch), null.safetensors is damaged (checksum "
        "mismatch); delete unknown files, then run `distill cache`: missing and damaged ones are made again"
    )
    assert folder_bytes(make(tmp_path, lengths)) == folder_bytes(whole)


def test_a_device_with_other_last_bits_goes_on_with_the_same_unconditional_row(tmp_path, lengths, whole):
    class Other(OfTheirLengths):
        def encode_null(self, pipeline, negative):
            return {name: each.float() * (1 + 1e-6) for name, each in super().encode_null(pipeline, negative).items()}

    make(tmp_path, lengths, part=(0, 2))
    other = encoding.TextEncoders(lengths.pipeline, Other(), lengths.facts, lengths.digest)
    make(tmp_path, other, part=(1, 2))
    assert conditions.read(tmp_path).digest == conditions.read(whole).digest
    assert (tmp_path / "null.safetensors").read_bytes() == (whole / "null.safetensors").read_bytes()

    (tmp_path / "null.safetensors").write_bytes(b"")  # damaged, and made again by the other device
    make(tmp_path, other)
    verify(tmp_path)
    assert folder_bytes(tmp_path)["shard-00000.safetensors"] == folder_bytes(whole)["shard-00000.safetensors"]

    (tmp_path / "begun").mkdir()  # killed when only this row had been written
    shutil.copy(whole / "null.safetensors", tmp_path / "begun")
    assert conditions.read(make(tmp_path / "begun", other)).digest == conditions.read(whole).digest


def test_embeddings_are_stored_in_the_data_type_and_refused_if_they_are_too_large(tmp_path, lengths):
    class Large(OfTheirLengths):
        def encode(self, pipeline, prompts):
            rows = super().encode(pipeline, prompts)
            return {**rows, "pooled_projections": rows["pooled_projections"] * (70000 if "d" in prompts else 7.1)}

    found = conditions.read(make(tmp_path / "a", lengths, dtype="bfloat16"))
    assert found.rows.take(torch.tensor([1]))["pooled_projections"].dtype == torch.bfloat16
    large = encoding.TextEncoders(lengths.pipeline, Large(), lengths.facts, lengths.digest)
    make(tmp_path / "b", large, dtype="bfloat16")
    with pytest.raises(RunError) as caught:
        make(tmp_path / "c", large, dtype="float16")
    assert str(caught.value) == (
        "pooled_projections of one of the prompts 2 to 3 contains NaN or infinity, computed in float32 and stored as "
        "float16; its shard was not written, earlier ones are intact. Use encoder_dtype: float32 and dtype: float32 or "
        "bfloat16"
    )


def test_the_key_is_that_of_prompts_encoders_and_settings():
    stage = CacheStage(kind="cache")
    changed = ["negative", "encoder_dtype", "dtype", "block", "prompts_shard"]
    values = ["rain", "bfloat16", "float16", 64, 512]
    stages = [stage.model_copy(update={name: value}) for name, value in zip(changed, values, strict=True)]
    keys = {cache.key("a", "b", each) for each in (stage, *stages)} | {cache.key("b", "a", stage)}
    assert len(keys) == 7
    assert cache.key("a", "b", stage.model_copy(update={"shard": 2048, "latents": "mean"})) == cache.key(
        "a", "b", stage
    )


# --- which encoders ---


@pytest.fixture
def copy(flux, tmp_path) -> Path:
    return shutil.copytree(flux, tmp_path / "copy")


def digest(folder: Path) -> str:
    return encoder_files.digest(CheckpointTeacher(path=str(folder)))


def test_the_digest_is_that_of_the_files_that_are_read(flux, copy, encoders):
    known = digest(flux)
    assert known == encoders.digest == digest(copy)
    for name in ("text_encoder", "text_encoder_2"):  # another variant of the same bytes
        (copy / name / "model.safetensors").rename(copy / name / "model.fp16.safetensors")
    edit(copy / "text_encoder" / "config.json", _name_or_path="elsewhere")
    (copy / "text_encoder" / "README.md").write_text("x")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"other")
    assert digest(copy) == known
    edit(copy / "text_encoder" / "config.json", num_attention_heads=4)
    assert digest(copy) != known
    edit(copy / "text_encoder" / "config.json", num_attention_heads=2)
    assert digest(copy) == known
    (copy / "tokenizer_2" / "tokenizer.json").write_text("{}")
    assert digest(copy) != known


def other(folder: Path) -> None:
    """Changes a weight of a text encoder."""
    path = folder / "text_encoder" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_conditions_of_other_encoders_are_refused(tmp_path, flux, copy, encoders, whole):
    rows, null = encoders.encode(["a"], "", 1, lambda done: None)
    conditions.write(tmp_path / "c.safetensors", rows, null, encoders.digest)
    other(copy)
    for path in (tmp_path / "c.safetensors", whole):
        load(flux, size=[16, 24], conditions=str(path))
        with pytest.raises(InputError) as caught:
            load(copy, size=[16, 24], conditions=str(path))
        assert str(caught.value) == (
            f"teacher.conditions={path} was made by other text encoders (digest {digest(flux)[:12]}) than those in "
            f"{copy} ({digest(copy)[:12]}); make it again with this teacher, e.g. distill encode {copy} PROMPTS.txt"
        )
    conditions.write(tmp_path / "c.safetensors", rows, null)  # it is not known which encoders made it
    load(copy, size=[16, 24], conditions=str(tmp_path / "c.safetensors"))
    shutil.rmtree(copy / "text_encoder")  # nor which the teacher has
    load(copy, size=[16, 24], conditions=str(whole))


def test_the_manifest_names_what_it_was_made_from(whole, encoders):
    found = json.loads((whole / "manifest.json").read_text())
    assert (found["encoder_digest"], found["prompts_digest"]) == (encoders.digest, PROMPTS.digest)
    content = (whole / "null.safetensors").read_bytes()
    assert found["null_sha256"] == hashlib.sha256(content).hexdigest()
