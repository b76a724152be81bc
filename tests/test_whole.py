"""Students as complete pipelines of plain diffusers."""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import diffusers
import pytest
import stock_pipelines
import students as students_without_weights
import test_lora_students as lora_students
import test_stock
import test_teacher_dit as dit
import test_teacher_flux as flux
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import torch
from commands import command, snapshot
from diffusers import DiffusionPipeline
from latent import CPU, conditions, ddim, load, normal, tokenizer, write, write_conditions
from runs import CARD, distill, kill, make_run, start, wait_for
from safetensors.torch import load_file, save_file
from texts import clip, t5

from distill.core.errors import InputError, RunError
from distill.exchange import pulling, student_card
from distill.exchange.student_card import LoraFacts, StockCall, StudentCard
from distill.spec.model import CheckpointTeacher
from distill.students import native_folder, packaged, stock_check, whole
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.teachers import pipeline_index

STOCK = {
    "sd3": (sd3.pipeline, lambda: sd3.embeddings(2)),
    "sdxl": (lambda: sd.pipeline(ddim(**sd.SD), xl=True), lambda: sd.embeddings(2, xl=True)),
    "flux": (lambda: flux.pipeline(guidance_embeds=False), lambda: flux.embeddings(2)),
}


def student_of(teacher, folder, amount=0.0):
    """The light folder of a student with the weights of a teacher, changed by noise of this amount."""
    teacher = teacher_on_linear_path(teacher)
    made = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind="velocity",
        sampler="euler", num_classes=made.num_classes if made.has_classes else None, null_class=made.null_class,
        shape=teacher.shape, weights="raw", images=1,
    )  # fmt: skip
    student = made.velocity_field()
    with torch.no_grad():
        for i, parameter in enumerate(student.parameters()):
            parameter += amount * normal(*parameter.shape, seed=i)
    export(student, folder, card, made.packaging)
    return folder


@pytest.mark.parametrize("name", STOCK)
def test_the_stock_pipeline_takes_what_a_light_folder_lacks(tmp_path, name):
    make, rows = STOCK[name]
    stock = make()
    conditions = write_conditions(tmp_path / "conditions.safetensors", rows())
    folder = write(tmp_path / "teacher", stock)
    student = student_of(load(folder, size=[16, 24], conditions=conditions), tmp_path / "student")
    index = json.loads((student / "model_index.json").read_text())
    network = "unet" if name == "sdxl" else "transformer"
    assert index.keys() == json.loads((folder / "model_index.json").read_text()).keys()
    assert {key for key, each in index.items() if isinstance(each, list) and each != [None, None]} == {
        network, "scheduler"
    }  # fmt: skip
    assert index.get("force_zeros_for_empty_prompt") == (True if name == "sdxl" else None)
    missing = {key: getattr(stock, key) for key, each in index.items() if each == [None, None]}
    for pipeline_class in (type(stock), DiffusionPipeline):
        found = pipeline_class.from_pretrained(student, **missing)
        assert type(found) is type(stock) and found.vae is stock.vae
        read = getattr(found, network).state_dict()
        assert all(torch.equal(read[key], each) for key, each in getattr(stock, network).state_dict().items())


TEXTS = (clip(8), clip(8, projection=12, seed=1))


