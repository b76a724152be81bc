"""Folders of students and LoRA students: what they keep of their training, their data type, and how they are used."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import students
import test_teacher_flux as flux
import tiny
import torch
from commands import command
from latent import CPU, conditions, normal, write, write_conditions
from runs import CARD
from safetensors.torch import load_file
from test_lora_students import adapted, exported, moved

from distill.core import space
from distill.core.errors import InputError, RunError
from distill.exchange import lora_use, student_card
from distill.exchange.student_card import LoraFacts, StockCall, StudentCard
from distill.execution import inspecting, sources
from distill.networks.sharing import is_shared, main_dtype, on_cpu
from distill.protocols import Trained
from distill.spec.guidancespec import FieldSettings, GuidanceSpec
from distill.spec.model import CheckpointTeacher, OptimizerSpec
from distill.students import extracting, lora_verify, lora_weights, merged, packaged
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import by_id, load_teacher
from distill.training.plain import PlainTrainable

X, T = normal(2, 4, 8, 12), torch.tensor([0.2, 0.6])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A FLUX.1 dev teacher as a spec names it."""
    folder = tmp_path_factory.mktemp("flux")
    rows = write_conditions(folder / "conditions.safetensors", flux.embeddings(2))
    path = write(folder / "teacher", flux.pipeline(guidance_embeds=True))
    return CheckpointTeacher(path=str(path), size=[16, 24], conditions=rows)


def loaded(place, **more):
    spec = place.model_copy(update=more)
    return teacher_on_linear_path(load_teacher(spec, CPU, probe=False))


def full(folder, teacher, kind="velocity"):
    """A student with all weights that has learnt something."""
    made = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    student = moved(made.velocity_field() if kind == "velocity" else made.acceleration())
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind=kind, num_classes=None,
        sampler="euler" if kind == "velocity" else "accelerated", null_class=None, shape=teacher.shape, weights="raw",
        images=1,
    )  # fmt: skip
    export(student, folder, card, teacher.packaging)
    return folder


# --- the embedded guidance of a student's training ---


@pytest.fixture(scope="module")
def guided(place, tmp_path_factory):
    """A teacher that is called with an embedded guidance of 2.5, and a LoRA student of it."""
    teacher = loaded(place, embedded_guidance=2.5)
    return teacher, exported(tmp_path_factory.mktemp("lora") / "s", teacher, moved(adapted(teacher)))


def guidance_of(student):
    return student.conditioning.collate(torch.tensor([0]))["guidance"].tolist()


def test_a_lora_student_keeps_its_embedded_guidance(place, guided, tmp_path):
    teacher, folder = guided
    assert student_card.read(folder).embedded_guidance == 2.5
    assert "| embedded guidance | 2.5: the network gets" in (folder / "README.md").read_text()
    shared = loaded(place)  # with the default of its pipeline
    for base in (None, shared, teacher):
        read = load_student(folder, CPU, place, base)
        assert guidance_of(read) == [2.5] and read.packaging.embedded_guidance == 2.5
    other = place.model_copy(update={"embedded_guidance": 3.5})
    for use in (
        lambda: load_student(folder, CPU, other),
        lambda: merged.merge_student(folder, other, tmp_path / "m"),
        lambda: sources._loaded(CheckpointTeacher(path=str(folder)), other, CPU),
    ):
        with pytest.raises(InputError) as caught:
            use()
        assert str(caught.value) == (
            f"teacher.embedded_guidance=3.5: the student {folder} was trained with 2.5, and works with no other value; "
            "leave teacher.embedded_guidance out, or set it to 2.5"
        )
    as_teacher = sources._loaded(CheckpointTeacher(path=str(folder)), place, CPU)
    assert guidance_of(as_teacher) == [2.5]


