"""Files with conditions, and the options of a teacher that go with them: each is used, or refused with one message."""

import shutil
from pathlib import Path

import pytest
import torch
from latent import load, normal, write, write_conditions
from test_teacher_cogview4 import pipeline as cogview4
from test_teacher_flux import embeddings, pipeline
from test_teacher_ltx import ROWS as LTX_ROWS
from test_teacher_ltx import SIZE
from test_teacher_ltx import pipeline as ltx

from distill.core.errors import InputError
from distill.data.arrays import ArrayData
from distill.execution import sources
from distill.flow.conditioning import ConditionTable
from distill.students.init import StudentInit

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
    assert {each.dtype for each in got.conditioning.rows.tensors.values()} == {
        dtype
    }  # not larger in memory than in the file
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


def test_the_null_row_and_the_constants_are_copied_to_a_device_once():
    table = ConditionTable({"a": torch.ones(4, 2)}, {"a": torch.zeros(1, 2)}, {"b": torch.ones(3)})
    first, second = (table.null({"a": torch.empty(2, 2, device="meta")}) for _ in range(2))
    assert {name: tuple(each.shape) for name, each in first.items()} == {"a": (2, 2), "b": (2, 3)}
    assert all(first[name]._base is second[name]._base for name in first)


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