def complete(name):
    """The tiny pipeline of a class with all its components."""
    if name == "dit":
        return dit.pipeline(num_embeds_ada_norm=3)
    if name == "sdxl":
        return sd.pipeline(ddim(**sd.SD), (tokenizer(), tokenizer(), *TEXTS), xl=True)
    texts = {
        "text_encoder": clip(24),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5(32),
        "tokenizer_2": tokenizer(512),
    }
    if name == "flux":
        return flux.pipeline(guidance_embeds=False, texts=texts)
    texts |= {f"text_encoder{suffix}": clip(12, 12, seed) for seed, suffix in enumerate(("", "_2"))}
    return sd3.pipeline(
        texts={**texts, "tokenizer_2": tokenizer(), "text_encoder_3": t5(32), "tokenizer_3": tokenizer(512)}
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a complete SDXL pipeline."""
    return write(tmp_path_factory.mktemp("whole") / "teacher", complete("sdxl"))


def find(folder, pipeline="StableDiffusionXLPipeline", **fields):
    return whole.find(CheckpointTeacher(path=str(folder), **fields), pipeline, ["unet", "scheduler"])


def taken(folder, **fields):
    found = find(folder, **fields)
    return {name: path.relative_to(folder.resolve()).as_posix() for name, path in found.places.items()}


def test_the_other_components_are_linked(teacher, tmp_path):
    found = find(teacher)
    index = json.loads((teacher / "model_index.json").read_text())
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    assert found.index == {name: index[name] for name in names}
    (tmp_path / "new").mkdir()
    whole.place(found, tmp_path / "new")
    for name in names:
        inside = {path.name for path in (teacher / name).iterdir()}
        assert {path.name for path in (tmp_path / "new" / name).iterdir()} == inside
        assert all((tmp_path / "new" / name / each).samefile(teacher / name / each) for each in inside)
    for path in (tmp_path / "new").rglob("*.safetensors"):
        assert path.stat().st_nlink > 1


def test_files_are_copied_where_links_are_impossible(teacher, tmp_path, monkeypatch):
    def refused(*given, **more):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    found = find(teacher)
    monkeypatch.setattr(os, "link", refused)
    whole.place(found, tmp_path)
    config, again = teacher / "vae" / "config.json", tmp_path / "vae" / "config.json"
    assert not again.samefile(config) and again.read_bytes() == config.read_bytes()


def test_one_variant_of_the_weights_is_taken_without_its_name(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    vae, text = folder / "vae", folder / "text_encoder"
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.fp16.safetensors")
    (vae / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    (vae / "code.json").write_text("{}")
    (text / "model.safetensors").rename(text / "model.fp16-00001-of-00001.safetensors")
    (text / "model.safetensors.index.fp16.json").write_text("{}")
    (text / "model.bf16.safetensors").write_bytes(b"")
    found = taken(folder)
    assert {name for name in found if name.startswith("vae/")} == {
        "vae/config.json", "vae/code.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert found["vae/diffusion_pytorch_model.safetensors"] == "vae/diffusion_pytorch_model.fp16.safetensors"
    assert found["text_encoder/model.fp16-00001-of-00001.safetensors"].startswith("text_encoder/model.fp16-")
    assert found["text_encoder/model.safetensors.index.json"] == "text_encoder/model.safetensors.index.fp16.json"
    assert taken(folder, variant="bf16")["text_encoder/model.safetensors"] == "text_encoder/model.bf16.safetensors"


def test_an_autoencoder_of_its_own_is_taken(teacher, tmp_path):
    vae = shutil.copytree(teacher / "vae", tmp_path / "own")
    found = find(teacher, vae=str(vae))
    assert found.places["vae/config.json"] == vae.resolve() / "config.json"
    assert found.index["vae"] == ["diffusers", "AutoencoderKL"]


def test_links_in_the_cache_of_the_hub_are_followed_and_no_others(teacher, tmp_path):
    model = tmp_path / "models--org--name"
    snapshot, blobs = shutil.copytree(teacher, model / "snapshots" / "0a"), model / "blobs"
    blobs.mkdir()
    config = snapshot / "vae" / "config.json"
    config.rename(blobs / "1b")
    config.symlink_to("../../../blobs/1b")
    found = find(snapshot)
    assert found.places["vae/config.json"] == (blobs / "1b").resolve()
    config.unlink()
    (tmp_path / "secret.json").write_text("{}")
    config.symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError) as error:
        find(snapshot)
    assert str(error.value) == f"{config} is a link to a file outside of {snapshot}; put the file itself there"
    config.unlink()
    vae = (snapshot / "vae").rename(tmp_path / "vae")
    with pytest.raises(InputError, match="has no vae; download it: hf download org/name"):
        find(snapshot)
    vae.rename(snapshot / "vae")
    os.mkfifo(config)
    with pytest.raises(InputError, match="config.json cannot be read: it is a FIFO, not a file"):
        find(snapshot)


WHOLE = "--whole writes a pipeline with text encoders, tokenizers and autoencoder, which come from the teacher, but "


def test_what_is_missing_for_a_whole_pipeline_is_told(teacher, tmp_path):
    def refused(*given, **fields):
        with pytest.raises(InputError) as error:
            find(*given, **fields)
        return str(error.value)

    network = shutil.copytree(teacher / "unet", tmp_path / "unet")
    assert refused(network) == (
        f"{WHOLE}teacher.path={network} is a single network, without text_encoder, text_encoder_2, tokenizer, "
        "tokenizer_2, vae; give the folder or hub id of a StableDiffusionXLPipeline with --teacher"
    )
    assert "is a single file, without text_encoder, " in refused(
        network / "diffusion_pytorch_model.safetensors", config=str(network)
    )
    assert refused(teacher, "StableDiffusionPipeline") == (
        f"teacher.path={teacher} is a StableDiffusionXLPipeline, but the student is for a StableDiffusionPipeline; "
        "give the folder or hub id of its teacher with --teacher"
    )
    half = shutil.copytree(teacher, tmp_path / "half")
    shutil.rmtree(half / "text_encoder_2")
    shutil.rmtree(half / "vae")
    assert refused(half) == (
        f"{WHOLE}{half} has no text_encoder_2, vae; give a complete StableDiffusionXLPipeline with --teacher"
    )
    shutil.rmtree(half)
    shutil.copytree(teacher, half)
    weights = half / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert refused(half) == (
        f"{half / 'vae'} has no weights as safetensors, but config.json, diffusion_pytorch_model.bin; download or "
        "convert them"
    )
    weights.with_suffix(".bin").rename(weights)
    (half / "vae" / "model.py").write_text("")
    assert "its vae is a AutoencoderKL of diffusers with code of its own, which is not run" in refused(half)
    with pytest.raises(InputError, match=r"org/nothing is not in the cache of the hub .* hf download org/nothing"):
        whole.local(CheckpointTeacher(path="org/nothing"))


def card_of(folder):
    return student_card.read(folder)


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """Of a class: the folder of a complete teacher, and the light folder of a student that has learnt something."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        write(folder / "teacher", complete(name))
        rows = () if name == "dit" else STOCK[name][1]()
        given = {"size": [16, 24], "conditions": write_conditions(folder / "rows", rows)} if rows else {}
        loaded = load(folder / "teacher", **given)
        return CheckpointTeacher(path=str(folder / "teacher")), student_of(loaded, folder / "student", amount=0.02)

    return of


def same_weights(one, two, dtype=torch.float32):
    """Whether the network of `two` has the weights of the network of `one`, rounded to a data type."""
    component = card_of(one).component
    index = json.loads((one / "model_index.json").read_text())
    network_class = getattr(diffusers, index[component][1])
    ours, theirs = (network_class.from_pretrained(each / component).state_dict() for each in (one, two))
    return all(torch.equal(ours[name].to(dtype).float(), each) for name, each in theirs.items())


@pytest.mark.long
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "dit"])
def test_a_whole_pipeline_is_written_and_checked(students, tmp_path, name):
    """It loads alone, and from a prompt in two steps it makes what distill makes."""
    teacher, student = students(name)
    packaged.export(student, tmp_path / "whole", packaged.Package("fp32", teacher))
    stock = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    stock.set_progress_bar_config(disable=True)
    origin, card = DiffusionPipeline.from_pretrained(teacher.path), card_of(tmp_path / "whole")
    assert type(stock) is type(origin) and (card.pipeline, card.is_distilled) == (type(stock).__name__, True)
    assert all((each is None) == (getattr(origin, key) is None) for key, each in stock.components.items())
    assert same_weights(student, tmp_path / "whole")
    assert pulling.verify(tmp_path / "whole") == card and card.nfe == [1, 2, 4]
    readme = (tmp_path / "whole" / "README.md").read_text()
    assert 'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype=torch.float32)' in readme
    call = next(line for line in readme.splitlines() if line.startswith("sample = pipeline("))
    picture = eval(call.removeprefix("sample = "), {"pipeline": stock})
    assert picture.size == (24, 16) if name != "dit" else (16, 16)


