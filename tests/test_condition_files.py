"""Files with conditions, and the options of a teacher that go with them: each is used, or refused with one message."""

import hashlib
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from latent import load, normal, write, write_conditions
from safetensors.torch import save_file
from test_teacher_cogview4 import pipeline as cogview4
from test_teacher_flux import embeddings, pipeline
from test_teacher_ltx import ROWS as LTX_ROWS
from test_teacher_ltx import SIZE
from test_teacher_ltx import pipeline as ltx

from distill.core import file_checksums
from distill.core.errors import InputError, RunError
from distill.data.arrays import ArrayData
from distill.data.prompts import Prompts
from distill.execution import sources
from distill.flow.conditioning import ConditionTable, HeldRows
from distill.spec.model import CheckpointTeacher
from distill.students.init import StudentInit
from distill.teachers import conditions

ROWS, NULL = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("teachers") / "flux", pipeline(guidance_embeds=True))


def teacher(flux: Path, folder: Path, rows: dict, null: dict | None = None, **fields):
    """The teacher with these rows in its file of conditions."""
    path = write_conditions(folder / "conditions.safetensors", rows, null)
    return load(flux, size=[16, 24], conditions=path, **fields)


def refused(flux: Path, folder: Path, rows: dict, said: str, **fields) -> None:
    with pytest.raises(InputError) as error:
        teacher(flux, folder, rows, **fields)
    assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_of_other_data_types_are_converted_when_they_are_used(flux, tmp_path, dtype):
    stored, null = ({name: each.to(dtype) for name, each in table.items()} for table in (ROWS, NULL))
    (tmp_path / "plain").mkdir()
    got = teacher(flux, tmp_path, stored, null)
    plain = teacher(flux, tmp_path / "plain", *({k: v.float() for k, v in each.items()} for each in (stored, null)))
    assert {each for _, each in got.conditioning.rows.fields.values()} == {dtype}
    x, t, indices = normal(3, 4, 8, 12), torch.full((3,), 0.5), torch.arange(3)
    for each in (1.0, 2.0):
        found, expected = (
            one.guided(each)(x, t, one.conditioning.collate(indices)) for one in (got, plain)
        )  # fmt: skip
        assert torch.equal(found, expected)


def test_a_mask_of_integers_is_one_of_booleans(tmp_path):
    rows = {"encoder_hidden_states": normal(2, 16, 24), "attention_mask": torch.ones(2, 16, dtype=torch.int64)}
    path = write_conditions(tmp_path / "c.safetensors", rows)
    made = load(write(tmp_path / "cogview4", cogview4()), size=[32, 48], conditions=path)
    assert made.conditioning.collate(torch.arange(2))["attention_mask"].dtype == torch.bool


def test_the_fields_of_a_prompt_have_the_same_number_of_tokens(tmp_path):
    rows = LTX_ROWS | {"encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)}
    path = write_conditions(tmp_path / "c.safetensors", rows)
    with pytest.raises(InputError) as error:
        load(write(tmp_path / "ltx", ltx()), size=SIZE, conditions=path)
    assert str(error.value) == (
        f"{path}: the fields have different numbers of tokens: encoder_hidden_states 7, encoder_attention_mask 5; "
        "valid: the same number in each"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3, 5), "guidance has rows of shape [5]; valid for this network: []"),
        (torch.ones(3, dtype=torch.int64), "guidance has the data type torch.int64; valid: torch.float32"),
    ],
)
def test_rows_in_place_of_a_constant_are_of_its_kind(flux, tmp_path, given, said):
    refused(flux, tmp_path, ROWS | {"guidance": given}, said)


def test_a_call_that_fails_names_the_conditions(flux, tmp_path, monkeypatch):
    def call(network, x_t, time, cond):
        raise KeyError("guidance")

    monkeypatch.setattr("distill.teachers.architectures.flux.Flux.call", staticmethod(call))
    path = tmp_path / "conditions.safetensors"
    refused(flux, tmp_path, ROWS, f"'guidance'; correct its config.json, or the conditions in {path}")