def test_a_merged_student_keeps_its_embedded_guidance(place, guided, tmp_path, monkeypatch):
    _, folder = guided
    merged.merge_student(folder, place, tmp_path / "m")
    assert student_card.verify(tmp_path / "m").embedded_guidance == 2.5
    read, lora = (load_student(each, CPU, place) for each in (tmp_path / "m", folder))
    cond = conditions(lora, 2)
    assert guidance_of(read) == [2.5]
    with torch.no_grad():
        difference = read.student(X, T, conditions(read, 2)) - lora.student(X, T, cond)
        assert difference.abs().max() <= 1e-5
    assert inspecting.inspect(CheckpointTeacher(path=str(tmp_path / "m"))).guidance.embedded == 2.5
    checked = []
    monkeypatch.setattr(packaged, "check", lambda made, *given, **options: checked.append(made))
    packaged.export(tmp_path / "m", tmp_path / "e", packaged.Package("bf16"))
    assert checked[0].found.packaging.embedded_guidance == 2.5
    assert student_card.verify(tmp_path / "e").embedded_guidance == 2.5
    with pytest.raises(InputError, match=r"teacher.embedded_guidance=4: the student .* was trained with 2.5, and"):
        load_student(tmp_path / "m", CPU, place.model_copy(update={"embedded_guidance": 4.0}))


def test_cards_say_which_embedded_guidance_was_used(place, tmp_path):
    """The default of the pipeline, too; and no guidance is another value than none."""
    read = student_card.read(full(tmp_path / "s", loaded(place)))
    assert read.embedded_guidance == 3.5
    assert "embedded_guidance" not in json.loads(student_card.to_json(CARD))
    none = json.loads(student_card.to_json(CARD.model_copy(update={"embedded_guidance": 0.0})))
    assert none["embedded_guidance"] == 0


def test_an_extracted_lora_is_no_complete_pipeline_and_keeps_its_guidance(place, tmp_path, monkeypatch):
    folder = full(tmp_path / "s", loaded(place, embedded_guidance=2.5))
    update = {"pipeline": "FluxPipeline", "size": [16, 24], "dtype": "bfloat16"}
    students.relist(folder, student_card.read(folder).model_copy(update=update))
    proved = []
    monkeypatch.setattr(lora_verify, "prove", lambda new, **given: proved.append(given["init"].packaging))
    extracting.extract(folder, place, [2], tmp_path / "out", samples=1, seed=0, device=CPU)
    assert [(each.embedded_guidance, each.folder) for each in proved] == [(2.5, Path(place.path))]
    card = student_card.verify(tmp_path / "out" / "rank-2")
    assert (card.pipeline, card.size, card.dtype, card.embedded_guidance) == ("", [], "", 2.5)
    text = (tmp_path / "out" / "rank-2" / "README.md").read_text()
    assert "complete Flux" not in text and 'pipeline.load_lora_weights("path/to/this/folder")' in text
    with pytest.raises(InputError, match="teacher.embedded_guidance=3.5: the student "):
        other = place.model_copy(update={"embedded_guidance": 3.5})
        extracting.extract(folder, other, [2], tmp_path / "no", samples=1, seed=0, device=CPU)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*/file/out: .*; nothing was kept"):
        extracting.extract(folder, place, [2], tmp_path / "file" / "out", samples=1, seed=0, device=CPU)


def test_a_weak_model_has_the_embedded_guidance_of_the_teacher(place, guided):
    settings, teacher = FieldSettings(2.0, GuidanceSpec(weak_path="weak")), loaded(place)
    replace(teacher, weak=loaded(place)).field_with(settings)
    with pytest.raises(InputError) as caught:
        replace(teacher, weak=guided[0]).field_with(settings)
    assert str(caught.value).endswith(
        "takes the embedded guidance 2.5, but the teacher (FluxTransformer2DModel from teacher) 3.5, and both are "
        "called with one value; set teacher.embedded_guidance to 2.5, or use another weak model"
    )


# --- data types ---


def test_a_base_in_16_bits_with_layers_in_float32_is_shared(tmp_path):
    spec = CheckpointTeacher(**tiny.TINY["wan"].write(tmp_path, dtype="bfloat16"))
    teacher = loaded(spec)
    assert next(teacher.network.parameters()).dtype == torch.float32
    assert main_dtype(teacher.network) == torch.bfloat16
    folder = exported(tmp_path / "s", teacher, moved(adapted(teacher)))
    read = load_student(folder, CPU, spec, teacher)
    shared = {each.data_ptr() for each in read.network.parameters() if is_shared(each)}
    assert shared == {each.data_ptr() for each in teacher.network.parameters()}
    acceleration = adapted(teacher, "acceleration")
    role = PlainTrainable("student", Trained(acceleration), OptimizerSpec(lr=1e-3))
    assert role.sizes and acceleration.network.acceleration.patch_embedding.weight.dtype == torch.float32
    x, t = normal(3, *teacher.shape), torch.tensor([0.2, 0.6, 1.0])
    with torch.no_grad():
        found = acceleration(x, t, x, conditions(teacher, 3))
        expected = teacher.field(x, t, conditions(teacher, 3))
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