def allow_missing(subject, monkeypatch):
    """Complete pipelines of this class may lack components. Returns the steps for which samples are compared."""
    needed = pipeline_index.components_of
    monkeypatch.setattr(pipeline_index, "components_of", lambda one: dict.fromkeys(needed(one), False))
    missing = {key: None for key, each in subject.make().components.items() if each is None}
    before = 'trust_remote_code=arguments["has_code"]'
    text = stock_check.PROGRAM.replace(before, f"{before}, **{missing!r}", 1)
    assert text != stock_check.PROGRAM
    monkeypatch.setattr(stock_check, "PROGRAM", text)
    compared, compare = [], stock_check._compare_samples
    monkeypatch.setattr(stock_check, "_compare_samples", lambda *given: compared.append(given[1]) or compare(*given))
    return compared


FORMS = ["ltx", "flux2 klein", "z image", "hunyuan dit", "wan 2.2", "sdxl renoise", "flux dev renoise"]


@pytest.mark.long
@pytest.mark.parametrize("name", FORMS)
def test_latents_of_every_form_are_compared(tmp_path, monkeypatch, name):
    """Of pipelines without text encoders, in bfloat16 where nothing is drawn in between."""
    subject, is_map = stock_pipelines.PIPELINES[name.removesuffix(" renoise")], name.endswith("renoise")
    compared = allow_missing(subject, monkeypatch)
    test_stock.exported(tmp_path, subject, *(("flow_map", "renoise") if is_map else ()))
    teacher = CheckpointTeacher(path=str(tmp_path / "pipeline"), **subject.fields)
    package = packaged.Package("fp32" if is_map else "bf16", teacher)
    packaged.export(tmp_path / "student", tmp_path / "whole", package)
    assert compared == [1, 2]


