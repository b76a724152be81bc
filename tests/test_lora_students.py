"""LoRA students: one frozen base in memory for all networks; adapters that are trained, saved, resumed, exported."""

import gc
from pathlib import Path

import pytest
import test_teacher_sd3 as sd3
import tiny
import torch
from latent import CPU, conditions, load, normal, write, write_conditions
from latent_runs import content, images
from runs import CARD
from safetensors.torch import load_file

from distill.core.errors import InputError, RunError, Stopped
from distill.core.stop import StopRequest
from distill.exchange import manifest
from distill.exchange.student_card import LoraFacts, StudentCard, read, record, verify
from distill.execution import preflight
from distill.execution.estimate import estimate
from distill.networks.sharing import has_base, is_shared
from distill.protocols import Batch, Copy, Frozen, Loss, Trained, Turn
from distill.runs.run_store import StagePaths
from distill.spec import checks, specfile
from distill.spec.model import CheckpointSpec, CheckpointTeacher, TrainStage
from distill.spec.rolespec import LoraSpec
from distill.students import adapting, isolated, lora_start, lora_verify, native
from distill.students.exporting import export
from distill.students.init import StudentInit, teacher_on_linear_path
from distill.students.loaded import load_student
from distill.students.native_folder import SECOND_TIME
from distill.testing.training import Recorder
from distill.training import engine
from distill.training.memory import storages

