"""Student folders: the same bytes for the same weights, loaded by plain diffusers, and never partly written."""

import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file

from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.evaluation import sample
from distill.exchange import student_card
from distill.exchange.student_card import StudentCard
from distill.flow.draws import generator, sample_labels, sample_noise
from distill.flow.times import uniform_grid
from distill.networks.acceleration import AccelerationStudent
from distill.networks.architectures import accelerated, build, two_times
from distill.networks.flow_map import FlowMapStudent
from distill.networks.velocity import VelocityStudent
from distill.spec.kinds import STUDENTS
from distill.spec.model import CheckpointTeacher, MlpSpec, UNetSpec
from distill.students import exporting, sampling, shipped
from distill.students.exporting import export
from distill.students.init import StudentInit
from distill.students.loaded import Student, load_student
from distill.students.samplers import euler
from distill.teachers import load_teacher

UNET = UNetSpec(kind="unet", channels=[8, 16])
MLP = MlpSpec(kind="mlp", width=16)
OWN = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 4: [1.0, 0.9, 0.55, 0.2, 0.0]}
KINDS = {
    "unet": (UNET, (1, 8, 8), None, "euler", {}),
    "unet-classes": (UNET, (3, 8, 8), 4, "euler", {}),
    "mlp": (MLP, (2,), None, "euler", {}),
    "mlp-classes": (MLP, (3,), 2, "euler", {}),
    "mlp-same-noise": (MLP, (3,), None, "same_noise", {}),
    "unet-jump": (UNET, (1, 8, 8), None, "jump", {}),
    "unet-classes-renoise": (UNET, (3, 8, 8), 4, "renoise", {}),
    "mlp-renoise": (MLP, (2,), None, "renoise", {}),
    "mlp-classes-jump": (MLP, (3,), 2, "jump", {}),
    "unet-classes-accelerated": (UNET, (3, 8, 8), 4, "accelerated", {}),
    "mlp-accelerated": (MLP, (2,), None, "accelerated", {}),
    "unet-own": (UNET, (1, 8, 8), None, "euler", OWN),
    "mlp-classes-same-noise-own": (MLP, (3,), 2, "same_noise", OWN),
    "mlp-jump-own": (MLP, (2,), None, "jump", OWN),
    "mlp-renoise-own": (MLP, (2,), None, "renoise", OWN),
    "mlp-classes-accelerated-own": (MLP, (3,), 2, "accelerated", OWN),
    "unet-classes-bns": (UNET, (3, 8, 8), 4, "bns", OWN),
    "mlp-bns": (MLP, (2,), None, "bns", OWN),
}


def make(kind: str, seed: int = 0) -> tuple[Student, StudentCard]:
    network, shape, classes, sampler, t_grids = KINDS[kind]
    card = describe(shape, classes, sampler, t_grids)
    student = VelocityStudent(build(network, shape, classes, seed))
    return {"velocity": lambda: student, "flow_map": lambda: two_timed(student), "acceleration": lambda: bent(student)}[
        card.kind
    ](), card


def two_timed(student: VelocityStudent) -> FlowMapStudent:
    """The flow map of its network, as if it had been trained: t - s has an effect."""
    network = two_times(student.network, 0)
    for name, parameter in network.named_parameters():
        if "gap." in name:
            drawn = torch.randn(parameter.shape, generator=generator("gap", name))
            parameter.data = 0.1 * drawn.to(parameter.device)
    return FlowMapStudent(network)


def bent(student: VelocityStudent) -> AccelerationStudent:
    """Its network and an acceleration, as if both had been trained: what it is given has an effect."""
    network = accelerated(student.network, 0)
    for name, parameter in network.named_parameters():
        if name.startswith(("acceleration.", "given.")):
            drawn = torch.randn(parameter.shape, generator=generator("bent", name))
            parameter.data += 0.1 * drawn.to(parameter.device)
    return AccelerationStudent(network)


