"""`distill init --teacher`: the specs that it writes are valid, and fit the teacher, the recipe and the GPUs."""

from dataclasses import replace
from pathlib import Path

import cached_runs
import checkpoints
import pytest
import test_teacher_ldm
import torch
from commands import command
from diffusers import DDPMScheduler
from latent import normal, write, write_conditions
from latent_runs import OF_PIXELS
from PIL import Image
from test_teacher_flux import embeddings, pipeline

from distill.core.errors import InputError
from distill.execution import drafting, inspecting, preflight
from distill.execution.drafting import DraftRequest
from distill.spec import checks, presets, registry, specfile
from distill.spec.model import CheckpointTeacher, LaunchSpec, PairsStage, TrainStage, VideosData
from distill.training.choice import TrainedMemory, fitting

GB = 10**9
BILLION = 10**9
RECIPES = registry.names()
NO_TEACHER = "pretrain/flow_matching"


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("teachers") / "flux", pipeline(guidance_embeds=True).to(torch.bfloat16))


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> Path:
    """A U-Net with ten classes and a null class."""
    return checkpoints.write(tmp_path_factory.mktemp("teachers") / "unet", checkpoints.unet(11), DDPMScheduler())


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drafted(teacher: Path, recipe: str, *, gpus: int = 1, memory: int = 80 * GB, **facts) -> drafting.Draft:
    """facts: what is changed of what the files of the teacher say."""
    given = CheckpointTeacher(path=str(teacher))
    found = replace(inspecting.inspect(given), **facts)
    return drafting.draft(given, found, DraftRequest(recipe, Path(), gpus, memory))


def trained(draft: drafting.Draft) -> TrainStage:
    return [each for each in draft.spec.stages.values() if isinstance(each, TrainStage)][-1]


@pytest.mark.parametrize("network", ["flux", "unet"])
def test_every_recipe_gives_a_valid_spec_that_reads_back_as_itself(request, tmp_path, network):
    teacher, given = request.getfixturevalue(network), None
    for recipe in RECIPES:
        if (network, recipe) == ("flux", NO_TEACHER):
            continue
        if network == "flux" and recipe in OF_PIXELS:
            with pytest.raises(
                InputError, match="networks of latent-space pipelines cannot get yet; use another recipe"
            ):
                drafted(teacher, recipe)
            continue
        made = drafted(teacher, recipe)
        (tmp_path / "spec.yaml").write_text(presets.annotated(made.spec, tmp_path))
        again = specfile.load(tmp_path / "spec.yaml")
        assert again.spec == made.spec
        found = checks.check(again.spec, tmp_path)
        assert "teacher" in found.needs(list(found.spec.stages)[-2]) or recipe == NO_TEACHER
        stage, given = trained(made), made.spec.teacher
        assert (stage.recipe, stage.precision, stage.export) == (recipe, "bf16", stage.ema_half_lives[0])
        assert stage.optimizer.lr == (2e-4 if recipe == NO_TEACHER else 1e-5)
        assert stage.batch_size == made.spec.launch.world_size * made.spec.launch.micro_batch == 64
    assert given.path == str(teacher)
    sizes = {"flux": ([256, 256], "flux-conditions.safetensors", "bfloat16"), "unet": (None, None, "float32")}
    assert (given.size, given.conditions, given.dtype) == sizes[network]


def test_the_command_writes_the_spec_and_says_what_is_to_do(capfd, flux, tmp_path):
    done = command(capfd, "init", "--teacher", str(flux), "score/dmd2", "--gpus", "2", "--gpu-memory", "40")
    assert (done.code, done.err) == (0, "")
    encode = f"distill encode {flux} PROMPTS.txt --out flux-conditions.safetensors"
    to_do = [
        f"teacher.conditions: flux-conditions.safetensors does not exist yet; make it with: {encode}",
        "data.path: set it to the folder of the real images, whose classes are the rows of teacher.conditions, one for "
        "each prompt",
    ]
    assert done.out.splitlines() == [
        "wrote flux-dmd2.yaml; edit it, then check it with: distill plan flux-dmd2.yaml",
        *(f"to do: {each}" for each in to_do),
    ]
    text = (tmp_path / "flux-dmd2.yaml").read_text()
    head = text[: text.index("\n\n")].replace("\n# ", " ")
    assert head.startswith("# distill run flux-dmd2.yaml score/dmd2 of a FluxTransformer2DModel with 78,288 parameters")
    assert all(f"To do: {each}" in head for each in to_do)
    assert specfile.load(tmp_path / "flux-dmd2.yaml").spec.launch.procs == 2
    done = command(capfd, "init", "--teacher", str(flux), "score/dmd2")
    assert (done.code, done.err) == (2, "error: flux-dmd2.yaml exists already; name another file with --out\n")


def test_a_recipe_of_ones_own_beside_the_spec(capfd, flux, tmp_path):
    (tmp_path / "specs").mkdir()
    mine = (registry.package_folder() / "reflow" / "reflow.py").read_text()
    (tmp_path / "specs" / "mine.py").write_text(mine)
    done = command(capfd, "init", "--teacher", str(flux), "./mine.py", "--out", "specs/s.yaml")
    assert done.code == 0, done.err
    assert specfile.load(tmp_path / "specs" / "s.yaml").spec.stages["mine"].recipe == "./mine.py"


