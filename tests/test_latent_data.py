"""Real data of latent-space teachers: it is encoded wherever a network is trained on it, or paths start from it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_wan as wan
import torch
from checkpoints import refused
from diffusers import AutoencoderKL, DiTTransformer2DModel
from latent import edit, load, normal, seeded, write, write_conditions
from latent_runs import MORE_PAIRS, PAIRS, content, images, run
from students import card
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.data import DataSource
from distill.data.arrays import ArrayData
from distill.evaluation import measuring
from distill.evaluation.sample import write_samples
from distill.execution import preflight
from distill.execution.batches import EncodedBatches
from distill.execution.solving import Solving
from distill.flow import codecs
from distill.flow.draws import Rows
from distill.networks.experts import Experts
from distill.pairs import PairSet, PairSource, manifest
from distill.runs.progress import Progress
from distill.spec import checks, specfile
from distill.spec.model import CheckpointTeacher, EvaluateStage, PairsStage
from distill.students.exporting import export
from distill.students.init import StudentInit

CPU = torch.device("cpu")
PIXELS = normal(9, 3, 16, 16, seed=4).tanh()
IMAGES = ArrayData("images", PIXELS, torch.arange(9) % 3, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("latent_data") / "dit", dit.pipeline(num_embeds_ada_norm=3))


def other_autoencoder(folder: Path) -> str:
    """The folder of an autoencoder with the same config and other weights than that of DiT."""
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    seeded(lambda: vae.decoder.conv_out.reset_parameters() or vae, 7).save_pretrained(folder.parent / "other")
    return str(folder.parent / "other")


def solving(folder: Path, store: Path, paths: str, **fields) -> Solving:
    stage = PairsStage(**{**(MORE_PAIRS["segments"] if paths == "segments" else PAIRS), "paths": paths, **fields})
    return Solving.of(load(folder), stage, store, seed=3, device=CPU, data=IMAGES, law=None)


@pytest.mark.parametrize("paths", ["forward", "segments"])
def test_paths_from_data_start_from_its_latents(folder, tmp_path, paths):
    made, codec = solving(folder, tmp_path, paths), load(folder).codec
    with Progress("pairs", 8, "pairs", None) as progress:
        made.generate(tmp_path / "pairs", progress, StopRequest(), None)
    found = PairSource(PairSet.open(tmp_path / "pairs", None), 8, 0).batch(0, Rows(0, 8, 8))
    encoded = codec.encode(PIXELS)
    assert found.pairs.data.shape == (8, 4, 8, 8)
    distance = (found.pairs.data[:, None] - encoded).abs().flatten(2).amax(2)
    assert (distance.min(1).values <= 1e-5).all(), "each path starts from one of the images"
    assert torch.equal(distance.argmin(1) % 3, found.cond["class_labels"])


def test_pairs_from_data_belong_to_an_autoencoder(folder, tmp_path):
    first = solving(folder, tmp_path, "forward")
    again = solving(folder, tmp_path, "forward")
    teacher = load(folder, vae=other_autoencoder(folder))
    other = Solving.of(teacher, first.stage, tmp_path, seed=3, device=CPU, data=IMAGES, law=None)
    assert first.data_digest == again.data_digest != other.data_digest
    assert IMAGES.digest not in (first.data_digest, other.data_digest)
    with pytest.raises(InputError, match=r"dtype: uint8 is for pixels, but the teacher \(DiTTransformer2DModel from "):
        solving(folder, tmp_path, "forward", dtype="uint8")


@pytest.mark.long
def test_an_evaluated_row_belongs_to_an_autoencoder(folder, tmp_path):
    """A row of the teacher is taken from another evaluation only if that decoded with the same autoencoder."""
    options = {"students": {}, "teacher_steps": [1], "samples": 16, "block": 8, "fine_steps": 1}
    stage = EvaluateStage(kind="evaluate", **options)
    pictures, kept = [], []
    for name, fields in {"first": {}, "second": {}, "other": {"vae": other_autoencoder(folder)}}.items():
        with Progress("measure", 32, "samples", None) as progress:
            measuring.measure(
                tmp_path / name, name, stage, load(folder, **fields), {}, None,
                seed=0, device=CPU, progress=progress, stop=StopRequest(), store=tmp_path,
            )  # fmt: skip
        pictures.append(sorted((tmp_path / name / "pictures").iterdir())[0].read_bytes())
        kept.append(len(list((tmp_path / "baselines").glob("*.json"))))
    assert kept == [1, 1, 2]
    assert pictures[0] == pictures[1] != pictures[2]
    assert load(folder).digest == load(folder, vae=other_autoencoder(folder)).digest


@pytest.mark.long
def test_training_data_belongs_to_an_autoencoder(folder, tmp_path):
    """Ranks compare the digest of the autoencoder, and a stage is resumed only with the same one."""
    teacher = {"path": str(folder)}
    data = images(tmp_path / "data", 3, 16, 16)
    done = run(tmp_path, content(teacher, data, ["score/dmd2"]))
    states = [json.loads(path.read_text()) for path in done.stage("dmd2").root.rglob("*.json")]
    settings = [each["settings"] for each in states if "settings" in each]
    assert settings and settings[0]["inputs"]["autoencoder"] == load(folder).codec.digest


def test_old_digests_of_teachers_with_one_network_are_kept(folder):
    """The autoencoder is no part of it, nor is a boundary."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    identity = {
        "config": {name: each for name, each in config.items() if name not in ("_diffusers_version", "_name_or_path")},
        "scheduler": {name: each for name, each in scheduler.items() if name != "_diffusers_version"},
        "prediction": None,
        "null_class": 3,
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("transformer/*.safetensors")],
    }
    assert load(folder).digest == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def test_two_networks_are_identified_by_their_boundary_and_both_configs(tmp_path):
    folder = write(tmp_path / "wan", wan.pipeline(transformer_2=wan.network(1), boundary_ratio=0.6))
    path = write_conditions(tmp_path / "conditions.safetensors", {"encoder_hidden_states": wan.ROWS})

    def digest() -> str:
        return load(folder, size=wan.SIZE, conditions=path).digest

    found = [digest()]
    edit(folder / "model_index.json", boundary_ratio=0.9)
    found.append(digest())
    edit(folder / "transformer_2" / "config.json", eps=1e-3)
    found.append(digest())
    edit(folder / "transformer_2" / "config.json", _diffusers_version="0")
    assert len(set(found)) == 3 and digest() == found[-1]