def describe(
    shape: tuple[int, ...], classes: int | None, sampler: str = "euler", t_grids: dict[int, list[float]] | None = None
) -> StudentCard:
    return StudentCard(
        kind=next(kind for kind, each in STUDENTS.items() if sampler in each.samplers),
        sampler=sampler,
        t_grids=t_grids or {},
        fitted={n: [[0.1 * (i - j) for j in range(i + 2)] for i in range(n)] for n in OWN} if sampler == "bns" else {},
        name="a-student",
        recipe="reflow/reflow",
        summary="Reflow (Liu et al. 2022, arXiv 2209.03003)",
        spec_digest="5" * 64,
        teacher_digest="7" * 64,
        num_classes=classes,
        null_class=classes,
        shape=shape,
        weights="raw",
        images=12_800,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fresh(card: StudentCard, count: int, steps: int) -> list[torch.Tensor]:
    noises = steps - 1 if card.sampler == "renoise" else 0
    return [sample_noise(100 + k, range(count), card.shape) for k in range(noises)]


def ours(student: Student, card: StudentCard, noise: torch.Tensor, steps: int) -> torch.Tensor:
    labels = {} if card.num_classes is None else {"class_labels": sample_labels(range(len(noise)), card.num_classes)}
    t_grid = torch.tensor(card.t_grids[steps], dtype=torch.float64) if card.t_grids else uniform_grid(steps)
    more = [*fresh(card, len(noise), steps), *sampling.weights(card.fitted, steps)]
    return sampling.by_sampler(student.eval(), card.sampler, noise, t_grid, labels, more)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Of a kind: its student, its card and the folder of its export, made once."""

    @functools.cache
    def of(kind):
        student, card = make(kind)
        folder = tmp_path_factory.mktemp(kind) / "s"
        export(student, folder, card)
        return student, card, folder

    return of


SOME_KINDS = [pytest.param(kind, marks=pytest.mark.long) if kind in ("unet", "unet-jump") else kind for kind in KINDS]


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_folder_loads_in_plain_diffusers_with_equal_weights_and_samples(exported, kind):
    student, card, folder = exported(kind)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for name, value in student.network.state_dict().items():
        assert torch.equal(value, pipeline.unet.state_dict()[name])
    noise = sample_noise(1, range(3), card.shape)
    labels = None if card.num_classes is None else sample_labels(range(3), card.num_classes)
    for steps in card.t_grids or (1, 2, 3, 4):
        more = fresh(card, 3, steps)
        theirs = pipeline(steps, class_labels=labels, latents=noise, fresh=more, output_type="pt").images
        assert torch.equal(theirs, ours(student, card, noise, steps)), steps
    assert pipeline.unet.training is False


def test_exports_at_the_same_time_do_not_load_each_others_code(tmp_path, monkeypatch):
    """diffusers copies every pipeline.py to one file: no other process may replace it before it is imported."""
    student, card = make("mlp")
    locked, load = [], DiffusionPipeline.from_pretrained

    def from_pretrained(*arguments, **options):
        with pytest.raises(Timeout):
            FileLock(Path(HF_MODULES_CACHE) / "distill.lock", timeout=0).acquire()
        locked.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    export(student, tmp_path / "s", card)
    assert len(locked) == 1


def test_pipelines_that_one_process_has_loaded_keep_their_own_samplers(pipelines):
    loaded = {kind: pipelines(kind) for kind in KINDS if kind not in ("unet", "unet-jump")}
    for kind, pipeline in loaded.items():
        (student, card), steps = make(kind), 4
        noise, labels = sample_noise(1, range(3), card.shape), sample_labels(range(3), card.num_classes or 1)
        theirs = pipeline(
            steps,
            class_labels=None if card.num_classes is None else labels,
            latents=noise,
            fresh=fresh(card, 3, steps),
            output_type="pt",
        ).images
        assert torch.equal(theirs, ours(student, card, noise, steps)), kind


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_what_is_loaded_again_is_the_student_bitwise(exported, kind):
    student, card, folder = exported(kind)
    found = load_student(folder, torch.device("cpu"))
    assert type(found.student) is type(student)
    assert (found.sampler, found.t_grids, found.shape) == (card.sampler, card.t_grids, card.shape)
    assert (found.num_classes, found.null_class) == (card.num_classes, card.null_class)
    assert not any(parameter.requires_grad for parameter in found.student.parameters())
    noise = sample_noise(1, range(3), card.shape)
    for steps in card.t_grids or (1, 3):
        assert torch.equal(ours(found.student, card, noise, steps), ours(student, card, noise, steps))


def test_a_flow_map_is_no_teacher(tmp_path):
    export(*_swap(make("unet-jump"), tmp_path / "s"))
    with pytest.raises(InputError, match="s is a student of kind flow_map; valid teachers: velocity"):
        load_teacher(CheckpointTeacher(path=str(tmp_path / "s")), torch.device("cpu"))
    with pytest.raises(InputError, match="s/unet is a student of kind flow_map; valid teachers: velocity"):
        load_teacher(CheckpointTeacher(path=str(tmp_path / "s" / "unet")), torch.device("cpu"))
    (tmp_path / "s" / "model_index.json").unlink()
    with pytest.raises(InputError, match="network class FlowMapUNet2DModel is not supported; .*VelocityUNet2DModel"):
        load_teacher(CheckpointTeacher(path=str(tmp_path / "s" / "unet")), torch.device("cpu"))


def test_a_student_whose_card_is_of_another_kind_is_refused(tmp_path):
    export(*_swap(make("mlp-classes-jump"), tmp_path / "s"))
    path = tmp_path / "s" / "distill.json"
    path.write_text(path.read_text().replace('"flow_map"', '"velocity"').replace('"jump"', '"euler"'))
    with pytest.raises(InputError, match="network class FlowMapMLP is not supported; .*VelocityMLP"):
        load_student(tmp_path / "s", torch.device("cpu"))
    path.write_text(path.read_text().replace('"euler"', '"jump"'))
    with pytest.raises(
        InputError, match="sampler jump does not fit a student of kind velocity; valid: euler, same_noise"
    ):
        load_student(tmp_path / "s", torch.device("cpu"))


@pytest.mark.parametrize("module", shipped.NETWORKS.values())
def test_a_shipped_network_is_one_file(module):
    """A hub is asked for no second one."""
    text = shipped.network(module)
    assert not re.search(r"^\s*(from|import) +\.", text, flags=re.MULTILINE)
    compile(text, module, "exec")


def test_a_folder_that_names_no_sampler_is_sampled_by_euler(tmp_path):
    student, card = make("mlp")
    export(student, tmp_path / "s", card)
    index = tmp_path / "s" / "model_index.json"
    index.write_text(index.read_text().replace('  "sampler": "euler",\n', ""))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)
    noise = sample_noise(1, range(3), card.shape)
    assert (pipeline(2, latents=noise).images - ours(student, card, noise, 2)).abs().max() <= 1e-5
    index.write_text(index.read_text().replace("{", '{\n  "sampler": "heun",', 1))
    with pytest.raises(ValueError, match="sampler='heun'; valid: 'euler', the only one in this student's pipeline.py"):
        DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)


def export_vp(folder: Path, sampler: str = "euler") -> tuple[Student, StudentCard]:
    """A student that starts from, and here still is, a DDPM checkpoint; exported to `folder`."""
    checkpoint = folder.parent / "ddpm"
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    DDPMPipeline(unet, DDPMScheduler(prediction_type="epsilon")).save_pretrained(checkpoint)
    teacher = load_teacher(CheckpointTeacher(path=str(checkpoint)), torch.device("cpu"))
    init, card = StudentInit(teacher, None, teacher.shape, None, 0), describe((1, 8, 8), None, sampler)
    starts = {"euler": init.velocity_field, "jump": init.flow_map, "accelerated": init.acceleration}
    student = starts[sampler]()
    export(student, folder, card)
    return student, card


def test_vp_network_ships_its_wrapper(tmp_path):
    student, card = export_vp(tmp_path / "s")
    assert (tmp_path / "s" / "unet" / "velocity_unet.py").is_file()
    assert str(tmp_path).encode() not in b"".join(contents(tmp_path / "s").values()), "says where its teacher lay"
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)
    noise = sample_noise(1, range(2), (1, 8, 8))
    for steps in (1, 2, 4):
        theirs = pipeline(steps, latents=noise, output_type="pt").images
        assert (theirs - ours(student, card, noise, steps)).abs().max() <= 1e-5


@pytest.mark.long
def test_a_flow_map_of_a_vp_network_is_exported_as_the_velocity_it_starts_as(tmp_path):
    """Jumps with an untrained second time are Euler steps: in the folder, and in what is loaded again."""
    velocity, _ = export_vp(tmp_path / "v")
    flow_map, card = export_vp(tmp_path / "u", "jump")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "u", trust_remote_code=True)
    again = load_student(tmp_path / "u", torch.device("cpu")).student
    noise, t, s = sample_noise(1, range(3), (1, 8, 8)), torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0.0, 0.5, 0.3])
    with torch.no_grad():
        v = velocity.eval()(noise, t, {})
        for u in (
            flow_map.eval()(noise, t, s, {}),
            again(noise, t, s, {}),
            pipeline.unet(noise, 1000 * t, 1000 * s)[0],
        ):
            assert (u - v).abs().max() <= 1e-6 * v.abs().max()
    for steps in (1, 2, 4):
        theirs = pipeline(steps, latents=noise, output_type="pt").images
        assert (theirs - euler.sample(velocity, noise, uniform_grid(steps), {})).abs().max() <= 1e-5


@pytest.mark.long
def test_a_velocity_with_its_acceleration_is_exported_for_a_vp_network_too(tmp_path):
    """Untrained, its velocity is the network's, and it ships in the same one file."""
    velocity, _ = export_vp(tmp_path / "v")
    student, card = export_vp(tmp_path / "a", "accelerated")
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "a", trust_remote_code=True)
    noise, t = sample_noise(1, range(3), (1, 8, 8)), torch.tensor([0.1, 0.5, 1.0])
    with torch.no_grad():
        v = velocity.eval()(noise, t, {})
        assert torch.equal(student.eval()(noise, t, None, {}), v) and torch.equal(pipeline.unet(noise, 1000 * t)[0], v)
    for steps in (1, 2, 4):
        theirs = pipeline(steps, latents=noise, output_type="pt").images
        assert (theirs - ours(student, card, noise, steps)).abs().max() <= 1e-5


