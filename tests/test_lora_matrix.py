"""LoRA students of every recipe, and of every class of teacher: stopped, killed and resumed to the bit, and exported.

One process trains each recipe on Stable Diffusion 3 and XL. Two processes with ZeRO 2 train each recipe on Stable
Diffusion 3, and reflow on every class. The pairs and the students that a recipe starts from are made once per teacher.
"""

import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from latent import CPU, conditions, normal
from latent_runs import BATCH, OF_PIXELS, RECIPES, content, images
from runs import folder_bytes, start, wait_for
from safetensors.torch import load_file

from distill.cli import start as starting
from distill.core.errors import Stopped
from distill.core.stop import StopRequest
from distill.exchange import student_card
from distill.execution import preflight, stages, train_stage
from distill.execution.work import Work
from distill.networks.sharing import is_shared, load_own, own_state
from distill.runs.run_store import RunPaths
from distill.spec import registry, resolved, specfile
from distill.spec.model import LaunchSpec, RunSpec
from distill.students import adapting
from distill.students.init import teacher_on_linear_path
from distill.students.loaded import load_student
from distill.students.native_folder import SECOND_TIME
from distill.teachers import load_teacher
from distill.testing.training import Recorder

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers about itself
]
NEW = ("gap.", "pos_embed.proj.", "conv_in.", "head.")  # trained layers without adapters: second time, velocity, logit
STEPS = 6  # updates of the student
IMAGES = STEPS * BATCH
SHARED = ["pairs", "halves", "reflow"]  # the stages that others start from


@dataclass(frozen=True)
class Prepared:
    """A run in which the stages that others start from are done. spec: its spec, for one process."""

    paths: RunPaths
    spec: RunSpec

    def copied(self, folder: Path, stage: str) -> RunPaths:
        """A copy of the run in which `stage` has not started."""
        paths = RunPaths(shutil.copytree(self.paths.root, folder / self.paths.name))
        for each in (paths.stage(stage).root, paths.student(stage)):
            shutil.rmtree(each, ignore_errors=True)
        return paths


def name_of(recipe: str) -> str:
    return recipe.partition("/")[2]


def prepare(folder: Path, teacher: str, recipes: list[str]) -> Prepared:
    """A run of these recipes, which all train adapters. The first is reflow."""
    torch.set_num_threads(1)
    given, alone = tiny.TINY[teacher], len(recipes) == 1
    of_spec = {} if alone else images(folder / "data", 3, *given.size)
    made = content(given.write(folder), of_spec, recipes)
    for stage in made["stages"].values():
        if stage["kind"] == "train":
            roles = ["student", "critic"] if stage["recipe"] == "score/dmd2" else ["student"]
            stage |= {"lora": dict.fromkeys(roles, {"rank": 2}), "ema_half_lives": [8.0], "images": IMAGES}
            stage |= {"checkpoint": {"images": BATCH, "minutes": None, "keep": STEPS}}
    made["launch"] = {"procs": 2, "zero_stage": 2, "threads": 1, "device": "cpu"}
    source = specfile.SpecSource(specfile.validate(made, "spec"), folder, "spec")
    paths = starting.begin(folder / "runs", source)
    spec = source.spec.model_copy(update={"launch": LaunchSpec(threads=1, device="cpu")})
    stages.run(paths, spec, ["pairs"] if alone else SHARED, StopRequest())
    return Prepared(paths, spec)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("sd3"), "sd3", list(RECIPES))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("sdxl"), "sdxl", list(RECIPES))


def saved(paths: RunPaths, stage: str) -> list[Path]:
    """The checkpoints, one for each update of the student."""
    return sorted(paths.stage(stage).checkpoints.glob("step-*"))


def bits(paths: RunPaths, stage: str) -> dict[str, bytes]:
    """All files of the last checkpoint but the one with the time."""
    assert len(saved(paths, stage)) == STEPS
    files = folder_bytes(saved(paths, stage)[-1])
    del files["meta.json"]
    return files


def exported(paths: RunPaths, stage: str) -> None:
    """Checks the folder of a LoRA student."""
    folder = paths.student(stage)
    card = student_card.verify(folder)
    assert (card.images, card.lora["student"].rank, bool(card.base_digest)) == (IMAGES, 2, True)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")} - {SECOND_TIME}
    assert "pytorch_lora_weights.safetensors" in names and not any("diffusion_pytorch_model" in each for each in names)


def test_all_recipes_are_here():
    assert set(RECIPES) | OF_PIXELS == set(registry.names())


# --- one process ---


@dataclass(frozen=True)
class Until(Work):
    """A stage that is asked to stop after so many images."""

    until: int = 0

    def progress(self, total, unit):
        return Recorder(self.stop, self.until)