def test_an_acceleration_is_exported_in_16_bits(place, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "check", lambda *given, **options: None)
    folder = full(tmp_path / "s", loaded(place), "acceleration")
    packaged.export(folder, tmp_path / "e", packaged.Package("bf16"))
    for name in ("transformer", "acceleration"):
        weights = load_file(tmp_path / "e" / name / "diffusion_pytorch_model.safetensors")
        assert {each.dtype for each in weights.values()} == {torch.bfloat16}, name
    assert student_card.verify(tmp_path / "e").dtype == "bfloat16"
    lora = lora_weights.LoraWeights("", "transformer", {})
    with pytest.raises(InputError, match="has a second network for the acceleration, into which a LoRA of its own was"):
        merged.unmerge_student(folder, lora, tmp_path / "u")


def test_a_lora_is_taken_out_of_weights_in_16_bits(place, guided, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "check", lambda *given, **options: None)
    _, folder = guided
    merged.merge_student(folder, place, tmp_path / "m")
    packaged.export(tmp_path / "m", tmp_path / "b", packaged.Package("bf16"))
    lora = merged.lora_of(folder)
    merged.unmerge_student(tmp_path / "b", lora, tmp_path / "u")
    assert student_card.verify(tmp_path / "u").dtype == "bfloat16"
    path = Path("transformer", "diffusion_pytorch_model.safetensors")
    weights, start = load_file(tmp_path / "u" / path), load_file(Path(place.path) / path)
    assert {each.dtype for each in weights.values()} == {torch.bfloat16}
    assert all((weights[name].float() - each).abs().max() <= 0.02 * each.abs().max() for name, each in start.items())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*/file/u from .*/b: .*; nothing was kept"):
        merged.unmerge_student(tmp_path / "b", lora, tmp_path / "file" / "u")
    (tmp_path / "b" / "transformer" / "config.json").unlink()
    with pytest.raises(InputError, match="transformer/config.json is missing; copy or export the student again"):
        merged.unmerge_student(tmp_path / "b", lora, tmp_path / "v")


def test_an_export_reads_the_weights_that_are_there():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    found = on_cpu(layer).eval()
    assert {each.data_ptr() for each in found.parameters()} == {each.data_ptr() for each in layer.parameters()}
    assert layer.training and not found.training
    found.append(torch.nn.Linear(3, 1))
    assert len(layer) == 2


# --- the base, with which the files of a LoRA are checked ---


def test_the_base_is_read_where_it_is_if_its_weights_are_unchanged(monkeypatch, place, tmp_path):
    stored = Path(place.path)
    assert loaded(place).packaging.folder == stored
    monkeypatch.setattr(by_id, "snapshot", lambda spec, **given: stored)
    assert loaded(place, path="org/name").packaging.folder == stored
    weights = "transformer/diffusion_pytorch_model.safetensors"
    single = {"path": str(stored / weights), "config": str(stored)}
    student = full(tmp_path / "student", loaded(place))
    variant = shutil.copytree(stored, tmp_path / "variant")
    (variant / weights).rename(variant / weights.replace("model.", "model.fp16."))
    for changed in (single, {"path": str(student), "size": [32, 48]}, {"path": str(variant), "variant": "fp16"}):
        assert loaded(place, **changed).packaging.folder is None


def test_other_bases_are_written_beside_the_student(place, tmp_path, monkeypatch):
    network = loaded(place).network
    size = sum(each.numel() * each.element_size() for each in network.state_dict().values())
    with lora_verify._bases({"transformer": network}, None, tmp_path / "student") as found:
        folder = found["transformer"]
        assert folder.parent.parent == tmp_path and folder.parent.name.startswith(".base-of-lora.tmp-")
        assert load_file(folder / "diffusion_pytorch_model.safetensors").keys() == network.state_dict().keys()
    assert not [*tmp_path.iterdir()]
    with lora_verify._bases({"transformer": network}, Path(place.path), tmp_path / "student") as found:
        assert found == {"transformer": Path(place.path, "transformer")} and not [*tmp_path.iterdir()]

    def bases():
        with lora_verify._bases({"transformer": network}, None, tmp_path / "student"):
            pass

    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(RunError) as caught:
        patched.setattr(type(network), "save_pretrained", full)
        bases()
    assert str(caught.value) == (
        f"export failed: cannot write the weights of the base to {tmp_path}, with which the LoRA files are checked: "
        "No space left on device; nothing was exported"
    )
    monkeypatch.setattr(space, "free", lambda folder: size - 1)
    with pytest.raises(RunError, match=f"not enough disk space for the weights of the base in {tmp_path}, with which"):
        bases()
    assert not [*tmp_path.iterdir()]


