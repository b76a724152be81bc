"""`distill merge`, `unmerge`, `extract` and `lora-check`, on tiny students of SD3 and SDXL."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import students
import test_teacher_sd3 as sd3
import test_teacher_unet_condition as sd
import torch
from commands import command, snapshot
from latent import CPU, ddim, load, normal, write, write_conditions

from distill.core.errors import InputError
from distill.exchange import student_card
from distill.exchange.student_card import LoraFacts, StudentCard
from distill.spec.model import CheckpointTeacher
from distill.students import lora_weights, native
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.students.lora_weights import LoraLayer, LoraWeights
from distill.students.merging import merge

pytestmark = pytest.mark.long
RANK = 2


def change(network, rank: int = RANK) -> LoraWeights:
    """A LoRA of the attention, as if it had been trained."""
    part, convention = native.base_of(network), native.convention_for(native.base_of(network))
    layers = {}
    for i, (name, each) in enumerate(part.named_modules()):
        if isinstance(each, torch.nn.Linear) and ".att" in name:
            down, up = normal(rank, each.in_features, seed=i), normal(each.out_features, rank, seed=i + 1)
            layers[name] = LoraLayer(0.1 * down, 0.1 * up, 2.0 * rank)
    return LoraWeights(type(part).__name__, convention.folder, layers)


def made(folder: Path, path: Path, fields: dict, kind: str) -> dict[str, object]:
    """A teacher, a student with all weights that differs from it by a LoRA of rank 2, and a LoRA student of that."""
    spec = CheckpointTeacher(path=str(path), **fields)
    teacher = teacher_on_linear_path(load(path, **fields))
    init = StudentInit(teacher, None, teacher.shape, teacher.num_classes, 0, teacher)
    full = init.velocity_field() if kind == "velocity" else init.flow_map()
    lora, adapted = change(full.network), native.without_adapters(teacher.network)
    lora_weights.add_to(adapted, lora)
    if kind == "velocity":
        on_base = native.velocity(adapted, native.call_of(teacher))
    else:
        with torch.no_grad():
            for i, each in enumerate(full.network.gap.parameters()):
                each += 0.1 * normal(*each.shape, seed=i)
        on_base = native.flow_map(adapted, native.call_of(teacher), 0)
        on_base.network.gap.load_state_dict(full.network.gap.state_dict())
    card = StudentCard(
        name="s", recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, kind=kind,
        sampler={"velocity": "euler", "flow_map": "jump"}[kind], num_classes=None, null_class=None,
        shape=teacher.shape, weights="raw", images=1, metrics={"FD@1": 1.5},
    )  # fmt: skip
    facts = {"student": LoraFacts(rank=RANK, alpha=2 * RANK, targets=[])}
    export(full, folder / "start", card, teacher.packaging)
    export(
        on_base,
        folder / "lora",
        card.model_copy(update={"lora": facts, "base_digest": teacher.base_digest}),
        teacher.packaging,
    )
    merge(native.base_of(full.network), lora)
    export(full, folder / "full", card, teacher.packaging)
    return {"spec": spec, "teacher": json.dumps(spec.model_dump(mode="json", exclude_defaults=True)), "lora": lora}


@pytest.fixture(scope="module")
def of_sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    null = {name: each[:1] for name, each in sd3.embeddings(5).items()}
    given = write_conditions(folder / "conditions.safetensors", sd3.embeddings(2), null)
    path = write(folder / "teacher", sd3.pipeline())
    return {"folder": folder, **made(folder, path, {"size": [16, 24], "conditions": given}, "velocity")}


@pytest.fixture(scope="module")
def of_sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    given = write_conditions(folder / "conditions.safetensors", sd.embeddings(2, xl=True))
    path = write(folder / "teacher", sd.pipeline(ddim(**sd.SD), xl=True))
    return {"folder": folder, **made(folder, path, {"size": [16, 24], "conditions": given}, "flow_map")}


@pytest.mark.parametrize("family", ["of_sd3", "of_sdxl"])
def test_merge_and_unmerge(family, request, tmp_path, capfd):
    given = request.getfixturevalue(family)
    folder, spec = given["folder"], given["spec"]
    done = command(capfd, "merge", str(folder / "lora"), "--teacher", given["teacher"], "--out", str(tmp_path / "m"))
    assert (done.code, done.err) == (0, ""), done
    assert done.out.endswith(f"{tmp_path}/m, with scale 1\n")
    # The student with all weights was merged in the same way, so that all its files are the same.
    assert snapshot(tmp_path / "m") == snapshot(folder / "full")
    half = command(
        capfd, "merge", str(folder / "lora"), "--teacher", given["teacher"], "--out", str(tmp_path / "h"),
        "--scale", "0.5",
    )  # fmt: skip
    assert half.code == 0
    states = [
        native.base_of(load_student(each, CPU, spec).network).state_dict()
        for each in (folder / "start", tmp_path / "h", folder / "full")
    ]
    for name, start in states[0].items():
        assert (states[1][name] - (start + states[2][name]) / 2).abs().max() <= 1e-6
    assert student_card.read(tmp_path / "h").metrics == {}
    for i, lora in enumerate((folder / "lora", folder / "lora" / "pytorch_lora_weights.safetensors")):
        done = command(capfd, "unmerge", str(tmp_path / "m"), "--lora", str(lora), "--out", str(tmp_path / f"u{i}"))
        assert (done.code, done.err) == (0, ""), done
        student_card.verify(tmp_path / f"u{i}")
        again = native.base_of(load_student(tmp_path / f"u{i}", CPU, spec).network).state_dict()
        assert again.keys() == states[0].keys()
        assert all((again[name] - each).abs().max() <= 1e-6 for name, each in states[0].items())
        assert {*snapshot(tmp_path / f"u{i}")} == {*snapshot(tmp_path / "m")}


def test_extract_of_a_known_lora(of_sd3, tmp_path, capfd):
    arguments = ["extract", str(of_sd3["folder"] / "full"), "--teacher", of_sd3["teacher"], "--device", "cpu"]
    arguments += ["--rank", "2", "--rank", "1", "--samples", "3", "--json", "--out", str(tmp_path / "out")]
    done = command(capfd, *arguments)
    assert done.code == 0, done
    found = json.loads(done.out)
    assert [each["rank"] for each in found["rows"]] == [0, 1, 2]
    assert found["compared"] == "images" and 0 < found["change"] < 0.2 and found["others"] == {}
    psnr = [each["difference"]["psnr"] for each in found["rows"]]
    assert psnr[0] < psnr[1] < 80 < psnr[2]
    assert 0.3 < found["rows"][1]["kept"] < 0.95 and found["rows"][2]["kept"] == pytest.approx(1)
    assert found["layers"]["2"].keys() == of_sd3["lora"].layers.keys()
    for rank in (1, 2):
        folder = tmp_path / "out" / f"rank-{rank}"
        card = student_card.verify(folder)
        assert card.lora["student"].rank == rank and card.metrics == {}
        assert found["rows"][rank]["size"] == (folder / "pytorch_lora_weights.safetensors").stat().st_size
    lora = lora_weights.read_diffusers(tmp_path / "out" / "rank-2")
    for name, layer in lora.layers.items():
        assert (layer.change - of_sd3["lora"].layers[name].change).abs().max() <= 1e-5
    # The folder is a LoRA student like others: merged, it is the student that it was extracted from.
    merge = command(
        capfd, "merge", str(tmp_path / "out" / "rank-2"), "--teacher", of_sd3["teacher"], "--out", str(tmp_path / "m")
    )
    assert merge.code == 0, merge
    ours, theirs = (
        native.base_of(load_student(each, CPU, of_sd3["spec"]).network).state_dict()
        for each in (tmp_path / "m", of_sd3["folder"] / "full")
    )
    assert all((ours[name] - each).abs().max() <= 1e-5 for name, each in theirs.items())


def test_extract_of_a_student_that_was_trained_in_full(of_sdxl, tmp_path, capfd):
    """The table, and what a LoRA cannot hold. The second time of a flow map is kept in full."""
    spec, folder = of_sdxl["spec"], of_sdxl["folder"]
    student = load_student(folder / "full", CPU, spec)
    with torch.no_grad():
        for i, each in enumerate(native.base_of(student.network).parameters()):
            each += 0.02 * normal(*each.shape, seed=i)
    card = student_card.read(folder / "full")
    export(student.student, tmp_path / "full", card, student.packaging)
    arguments = ["extract", str(tmp_path / "full"), "--teacher", of_sdxl["teacher"], "--device", "cpu"]
    done = command(capfd, *arguments, "--rank", "4", "--out", str(tmp_path / "out"))
    assert done.code == 0, done
    lines = done.out.split("\n")
    assert lines[1].split() == ["rank", "file", "change", "kept", "PSNR", "RMS", "difference"]
    base, row = lines[3].split(), lines[4].split()
    assert base[:4] == ["0", "(the", "base)", "-"] and row[0] == "4"
    assert float(base[5]) < float(row[4]) and float(base[7]) > float(row[6])
    assert lines[6] == "PSNR and RMS difference: images of 4 samples at 1 step, seed 0"
    assert re.fullmatch(r"the size of the change is \d+\.\d\d% of that of the base's weights", lines[7])
    assert re.fullmatch(
        r"\d+\.\d\d% of the change is in parameters that a LoRA cannot hold: (\S+ \d+\.\d\d%, ){5}and \d+ more",
        lines[8],
    )
    assert lines[9].endswith("out: rank-4")
    kept = [
        load_student(each, CPU, spec).network.gap.state_dict() for each in (tmp_path / "out/rank-4", folder / "full")
    ]
    assert all(torch.equal(kept[0][name], each) for name, each in kept[1].items())


@pytest.mark.parametrize("family", ["of_sd3", "of_sdxl"])
def test_lora_check(family, request, capfd):
    given = request.getfixturevalue(family)
    arguments = ["lora-check", str(given["folder"] / "lora"), "--teacher", given["teacher"], "--device", "cpu"]
    done = command(capfd, *arguments)
    assert done.code == 0, done
    found = json.loads(command(capfd, *arguments, "--json").out)
    assert 0 < found["base"]["rms"] / 3 < found["lora"]["rms"] < found["effect"]["rms"]
    network = load(given["spec"].path, **given["spec"].model_dump(include={"size", "conditions"})).network
    assert found["layers"] == sum(isinstance(each, torch.nn.Linear) for each in network.modules())


def test_what_does_not_fit_is_refused(of_sd3, of_sdxl, tmp_path, capfd):
    """One message, exit code 2, and nothing is written."""
    full, lora, teacher = str(of_sd3["folder"] / "full"), str(of_sd3["folder"] / "lora"), of_sd3["teacher"]
    fields = of_sd3["spec"].model_dump(include={"size", "conditions"})
    unrelated = sd3.pipeline()
    for i, each in enumerate(unrelated.transformer.parameters()):
        each.data = each.std() * normal(*each.shape, seed=i)
    others = {
        name: json.dumps({"path": str(write(tmp_path / name, stock)), **fields})
        for name, stock in (("unrelated", unrelated), ("sd3.5", sd3.pipeline(version="3.5")))
    }
    pixels = str(students.make(tmp_path / "pixels"))
    (tmp_path / "empty").mkdir()
    before = {*snapshot(tmp_path)}
    extract = ["extract", full, "--device", "cpu", "--rank", "2"]
    closed = "{kind: gaussian, mean: [0], std: [1]}"
    other_class = str(of_sdxl["folder"] / "full")
    cases: dict[str, list[str]] = {
        "--out empty: exists already; name another folder": ["merge", lora, "--teacher", teacher, "--out", "empty"],
        "--scale 0: has no effect or is not finite": ["merge", lora, "--teacher", teacher, "--scale", "0"],
        "--scale nan: has no effect": ["unmerge", full, "--lora", lora, "--scale", "nan"],
        "full is not a LoRA student: its folder has all weights; to make": ["merge", full, "--teacher", teacher],
        "lora holds the adapters of another network than": ["merge", lora, "--teacher", others["unrelated"]],
        "of kind gaussian has no weights; give a checkpoint": ["merge", lora, "--teacher", closed],
        "--lora missing: does not exist": ["unmerge", full, "--lora", "missing"],
        "lora is a LoRA student, whose LoRA is not merged": ["unmerge", lora, "--lora", lora],
        "pixels has a network of its own class, into which no LoRA": ["unmerge", pixels, "--lora", lora],
        "the LoRA is one of a network transformer, which": ["unmerge", other_class, "--lora", lora],
        "lora is a LoRA student already; to change its rank": ["extract", lora, "--teacher", teacher, "--rank", "1"],
        "pixels has a network of its own class, and a LoRA": ["extract", pixels, "--teacher", teacher, "--rank", "1"],
        "--rank 0: valid are 1 to 32": [*extract, "--teacher", teacher, "--rank", "0"],
        "--rank 33: valid are 1 to 32": [*extract, "--teacher", teacher, "--rank", "33"],
        "has a UNet2DConditionModel, but": ["extract", other_class, "--teacher", teacher, "--rank", "1"],
        "differ from its weights by": [*extract, "--teacher", others["unrelated"]],
        "are networks of different sizes: transformer_blocks": [*extract, "--teacher", others["sd3.5"]],
        "full is not a LoRA student": ["lora-check", full, "--teacher", teacher],
        "; give that teacher": ["lora-check", lora, "--teacher", others["unrelated"]],
    }  # fmt: skip
    with contextlib.chdir(tmp_path):
        for message, arguments in cases.items():
            out = [] if arguments[0] == "lora-check" or "--out" in arguments else ["--out", "out"]
            done = command(capfd, *arguments, *out)
            assert (done.code, done.out) == (2, ""), (message, done)
            assert done.err.startswith("error: ") and done.err.count("\n") == 1, (message, done.err)
            assert message in done.err, done.err
            assert {*snapshot(tmp_path)} == before, message
    again = load_student(of_sd3["folder"] / "full", CPU, of_sd3["spec"])
    with pytest.raises(InputError, match="changes the layer transformer_blocks.0.attn2.to_q, which this"):
        merge(again.network, change(load(tmp_path / "sd3.5", **fields).network))