def test_student_is_a_teacher_again(tmp_path):
    student, card = make("unet-classes")
    export(student, tmp_path / "s", card)
    teacher = load_teacher(CheckpointTeacher(path=str(tmp_path / "s")), torch.device("cpu"))
    x_t, t, labels = torch.randn(5, 3, 8, 8), torch.rand(5), {"class_labels": torch.arange(5) % 4}
    with torch.no_grad():
        assert torch.equal(teacher.field(x_t, t, labels), student.eval()(x_t, t, labels))
    assert (teacher.num_classes, teacher.null_class, teacher.shape) == (4, 4, (3, 8, 8))


def test_same_weights_same_bytes_wherever_they_lie(tmp_path):
    for place in ("one", "elsewhere"):
        export(*_swap(make("unet-classes"), tmp_path / place / "s"))
    assert contents(tmp_path / "one" / "s") == contents(tmp_path / "elsewhere" / "s")
    export(*_swap(make("unet-classes", seed=1), tmp_path / "other" / "s"))
    first, other = contents(tmp_path / "one" / "s"), contents(tmp_path / "other" / "s")
    differ = {name for name in first if first[name] != other[name]}
    assert differ == {"unet/diffusion_pytorch_model.safetensors", "distill.json"}
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["s"]


def _swap(made: tuple[Student, StudentCard], folder: Path) -> tuple[Student, Path, StudentCard]:
    return made[0], folder, made[1]