def test_guidance_of_the_pipeline_is_that_of_the_pairs_or_of_the_recipe(flux):
    guidance = inspecting.InspectedGuidance("second call, scale 4", 4.0, None, None)
    made = drafted(flux, "reflow/boss", guidance=guidance)
    pairs = made.spec.stages["pairs"]
    assert isinstance(pairs, PairsStage)
    assert (pairs.guidance_scale, pairs.times) == (4, [1, 0.75, 0.5, 0.25, 0])
    assert made.spec.stages["evaluate"].guidance_scale == 4
    assert made.spec.stages["evaluate"].students == {"boss": [4]}
    assert trained(drafted(flux, "reflow/perflow", guidance=guidance)).options == {"guidance_scale": 4}
    assert trained(drafted(flux, "reflow/perflow")).options == {}


def test_slimflow_trains_a_smaller_network_of_pixels_first(unet, flux):
    stages = drafted(unet, "reflow/slimflow").spec.stages
    assert list(stages) == ["pairs", "anneal", "slimflow", "evaluate"]
    assert stages["anneal"].network.channels == [64, 128] and stages["slimflow"].init == "anneal"
    assert list(drafted(flux, "reflow/slimflow").spec.stages) == ["pairs", "slimflow", "evaluate"]


def test_a_large_network_recomputes_activations_in_small_micro_batches(flux):
    made = drafted(flux, "reflow/reflow", gpus=8, **of_size(12 * BILLION))
    launch = made.spec.launch
    assert (launch.activation_checkpointing, launch.micro_batch, trained(made).batch_size) == (True, 1, 64)
    assert (launch.procs, launch.nodes, launch.slurm.gpus_per_node) == (8, 1, 8)
    launch = drafted(flux, "reflow/reflow", gpus=16).spec.launch
    assert (launch.procs, launch.nodes, launch.micro_batch) == (8, 2, 16)
    with pytest.raises(InputError, match="^--gpus 12: give up to 8, or a multiple of 8"):
        drafted(flux, "reflow/reflow", gpus=12)