@pytest.mark.long
def test_weights_are_rounded_and_divided(students, tmp_path, monkeypatch):
    monkeypatch.setattr(native_folder, "SHARD", "20KB")
    teacher, student = students("sd3")
    packaged.export(student, tmp_path / "whole", packaged.Package("bf16", teacher))
    files = sorted(path.name for path in (tmp_path / "whole" / "transformer").iterdir())
    assert files[:2] == ["config.json", f"diffusion_pytorch_model-00001-of-{len(files) - 2:05}.safetensors"]
    assert files[-1] == "diffusion_pytorch_model.safetensors.index.json" and len(files) > 4
    assert load_file(tmp_path / "whole" / "transformer" / files[1]).popitem()[1].dtype == torch.bfloat16
    assert same_weights(student, tmp_path / "whole", torch.bfloat16)
    assert card_of(tmp_path / "whole").dtype == "bfloat16"
    packaged.export(student, tmp_path / "light", packaged.Package("bf16"))
    assert same_weights(tmp_path / "whole", tmp_path / "light")
    assert not (tmp_path / "light" / "vae").exists() and card_of(tmp_path / "light").pipeline == ""
    # A student in bfloat16, and a whole pipeline, are students, too.
    packaged.export(tmp_path / "whole", tmp_path / "again", packaged.Package("fp32", teacher))
    assert same_weights(tmp_path / "light", tmp_path / "again") and (tmp_path / "again" / "vae").exists()


@pytest.mark.long
def test_nothing_is_kept_if_the_check_fails(students, tmp_path, monkeypatch):
    teacher, student = students("dit")

    def refused(change):
        with monkeypatch.context() as changes:
            change(changes)
            with pytest.raises(RunError) as error:
                packaged.export(student, tmp_path / "whole", packaged.Package("fp32", teacher))
        assert list(tmp_path.iterdir()) == []
        return str(error.value)

    said = refused(lambda changes: changes.setattr(stock_check, "usual_grid", lambda student, sampler, n: uniform(n)))
    assert re.fullmatch(
        r"verification failed: at 1 step, the pipeline of diffusers makes other latents than distill from the same "
        r"noise: largest difference \S+, allowed 0.0001 of the largest value \S+; nothing was kept",
        said,
    )
    said = refused(lambda changes: changes.setattr(student_card, "write", damaged))
    assert said == (
        "verification failed: diffusers loads another transformer/proj_out_2.bias than was written; nothing was kept"
    )
    said = refused(lambda changes: changes.setattr(student_card, "write", without_vae))
    assert "verification failed: a process that cannot import distill ended with code 1: " in said