def test_weights_do_not_depend_on_training_mode_or_global_random_state(tmp_path):
    student, card = make("unet")
    student.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    export(student, tmp_path / "s", card)
    assert torch.equal(before, torch.get_rng_state())
    assert student.training


def test_existing_student_is_replaced_and_a_failed_export_changes_nothing(tmp_path):
    student, card = make("mlp")
    export(student, tmp_path / "s", card)
    first = contents(tmp_path / "s")
    with torch.no_grad():
        student.network.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="layers.0.weight contains NaN or infinity; nothing was exported"):
        export(student, tmp_path / "s", card)
    assert contents(tmp_path / "s") == first
    export(make("mlp", seed=1)[0], tmp_path / "s", card)
    assert contents(tmp_path / "s") != first
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_disagreement_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    student, card = make("mlp")
    monkeypatch.setattr(sampling, "uniform_grid", lambda steps: torch.linspace(1, 0, steps + 1).square())
    with pytest.raises(
        RunError, match="at 2 steps, the exported student generates other samples in diffusers than in distill from the"
    ):
        export(student, tmp_path / "s", card)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_large_values_are_compared_by_their_own_scale(tmp_path, monkeypatch):
    student, card = make("mlp")
    with torch.no_grad():
        for parameter in student.network.layers[-1].parameters():
            parameter.mul_(1000)
    sampled, largest = exporting.by_sampler, []

    def rounded(*given):
        samples = sampled(*given)
        largest.append(samples.abs().max().item())
        return samples * (1 + share)

    monkeypatch.setattr(exporting, "by_sampler", rounded)
    share = 5e-6  # more than 1e-5 of such values, which float32 tells from each other by 3e-5 at best
    export(student, tmp_path / "s", card)
    assert min(largest) > 100
    share = 5e-5
    with pytest.raises(RunError, match="generates other samples in diffusers than in distill from the same noise, max"):
        export(student, tmp_path / "s", card)