def test_options_without_effect_are_refused(flux, tmp_path):
    refused(
        flux,
        tmp_path,
        ROWS,
        f"teacher.null_class=7 has no effect: this network ({flux / 'transformer' / 'config.json'}) is conditioned on "
        "prompts, not on classes; remove it",
        null_class=7,
    )
    refused(
        flux,
        tmp_path,
        ROWS | {"guidance": torch.full((3,), 9.0)},
        f"teacher.embedded_guidance=2 has no effect: {tmp_path / 'conditions.safetensors'} has the guidance scale of "
        "each row, in its field `guidance`; remove one of both",
        embedded_guidance=2,
    )


def test_the_null_row_is_copied_to_a_device_once_and_constants_are_those_of_the_condition():
    table = ConditionTable(HeldRows({"a": torch.ones(4, 2)}), {"a": torch.zeros(1, 2)}, {"b": torch.ones(3)})
    cond = {"a": torch.empty(2, 2, device="meta"), "b": torch.empty(2, 3, device="meta")}
    first, second = (table.null(cond) for _ in range(2))
    assert {name: tuple(each.shape) for name, each in first.items()} == {"a": (2, 2), "b": (2, 3)}
    assert first["a"]._base is second["a"]._base and first["b"] is second["b"] is cond["b"]


def test_a_network_is_tested_with_a_small_sample(flux, tmp_path, capfd, monkeypatch):
    """Latents of 128x128 are those of 1024 pixels per side, which a large network on the CPU would need minutes for."""
    monkeypatch.setattr("distill.teachers.checkpoint.LARGE", 0)
    path = write_conditions(tmp_path / "conditions.safetensors", ROWS)
    assert load(flux, size=[256, 260], conditions=path).shape == (4, 128, 130)
    said = f"teacher.path={flux}: testing its network on a sample of shape [4, 8, 8]; this may take minutes\n"
    assert capfd.readouterr() == ("", said)


def test_a_student_without_conditions_says_where_they_come_from(flux, tmp_path):
    folder = shutil.copytree(flux, tmp_path / "student")
    (folder / "distill.json").write_text('{"kind": "velocity"}')
    with pytest.raises(InputError) as error:
        load(folder)
    assert str(error.value) == (
        f"{folder / 'transformer' / 'config.json'}: this network is conditioned on encoder_hidden_states, "
        "pooled_projections, so a file with embeddings of prompts must be given, as for its teacher: on the command "
        "line with --teacher '{path: TEACHER, conditions: FILE}', in a spec as teacher.conditions; `distill encode "
        "TEACHER PROMPTS.txt` makes one"
    )


def test_messages_are_about_prompts_where_there_are_no_classes(flux, tmp_path):
    found = teacher(flux, tmp_path, ROWS)
    said = "the file of teacher.conditions has no condition for the unconditional call, which label_dropout needs"
    with pytest.raises(InputError, match=said):
        StudentInit(found, None, found.shape, 3, 0, found).null(found.conditioning.collate(torch.arange(1)))
    with pytest.raises(InputError, match="has 3 conditions, the rows of its file of teacher.conditions, but the data"):
        StudentInit(found, None, found.shape, 2, 0)
    data = ArrayData("pictures", torch.zeros(4, 3, 16, 24), torch.arange(4) % 2, 2)
    with pytest.raises(InputError) as error:
        sources.check_shapes(found, data)
    assert str(error.value) == (
        f"data 'pictures' has 2 classes, but the teacher ({found.description}) has 3 prompts: the rows of its file of "
        "teacher.conditions. Samples with label i belong to row i; give data with a label for each row, or a file with "
        "one row for each class"
    )


# --- made by others ---


def folder_of(folder: Path, rows: dict, null: dict | None = None) -> Path:
    """A folder with FIELD.npy and null.FIELD.npy."""
    folder.mkdir()
    for name, each in {**rows, **{f"null.{name}": each for name, each in (null or {}).items()}}.items():
        np.save(folder / f"{name}.npy", each.numpy())
    return folder


def test_a_folder_of_arrays_has_the_same_rows_as_a_file(flux, tmp_path):
    of_file = teacher(flux, tmp_path, ROWS, NULL)
    made = folder_of(tmp_path / "rows", ROWS, NULL)
    of_folder = load(flux, size=[16, 24], conditions=str(made))
    assert of_folder.num_classes == 3 and of_folder.conditioning.has_null
    indices = torch.tensor([2, 0, 2, 1])
    got, expected = (each.conditioning.collate(indices) for each in (of_folder, of_file))
    nulls = (each.conditioning.null(got) for each in (of_folder, of_file))
    for one, other in ((got, expected), nulls):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    content = "".join(
        f"{path.stem} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(made.glob("*.npy"))
    )
    assert conditions.read(made).digest == hashlib.sha256(content.encode()).hexdigest()
    assert len({of_file.digest, of_folder.digest}) == 2