def train_until(paths: RunPaths, spec: RunSpec, stage: str, until: int) -> None:
    """Trains a stage from its start, without an export."""
    paths.stage(stage).root.mkdir(parents=True)
    work = Until(paths, resolved.of_run(spec, paths.root), stage, CPU, until=until)
    with pytest.raises(Stopped):
        train_stage.train(work, spec.stages[stage])


def rebuilt(paths: RunPaths, spec: RunSpec, name: str):
    """The trained networks of a recipe with the weights of the last checkpoint; their teacher."""
    stage, asked = spec.stages[name], resolved.of_run(spec, paths.root).recipes[name]
    teacher = teacher_on_linear_path(load_teacher(spec.teacher, CPU))
    source = teacher if stage.init is None else load_student(paths.student(stage.init), CPU, spec.teacher, teacher)
    init = preflight.start(stage, asked, teacher, source, None, 0)
    roles = adapting.trained(asked.module.Recipe(asked.config, teacher).networks(init), stage.lora, 0, stage.recipe)
    started = {role: {key: each.clone() for key, each in own_state(roles[role].module).items()} for role in roles}
    for role, each in roles.items():
        load_own(each.module, load_file(saved(paths, name)[-1] / f"network.{role}.safetensors"))
        each.module.eval().requires_grad_(False)  # torch multiplies matrices that need gradients in another order
    return {role: each.module for role, each in roles.items()}, started, teacher


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("teacher", ["sd3", "sdxl"])
def test_one_process(request, tmp_path, teacher, recipe):
    prepared, name = request.getfixturevalue(teacher), name_of(recipe)
    spec, undisturbed = prepared.spec, prepared.copied(tmp_path / "one", name)
    train_until(undisturbed, spec, name, IMAGES)
    paths = prepared.copied(tmp_path / "two", name)
    train_until(paths, spec, name, BATCH)
    assert len(saved(paths, name)) == 1
    stages.run(paths, spec, [name], StopRequest())
    assert bits(paths, name) == bits(undisturbed, name)
    exported(paths, name)

    networks, before, on_disk = rebuilt(paths, spec, name)
    assert set(networks) == set(spec.stages[name].lora)
    base = {each.data_ptr() for each in on_disk.network.parameters()}
    for role, network in networks.items():
        own = own_state(network)
        assert all("lora_" in key or any(part in key for part in NEW) for key in own)
        assert {each.data_ptr() for each in network.parameters() if is_shared(each)} <= base
        changed = [key for key, each in own.items() if "lora_B" in key and not torch.equal(each, before[role][key])]
        assert len(changed) >= 4, role

    read = load_student(paths.student(name), CPU, spec.teacher)
    x, cond, t = normal(3, *on_disk.shape), conditions(on_disk, 3), torch.tensor([0.2, 0.6, 1.0])
    kind = student_card.read(paths.student(name)).kind
    given = {"velocity": (), "flow_map": (t / 2,), "acceleration": (normal(*x.shape, seed=9),)}[kind]
    with torch.no_grad():
        found, expected = read.student(x, t, *given, cond), networks["student"](x, t, *given, cond)
        assert torch.equal(found, expected)
        assert not torch.equal(found, on_disk.field(x, t, cond))


# --- two processes with ZeRO 2 ---


def ranks(paths: RunPaths, stage: str, log: Path):
    """The processes of `distill stage`, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    env |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return [
        start(
            "stage", str(paths.root), stage, cwd=paths.root, log=log.with_suffix(f".{rank}"),
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def kill_after(paths: RunPaths, stage: str, count: int, log: Path) -> None:
    """Trains a stage, and kills its processes once there are so many checkpoints."""
    both = ranks(paths, stage, log)
    assert wait_for(lambda: len(saved(paths, stage)) >= count, both[0]), both[0].said + both[1].said
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped, none of them can end because it has lost the other
        for each in both:
            each.send_all(number)
    assert [each.end() for each in both] == [-signal.SIGKILL] * 2


def killed_and_resumed(prepared: Prepared, folder: Path, recipe: str) -> None:
    name = name_of(recipe)
    undisturbed, paths = (prepared.copied(folder / each, name) for each in ("one", "two"))
    kill_after(undisturbed, name, STEPS, folder / "one.log")  # while it is exported
    kill_after(paths, name, 1, folder / "two.log")
    assert len(saved(paths, name)) < STEPS
    both = ranks(paths, name, folder / "three.log")
    assert [each.end(300) for each in both] == [0, 0], both[0].said + both[1].said
    assert "bit-identical" not in both[0].said
    assert bits(paths, name) == bits(undisturbed, name)
    exported(paths, name)


@pytest.mark.process
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes(sd3, tmp_path, recipe):
    killed_and_resumed(sd3, tmp_path, recipe)


@pytest.mark.process
@pytest.mark.parametrize("teacher", tiny.TINY)
def test_two_processes_of_every_teacher(tmp_path, teacher):
    killed_and_resumed(prepare(tmp_path, teacher, ["reflow/reflow"]), tmp_path, "reflow/reflow")