def test_what_a_killed_export_left_is_cleared_and_the_old_student_comes_back(tmp_path, monkeypatch):
    student, card = make("mlp")
    export(student, tmp_path / "s", card)
    first = contents(tmp_path / "s")
    dead = f"0123abcd-{replace(Owner.this(), start='1').label}"  # killed between the two renames
    (tmp_path / "s").rename(tmp_path / f".s.old-{dead}")
    shutil.copytree(tmp_path / f".s.old-{dead}", tmp_path / f".s.tmp-{dead}")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(RunError, match="generates other samples in diffusers than in distill"):
        export(student, tmp_path / "s", card)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]
    assert contents(tmp_path / "s") == first


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the student to .*Not a directory|File exists"):
        export(*_swap(make("mlp"), tmp_path / "file" / "s"))


def test_card_lists_every_file_and_damage_is_named(tmp_path):
    export(*_swap(make("mlp"), tmp_path / "s"))
    card = student_card.verify(tmp_path / "s")
    assert set(card.files) == set(contents(tmp_path / "s")) - {"distill.json"}
    assert {"pipeline.py", "unet/velocity_mlp.py", "scheduler/scheduler_config.json"} < set(card.files)
    weights = tmp_path / "s" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["layers.0.weight"] = tensors["layers.0.weight"] + 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is damaged: .* sha256"):
        student_card.verify(tmp_path / "s")
    weights.unlink()
    with pytest.raises(InputError, match="diffusion_pytorch_model.safetensors is missing"):
        student_card.verify(tmp_path / "s")


