"""`distill encode`: the conditions of prompts are those that the pipeline computes itself."""

import json
import shutil
from pathlib import Path

import checkpoints
import pytest
import torch
from commands import command, snapshot
from diffusers import DDPMScheduler
from latent import VOCABULARY, edit, load, normal, ours, same, seeded, tokenizer, write
from test_teacher_flux import pipeline
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from distill.core.errors import InputError
from distill.spec.model import CheckpointTeacher
from distill.teachers import conditions, encoding
from distill.teachers.architectures.flux import ARCHITECTURE, Flux

PROMPTS = ["a cat", "two dogs on a hill", "a red house"]
CLIP = CLIPTextConfig(
    vocab_size=VOCABULARY, hidden_size=24, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    bos_token_id=1, eos_token_id=3,
)  # fmt: skip
T5 = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)


def stock():
    """FLUX.1 dev in miniature, with its text encoders."""
    found = pipeline(guidance_embeds=True)
    found.register_modules(
        text_encoder=seeded(lambda: CLIPTextModel(CLIP)),
        tokenizer=tokenizer(),
        text_encoder_2=seeded(lambda: T5EncoderModel(T5)),
        tokenizer_2=tokenizer(512),
    )
    return found


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("teachers") / "flux", stock())


@pytest.fixture
def folder(flux, tmp_path) -> Path:
    """A copy of the pipeline, to change."""
    return shutil.copytree(flux, tmp_path / "changed")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def encode(capfd, teacher: Path, prompts: Path, out: Path, *options: str):
    return command(capfd, "encode", str(teacher), str(prompts), "--out", str(out), "--device", "cpu", *options)


def test_the_teacher_makes_the_latents_of_the_pipeline_from_prompts(capfd, flux, prompts, tmp_path):
    out = tmp_path / "c.safetensors"
    done = encode(capfd, flux, prompts, out, "--batch", "2", "--negative", "rain")
    assert done.code == 0, done.err
    assert done.out == (
        f"wrote {out}: 3 prompts and the unconditional call; encoder_hidden_states [512, 32], pooled_projections [24]\n"
        f"use it in a spec: teacher: {{path: {flux}, conditions: {out}}}\n"
    )
    assert " encode  3/3 prompts" in done.err
    size = 4 * 4 * (512 * 32 + 24)  # four rows of float32
    assert (
        f"encode: {out} will have about {size / 1000:.1f} kB, and up to three times as much memory is needed\n"
        in done.err
    )
    teacher, noise, theirs = load(flux, size=[16, 24], conditions=str(out)), normal(3, 4, 8, 12), stock()
    for scale in (1.0, 3.0):
        expected = theirs(
            PROMPTS, negative_prompt=["rain"] * 3, true_cfg_scale=scale, height=16, width=24, num_inference_steps=2,
            output_type="latent", latents=theirs._pack_latents(noise, 3, 4, 8, 12),
        ).images  # fmt: skip
        got = ours(teacher, theirs.scheduler.sigmas, noise, scale)
        same(got, theirs._unpack_latents(expected, 16, 24, 2))


def test_neither_network_nor_autoencoder_are_loaded_and_a_variant_will_do(capfd, folder, prompts, flux, tmp_path):
    for name in ("transformer", "vae"):
        (folder / name / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name / "model.safetensors").rename(folder / name / "model.fp16.safetensors")
    for name, teacher in {"a": flux, "b": folder}.items():
        assert encode(capfd, teacher, prompts, tmp_path / f"{name}.safetensors").code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_same_rows_give_the_same_bytes_each_time(tmp_path):
    rows, path = {"prompt_embeds": normal(2, 3, 4)}, tmp_path / "rows.safetensors"
    contents = set()
    for _ in range(8):  # two metadata keys, in random order, are the same 8 times with a probability of 1/128
        conditions.write(path, rows, {"prompt_embeds": normal(1, 3, 4)}, "0" * 64, PROMPTS[:2])
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert conditions.read(path).rows.take(torch.tensor([1]))["prompt_embeds"].equal(rows["prompt_embeds"][1:])


class OfTheirLengths(Flux):
    """A convention whose rows are as long as the longest prompt of a batch."""

    def encode(self, pipeline, prompts):
        length = max(map(len, prompts))
        states = torch.stack([torch.full((length, 32), float(len(prompt))) for prompt in prompts])
        return {"encoder_hidden_states": states, "pooled_projections": torch.ones(len(prompts), 24)}


def test_rows_are_padded_with_zeros_to_one_shape(flux):
    facts = encoding.load(CheckpointTeacher(path=str(flux)), checkpoints.CPU, torch.float32).facts
    counted = []
    encoders = encoding.TextEncoders(pipeline(guidance_embeds=True), OfTheirLengths(), facts)
    rows, null = encoders.encode(["a", "four", "six___"], "no", 2, counted.append)
    states = rows["encoder_hidden_states"]
    assert states.shape == (3, 6, 32) and null["encoder_hidden_states"].shape == (1, 6, 32)
    for row, (filled, value) in zip(
        [*states, null["encoder_hidden_states"][0]], [(4, 1), (4, 4), (6, 6), (2, 2)], strict=True
    ):
        assert (row[:filled] == value).all() and not row[filled:].any()
    assert counted == [2, 3]