@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0, -1.0, 1e30])
def test_a_boundary_lies_between_0_and_1(tmp_path, ratio):
    folder = write(tmp_path / "wan", wan.pipeline(transformer_2=wan.network(1), boundary_ratio=ratio))
    limit = "greater than 0" if ratio <= 0 else "less than 1"
    refused(folder, f"model_index.json: boundary_ratio={ratio}; valid: {limit}", size=wan.SIZE)


def test_weak_models_have_the_conditions_of_the_teacher(tmp_path):
    """The student of a stage, and a checkpoint by its path."""
    path = str(write(tmp_path / "flux", flux.pipeline(guidance_embeds=True)))
    rows = flux.embeddings(2)
    given = write_conditions(tmp_path / "conditions.safetensors", rows)
    teacher = {"path": path, "size": [16, 24], "conditions": given, "embedded_guidance": 2.0}
    weak = {**PAIRS, "guidance_scale": 2.0}
    stages = {
        "of_stage": {**weak, "guidance": {"weak": "reflow"}},
        "of_path": {**weak, "guidance": {"weak_path": path}},
    }
    done = run(tmp_path, content(teacher, {}, ["reflow/reflow"], stages))
    found = [manifest.read(done.stage(name).pairs) for name in ("pairs", *stages)]
    assert all(each.done for each in found)
    assert found[2].weak_digest == found[0].teacher_digest not in (None, found[1].weak_digest)


def planned(folder: Path, data: dict[str, object], **fields) -> None:
    """Checks the spec of a run with pairs from data, as `distill plan` does."""
    teacher = {"path": str(folder), **fields}
    spec = {"name": "run", "teacher": teacher, "data": data, "stages": {"pairs": MORE_PAIRS["segments"]}}
    preflight.check(checks.check(specfile.validate(spec, "spec"), folder))