def test_files_that_do_not_belong_and_folders_that_are_no_students_are_refused(tmp_path):
    export(*_swap(make("mlp"), tmp_path / "s"))
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="files that distill.json does not list: notes.txt"):
        student_card.verify(tmp_path / "s")
    with pytest.raises(InputError, match="is not a student folder: it has no distill.json"):
        student_card.read(tmp_path)
    (tmp_path / "s" / "distill.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="cannot be used: format"):
        student_card.read(tmp_path / "s")


def test_model_card_says_what_is_known(tmp_path):
    text = student_card.readme(make("unet-classes")[1])
    assert "library_name: diffusers" in text
    assert "Reflow (Liu et al. 2022, arXiv 2209.03003)" in text
    assert "class_labels=list(range(4))" in text
    assert "12,800 images" in text
    assert "`777777777777`" in text
    assert "Terms of use: not stated" in text
    assert "called with timestep = 1000 t |" in text
    assert "| sampler | Euler, x_s = x_t + (s - t) v(x_t, t) |" in text
    assert "| times | 1, (N-1)/N, ..., 1/N, 0 for N steps |" in text
    assert "pipeline(num_inference_steps=1, class_labels" in text
    licensed = student_card.readme(make("mlp")[1].model_copy(update={"license": "cc-by-4.0"}))
    assert "license: cc-by-4.0" in licensed
    assert "cc-by-4.0: the teacher's terms, passed on." in licensed and "not stated" not in licensed
    measured = student_card.readme(
        make("mlp")[1].model_copy(update={"metrics": {"SW2@1": 0.25, "SW2@2": 0.125, "KID@2": 1.5}})
    )
    assert "| NFE | SW2 | KID |\n|---:|---:|---:|\n| 1 | 0.25 |  |\n| 2 | 0.125 | 1.5 |\n" in measured
    assert "Its samples were not evaluated" in text and "not measured" not in measured


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("unet-jump", "| sampler | jumps x_s = x_t + (s - t) u(x_t, t, s) |"),
        (
            "mlp-renoise",
            "| sampler | jumps to data = x_t - t u(x_t, t, 0), each but the last followed by x_s = (1 - s) data",
        ),
    ],
)
def test_model_card_of_a_flow_map(kind, said):
    text = student_card.readme(make(kind)[1])
    assert said in text
    assert "| network | average velocity u(x_t, t, s) from t to s of" in text
    assert "called with timestep = 1000 t, target_timestep = 1000 s |" in text
    assert "Euler" not in text


def test_model_card_of_a_velocity_with_its_acceleration():
    student = make("mlp-accelerated")[1].model_copy(update={"metrics": {"SW2@1": 0.25, "SW2@4": 0.125}})
    text = student_card.readme(student)
    assert (
        "| network | velocity v(x_t, t), called with timestep = 1000 t, and acceleration a(x_t, t, v) = dv/dt" in text
    )
    assert "x_s = x_t + (s - t) (v + ((t + s) / 2 - 1) a(x_t, t, v)): N + 1 network calls in N steps |" in text
    assert "| NFE | SW2 |\n|---:|---:|\n| 2 | 0.25 |\n| 5 | 0.125 |\n" in text


def test_model_card_of_a_student_with_times_of_its_own():
    student = make("mlp-classes-same-noise-own")[1].model_copy(update={"t_grids": {4: OWN[4], 2: [1.0, 2 / 3, 0.0]}})
    text = student_card.readme(student)
    assert "| sampler | data = x_t - t v(x_t, t), x_s = (1 - s) data + s noise, with the noise that it began" in text
    own = "each with its times: 2 steps: 1, 0.6667, 0; 4 steps: 1, 0.9, 0.55, 0.2, 0 |"
    assert f"| times | only these numbers of steps are possible, {own}" in text
    assert "pipeline(num_inference_steps=2, class_labels" in text


@pytest.mark.parametrize("times", [[1.0, 0.0], [1.0, 0.5, 0.5, 0.0], [0.9, 0.5, 0.2, 0.0], [1.0, 0.5, 0.2, 0.1]])
def test_times_that_are_no_path_from_noise_to_data_are_refused(times):
    with pytest.raises(ValueError, match=r"t_grids: 3 steps need 4 times that decrease from 1 to 0, got \[.*\]"):
        describe((2,), None, t_grids={3: times})