def test_only_rows_that_are_taken_are_read(tmp_path, monkeypatch):
    """Also in another process: the rows are not sent to it, it opens the file again."""
    monkeypatch.setattr(conditions, "CHECKED", 100)
    rows = {"a": normal(1000, 50, 8).double(), "b": torch.arange(1000)}
    rows["a"][7, 3, 1] = torch.nan
    files = [
        folder_of(tmp_path / "npy", rows),
        Path(write_conditions(tmp_path / "rows.safetensors", rows)),
    ]
    for path, where in zip(files, ("npy/a.npy", "rows.safetensors, tensor a"), strict=True):
        found = conditions.read(path).rows
        assert len(found) == 1000
        assert found.fields == {"a": ((50, 8), torch.float64), "b": ((), torch.int64)}
        sent = pickle.dumps(found)
        assert len(sent) < 2000
        for each in (found, pickle.loads(sent)):  # noqa: S301
            taken = each.take(torch.tensor([999, 0, 999]))
            assert all(torch.equal(taken[name], rows[name][[999, 0, 999]]) for name in rows)
        with pytest.raises(InputError) as error:
            found.take(torch.tensor([3, 7]))
        assert str(error.value) == (
            f"{tmp_path / where} contains NaN or infinity in row 7 (rows count from 0); make it again"
        )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: folder_of(path, {}), "teacher.conditions={path} contains no .npy files; give a folder with "
         "FIELD.npy and null.FIELD.npy for each field, or a safetensors file"),
        (lambda path: folder_of(path, {"a": ROWS["pooled_projections"], "b": torch.zeros(4, 2)}),
         "{path} has no rows of conditions, or not the same number in each field; make it again"),
        (lambda path: folder_of(path, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 2)}),
         "{path}: the fields null.* are not one row of each other field; make it again"),
        (lambda path: folder_of(path, {"a": torch.full((3, 2), torch.inf)}),
         "{path} contains NaN or infinity in a; make it again"),
        (lambda path: folder_of(path, {"a": torch.zeros(3, 2).T}),
         "{path}: a is in Fortran order, so that taking one row would read the whole file; save it with np.save(FILE, "
         "np.ascontiguousarray(ARRAY))"),
        (lambda path: folder_of(path, {"a": torch.zeros(3, 2)}).joinpath("b.npy").write_bytes(b"x" * 99),
         "{path}/b.npy is not a .npy file, or is damaged or cut (the magic string is not correct; expected "
         "b'\\x93NUMPY', got b'xxxxxx'); copy or make it again"),
    ],
    ids=["empty", "lengths", "null", "infinity", "Fortran", "damaged"],
)  # fmt: skip
def test_folders_that_cannot_be_used_are_refused(tmp_path, make, said):
    make(tmp_path / "rows")
    with pytest.raises(InputError) as error:
        conditions.read(tmp_path / "rows")
    assert str(error.value) == said.replace("{path}", str(tmp_path / "rows"))


def test_one_array_is_no_table_of_conditions(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    with pytest.raises(InputError) as error:
        conditions.read(tmp_path / "a.npy")
    assert str(error.value) == (
        f"teacher.conditions={tmp_path / 'a.npy'} is one array; give a folder with FIELD.npy and null.FIELD.npy for "
        "each field"
    )


def test_checksums_that_a_store_cannot_keep_are_kept_in_the_run(tmp_path, monkeypatch, capsys):
    """A store that users share may have an `indexes` folder of another user."""
    monkeypatch.setattr(file_checksums, "LARGE", 1000)
    monkeypatch.setattr(file_checksums, "_KNOWN", {})
    given = folder_of(tmp_path / "rows", {"a": normal(3, 500)})
    spec = CheckpointTeacher(path=str(tmp_path), conditions=str(given))
    for name in ("store", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "store" / "indexes").touch()
    conditions.keep_checksums(spec, tmp_path / "store", tmp_path / "run")
    assert capsys.readouterr().err == (
        f"warning: cannot create {tmp_path}/store/indexes: File exists; nothing was changed; without the checksums in "
        "the store, each new run reads these files again\n"
    )
    assert str(given / "a.npy") in (tmp_path / "run" / file_checksums.FILE).read_text()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=f"^cannot create {tmp_path}/run/indexes: "):
        conditions.keep_checksums(spec, None, tmp_path / "run")


