"""Students as teachers: they have the autoencoder of their teacher, wherever that is."""

import pytest
from latent import write
from test_teacher_flux import pipeline as flux

from distill.spec.model import CheckpointTeacher, GaussianTeacher
from distill.teachers.of_students import student_as_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline in a folder of another one."""
    root = tmp_path_factory.mktemp("of_students")
    write(root / "outer" / "flux", flux(guidance_embeds=False))
    return root / "outer"


def test_a_student_has_the_autoencoder_of_its_teacher(folder, tmp_path):
    vae, file = str(folder / "flux" / "vae"), tmp_path / "x.safetensors"
    file.touch()
    for teacher in (
        {"path": str(folder / "flux")},
        {"path": str(folder / "flux" / "transformer")},
        {"path": str(folder), "subfolder": "flux"},
        {"path": str(folder), "subfolder": "flux/transformer", "variant": "fp16"},
        {"path": str(file), "config": str(folder / "flux")},
    ):
        found = student_as_teacher(tmp_path, CheckpointTeacher(**teacher, size=[16, 24], dtype="bfloat16"))
        assert found == CheckpointTeacher(path=str(tmp_path), size=[16, 24], vae=vae), teacher


def test_where_there_is_no_autoencoder_a_student_has_none(folder, tmp_path):
    alone = CheckpointTeacher(path=str(tmp_path))
    assert student_as_teacher(tmp_path, None) == alone
    assert student_as_teacher(tmp_path, GaussianTeacher(kind="gaussian", mean=[0.0], std=[1.0])) == alone
    gone = CheckpointTeacher(path=str(tmp_path / "gone"))
    assert student_as_teacher(folder / "flux", gone) == CheckpointTeacher(path=str(folder / "flux"))
    given = CheckpointTeacher(path=str(folder / "flux"), vae="/mine")
    assert student_as_teacher(tmp_path, given) == CheckpointTeacher(path=str(tmp_path), vae="/mine")