def test_a_card_from_before_there_were_times_is_read(tmp_path):
    student, card = make("mlp")
    export(student, tmp_path / "s", card)
    path = tmp_path / "s" / "distill.json"
    assert '"t_grids": {}' in path.read_text()
    path.write_text(path.read_text().replace('"t_grids": {}', '"t_grid": "uniform"'))
    assert student_card.verify(tmp_path / "s").t_grids == {}
    path.write_text(path.read_text().replace('"t_grid": "uniform"', '"t_grid": "cosine"'))
    with pytest.raises(InputError, match="distill.json cannot be used: t_grid: .* given; extra inputs are not"):
        student_card.read(tmp_path / "s")


def test_numbers_of_steps_that_a_student_is_not_made_for_are_refused(tmp_path):
    student, card = make("mlp-jump-own")
    export(student, tmp_path / "s", card)
    with pytest.raises(InputError, match="steps: this student supports only 1, 2 and 4 steps, not 3"):
        sample.write_samples(
            tmp_path / "s", tmp_path / "a.png", steps=3, seed=0, count=4, labels=None, device=torch.device("cpu")
        )
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)
    with pytest.raises(ValueError, match="num_inference_steps=3; this student is made for: 1, 2, 4"):
        pipeline(3)
    for made, said in (({4: OWN[4]}, "4 steps"), ({1: OWN[1]}, "1 step"), ({4: OWN[4], 2: OWN[2]}, "2 and 4 steps")):
        with pytest.raises(InputError, match=f"students.one: this student supports only {said}, not 3"):
            sampling.refuse_steps(made, [*made, 3, 7], "students.one")
    sampling.refuse_steps({}, [1, 2, 3], "any")


def test_by_default_a_student_takes_the_fewest_steps_that_it_is_made_for(tmp_path):
    student, card = make("unet-own")
    export(student, tmp_path / "s", card.model_copy(update={"t_grids": {4: OWN[4], 2: OWN[2]}}))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "s", trust_remote_code=True)
    noise = sample_noise(1, range(3), card.shape)
    found = pipeline(latents=noise, output_type="pt").images
    assert torch.equal(found, pipeline(2, latents=noise, output_type="pt").images)
    assert (found - ours(student, card, noise, 2)).abs().max() <= 1e-5
    assert student_card.read(tmp_path / "s").fewest_steps == 2


# --- the pipeline's own manners ---


