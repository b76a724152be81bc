"""Mistakes of users: exit code 2, one exact message, and nothing is written, except for an index of the data.

To add a case, add a line to FIELDS (an override of the preset `digits`), FILES (the text of a spec), COMMANDS
(arguments) or CHECKPOINTS (a change of a valid teacher's folder). {tmp} is replaced by the current folder.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from commands import command, snapshot
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from runs import distill
from safetensors.torch import load_file, save_file

from distill.cli import start
from distill.core.errors import InputError
from distill.core.versions import DRAWS
from distill.runs.run_store import CREATED, RunPaths, create_run, event_line
from distill.spec import presets, registry, specfile
from distill.spec.resolved import resolve
from distill.spec.schema import NAME_RULE

RECIPES = ", ".join(registry.names())
PRESETS = ", ".join(presets.names())
TOP = "compile, data, launch, name, numerics, seed, stages, teacher"
TEACH, PAIRS = (specfile.load(presets.find("digits")).spec.stages[name] for name in ("teach", "pairs"))
HALVES = ", ".join(f"{half:g}" for half in TEACH.ema_half_lives)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILL_STORE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path.parent / "no-config"))


def refuse(capfd, tmp_path, arguments, said, indexes=0):
    """The command is refused with exactly this message, and leaves every file as it was.

    indexes: how many indexes of data it keeps in a new store, so that the next command need not read the data again.
    """
    before = snapshot(tmp_path)
    done = command(capfd, *arguments)
    assert done.err == f"error: {said.replace('{tmp}', str(tmp_path))}\n"
    assert done.code == 2
    assert done.out == ""
    after = snapshot(tmp_path)
    kept = [name for name in after if Path(name).match("runs/indexes/*.safetensors")]
    assert len(kept) == indexes
    for name in ["runs", "runs/indexes", *kept] if indexes else []:
        del after[name]
    assert after == before, "something was written"


# --- fields: `distill run digits CHANGE...` ---

SOLVERS = (
    "'euler', 'heun', 'ab2', 'ab3', 'dpm_solver_pp_2m', 'dpm_solver_pp_3m', "
    "'ipndm3', 'ipndm4', 'unip3', 'unipc2', 'unipc3', 'auto' or 'bns'"
)
DIGITS = "preset 'digits': "
SPEC = "spec 'digits': "
FIELDS = {
    "unknown key": (
        ["stages.teach.imges=5"],
        "stages.teach.imges=5: stages.teach has no 'imges'; did you mean 'images'? valid: batch_size, checkpoint, "
        "dropout, ema_half_lives, ema_lengths, ema_snapshots, export, guidance, images, init, kind, lora, network, "
        "optimizer, options, pairs, precision, recipe, student, teacher",
    ),
    "unknown section": (
        ["lunch.device=cpu"],
        f"lunch.device=cpu: the spec has no 'lunch'; did you mean 'launch'? valid: {TOP}",
    ),
    "unknown stage": (
        ["stages.reflw.images=5"],
        "stages.reflw.images=5: stages has no 'reflw'; did you mean 'reflow'? valid: evaluate, one_step, pairs, "
        "reflow, teach",
    ),
    "no change": (["images"], "'images' is not a change of the spec; write path=value, like stages.teach.images=64000"),
    "broken value": (["seed=[1"], "seed=[1: not YAML: line 2, column 1: did not find expected ',' or ']'"),
    "wrong type": (["stages.teach.images=many"], DIGITS + "stages.teach.images: 'many' given; must be a whole number"),
    "zero images": (["stages.teach.images=0"], DIGITS + "stages.teach.images: 0 given; must be greater than 0"),
    "half an image": (["stages.teach.images=0.5"], DIGITS + "stages.teach.images: 0.5 given; must be a whole number"),
    "negative rate": (
        ["stages.teach.optimizer.lr=-1"],
        DIGITS + "stages.teach.optimizer.lr: -1 given; must be greater than 0",
    ),
    "endless rate": (
        ["stages.teach.optimizer.lr=.inf"],
        DIGITS + "stages.teach.optimizer.lr: '.inf' given; must be a number",
    ),
    "not a number": (
        ["stages.pairs.guidance_scale=nan"],
        DIGITS + "stages.pairs.guidance_scale: 'nan' given; must be a number",
    ),
    "yes is no truth": (
        ["stages.teach.network.attention=yes"],
        DIGITS + "stages.teach.network.attention: 'yes' given; must be true or false",
    ),
    "unknown kind of data": (
        ["data={kind: digit}"],
        DIGITS + "data: kind is 'digit'; did you mean 'digits'? valid: checkerboard, digits, hf, images, latents, "
        "mnist, none, prompts, tars, videos",
    ),
    "unknown solver": (
        ["stages.pairs.solver=huen"],
        DIGITS + f"stages.pairs.solver: 'huen' given; must be {SOLVERS}",
    ),
    "bad run name": (["name=a/b"], DIGITS + f"name: 'a/b' given; must be {NAME_RULE}"),
    "unknown recipe": (
        ["stages.reflow.recipe=reflow/reflw"],
        SPEC + "stages.reflow.recipe: there is no recipe 'reflow/reflw'; did you mean 'reflow/reflow'? "
        f"valid: {RECIPES}; for a recipe of your own, give its file: ./file.py",
    ),
    "unknown option": (
        ["stages.reflow.options.distanse=l2"],
        SPEC + "stages.reflow.options.distanse: unknown key; did you mean 'distance'? valid: data_weight, "
        "distance, mu, sigma, time_law",
    ),
    "option without effect": (
        ["stages.teach.options.mu=1"],
        SPEC + "stages.teach.options: mu and sigma have no effect with time_law: uniform; remove them or use "
        "logit_normal",
    ),
    "batch not divisible": (
        ["launch.micro_batch=48", "stages={teach: {kind: train, recipe: pretrain/flow_matching, images: 1280, "
         "network: {kind: unet, channels: [8]}}}"],
        SPEC + "launch.micro_batch: 48 does not divide stages.teach.batch_size (128)",
    ),
    "images not divisible": (
        ["stages.teach.images=10000", "stages.teach.batch_size=128"],
        SPEC + "stages.teach.images: 10000 is not a multiple of batch_size (128); nearest: 9984",
    ),
    "unknown half-life": (
        ["stages.teach.export=9000.5"],
        SPEC + f"stages.teach.export: 9000.5 is not one of ema_half_lives and ema_lengths; valid: raw, {HALVES}",
    ),
    "needs data": (
        ["data={kind: none}"],
        SPEC + "stages.teach: pretrain/flow_matching needs data, but the spec has none; e.g. "
        "data: {kind: digits}",
    ),
    "no such pairs": (
        ["stages.reflow.pairs=pears"],
        SPEC + "stages.reflow.pairs: there is no stage 'pears'; did you mean 'pairs'? valid: pairs",
    ),
    "no GPU": (
        ["launch.device=cuda"],
        "launch.device=cuda, but torch sees no GPU here; use launch.device=auto or cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_fields(capfd, tmp_path, monkeypatch, case):
    changes, said = FIELDS[case]
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # also where there is one
    refuse(capfd, tmp_path, ["run", "digits", *changes], said)


def test_several_mistakes_come_at_once(capfd, tmp_path):
    said = "preset 'digits': 2 mistakes\n  seed: -1 given; must be at least 0\n  data: kind is missing; valid: "
    said += "checkerboard, digits, hf, images, latents, mnist, none, prompts, tars, videos"
    refuse(capfd, tmp_path, ["run", "digits", "seed=-1", "data={}"], said)


# --- files: `distill run s.yaml` ---

FILES = {
    "empty": ("", "s.yaml: empty; `distill init` lists the presets to start from"),
    "a list": ("- 1\n", "s.yaml: contains [1], not a spec; a spec has name and stages"),
    "not YAML": ("name: [1\n", "s.yaml: not YAML: line 2, column 1: did not find expected ',' or ']'"),
    "a key twice": ("name: a\nstages: {}\nname: b\n", "s.yaml: line 3: key 'name' appears twice"),
    "a number as key": ("name: a\nstages: {1: {}}\n", "s.yaml: key 1 is not text; write it in quotes"),
    "a number as name": (
        "name: 3\nstages: {}\n",
        "s.yaml: name: 3 given; must be text (in quotes if it looks like a number)",
    ),
    "no stages": ("name: a\n", "s.yaml: stages: missing (the stages by name, in the order in which they run)"),
    "not text": ("name: \0", "s.yaml: not YAML: character 0x0 is not allowed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files(capfd, tmp_path, case):
    text, said = FILES[case]
    (tmp_path / "s.yaml").write_text(text)
    refuse(capfd, tmp_path, ["run", "s.yaml"], said)


def test_a_binary_file_is_no_spec(capfd, tmp_path):
    (tmp_path / "s.yaml").write_bytes(b"\xff\xfe\x00")
    refuse(capfd, tmp_path, ["run", "s.yaml"], "s.yaml: not a text file (UTF-8); a spec is a YAML file")


# --- commands ---

GAUSSIAN = "{kind: gaussian, mean: [0], std: [1]}"
COMMANDS = {
    "no such file": (["run", "nope.yaml"], f"there is no spec nope.yaml; give a YAML file or a preset: {PRESETS}"),
    "no such preset": (
        ["run", "digit"],
        f"there is no spec file and no preset 'digit'; did you mean 'digits'? valid: {PRESETS}",
    ),
    "change instead of a spec": (
        ["run", "seed=1"],
        "the first argument must be a spec or preset, not an override ('seed=1'); e.g. distill run SPEC seed=1",
    ),
    "a folder": (["run", "."], "there is no spec file and no preset '.'; valid: " + PRESETS),
    "nothing to resume": (
        ["run", "digits", "--resume"],
        "there is no run 'digits' in runs to resume; start it without --resume",
    ),
    "no such run": (
        ["show", "one"],
        "there is no run 'one' in runs; the store is empty; `distill run digits` creates a first run",
    ),
    "no such student": (
        ["sample", "one/teach", "--out", "a.png"],
        "there is no student 'one/teach'; give a student folder, or RUN/STAGE of a run in runs",
    ),
    "words for numbers": (
        ["sample", "one", "--classes", "a,b", "--out", "a.png"],
        "--classes a,b: give whole numbers separated by commas, like 1,2,4",
    ),
    "pairs of nothing": (
        ["pairs", "./nowhere", "--out", "p"],
        "teacher.path: there is no folder ./nowhere; give a checkpoint's folder or a hub id (org/name)",
    ),
    "no pairs": (["pairs", "a", "--count", "0", "--out", "p"], "--count: 0 given; must be greater than 0"),
    "half a block": (
        ["pairs", "a", "--shard", "300", "--out", "p"],
        "--shard: 300 is not a multiple of block (256); nearest: 256",
    ),
    "pairs into a file": (
        ["pairs", GAUSSIAN, "--out", __file__],
        f"--out {__file__}: {__file__} is a file; name a folder",
    ),
    "pairs below a file": (
        ["pairs", GAUSSIAN, "--out", f"{__file__}/p"],
        f"--out {__file__}/p: {__file__} is a file; name a folder",
    ),
    "unknown solver": (
        ["pairs", "a", "--solver", "huen", "--out", "p"],
        f"--solver: 'huen' given; must be {SOLVERS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(capfd, tmp_path, case):
    refuse(capfd, tmp_path, *COMMANDS[case])


@pytest.mark.skipif(not Path("/proc/sys").exists(), reason="needs a folder that even root cannot write")
def test_pairs_where_nothing_can_be_written(capfd, tmp_path):
    done = command(capfd, "pairs", GAUSSIAN, "--out", "/proc/sys/pairs")
    assert done.code == 2
    assert done.err.startswith("error: --out /proc/sys/pairs: cannot write there: ")
    assert done.err.endswith("; name another folder\n")


@pytest.mark.parametrize(("seed", "bound"), [("-1", "0"), (str(2**63), str(2**63 - 1))])
def test_a_seed_out_of_range(capfd, tmp_path, seed, bound):
    for arguments in (
        ["pairs", GAUSSIAN, "--out", "p"],
        ["sample", "s", "--out", "a.png"],
        ["eval", "s", "--out", "e"],
    ):
        done = command(capfd, *arguments, f"--seed={seed}")
        assert done.code == 2
        said = " ".join(done.err.replace("│", " ").split())
        assert "Invalid value for '--seed': " in said
        assert bound in said
    assert snapshot(tmp_path) == {}


# --- the store and runs in it ---


def make_run(store, changes=()):
    spec = specfile.load(presets.find("digits"), changes, name="one").spec
    kinds = {name: stage.kind for name, stage in spec.stages.items()}
    files = {
        "spec.yaml": specfile.resolved(spec),
        "env.json": json.dumps({"threads": 1, "draws": DRAWS}),
        CREATED: event_line("created", stages=kinds),
    }
    return create_run(store, "one", files)


def test_the_store_is_a_file(capfd, tmp_path):
    (tmp_path / "runs").touch()
    refuse(capfd, tmp_path, ["run", "digits"], "the store runs (from the default) is a file; name a folder")
    refuse(capfd, tmp_path, ["list", "--store", "runs"], "the store runs (from --store) is a file; name a folder")


def test_the_store_lies_below_a_file(capfd, tmp_path):
    (tmp_path / "file").touch()
    said = "cannot create a run in the store file/runs: Not a directory; choose another with --store"
    refuse(capfd, tmp_path, ["run", "digits", "--store", "file/runs"], said)


@pytest.mark.skipif(not Path("/proc/sys").exists(), reason="needs a folder that even root cannot write")
def test_the_store_cannot_be_written(capfd, tmp_path):
    done = command(capfd, "run", "digits", "--store", "/proc/sys/runs")
    assert done.code == 2
    assert done.err.startswith("error: cannot create a run in the store /proc/sys/runs: ")
    assert done.err.endswith("; choose another with --store\n")


def test_a_run_name_in_use(capfd, tmp_path):
    make_run(tmp_path / "runs")
    said = "there is a run 'one' in {tmp}/runs already; resume it with --resume, or start another with --name OTHER"
    refuse(capfd, tmp_path, ["run", "digits", "--name", "one"], said)


def test_resume_with_a_changed_spec(capfd, tmp_path):
    make_run(tmp_path / "runs")
    said = (
        "run 'one' cannot be resumed with a changed spec (only launch and data.max_unreadable may change):\n"
        f"  seed: 0 -> 3\n  stages.pairs.count: {PAIRS.count} -> 100\n"
        "start another run with --name OTHER, or undo the change"
    )
    changes = ["seed=3", "stages.pairs.count=100"]
    refuse(capfd, tmp_path, ["run", "one", *changes, "--resume"], said)
    refuse(capfd, tmp_path, ["run", "digits", *changes, "--name", "one", "--resume"], said)


@pytest.mark.parametrize(("record", "version", "remedy"), [({}, 1, "0.1.0"), ({"draws": 99}, 99, "newer")])
def test_resume_of_a_run_with_other_random_numbers(capfd, tmp_path, record, version, remedy):
    run = make_run(tmp_path / "runs")
    run.env.write_text(json.dumps({"threads": 1, **record}))
    able = "a newer version of distill" if remedy == "newer" else f"distill {remedy}"
    said = (
        f"run 'one' was started with version {version} of the random numbers for training, but this distill uses "
        f"version {DRAWS} and would train a different student. Resume it with {able}, or start another run"
    )
    refuse(capfd, tmp_path, ["run", "one", "--resume"], said)
    refuse(capfd, tmp_path, ["run", "digits", "--name", "one", "--resume"], said)


def test_only_what_trains_needs_the_same_random_numbers(capfd, tmp_path):
    run = make_run(tmp_path / "runs")
    run.env.write_text(json.dumps({"threads": 1}))
    source = specfile.load(run.spec, [])
    with pytest.raises(
        InputError, match="run 'one' was started with version 1 of the random numbers for training, but"
    ):
        start.go_on(run, source)
    start.go_on(run, source, trains=False)  # pairs, or the version that a submitted run has kept
    said = command(capfd, "stage", str(run.root), "teach")  # as a job does that has waited while distill was upgraded
    assert said.code == 2 and "Resume it with distill 0.1.0, or start another run" in said.err
    run.env.unlink()
    start.go_on(run, source)  # nothing is known: checkpoints say theirs


def test_resume_with_a_changed_recipe(capfd, tmp_path):
    text = (presets.folder().parent / "reflow" / "reflow.py").read_text()
    (tmp_path / "mine.py").write_text(text)
    run = make_run(tmp_path / "runs", ["stages.reflow.recipe=./mine.py"])
    shutil.copy(tmp_path / "mine.py", run.root / "mine.py")
    shutil.copy(run.spec, tmp_path / "s.yaml")
    (tmp_path / "mine.py").write_text(text + "\n")
    said = (
        "run 'one' cannot be resumed with a changed spec (only launch and data.max_unreadable may change):\n"
        "  recipe ./mine.py: its file has changed\nstart another run with --name OTHER, or undo the change"
    )
    refuse(capfd, tmp_path, ["run", "s.yaml", "--resume"], said)


def test_a_finished_run_with_a_relative_path_among_its_options(capfd, tmp_path):
    """The run's spec has it absolute; the file that it came from is still the same spec."""
    (tmp_path / "trunk.safetensors").touch()
    options = "{distance: lpips, lpips_trunk: squeeze, lpips_path: trunk.safetensors}"
    changes = [f"stages.one_step.options={options}", "name=one"]
    source = specfile.load(presets.find("digits"), changes)
    (tmp_path / "s.yaml").write_text(specfile.resolved(source.spec))
    run = make_run(tmp_path / "runs", changes[:1])
    located = resolve(source.spec, tmp_path).spec
    assert located.digest() != source.spec.digest()
    run.spec.write_text(specfile.resolved(located))
    for stage in located.stages:
        run.stage(stage).root.mkdir(parents=True)
        run.stage(stage).done.write_text("{}")
    done = command(capfd, "run", "s.yaml", "--resume")
    assert (done.code, done.out.splitlines()[0], done.err) == (0, "all stages of run 'one' are done", "")