def test_an_autoencoder_is_checked_before_a_run(folder, tmp_path):
    data = images(tmp_path / "data", 3, 16, 16)
    planned(folder, data)
    found = shutil.copytree(folder, tmp_path / "dit")
    weights = found / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        InputError, match=r"dit/vae has no diffusion_pytorch_model.safetensors, but config.json, "
    ) as error:
        planned(found, data)
    assert len(str(error.value).splitlines()) == 1
    weights.with_suffix(".bin").rename(weights)
    edit(found / "vae" / "config.json", block_out_channels=[4, 8])
    with pytest.raises(InputError, match=r"dit/vae: config.json and the weights do not match: "):
        planned(found, data)
    assert load(found).shape == (4, 8, 8), "what does not use the autoencoder can still be done"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent_channels": 8}, "on latents of 4 channels, but the autoencoder in "),
        ({"scaling_factor": "x"}, "vae/config.json: scaling_factor='x'; valid: "),
        ({"scaling_factor": 0}, "vae/config.json: scaling_factor=0; valid: greater than 0"),
        ({"shift_factor": [1]}, "vae/config.json: shift_factor=[1]; valid: "),
        ({"latents_mean": [0.0, 0.0]}, "vae/config.json: latents_mean has 2 numbers; valid: one for each of the 4"),
        ({"latents_mean": [0.0] * 4}, "vae/config.json: latents_std has no numbers; valid: one for each of the 4"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "latents_std=[0.0, 0.0, 0.0, 0.0]; valid: greater"),
        ({"_class_name": ["a"]}, "autoencoder class ['a'] is not supported; valid: "),
    ],
)
def test_configs_of_autoencoders_are_checked(folder, tmp_path, changes, said):
    found = shutil.copytree(folder, tmp_path / "dit")
    edit(found / "vae" / "config.json", **changes)
    refused(found, said)


def test_a_network_without_rows_is_called_only_for_other_processes():
    made = Experts(nn.Linear(1, 1), nn.Linear(1, 1), 500.0)
    called = []

    def call(network, x_t, time, cond):
        called.append((0 if network is made.transformer else 1, len(x_t)))
        return network(x_t)

    def calls(*times: float) -> list[tuple[int, int]]:
        called.clear()
        x_t = torch.arange(1.0, len(times) + 1)[:, None]
        found = made.called(call, x_t, torch.tensor(times), {})
        networks = [made.transformer if time >= 500 else made.transformer_2 for time in times]
        assert torch.equal(found, torch.stack([network(x) for network, x in zip(networks, x_t, strict=True)]))
        return called.copy()

    with torch.no_grad():
        assert calls(900.0) == [(0, 1)]
        assert calls(100.0, 499.0) == [(1, 2)]
        assert calls(900.0, 100.0, 500.0) == [(0, 2), (1, 1)]
        for parameter in made.parameters():
            parameter.ds_id = 0
        assert calls(900.0) == [(0, 1), (1, 1)]
        assert calls(100.0, 499.0) == [(0, 1), (1, 2)]
        del made.transformer_2.weight.ds_id, made.transformer_2.bias.ds_id
        assert calls(900.0) == [(0, 1)]
    assert calls(900.0) == [(0, 1), (1, 1)]


def test_samples_are_converted_in_blocks(folder, monkeypatch):
    codec = load(folder).codec
    latents, sizes = codec.encode(PIXELS), []
    decoded = codec.decode(latents)
    vae = codec._read
    vae.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    assert codec.together((4, 8, 8)) == (64 << 20) // (3 * 16 * 16 * 4)
    assert codec.together((4, 4096, 4096)) == 1
    monkeypatch.setattr(codecs, "MEMORY", 4 * 3 * 16 * 16 * 4)
    assert (codec.encode(PIXELS) - latents).abs().max() <= 1e-5
    assert (codec.decode(latents) - decoded).abs().max() <= 1e-5
    assert sizes == [4, 4, 1] * 2


def test_data_of_training_is_encoded_on_the_device_of_the_stage(folder):
    """The device "meta" stands for another one than the CPU. Encoded data stays on it."""
    codec, source = load(folder).codec, DataSource(IMAGES, 4, 0)
    (pixels, found) = (each.batch(0, Rows(0, 4, 4)).data for each in (source, EncodedBatches.of(source, codec, CPU)))
    assert torch.equal(found, codec.encode(pixels))
    there = EncodedBatches.of(source, codec, torch.device("meta")).batch(0, Rows(0, 4, 4))
    assert (there.data.device.type, there.data.shape) == ("meta", found.shape)
    assert there.cond["class_labels"].device == CPU


def test_samples_of_a_student_are_made_in_blocks_that_can_be_decoded_at_once(folder, tmp_path, monkeypatch):
    teacher, sizes = load(folder), []
    student = StudentInit(teacher, None, teacher.shape, 3, 0, teacher).velocity_field().eval()
    export(student, tmp_path / "student", card(shape=teacher.shape, num_classes=3), teacher.packaging)
    monkeypatch.setattr(codecs, "MEMORY", 4 * 3 * 16 * 16 * 4)
    hook = register_module_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if isinstance(module, DiTTransformer2DModel) else None
    )
    like = CheckpointTeacher(path=str(folder))
    try:
        write_samples(
            tmp_path / "student", tmp_path / "x.png", steps=1, seed=0, count=9, labels=None, device=CPU, like=like
        )
    finally:
        hook.remove()
    assert sizes == [4, 4, 1]