@pytest.fixture(scope="module")
def pipelines(exported):
    """Of a kind: its pipeline, loaded once."""
    return functools.cache(lambda kind: DiffusionPipeline.from_pretrained(exported(kind)[2], trust_remote_code=True))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unet-classes", {}, "needs class_labels: 1 ids from 0 to 3"),
        ("unet-classes", {"class_labels": [1], "batch_size": 2}, r"class_labels have shape \[1\], but 2 samples"),
        ("unet-classes", {"class_labels": [5]}, r"class_labels \[5\] are not all valid; this student knows 0 to 3"),
        ("unet-classes", {"class_labels": [-1]}, r"class_labels \[-1\] are not all valid"),
        ("unet", {"class_labels": [1]}, "this student is unconditional; leave them out"),
        ("unet", {"num_inference_steps": 0}, "num_inference_steps=0; give 1 or more"),
        ("unet", {"output_type": "latent"}, "output_type='latent'; valid: 'pil', 'np', 'pt'"),
        ("unet", {"latents": torch.zeros(2, 1, 8, 9)}, r"latents have shape \[2, 1, 8, 9\]; valid: \[batch, 1, 8, 8\]"),
        ("unet", {"latents": torch.zeros(2, 1, 8, 8), "batch_size": 3}, "batch_size=3, but latents have 2 rows"),
        (
            "unet-jump",
            {"num_inference_steps": 2, "fresh": torch.zeros(1, 1, 1, 8, 8)},
            r"fresh holds noises of shape \[\[1, 1, 8, 8\]\]; by the sampler jump this student takes 0 of",
        ),
        (
            "mlp-renoise",
            {"num_inference_steps": 3, "fresh": [torch.zeros(1, 2)]},
            r"shape \[\[1, 2\]\]; by the sampler renoise this student takes 2 of \[1, 2\]",
        ),
        (
            "mlp-renoise",
            {"num_inference_steps": 2, "fresh": [torch.zeros(1, 3)]},
            r"shape \[\[1, 3\]\]; .* 1 of \[1, 2\]",
        ),
    ],
)
def test_pipeline_refuses_what_cannot_work(pipelines, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelines(kind)(**arguments)


def test_pipeline_output_types(pipelines):
    noise, labels = 3 * sample_noise(0, range(4), (3, 8, 8)), [0, 1, 2, 3]
    raw, array, images = (
        pipelines("unet-classes")(2, labels, latents=noise, output_type=kind).images for kind in ("pt", "np", "pil")
    )
    assert raw.abs().max() > 1, "pt is not clamped"
    np.testing.assert_allclose(array, (raw / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.array_equal(np.asarray(images[2]), (array[2] * 255).round().astype("uint8"))
    assert pipelines("unet")(batch_size=2).images[1].mode == "L"
    vectors = pipelines("mlp")(2, latents=noise[:, 0, 0, :2]).images
    assert isinstance(vectors, torch.Tensor)
    assert vectors.shape == (4, 2)
    (single,) = pipelines("mlp")(latents=noise[:1, 0, 0, :2], return_dict=False)
    assert torch.equal(single, pipelines("mlp")(latents=noise[:1, 0, 0, :2]).images)


def test_pipeline_draws_its_noise_from_the_generator(pipelines):
    first, again, other = (
        pipelines("unet")(batch_size=3, generator=torch.Generator().manual_seed(s), output_type="pt").images
        for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    noise = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, pipelines("unet")(latents=noise, output_type="pt").images)
    assert len(pipelines("mlp-classes")(class_labels=torch.tensor([0, 1, 2])).images) == 3


def test_pipeline_draws_fresh_noise_from_the_generator(pipelines):
    student, noise = pipelines("mlp-renoise"), sample_noise(0, range(5), (2,))

    def drawn(steps, seed):
        return student(steps, latents=noise, generator=torch.Generator().manual_seed(seed)).images

    assert torch.equal(drawn(1, 0), drawn(1, 1)), "one step takes none"
    assert torch.equal(drawn(3, 0), drawn(3, 0))
    assert not torch.equal(drawn(3, 0), drawn(3, 1))
    given = torch.Generator().manual_seed(0)
    more = [torch.randn(5, 2, generator=given) for _ in range(2)]
    assert torch.equal(drawn(3, 0), student(3, latents=noise, fresh=more).images)


# --- the proof: a process that has never heard of distill ---


@pytest.mark.process
def test_a_process_without_distill_makes_the_same_samples(tmp_path):
    made = {kind: make(kind) for kind in KINDS}
    for kind, (student, card) in made.items():
        export(student, tmp_path / kind, card)
    made["vp"] = export_vp(tmp_path / "vp")
    made["vp-jump"] = export_vp(tmp_path / "vp-jump", "jump")
    made["vp-accelerated"] = export_vp(tmp_path / "vp-accelerated", "accelerated")
    noise = {kind: sample_noise(2, range(5), card.shape) for kind, (_, card) in made.items()}
    for kind, (_, card) in made.items():
        inputs = {"latents": noise[kind]}
        if card.num_classes is not None:
            inputs["class_labels"] = sample_labels(range(5), card.num_classes)
        if card.sampler == "renoise":
            inputs["fresh"] = torch.stack(fresh(card, 5, 4))
        save_file(inputs, tmp_path / f"{kind}.in.safetensors")
    program = Path(__file__).parent / "programs" / "plain_diffusers.py"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # on which the rounding of convolutions depends
    command = [sys.executable, "-P", program, tmp_path, *made]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, (student, card) in made.items():
        theirs = load_file(tmp_path / f"{kind}.out.safetensors")
        assert set(theirs) == {"1", "2", "4"}
        for steps, samples in theirs.items():
            assert (samples - ours(student, card, noise[kind], int(steps))).abs().max() <= 1e-5, (kind, steps)