X, T, S = normal(3, 4, 8, 8), torch.tensor([0.2, 0.6, 1.0]), torch.tensor([0.1, 0.0, 0.5])
INPUTS = {"velocity_field": (X, T), "flow_map": (X, T, S), "acceleration": (X, T, X), "critic": (X, T)}
KINDS = {"velocity_field": ("velocity", "euler"), "flow_map": ("flow_map", "jump")}
KINDS["acceleration"] = ("acceleration", "accelerated")
RANK2 = LoraSpec(rank=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Stable Diffusion 3.5 teacher as a spec names it."""
    folder = tmp_path_factory.mktemp("sd3")
    rows = write_conditions(folder / "conditions.safetensors", sd3.embeddings(2))
    path = write(folder / "teacher", sd3.pipeline(version="3.5"))
    return CheckpointTeacher(path=str(path), size=[16, 16], conditions=rows)


def loaded(place, dtype="float32"):
    return teacher_on_linear_path(load(place.path, size=place.size, conditions=place.conditions, dtype=dtype))


@pytest.fixture
def teacher(place):
    return loaded(place)


def init(teacher, source=None):
    return StudentInit(source or teacher, None, teacher.shape, teacher.num_classes, 0, teacher, shares=True)


def adapted(teacher, kind="velocity_field", spec=RANK2, source=None):
    """A student with adapters."""
    role = Trained(getattr(init(teacher, source), kind)())
    return adapting.one("student", role, {"student": spec}, 0).module.eval()


@torch.no_grad()
def moved(module):
    """The module with all trained weights changed, as after training."""
    for i, each in enumerate(p for p in module.parameters() if p.requires_grad):
        each += 0.05 * normal(*each.shape, seed=i)
    return module


def exported(folder, teacher, student, kind="velocity_field", title="s"):
    name, sampler = KINDS[kind]
    card = StudentCard(
        name=title, recipe="reflow/reflow", spec_digest="", teacher_digest=teacher.digest, teacher="tiny", kind=name,
        sampler=sampler, num_classes=None, null_class=None, shape=teacher.shape, weights="raw", images=1,
        lora={"student": LoraFacts(rank=2, alpha=2.0, targets=[])}, base_digest=teacher.base_digest,
    )  # fmt: skip
    export(student, folder, card, teacher.packaging)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_networks_start_as_the_teacher_on_its_own_weights(place, dtype):
    teacher = loaded(place, dtype)
    cond, base = conditions(teacher, 3), {each.data_ptr() for each in teacher.network.parameters()}
    expected = teacher.field(X, T, cond)
    new = {"velocity_field": [], "flow_map": ["gap"], "acceleration": ["pos_embed.proj"], "critic": ["head"]}
    for kind, inputs in INPUTS.items():
        network = adapted(teacher, kind)
        output = network(*inputs, cond)
        assert torch.equal(output[0] if kind == "critic" else output, expected), kind
        assert {each.data_ptr() for each in network.parameters() if is_shared(each)} == base
        assert not any(each.requires_grad for each in network.parameters() if is_shared(each))
        own = {name: each for name, each in network.named_parameters() if not is_shared(each)}
        assert all(each.dtype == torch.float32 and each.requires_grad for each in own.values())
        others = [name for name in own if "lora_" not in name]
        assert bool(others) == bool(new[kind]) and all(new[kind][0] in name for name in others), others
        full = adapting.one("student", Trained(getattr(init(teacher), kind)()), {"critic": RANK2}, 0).module.eval()
        assert not has_base(full) and all(each.dtype == torch.float32 for each in full.parameters())
        output = full(*inputs, cond)
        assert ((output[0] if kind == "critic" else output) - expected).abs().max() <= (
            0 if dtype == "float32" else 0.03
        )


# --- training ---


class ManyNetworks:
    """A student, a critic, a target copy and a frozen network."""

    sampler = "jump"

    def networks(self, init):
        trained = {"student": Trained(init.flow_map()), "critic": Trained(init.critic())}
        return {**trained, "target": Copy("student", 0.5), "fixed": Frozen(init.velocity_field())}

    def turns(self, step, images):
        yield Turn("critic", self.critic)
        yield Turn("student", self.student)

    def critic(self, nets, batch, ctx):
        t = ctx.draw.uniform("t", batch.data)
        velocity, logit = nets["critic"](batch.data, t, batch.cond)
        return Loss((velocity - batch.data).square().mean() + logit.square().mean())

    def student(self, nets, batch, ctx):
        t, cond = ctx.draw.uniform("t", batch.data), batch.cond
        u, aim = nets["student"](batch.data, t, 0 * t, cond), nets["fixed"](batch.data, t, cond)
        with torch.no_grad():
            target = nets["target"](batch.data, t, t, cond)
        return Loss((u - aim - 0.1 * batch.data).square().mean() + (u - target).square().mean())


class Noise:
    def __init__(self, teacher):
        self.teacher = teacher

    def batch(self, step, rows):
        data = normal(4, *self.teacher.shape, seed=step)[rows.start : rows.stop]
        indices = torch.arange(rows.start, rows.stop) % self.teacher.num_classes
        return Batch(data, None, self.teacher.conditioning.collate(indices))


def train(folder, teacher, *, stop_at=None, precision="fp32", probe=None):
    """Trains three steps, and continues after a stop."""
    stage = TrainStage(
        kind="train", recipe="many", images=12, batch_size=4, precision=precision, ema_half_lives=[4.0],
        lora={"student": RANK2, "critic": LoraSpec(rank=3, alpha=1.0, targets=["to_q", "ff.net.2"])},
        checkpoint=CheckpointSpec(images=4, minutes=None, keep=1),
    )  # fmt: skip
    stop = StopRequest()
    recorder = Recorder(stop, stop_at)
    for attempt in range(2):
        try:
            return engine.train(
                ManyNetworks(), init(teacher), Noise(teacher), stage, seed=0, device=CPU, micro_batch=4,
                paths=StagePaths(folder), progress=recorder, stop=stop, teacher=teacher.network, probe=probe,
            )  # fmt: skip
        except Stopped:
            assert attempt == 0
            stop.signal = None
    raise AssertionError


def saved(folder):
    (newest,) = folder.glob("checkpoints/step-*")
    return {path.stem: load_file(path) for path in newest.glob("*.safetensors")}


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_one_base_in_memory_for_all_networks(place, tmp_path, precision):
    teacher, counted = loaded(place, "bfloat16"), []
    before = {name: each.clone() for name, each in teacher.network.state_dict().items()}
    base = storages([*teacher.network.parameters(), *teacher.network.buffers()])

    def count(roles):
        gc.collect()
        networks = [teacher.network, *roles.networks.values()]
        held = storages(each for network in networks for each in (*network.parameters(), *network.buffers()))
        trained = [each for each in roles.trainables.values() for each in each.live()["parameters"]]
        copies = roles.live()["copies"]
        assert held == base | storages([*trained, *copies])
        assert sum(storages(trained).values()) < 0.2 * sum(base.values())
        counted.append(roles.checkpoint_bytes())

    roles = train(tmp_path, teacher, precision=precision, probe=count).roles
    files = saved(tmp_path)
    assert files.keys() == {
        *(f"{kind}.{name}" for kind in ("network", "optimizer") for name in ("student", "critic")),
        "network.target", "ema.student.4.0",
    }  # fmt: skip
    assert files["network.student"].keys() == files["network.target"].keys() == files["ema.student.4.0"].keys()
    for network, names in (("student", ("lora_", "gap")), ("critic", ("lora_", "head"))):
        assert all(any(part in key for part in names) for key in files[f"network.{network}"])
    size = sum(path.stat().st_size for path in tmp_path.glob("checkpoints/*/*.safetensors"))
    assert counted[-1] == pytest.approx(size, rel=0.4)  # with names, which matter in tiny files
    assert all(torch.equal(each, before[name]) for name, each in teacher.network.state_dict().items())
    changed = [each.any() for name, each in files["network.student"].items() if "lora_B" in name]
    assert sum(changed) >= len(changed) - 1  # a prompt's queries in the last block have no effect
    roles.close()


@pytest.mark.parametrize("stop_at", [4, pytest.param(8, marks=pytest.mark.long)])
def test_a_stop_and_a_resume_change_no_bit(teacher, tmp_path, stop_at):
    train(tmp_path / "one", teacher)
    train(tmp_path / "two", teacher, stop_at=stop_at)
    ours, theirs = saved(tmp_path / "one"), saved(tmp_path / "two")
    assert ours.keys() == theirs.keys()
    for group, tensors in ours.items():
        assert tensors.keys() == theirs[group].keys()
        assert all(torch.equal(each, theirs[group][name]) for name, each in tensors.items())


def test_an_unknown_network_is_named(teacher):
    with pytest.raises(InputError) as caught:
        adapting.trained(ManyNetworks().networks(init(teacher)), {"citric": RANK2}, 0, "many")
    assert str(caught.value) == (
        "lora.citric: recipe 'many' trains no network 'citric'; did you mean 'critic'? valid: critic, student"
    )


# --- folders ---


@torch.no_grad()
@pytest.mark.parametrize("kind", ["velocity_field", "flow_map", pytest.param("acceleration", marks=pytest.mark.long)])
def test_a_student_is_read_again_on_the_weights_of_its_teacher(place, teacher, tmp_path, kind):
    student, cond = moved(adapted(teacher, kind)), conditions(teacher, 3)
    folder = exported(tmp_path / "s", teacher, student, kind)
    card, files = verify(folder), {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"pytorch_lora_weights.safetensors", "comfyui/s.safetensors", "scheduler/scheduler_config.json"} <= files
    weights = {name for name in files if name.endswith("diffusion_pytorch_model.safetensors")}
    assert weights == ({SECOND_TIME} if kind == "flow_map" else set())
    facts = card.lora["student"]
    assert (facts.rank, facts.alpha) == (2, 2.0)
    assert {"to_q", "to_out.0", "add_k_proj"} <= set(facts.targets)
    student.requires_grad_(False)  # torch multiplies matrices that need gradients in another order
    read = load_student(folder, CPU, place, teacher)
    assert torch.equal(read.student(*INPUTS[kind], cond), student(*INPUTS[kind], cond))
    shared = {each.data_ptr() for each in read.network.parameters() if is_shared(each)}
    assert shared == {each.data_ptr() for each in teacher.network.parameters()}
    alone = load_student(folder, CPU, place)
    assert torch.equal(alone.student(*INPUTS[kind], cond), student(*INPUTS[kind], cond))
    assert alone.digest == read.digest != teacher.digest
    again = adapted(teacher, kind, source=read).requires_grad_(False)  # the next stage continues
    assert torch.equal(again(*INPUTS[kind], cond), student(*INPUTS[kind], cond))
    assert {each.data_ptr() for each in again.parameters() if is_shared(each)} == shared
    full = StudentInit(read, None, teacher.shape, teacher.num_classes, 0, teacher)
    merged = getattr(full, kind)().eval()
    assert (merged(*INPUTS[kind], cond) - student(*INPUTS[kind], cond)).abs().max() <= 1e-5
    assert not has_base(merged)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("my student, 2nd", "my-student-2nd"),
        ("{outside}", None),
        ("学生", "student"),
        (".hidden", "hidden"),
        ("x" * 200, "x" * 100),
    ],
)
def test_the_file_for_comfyui_has_a_plain_name(teacher, tmp_path, name, file):
    """Also if the name of the student is a path: no other file is written."""
    victim = tmp_path / "outside.safetensors"
    victim.write_text("x")
    name = name.format(outside=tmp_path / "outside")
    student = adapted(teacher, spec=LoraSpec(rank=1, targets=["transformer_blocks.0.attn.to_q"]))
    folder = exported(tmp_path / "s", teacher, student, title=name)
    (found,) = (folder / "comfyui").iterdir()
    assert found.name == f"{file}.safetensors" if file else found.name.endswith("-outside.safetensors")
    assert victim.read_text() == "x" and {path.name for path in tmp_path.iterdir()} == {"s", victim.name}
    manifest.refuse_files(read(folder) if file else CARD.model_copy(update={"files": record(folder)}), "the card")


def test_another_base_is_refused(place, teacher, tmp_path):
    folder = exported(tmp_path / "s", teacher, moved(adapted(teacher)))
    with pytest.raises(InputError) as caught:
        load_student(folder, CPU)
    assert str(caught.value) == (
        f"{folder} is a LoRA student, which has no weights of its own; give its teacher (tiny) with --teacher"
    )
    other = write(tmp_path / "other", sd3.pipeline(version="3"))
    with pytest.raises(InputError) as caught:
        load_student(folder, CPU, place.model_copy(update={"path": str(other)}))
    ours = teacher.base_digest[:12]
    assert str(caught.value).startswith(
        f"{folder} holds the adapters of another network than the SD3Transformer2DModel from other: it was trained on "
        f"tiny with the weights {ours}, and these are "
    )


# --- starting from a LoRA ---


@torch.no_grad()
def test_adapters_start_from_a_lora_with_another_alpha(teacher, tmp_path):
    student, cond = moved(adapted(teacher)), conditions(teacher, 3)
    folder = exported(tmp_path / "s", teacher, student)
    again = adapted(teacher, spec=LoraSpec(rank=2, alpha=8.0, path=str(folder)))
    assert (again(X, T, cond) - student(X, T, cond)).abs().max() <= 1e-5
    assert {each.scaling["default"] for each in again.modules() if hasattr(each, "scaling")} == {4.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank": 3},
            "lora.student.path={path}: the adapter of transformer_blocks.0.attn.add_k_proj has the rank 2, but "
            "lora.student.rank is 3; set it to 2",
        ),
        (
            {"rank": 2, "targets": ["to_q"]},
            "lora.student.targets: lora.student.path={path} has an adapter in transformer_blocks.0.attn.add_k_proj, "
            "unlike targets; remove targets, so that the layers stay the same",
        ),
    ],
)
def test_a_lora_that_does_not_fit_the_spec_is_refused(teacher, tmp_path, fields, message):
    path = exported(tmp_path / "s", teacher, adapted(teacher)) / "pytorch_lora_weights.safetensors"
    with pytest.raises(InputError) as caught:
        adapted(teacher, spec=LoraSpec(**fields, path=str(path)))
    assert str(caught.value) == message.format(path=path)


def test_a_lora_is_continued_with_the_same_targets(tmp_path):
    """Also where some of the layers that they name have no effect, and therefore no adapter."""
    given = tiny.TINY["qwen"].write(tmp_path)
    teacher = teacher_on_linear_path(load(Path(given.pop("path")), **given))
    spec, block = LoraSpec(rank=2, targets=["to_add_out", "to_q", "txt_mlp.net.2"]), "transformer_blocks.1"
    student = adapted(teacher, spec=spec)
    layers = {name for name, part in native.base_of(student.network).named_modules() if hasattr(part, "lora_A")}
    assert {f"{block}.attn.to_q", "transformer_blocks.0.attn.to_add_out"} <= layers
    assert not {f"{block}.attn.to_add_out", f"{block}.txt_mlp.net.2"} & layers
    lora_start.adapt("student", student, spec, 0)
    with pytest.raises(InputError, match=r"^lora.student.targets: the student that is continued has an adapter in "):
        lora_start.adapt("student", student, LoraSpec(rank=2, targets=["to_q"]), 0)


# --- proofs ---


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        (1.0, [1.0, float("nan")], "relative difference nan"),
        (1.0, [1.0, 1.5], "relative difference 0.5"),
        (float("inf"), [float("inf")] * 2, "relative difference nan"),
        (0.0, [0.0, 1e-3], "relative difference inf"),
        (0.0, [0.0, 0.0], ""),
        (1.0, [1.0, 1 + 1e-6], ""),
    ],
)
def test_each_output_is_compared(teacher, tmp_path, monkeypatch, expected, found, said):
    """Of outputs that another process has computed."""
    monkeypatch.setattr(
        lora_verify,
        "_recorded",
        lambda *given: ({}, {}, {f"transformer:{i}": torch.full((2,), expected) for i in (0, 1)}),
    )
    outputs = {f"diffusers:transformer:{i}": torch.full((2,), each) for i, each in enumerate(found)}
    monkeypatch.setattr(isolated, "run", lambda *given: outputs)
    if not said:
        assert lora_verify.verify(tmp_path, adapted(teacher), teacher.shape, {}).difference <= 1e-5
        return
    with pytest.raises(RunError, match=f"computes other outputs than here, {said} .*; nothing was exported$"):
        lora_verify.verify(tmp_path, adapted(teacher), teacher.shape, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            LoraSpec(rank=2, targets=["to_kq"]),
            "network 'student': the adapter's target 'to_kq' matches no linear or convolution layer (by full name or "
            "last part); did you mean 'to_q'? valid: ",
        ),
        (
            LoraSpec(rank=2, path="nowhere.safetensors"),
            "lora.student.path=nowhere.safetensors does not exist here; download it and give the file or its folder",
        ),
    ],
)
def test_what_is_not_there_is_named(teacher, spec, message):
    with pytest.raises(InputError) as caught:
        adapted(teacher, spec=spec)
    assert str(caught.value).startswith(message)


# --- before a run ---


def test_the_base_is_counted_once_on_the_device(place, teacher, tmp_path):
    """Reflow does not call the teacher, whose weights its student shares; the other recipe does."""
    given = {"path": place.path, "size": place.size, "conditions": place.conditions, "dtype": "bfloat16"}
    made = content(given, images(tmp_path / "data", 3, 16, 16), ["reflow/reflow", "shortcut/shortcut"])
    for name in ("reflow", "shortcut"):
        made["stages"][name] |= {"lora": {"student": {"rank": 2}}}
    found = estimate(preflight.check(checks.check(specfile.validate(made, "spec"), tmp_path)))
    size = 2 * sum(each.numel() for each in teacher.network.parameters())
    assert [each.get("base") for each in found.values()] == [size, None]
    assert [each.get("teacher") for each in found.values()] == [None, size]