def test_ctrl_c_leaves_what_was_there(capfd, flux, prompts, tmp_path, monkeypatch):
    out = tmp_path / "c.safetensors"
    conditions.write(out, {"encoder_hidden_states": torch.ones(1, 2)}, None)
    before = snapshot(tmp_path)

    def interrupted(pipeline, prompts):
        if prompts == PROMPTS[2:]:
            raise KeyboardInterrupt
        return Flux.encode(ARCHITECTURE, pipeline, prompts)

    monkeypatch.setattr(ARCHITECTURE, "encode", interrupted)
    assert encode(capfd, flux, prompts, out, "--batch", "2").code == 130
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\n\nb\n", "line 2 is empty; give one prompt on each line, and remove empty lines"),
        (b"a\nb\n\n", "line 3 is empty; give one prompt on each line, and remove empty lines"),
        (b" \na", "line 1 is empty; give one prompt on each line, and remove empty lines"),
        (b"", "line 1 is empty, and there is no other; give one prompt on each line, and remove empty lines"),
        (b"a\n\x1b[2Jb", "line 2 contains a control character; remove it"),
        (b"\xff", "not a text file (UTF-8); give one prompt on each line"),
    ],
)
def test_prompts_that_are_refused(capfd, flux, tmp_path, content, said):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    done = encode(capfd, flux, path, tmp_path / "c.safetensors")
    assert (done.code, done.err) == (2, f"error: {path}: {said}\n")


def test_windows_line_ends_are_not_part_of_a_prompt(tmp_path):
    from distill.cli.prompt_options import of_file

    (tmp_path / "prompts.txt").write_bytes(b"a b\r\nc\r\n")
    assert of_file(tmp_path / "prompts.txt") == ["a b", "c"]


def test_pipelines_that_are_refused(capfd, flux, folder, prompts, tmp_path):
    def refused(teacher: Path, said: str, *options: str) -> None:
        done = encode(capfd, teacher, prompts, tmp_path / "c.safetensors", *options)
        assert (done.code, done.err) == (2, f"error: {said}\n")

    whole = "give the folder of a whole pipeline (FluxPipeline) with its text encoders and tokenizers"
    bare = write(tmp_path / "bare", pipeline(guidance_embeds=True))
    refused(bare, f"teacher.path={bare} has no text encoder; {whole}")
    unet = checkpoints.write(tmp_path / "unet", checkpoints.unet(), DDPMScheduler())
    refused(unet, f"{unet}/unet/config.json: this network is not conditioned on prompts, so there is nothing to encode")
    index = json.loads((folder / "model_index.json").read_text())
    code = "with code of its own, which is not run; valid: classes of diffusers and transformers"
    edit(folder / "model_index.json", text_encoder=["mine", "Encoder"])
    refused(folder, f"{folder}: its text_encoder is a Encoder of mine {code}")
    edit(folder / "model_index.json", **index)
    (folder / "tokenizer_2" / "transformers.py").write_text("raise SystemExit(1)")
    refused(folder, f"{folder}: its tokenizer_2 is a TokenizersBackend of transformers {code}")
    shutil.rmtree(folder / "tokenizer_2")
    refused(folder, f"{folder} has no folder tokenizer_2; copy or download the whole pipeline")
    refused(flux, "--dtype int8: valid: bfloat16, float16, float32", "--dtype", "int8")
    done = encode(capfd, flux, prompts, tmp_path / "c.bin")
    assert done.err == f"error: --out {tmp_path}/c.bin: give the name of a .safetensors file\n"
    assert not list(tmp_path.glob("c.*"))


def test_encoders_without_weights_are_said_with_the_reason(capfd, folder, prompts, tmp_path):
    (folder / "text_encoder" / "model.safetensors").unlink()
    done = encode(capfd, folder, prompts, tmp_path / "c.safetensors")
    assert done.code == 2
    assert done.err.startswith(f"error: the text encoders of {folder} cannot be loaded: ")
    assert done.err.endswith("; copy or download the pipeline again\n")


def test_values_that_are_not_finite_are_refused(flux):
    class Broken(OfTheirLengths):
        def encode(self, pipeline, prompts):
            return {name: each * torch.inf for name, each in super().encode(pipeline, prompts).items()}

    facts = encoding.load(CheckpointTeacher(path=str(flux)), checkpoints.CPU, torch.float32).facts
    encoders = encoding.TextEncoders(pipeline(guidance_embeds=True), Broken(), facts)
    with pytest.raises(InputError, match="return NaN or infinity in torch.float32; use --dtype float32"):
        encoders.encode(["a"], "", 1, lambda done: None)


def test_a_file_that_does_not_exist_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="none.safetensors does not exist; make it with `distill encode TEACHER PROM"):
        conditions.read(tmp_path / "none.safetensors")
