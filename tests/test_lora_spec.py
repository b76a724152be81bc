"""Settings of adapters and smaller students in a spec: what is refused, and with which message."""

import pytest

from distill.core.errors import InputError
from distill.spec import checks, specfile
from distill.spec.model import RunSpec

TEACHER = {"kind": "diffusers", "path": "org/teacher"}
EXACT = {"kind": "gaussian", "mean": [1.0, 2.0], "std": [0.5, 0.25]}
STAGE = {"kind": "train", "recipe": "score/dmd2", "images": 8, "batch_size": 8}
SMALLER = {"student": {"config": {"num_layers": 1}}}
FULL = {"first": STAGE}


def refused(tmp_path, earlier=None, teacher=TEACHER, launch=None, **fields):
    """The first message that names adapters or the student, for a spec with the stage `s`."""
    stages = {**(earlier or {}), "s": {**STAGE, **fields}}
    data = {"kind": "digits"}
    content = {"name": "x", "teacher": teacher, "data": data, "stages": stages, "launch": launch or {}}
    with pytest.raises(InputError) as caught:
        checks.check(specfile.validate(content, "f"), tmp_path)
    lines = [line.strip().removeprefix("spec 'x': ") for line in str(caught.value).split("\n")]
    found = next(line for line in lines if "lora" in line or "student" in line)
    return found.removeprefix("stages.s")


def lora(**fields):
    return {"lora": {"student": {"rank": 4, **fields}}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"teacher": EXACT, "network": {"kind": "mlp"}, **lora()},
            ".lora: the teacher is known in closed form, so there is no network that could get adapters; remove it",
        ),
        (
            {"network": {"kind": "unet", "channels": [8]}, **lora()},
            ".lora: adapters change the weights of the teacher, but the weights of `network` are new; remove one of "
            "them",
        ),
        (
            {"launch": {"zero_stage": 3}, **lora()},
            "launch.zero_stage: 3 divides the weights of each network, but with stages.s.lora they share those of the "
            "teacher; use 0, 1 or 2",
        ),
        (
            {"launch": {"divide_teacher": True, "procs": 2}, **lora()},
            "launch.divide_teacher: with stages.s.lora, the networks share the weights of the teacher, which are not "
            "divided then; remove it",
        ),
        (
            {"earlier": FULL, "init": "first", **lora()},
            ".lora.student: the student of init 'first' is trained in full, but adapters can be loaded only on the "
            "spec's teacher; name a stage that has lora.student, or remove it",
        ),
        (
            {"earlier": {"first": {**STAGE, **lora()}}, "init": "first", **lora(rank=8)},
            ".lora.student.rank: 8 given, but the adapters start from those of init 'first', which have the rank 4; "
            "use the same rank",
        ),
        (
            {"earlier": {"first": {**STAGE, **lora()}}, "init": "first", **lora(path=".")},
            ".lora.student.path: the adapters start from those of init 'first', so this has no effect; remove it",
        ),
        (
            {"network": {"kind": "unet", "channels": [8]}, **SMALLER},
            ": student and network are both given, but only one of them can be trained; remove one",
        ),
        (
            {**SMALLER, **lora()},
            ".lora.student: adapters change the teacher's weights, but the weights of `student` are new; remove one of "
            "them",
        ),
        (
            {"earlier": {"first": {**STAGE, "recipe": "shortcut/shortcut"}}, "init": "first", **SMALLER},
            ".student: no smaller student can be made of the student of init 'first', because it is a flow map; start "
            "from a velocity student, or from the teacher",
        ),
        (
            {"teacher": EXACT, **SMALLER},
            ".student: the teacher is known in closed form and has no network class; use network",
        ),
    ],
)
def test_settings_that_do_not_work_together_are_one_message(tmp_path, given, message):
    assert refused(tmp_path, **given) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "stages.s.lora.student.rank: 0 given; must be at least 1"),
        ({"alpha": 0.0}, "stages.s.lora.student.alpha: 0.0 given; must be greater than 0"),
        ({"targets": []}, "stages.s.lora.student.targets: [] given; must be a list of at least 1"),
        (
            {"targets": ["to_q|.*"]},
            "stages.s.lora.student.targets.0: 'to_q|.*' given; must be the name of a layer, or the end of its name, "
            "such as to_q or to_out.0",
        ),
        (
            {"ranks": 4},
            "stages.s.lora.student.ranks: unknown key; did you mean 'rank'? valid: alpha, path, rank, targets",
        ),
    ],
)
def test_values_are_checked(fields, message):
    with pytest.raises(InputError) as caught:
        specfile.validate({"name": "x", "teacher": TEACHER, "stages": {"s": {**STAGE, **lora(**fields)}}}, "f")
    assert str(caught.value) == f"f: {message}"


def test_a_lora_is_found_beside_the_spec(tmp_path):
    (tmp_path / "old.safetensors").write_bytes(b"")
    content = {"name": "x", "teacher": TEACHER, "stages": {"s": {**STAGE, **lora(path="old.safetensors")}}}
    (tmp_path / "spec.yaml").write_text(specfile.resolved(specfile.validate(content, "f")))
    found = specfile.load(tmp_path / "spec.yaml").spec.stages["s"].lora["student"]
    assert (found.path, found.rank, found.scale) == (str(tmp_path / "old.safetensors"), 4, 1.0)


def test_the_digest_counts_adapters_but_not_their_absence():
    def digest(**fields):
        stage = {**STAGE, "network": {"kind": "mlp"}, **fields}
        return RunSpec.model_validate({"name": "x", "teacher": EXACT, "stages": {"s": stage}}).digest()

    before = "57158b8831abe19e70f71726616d9fb964ed2f38328e66aa4b89d39a3596c839"  # of version 0.3.0
    assert digest() == digest(lora={}) == digest(student=None) == before
    assert len({before, digest(**lora()), digest(**lora(alpha=4.0)), digest(**SMALLER)}) == 4