def uniform(steps):
    return torch.cat([torch.linspace(0.9, 0.1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def damaged(folder, card):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out_2.bias"] = weights["proj_out_2.bias"] + 1e-7
    save_file(weights, path)


def without_vae(folder, card):
    shutil.rmtree(folder / "vae")


@pytest.mark.long
def test_a_killed_export_leaves_no_folder(students, tmp_path):
    """At several moments; the next export removes what is left."""
    teacher, student = students("dit")
    out = tmp_path / "out" / "whole"
    arguments = ["export", str(student), "--whole", "--teacher", teacher.path, "--out", str(out)]
    for seconds in (0.0, 2.0):
        before = {*out.parent.glob(".whole.tmp-*")}
        process = start(*arguments, cwd=tmp_path, log=tmp_path / "log", env={"OMP_NUM_THREADS": "1"})
        assert wait_for(lambda before=before: {*out.parent.glob(".whole.tmp-*")} - before, process)
        time.sleep(seconds)
        assert kill(process) == -signal.SIGKILL
        assert not out.exists()
    done = distill(*arguments, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (0, "exported out/whole\n"), done.stderr
    assert [path.name for path in out.parent.iterdir()] == ["whole"]


@pytest.mark.long
def test_a_lora_is_added_to_the_weights(students, tmp_path):
    teacher, _ = students("sd3")
    given = {"size": [16, 24], "conditions": write_conditions(tmp_path / "rows", sd3.embeddings(2))}
    loaded = teacher_on_linear_path(load(Path(teacher.path), **given))
    adapted = lora_students.moved(lora_students.adapted(loaded))
    student = lora_students.exported(tmp_path / "student", loaded, adapted)
    read = load_student(student, CPU, teacher.model_copy(update=given))
    with pytest.raises(InputError, match="is a LoRA student, which has no network of its own: --dtype needs --whole"):
        packaged.export(student, tmp_path / "whole", packaged.Package("bf16"))
    packaged.export(student, tmp_path / "whole", packaged.Package("fp32", teacher))
    full = load_student(tmp_path / "whole", CPU, teacher.model_copy(update=given))
    x, t, cond = normal(3, *full.shape), torch.tensor([0.2, 0.6, 1.0]), conditions(read, 3)
    with torch.no_grad():
        expected, found = (each.student(x, t, cond) for each in (read, full))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (found - loaded.field(x, t, cond)).abs().max() > 1e-3
    card = card_of(tmp_path / "whole")
    assert (card.lora, card.base_digest, card.pipeline) == ({}, "", "StableDiffusion3Pipeline")
    other = write(tmp_path / "other", sd3.pipeline(version="3.5"))
    with pytest.raises(InputError, match="holds the adapters of another network than the "):
        packaged.export(student, tmp_path / "more", packaged.Package("fp32", CheckpointTeacher(path=str(other))))


def test_readmes_say_how_the_pipeline_is_called():
    call = StockCall(steps=[2, 4], arguments={"guidance_scale": 1.0})
    card = CARD.model_copy(
        update={"network": "SD3Transformer2DModel", "component": "transformer", "stock": call, "shape": (16, 64, 64)}
    )
    light = student_card.readme(card)
    assert 'sample = pipeline("a photo of a cat", num_inference_steps=2, guidance_scale=1).images[0]\n' in light
    assert "`num_inference_steps` may be\n2, 4. `distill export --whole` writes a folder with all components." in light
    whole = student_card.readme(
        card.model_copy(update={"pipeline": "StableDiffusion3Pipeline", "size": [512, 768], "dtype": "bfloat16"})
    )
    assert 'DiffusionPipeline.from_pretrained("path/to/this/folder", dtype=torch.bfloat16)' in whole
    assert "num_inference_steps=2, guidance_scale=1, height=512, width=768).images[0]" in whole
    facts = {"student": LoraFacts(rank=2, alpha=2.0, targets=["to_q"])}
    lora = student_card.readme(card.model_copy(update={"lora": facts}))
    assert 'pipeline.load_lora_weights("path/to/this/folder")' in lora


def test_cards_of_earlier_versions_keep_their_text():
    assert not {"is_distilled", "nfe", "pipeline", "size", "dtype"} & json.loads(student_card.to_json(CARD)).keys()


def test_what_cannot_be_exported_is_told(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")

    def refused(*arguments):
        done = command(capfd, "export", *arguments)
        assert (done.code, done.out) == (2, "")
        return done.err

    assert "--dtype fp16: did you mean 'bf16'? valid: bf16, fp32" in refused("one", "teach", "--dtype", "fp16")
    assert "--teacher t has no effect without --whole; leave it out" in refused("one", "teach", "--teacher", "t")
    assert "stage 'teach' of run 'one' has no checkpoint yet" in refused("one/teach")
    assert "there is no run or student 'two/teach'; give RUN or RUN/STAGE of" in refused("two/teach")
    student = run.student("teach")
    student.mkdir(parents=True)
    (student / "distill.json").write_text(student_card.to_json(CARD))
    assert "run 'one' has no teacher; give the pipeline of its network with --teacher" in refused(
        "one/teach", "--whole"
    )
    assert "--whole and --dtype have no effect, because its folder has a pipeline of its own" in refused(
        "one/teach", "--dtype", "bf16"
    )
    shutil.copytree(student, tmp_path / "alone")
    assert "alone is not part of a run, so its teacher is not known; give --teacher" in refused("alone", "--whole")
    assert "--raw has no effect: alone has one set of weights" in refused("alone", "--raw")


def test_no_file_is_written_outside_of_the_new_folder(tmp_path):
    """The names in distill.json are checked as for a pull, before a file is read."""
    student = students_without_weights.make(tmp_path / "there" / "student")
    (tmp_path / "there" / "profile.txt").write_text("x")
    record = {"sha256": hashlib.sha256(b"x").hexdigest(), "size": 1}
    students_without_weights.edit_card(student, lambda content: content["files"].update({"../profile.txt": record}))
    with pytest.raises(InputError) as error:
        packaged.export(student, tmp_path / "out" / "student")
    assert str(error.value) == (
        f"{student}/distill.json is invalid: it lists '../profile.txt', a path that leads out of the folder; nothing "
        "was saved"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("index", "shown"), [("{}", "None"), ('{"_class_name": "NoPipeline"}', "'NoPipeline'"), ('{"_class_name": 1}', "1")]
)
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_pipeline_of_no_class_is_told(tmp_path, index, shown, is_whole):
    student = tmp_path / "student"
    student.mkdir()
    (student / "model_index.json").write_text(index)
    facts = {"network": "SD3Transformer2DModel", "component": "transformer", "files": student_card.record(student)}
    (student / "distill.json").write_text(student_card.to_json(CARD.model_copy(update=facts)))
    teacher = CheckpointTeacher(path=str(tmp_path)) if is_whole else None
    with pytest.raises(InputError) as error:
        packaged.export(student, tmp_path / "new", packaged.Package("bf16", teacher))
    assert str(error.value) == (
        f"{student}/model_index.json: _class_name is {shown}; valid: the name of a pipeline class of diffusers, like "
        "StableDiffusion3Pipeline; export or copy the student again"
    )
    assert not (tmp_path / "new").exists()


def test_a_finished_student_is_exported_as_it_is(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = make_run(tmp_path / "runs").student("one_step")
    (student / "unet").mkdir(parents=True)
    (student / "unet" / "config.json").write_text("{}")
    files = {"files": student_card.record(student)}
    (student / "distill.json").write_text(student_card.to_json(CARD.model_copy(update=files)))
    for given, out in [("one/one_step", "a"), ("one", "b"), (str(student), "c")]:
        done = command(capfd, "export", given, "--out", out)
        assert (done.code, done.out) == (0, f"exported {out}\n"), done.err
        assert snapshot(tmp_path / out) == snapshot(student)
    assert "a exists already; name another folder with --out" in command(capfd, "export", "one", "--out", "a").err
    (student / "unet" / "config.json").write_text("{ }")
    done = command(capfd, "export", "one")
    assert (done.code, done.out) == (2, "") and "unet/config.json is damaged" in done.err
    assert not (tmp_path / "one-one_step").exists()