def test_a_run_that_another_process_executes(capfd, tmp_path, monkeypatch):
    from distill.runs import claims

    monkeypatch.setattr(claims, "GRACE", 0.0)
    run = make_run(tmp_path / "runs")
    with claims.claim(run):
        said = f"run 'one' is being executed by process {os.getpid()}; wait for it, or stop it: kill {os.getpid()}"
        refuse(capfd, tmp_path, ["run", "one", "--resume"], said)
        refuse(capfd, tmp_path, ["clean", "one", "--all", "--yes"], said)


def test_export_of_what_is_not_there(capfd, tmp_path):
    run = make_run(tmp_path / "runs")
    run.stage("reflow").root.mkdir(parents=True)
    run.stage("reflow").done.write_text("{}")
    for arguments, said in [
        ([], "run 'one' has 3 train stages; name one: teach, reflow, one_step"),
        (["reflw"], "run 'one' has no train stage 'reflw'; did you mean 'reflow'? valid: one_step, reflow, teach"),
        (["teach", "--half-life", "5"], f"--half-life 5 is not one of the stage's; valid: {HALVES}"),
        (["teach", "--half-life", f"{TEACH.ema_half_lives[0]:g}", "--raw"], "--raw and --half-life cannot be combined"),
        (
            ["teach", "--half-life", "0.5"],
            "--half-life 0.5: half-lives are at least 1 image; for a length give --ema-length",
        ),
        (
            ["teach", "--ema-length", "0.3"],
            "--ema-length 0.3: give a number from 0.01 to 0.28, a fraction of the training",
        ),
        (
            ["teach", "--ema-length", "0.1"],
            "--ema-length 0.1 is not one of ema_lengths (none) of stage 'teach', and it keeps no snapshots to make "
            "others from; set ema_snapshots in the spec of the next run",
        ),
        (
            ["reflow"],
            "the checkpoints of stage 'reflow' were deleted; use its exported student: runs/one/students/reflow",
        ),
        (["teach"], "stage 'teach' of run 'one' has no checkpoint yet; wait for the first one"),
    ]:
        refuse(capfd, tmp_path, ["export", "one", *arguments], said)
    for named in ("runs/one", str(run.root)):  # one rule chooses the stage, however the run is named
        said = "run 'one' has 3 train stages; name one: teach, reflow, one_step"
        refuse(capfd, tmp_path, ["export", named], said)
        refuse(capfd, tmp_path, ["publish", named, "name"], said)