# --- how a LoRA is used ---

FIRST, SECOND = (f"pytorch_lora_weights{end}.safetensors" for end in ("", "_2"))
PEFT = ("adapter_config.json", "adapter_model.safetensors", FIRST)
PIPELINE_CALL = 'pipeline.load_lora_weights("{}")'
SECOND_CALL = f'pipeline.load_lora_weights("{{}}", weight_name="{SECOND}", load_into_transformer_2=True)'
PEFT_CALL = 'peft.PeftModel.from_pretrained(pipeline.transformer, "{}")'


@pytest.mark.parametrize(
    ("network", "files", "expected"),
    [
        ("SD3Transformer2DModel", [FIRST], [PIPELINE_CALL]),
        ("WanTransformer3DModel", [FIRST, SECOND], [PIPELINE_CALL, SECOND_CALL]),
        ("WanTransformer3DModel", [SECOND], [SECOND_CALL]),
        ("PixArtTransformer2DModel", PEFT, [PEFT_CALL]),
        ("DiTTransformer2DModel", PEFT, [PEFT_CALL]),
    ],
)
def test_the_readme_and_pull_say_how_a_lora_is_loaded(tmp_path, monkeypatch, capfd, network, files, expected):
    monkeypatch.chdir(tmp_path)
    for name in files:
        path = Path("student", name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(students.tensors(300, 0) if name.endswith("tensors") else b'{"peft_type": "LORA", "r": 1}')
    facts = {"student": LoraFacts(rank=2, alpha=2.0, targets=["to_q"])}
    card = students.card(
        network=network, component="transformer", lora=facts, stock=StockCall(), teacher="its-teacher",
        num_classes=5 if network.startswith("DiT") else None, shape=(4, 8, 8),
    )  # fmt: skip
    student_card.write(Path("student"), card)
    text = Path("student", "README.md").read_text()
    lines = [each for each in text.splitlines() if "load_lora" in each or "PeftModel" in each]
    assert lines == [each.format("path/to/this/folder") for each in expected]
    assert ("import peft\n" in text) == (expected == [PEFT_CALL])
    student_card.verify(Path("student"))
    calls = "; ".join(each.format("got") for each in expected)
    assert command(capfd, "pull", "student", "got").out.splitlines()[1] == (
        f"use it: {calls}, where pipeline is that of its-teacher; got/README.md says how to sample it"
    )


def test_a_lora_that_no_pipeline_samples_is_used_with_distill(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("student").mkdir()
    Path("student", FIRST).write_bytes(students.tensors(300, 0))
    facts = {"student": LoraFacts(rank=2, alpha=2.0, targets=["to_q"])}
    card = students.card(
        network="SD3Transformer2DModel", component="transformer", lora=facts, teacher="its-teacher",
        stock=StockCall(reason="its network takes a second time"), shape=(4, 8, 8),
    )  # fmt: skip
    student_card.write(Path("student"), card)
    assert command(capfd, "pull", "student", "got").out.splitlines()[1] == (
        "use it: distill sample got --teacher TEACHER --prompt TEXT --out samples.png (TEACHER: the pipeline of "
        "its-teacher)"
    )


def test_names_of_lora_files_are_those_that_are_written():
    assert (lora_weights.FILE, lora_weights.FILE_2) == (lora_use.FIRST_FILE, lora_use.SECOND_FILE)
    assert lora_weights.SETTINGS == lora_use.ADAPTER_CONFIG


def test_a_student_whose_critic_alone_had_adapters_has_a_network():
    """The pipeline takes the network of the folder, whatever was trained with adapters beside it."""
    facts = {"critic": LoraFacts(rank=2, alpha=2.0, targets=["to_q"])}
    more = {"network": "SD3Transformer2DModel", "component": "transformer", "stock": StockCall(), "shape": (4, 8, 8)}
    text = student_card.readme(CARD.model_copy(update={"lora": facts, **more}))
    assert "| pipeline | with the network and the scheduler of this folder," in text