def of_size(parameters: int) -> dict:
    """The facts of a network of this size, in float32 and in 100 tensors."""
    networks = [inspecting.InspectedNetwork("transformer", parameters, {"F32": 100})]
    return {"networks": networks, "sizes": [parameters // 100] * 100}


@pytest.mark.parametrize(
    ("recipe", "billions", "gpus", "expected", "bytes_per_parameter"),
    [
        ("reflow/reflow", 1, 1, (None, False, False), 24),  # weights, gradients, moments (2), average, teacher: 4 each
        ("reflow/reflow", 3, 1, (1, False, True), 16),  # the moments and master weights are in the memory of the host
        ("reflow/reflow", 3, 8, (1, False, False), 4 + 4 + (4 + 12 + 4) / 8),
        ("reflow/reflow", 5, 8, (1, False, False), 4 + 4 + (4 + 12 + 4) / 8),
        ("reflow/reflow", 12, 8, (3, True, False), (4 + 4 + 12 + 4 + 4) / 8),
        ("shortcut/shortcut", 1, 1, (None, False, False), 28),  # with a copy of the student
        ("score/dmd2", 1, 1, (None, False, False), 36),  # a critic: weights and moments; one turn has gradients
        ("reflow/caf", 1, 1, (None, False, False), 44),  # two networks in one
    ],
)
def test_the_division_among_gpus_is_the_fastest_that_fits(flux, recipe, billions, gpus, expected, bytes_per_parameter):
    made = drafted(flux, recipe, gpus=gpus, **of_size(billions * BILLION))
    launch = made.spec.launch
    assert (launch.zero_stage, launch.divide_teacher, launch.offload_optimizer) == expected
    assert made.bytes == pytest.approx(bytes_per_parameter * billions * BILLION)
    assert not any(each.startswith("memory: ") for each in made.to_do)


def test_what_does_not_fit_is_said(flux):
    made = drafted(flux, "reflow/reflow", **of_size(12 * BILLION))
    assert made.to_do[-1] == (
        "memory: weights, gradients, optimizer and averages need 192.0 GB on each GPU, and a GPU has 80.0 GB; use more "
        "GPUs (--gpus), or larger ones (--gpu-memory)"
    )


def test_of_ways_that_do_not_fit_the_one_with_the_least_memory_is_taken():
    needed = TrainedMemory({"student": [1000]}, {}, [], averages=1, frozen=4000)
    launch, size = fitting(LaunchSpec(procs=2), needed, 0)
    assert (launch.offload_optimizer, launch.divide_teacher) == (True, True)
    assert size == 4 * (500 + 1000 + 500 + 500) + 2000  # a small parameter is whole beside its parts


def test_recipes_that_do_not_fit_the_teacher(capfd, flux):
    def refused(said: str, *words: str) -> None:
        done = command(capfd, "init", *words)
        assert done.code == 2
        assert done.err.startswith(f"error: {said}"), done.err

    refused(
        f"{NO_TEACHER} trains a new network on images, without a teacher, so it has no use for {flux}; name",
        "--teacher", str(flux), NO_TEACHER,
    )  # fmt: skip
    refused("there is no recipe 'reflow'; did you mean 'reflow/reflow'? valid: ", "--teacher", str(flux), "reflow")
    refused(f"--teacher {flux}: name a recipe too; valid: consistency/consistency, ", "--teacher", str(flux))
    refused("--gpus has no effect without --teacher; leave it out", "digits", "--gpus", "2")
    with pytest.raises(InputError, match="needs real data, and this teacher makes videos, .* reflow/boss, reflow/caf"):
        drafted(flux, "score/dmd2", size=[9, 16, 16])
    assert list(drafted(flux, "reflow/reflow", size=[9, 16, 16]).spec.stages) == ["pairs", "reflow", "evaluate"]
    said = "which have captions and no classes: its text encoders must encode the captions, but "
    for encoders, why in (({}, "it has none"), ({"text_encoder": "T5"}, "teacher.conditions is given")):
        with pytest.raises(InputError, match=f"{said}{why}; use a recipe that trains on pairs of the teacher: reflow/"):
            drafted(flux, "score/dmd2", size=[9, 16, 16], text_encoders=encoders, to_set={})


def test_a_teacher_that_makes_videos_learns_from_videos_with_captions(flux, tmp_path):
    given = {"text_encoders": {"text_encoder": "T5"}, "size": [9, 16, 32]}
    made = drafted(flux, "score/dmd2", **given)
    assert list(made.spec.stages) == ["cache", "dmd2", "evaluate"]
    assert made.spec.data == VideosData(kind="videos", path="VIDEOS", size=[9, 16, 32], captions=True)
    assert made.to_do == [
        "data.path: set it to the folder of the real videos, with a caption for each: NAME.txt beside the folder NAME "
        "of its frames"
    ]
    (tmp_path / "spec.yaml").write_text(presets.annotated(made.spec, tmp_path))
    assert specfile.load(tmp_path / "spec.yaml").spec == made.spec


def test_latents_of_a_u_net_are_of_images(tmp_path):
    made = drafted(write(tmp_path / "ldm", test_teacher_ldm.pipeline(4)), "score/dmd2")
    assert (made.spec.data.size, made.spec.data.channels) == (16, 3)
    assert made.spec.teacher.size is None  # its config gives the size


def test_a_scheduler_that_is_not_known_is_to_do(unet, tmp_path):
    folder = checkpoints.write(tmp_path / "unet", checkpoints.unet(), DDPMScheduler())
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (said,) = drafted(folder, "reflow/reflow").to_do
    assert said.startswith(f"teacher.scheduler: teacher.path={folder} has no scheduler config")


def test_prompts_of_a_teacher_with_text_encoders_are_cached(tmp_path):
    teacher = cached_runs.pipeline(tmp_path / "sd3")
    made = drafted(teacher, "score/dmd2")
    assert list(made.spec.stages) == ["cache", "dmd2", "evaluate"]
    assert (made.spec.data.captions, made.spec.teacher.conditions) == (True, None)
    assert made.to_do == [
        "data.path: set it to the folder of the real images, with a caption for each: NAME.txt beside NAME.jpg, or a "
        "metadata.jsonl"
    ]
    made = drafted(teacher, "reflow/reflow")
    assert list(made.spec.stages) == ["cache", "pairs", "reflow", "evaluate"]
    assert (made.spec.data.kind, made.spec.data.path, made.spec.teacher.conditions) == ("prompts", "PROMPTS.txt", None)
    assert made.to_do == [
        "data.path: set it to a file with prompts, one on each line; PROMPTS.txt is a placeholder"
    ]  # fmt: skip
    text = presets.annotated(made.spec, tmp_path)
    assert "# images or prompts that are encoded at once" in text
    (tmp_path / "spec.yaml").write_text(text)
    assert specfile.load(tmp_path / "spec.yaml").spec == made.spec


@pytest.mark.long
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != NO_TEACHER and name not in OF_PIXELS])
def test_the_spec_passes_the_checks_of_plan_once_it_is_complete(flux, tmp_path, recipe):
    """With conditions, and with images of each class."""
    rows, null = embeddings(2), {name: each[:1] for name, each in embeddings(5).items()}
    conditions = write_conditions(tmp_path / "c.safetensors", rows, null)
    for label in range(3):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for number in range(12):
            pixels = normal(16, 16, 3, seed=number).clamp(-1, 1).add(1).mul(127).byte()
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / str(label) / f"{number}.png")
    made = drafted(flux, recipe)
    changes = {"teacher": made.spec.teacher.model_copy(update={"conditions": conditions, "size": [16, 16]})}
    if made.spec.data.kind == "images":
        changes["data"] = made.spec.data.model_copy(update={"path": str(tmp_path / "images"), "size": 16})
    resolved = checks.check(made.spec.model_copy(update=changes), tmp_path)
    assert list(preflight.check(resolved).built) == [
        name for name, each in made.spec.stages.items() if each.kind == "train"
    ]