# --- teachers ---


@pytest.fixture(scope="module")
def sound_teacher(tmp_path_factory):
    """A folder of an unconditional network for 1x8x8 images."""
    folder = tmp_path_factory.mktemp("checkpoints") / "teacher"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
            layers_per_block=1, down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    network.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


WEIGHTS = "diffusion_pytorch_model.safetensors"


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def truncated(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def not_finite(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def no_config(folder):
    (folder / "config.json").unlink()


def sound(folder): ...


NO_WEIGHTS = (
    "{tmp}/teacher has no diffusion_pytorch_model.safetensors, but config.json, diffusion_pytorch_model.bin, "
    "scheduler; only safetensors files are loaded. If you trust diffusion_pytorch_model.bin, convert it: distill "
    "convert {tmp}/teacher/diffusion_pytorch_model.bin NEW_FOLDER"
)
CHECKPOINTS = {
    "pickled weights": (pickled, [], NO_WEIGHTS),
    "truncated weights": (
        truncated,
        [],
        "{tmp}/teacher/diffusion_pytorch_model.safetensors is truncated or damaged (Error while deserializing header: "
        "incomplete metadata, file not fully covered); copy or download it again",
    ),
    "weights that are no numbers": (
        not_finite,
        [],
        "{tmp}/teacher/diffusion_pytorch_model.safetensors contains NaN or infinity in conv_in.bias; give valid "
        "weights",
    ),
    "no config": (
        no_config,
        [],
        "teacher.path={tmp}/teacher has neither model_index.json nor config.json, but "
        "diffusion_pytorch_model.safetensors, scheduler; give a diffusers pipeline folder or model folder",
    ),
    "guidance without classes": (
        sound,
        ["stages.pairs.guidance_scale=2"],
        "UNet2DModel from teacher has no class id for the unconditional call, which guidance needs; use "
        "guidance_scale: 1, or set teacher.null_class to that class id",
    ),
    "data of another shape": (
        sound,
        ["data={kind: images, path: pictures, size: 4, channels: 1}", "stages.e={kind: evaluate, students: {r: [1]}}"],
        "data 'pictures' has samples of shape [1, 4, 4], but the teacher (UNet2DModel from teacher) makes "
        "[1, 8, 8]; use data of the teacher's shape (data.size, data.channels) or another teacher",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(capfd, tmp_path, sound_teacher, case):
    harm, changes, said = CHECKPOINTS[case]
    shutil.copytree(sound_teacher, tmp_path / "teacher")
    harm(tmp_path / "teacher")
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.new("L", (4, 4), i).save(tmp_path / "pictures" / f"{i}.png")
    spec = {
        "name": "x",
        "teacher": {"kind": "diffusers", "path": "teacher"},
        "stages": {
            "pairs": {"kind": "pairs", "count": 256},
            "r": {"kind": "train", "recipe": "reflow/reflow", "pairs": "pairs", "images": 128},
        },
    }
    (tmp_path / "s.yaml").write_text(json.dumps(spec))
    refuse(capfd, tmp_path, ["run", "s.yaml", *changes], said, indexes=case == "data of another shape")


def test_pairs_of_another_teacher(capfd, tmp_path):
    arguments = ["--count", "8", "--block", "8", "--shard", "8", "--steps", "1", "--device", "cpu", "--out", "p"]
    assert command(capfd, "pairs", GAUSSIAN, *arguments).code == 0
    before = snapshot(tmp_path)
    done = command(capfd, "pairs", "{kind: gaussian, mean: [1], std: [1]}", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: p contains pairs with other settings: ")
    assert "teacher_digest" in done.err
    assert done.err.endswith("; delete the folder, or use another folder or run name\n")
    assert snapshot(tmp_path) == before


# --- data ---


def test_data_that_cannot_be_read(capfd, tmp_path):
    teach = "stages={teach: {kind: train, recipe: pretrain/flow_matching, images: 128, network: {kind: unet, "
    teach += "channels: [8]}}}"
    images = "data={kind: images, path: pictures, size: 8, channels: 1}"
    said = "data.path=pictures is not a folder; give a folder of images, or one with a folder per class"
    refuse(capfd, tmp_path, ["run", "digits", teach, images], said)
    (tmp_path / "pictures").mkdir()
    said = "data.path={tmp}/pictures contains no images; valid are files like .png, .jpg, .webp, .bmp, .tiff"
    refuse(capfd, tmp_path, ["run", "digits", teach, images], said)


# --- through a real process ---


@pytest.mark.process
def test_as_a_user_sees_it(tmp_path):
    done = distill("run", "digits", "stages.teach.imges=5", cwd=tmp_path, fresh=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {FIELDS['unknown key'][1]}\n"
    done = distill("run", "digits", "data={kind: none}", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: {FIELDS['needs data'][1]}\n"
    assert snapshot(tmp_path) == {}


@pytest.mark.process
def test_numbers_that_are_none_are_refused_by_the_process_of_the_stage(tmp_path):
    """NaN in an image is seen when it is decoded; the run that was made for it goes again."""
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        Image.fromarray(torch.full((8, 8), float("nan") if i == 2 else 0.5).numpy()).save(
            tmp_path / f"pictures/{i}.tiff"
        )
    teach = (
        "stages={teach: {kind: train, recipe: pretrain/flow_matching, images: 8, batch_size: 4, network: {kind: unet, "
    )
    teach += "channels: [8]}}}"
    done = distill("run", "digits", teach, "data={kind: images, path: pictures, size: 8, channels: 1}", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert (
        "2.tiff (row 2) has values from nan to nan; floating-point images must be finite and within 0 to 1"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not RunPaths(tmp_path / "runs" / "digits").root.exists()