def test_a_large_file_is_read_once_for_its_checksum(tmp_path, monkeypatch):
    """By the check of the spec. The processes of the run take the checksum from there, unless the file has changed."""
    monkeypatch.setattr(file_checksums, "LARGE", 1000)
    monkeypatch.setattr(file_checksums, "_KNOWN", {})
    read = []
    opened = file_checksums.open_regular
    monkeypatch.setattr(
        file_checksums, "open_regular", lambda path, **more: read.append(path.name) or opened(path, **more)
    )
    given = folder_of(tmp_path / "rows", {"a": normal(3, 500), "b": torch.arange(3)})
    for path in given.iterdir():
        os.utime(path, ns=(0, 10**18))
    spec = CheckpointTeacher(path=str(tmp_path), conditions=str(given))
    digest = conditions.read(given).digest
    assert read == ["a.npy", "b.npy"]
    conditions.keep_checksums(spec, tmp_path / "store")
    for change in (False, True):
        read.clear()
        file_checksums._KNOWN.clear()
        if change:
            os.utime(given / "a.npy", ns=(0, 2 * 10**18 // 3))
        file_checksums.read(tmp_path / "store")
        assert conditions.read(given).digest == digest
        assert read == (["a.npy"] if change else []) + ["b.npy"], "small files are always read"
    kept = (tmp_path / "store" / file_checksums.FILE).read_text()
    for damage in (kept[:-1], kept.replace("sha256", "sha"), "[]"):
        (tmp_path / "store" / file_checksums.FILE).write_text(damage)
        file_checksums._KNOWN.clear()
        file_checksums.read(tmp_path / "store")
        assert file_checksums._KNOWN == {}


def test_the_prompts_of_data_are_the_rows_of_the_file(flux, tmp_path):
    found = teacher(flux, tmp_path, ROWS)
    data = ArrayData("pictures", torch.zeros(4, 3, 16, 24), torch.tensor([0, 1, 2, 0]), 3)
    data.prompts = Prompts.of(["a", "b", "c"])
    sources.check_shapes(found, data)
    data.num_classes, data.prompts = 4, Prompts.of("abcd")
    with pytest.raises(InputError) as error:
        sources.check_shapes(found, data)
    assert str(error.value) == (
        f"data 'pictures' has 4 prompts, but teacher.conditions of the teacher ({found.description}) has 3 rows; row i "
        "must belong to the i-th prompt of the data, so encode these prompts, or let a cache stage do it, without "
        "teacher.conditions"
    )
    for classes, takes in ((4, "is conditioned on classes"), (None, "is unconditional")):
        other = replace(found, given=None, num_classes=classes)
        with pytest.raises(InputError) as error:
            sources.check_prompts(other, "x", 4)
        assert str(error.value) == (
            f"data 'x' has prompts, but the teacher ({found.description}) {takes}; use data without prompts, or a "
            "teacher that takes them"
        )


def test_the_first_prompts_are_kept_for_captions(flux, tmp_path):
    """They have no effect on anything else, so that damaged ones are as good as none."""
    path, prompts = tmp_path / "c.safetensors", ["a  cat\nand \x1b[2Jdogs", "x" * 400, *map(str, range(2, 100))]
    conditions.write(path, ROWS, NULL, "0" * 64, prompts)
    found = load(flux, size=[16, 24], conditions=str(path)).conditioning
    assert found.prompts[0] == "a cat and \ufffd[2Jdogs" and found.prompts[2:] == tuple(map(str, range(2, 64)))
    assert len(found.prompts[1]) == 300
    assert (conditions.encoder_of(path), teacher(flux, tmp_path, ROWS, NULL).conditioning.prompts) == ("0" * 64, ())
    for damaged in ("{", '{"a": 1}', "[1]", "[" * 100_000):
        tensors = {**ROWS, **{f"null.{name}": each for name, each in NULL.items()}}
        save_file(tensors, path, {conditions.PROMPTS: damaged})
        assert conditions.read(path).prompts == ()
