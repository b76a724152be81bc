"""Runs with a cache stage, from a folder of captioned images to a student, without encoders in between."""

import gc
import json
import os
import shutil
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import cached_runs
import pytest
import torch
from cached_runs import CAPTIONS, LEARN, SOLVE, UNIQUE, content
from commands import command
from diffusers import AutoencoderKL
from PIL import Image
from programs.forked import Forked
from runs import distill, folder_bytes, kill, start, wait_for
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from distill import caches
from distill.core import file_checksums
from distill.core.atomic import hidden
from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.core.versions import DRAWS
from distill.data import timing
from distill.execution import caching, forecast, preflight, sources, stages
from distill.execution.caching import Caching
from distill.flow.draws import Rows
from distill.pairs import PairSet, PairSource
from distill.runs import cached
from distill.runs.run_store import CREATED, RunPaths, create_run, event_line, read_events
from distill.spec import checks, resolved, specfile
from distill.teachers import encoding

CPU = torch.device("cpu")
ENCODERS = (AutoencoderKL, CLIPTextModelWithProjection, T5EncoderModel)
MIXED = {**LEARN, "recipe": "reflow/reflow", "pairs": {"solve": 0.5, "ahead": 0.5}}
STAGES = {
    "solve": SOLVE,
    "ahead": {**SOLVE, "paths": "forward"},
    "flow": MIXED,
    "few": {**LEARN, "recipe": "shortcut/shortcut"},
}
MORE = {
    "along": {**SOLVE, "paths": "trajectories", "times": [1, 0.5, 0], "guidance_scale": 2.0},
    "between": {**SOLVE, "paths": "segments", "times": [1, 0.5, 0]},
    "again": {**SOLVE, "teacher": "flow"},
}
MEASURE = {"kind": "evaluate", "students": {"few": [1]}, "samples": 16, "block": 8, "fine_steps": 1, "baselines": [],
           "teacher_steps": []}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a teacher and images."""
    made = tmp_path_factory.mktemp("cached")
    cached_runs.pipeline(made / "sd3")
    cached_runs.images(made / "images")
    torch.set_num_threads(1)
    return made


def spec_of(folder: Path, given: dict[str, object] | None = None, **fields):
    data = {"kind": "images", "path": str(folder / "images"), "size": 16, "captions": True}
    return checks.check(specfile.validate(content(folder / "sd3", data, given or STAGES, **fields), "spec"), folder)


def begun(store: Path, found: resolved.Resolved) -> RunPaths:
    run = RunPaths(store / found.spec.name)
    run.root.mkdir(parents=True)
    run.spec.write_text(specfile.resolved(found.spec))
    return run


@pytest.fixture(scope="module")
def made(folder):
    """(a run of all stages, its spec, the classes of encoders that were in memory, or called, in each train stage)."""
    found = spec_of(folder, {**STAGES, **MORE})
    preflight.check(found)
    run, seen = begun(folder / "runs", found), {}
    for name in found.spec.stages:
        gc.collect()
        alive: set[str] = set()

        def look(module, inputs, alive=alive):
            if not alive:
                every = [each for each in gc.get_objects() if isinstance(each, torch.nn.Module)]
                alive |= {type(each).__name__ for each in every}
            alive.add(type(module).__name__)

        hook = register_module_forward_pre_hook(look)
        try:
            stages.run(run, found.spec, [name], StopRequest())
        finally:
            hook.remove()
        seen[name] = alive & {each.__name__ for each in ENCODERS}
    return run, found, seen


def opened(made) -> caches.CachedLatents:
    run, found, _ = made
    return caches.open_latents(cached.of_run(run, found.spec)["latents"].place(run.root.parent), found.spec.seed)


def test_encoders_are_in_memory_only_while_the_cache_is_made(made):
    assert made[2] == {"cache": {each.__name__ for each in ENCODERS}, **{name: set() for name in {**STAGES, **MORE}}}


def test_a_run_notes_what_it_has_cached(made):
    run, found, _ = made
    done = json.loads(run.stage("cache").done.read_text())
    assert [(each["what"], each["count"], each["files"]) for each in done["caches"]] == [
        ("latents", len(CAPTIONS), 3), ("prompts", len(UNIQUE), 2)
    ]  # fmt: skip
    store = run.root.parent
    used = cached.of_run(run, found.spec)
    assert used["latents"].digest == opened(made).digest
    assert sorted(path.name for path in (store / "caches").iterdir()) == sorted(
        each.place(store).name for each in used.values()
    )
    progress = [event for event in read_events(run, ["progress"]) if event["label"] == "cache"]
    assert {(event["total"], event["unit"]) for event in progress} == {(6, "images"), (4, "prompts")}
    meta = next(run.stage("few").checkpoints.glob("*/meta.json"))
    inputs = json.loads(meta.read_text())["settings"]["inputs"]
    assert (inputs["data"], inputs["prompts"]) == (used["latents"].digest, used["prompts"].digest)
    assert "autoencoder" not in inputs


def test_pairs_hold_the_numbers_of_prompts_and_start_from_cached_latents(made):
    run, found, _ = made
    inputs = sources.load(run, found, "few", CPU)
    for name in ("solve", "ahead"):
        pairs = PairSet.open(run.stage(name).pairs, inputs.teacher.digest)
        assert pairs.manifest.num_classes == len(UNIQUE)
        batch = PairSource(pairs, 8, 0).batch(0, Rows(0, 8, 8))
        labels = batch.cond["class_labels"].tolist()
        if name == "solve":
            assert sorted(labels) == sorted(i % 4 for i in range(8))
            continue
        assert pairs.manifest.data_digest == opened(made).digest
        latents = [opened(made).items(epoch, range(6)) for epoch in (0, 1)]
        every = torch.cat([each.samples for each in latents]).flatten(1)
        near = (batch.pairs.data.flatten(1)[:, None] - every).abs().amax(2).argmin(1)
        assert (batch.pairs.data.flatten(1) - every[near]).abs().max() == 0
        assert labels == [UNIQUE.index(CAPTIONS[i % 6]) for i in near.tolist()]


@pytest.mark.parametrize("name", MORE)
def test_other_kinds_of_paths_hold_them_too(made, name):
    run, found, _ = made
    pairs = PairSet.open(run.stage(name).pairs, sources.load(run, found, name, CPU).teacher.digest)
    batch = PairSource(pairs, 8, 0).batch(0, Rows(0, 8, 8))
    assert (pairs.manifest.num_classes, pairs.manifest.guidance_scale) == (4, 2.0 if name == "along" else 1.0)
    labels = batch.cond["class_labels"].tolist()
    assert sorted(labels) == [0, 0, 1, 1, 2, 2, 3, 3] or name == "between"
    if name == "between":
        assert pairs.manifest.data_digest == opened(made).digest
        assert set(labels) == set(range(4))


def test_a_stage_refuses_another_cache_than_it_was_made_with(made, tmp_path):
    run, found, _ = made
    shutil.copytree(run.root.parent, tmp_path / "runs")
    copy = RunPaths(tmp_path / "runs" / run.name)
    done = json.loads(run.stage("cache").done.read_text())
    for i, what in enumerate(("latents", "prompts")):
        other = json.loads(json.dumps(done))
        other["caches"][i]["digest"] = "0" * 64
        copy.stage("cache").done.write_text(json.dumps(other))
        with pytest.raises(InputError) as error:
            sources.load(copy, found, "few", CPU)
        assert f"caches/{what}-" in str(error.value)
        digest = done["caches"][i]["digest"]
        assert f"has the digest {digest[:12]}, but run 'run' was started with 000000000000" in str(error.value)


def test_prompts_alone_are_cached_for_pairs(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nred\n")
    data = {"kind": "prompts", "path": str(tmp_path / "prompts.txt")}
    found = checks.check(specfile.validate(content(folder / "sd3", data, {"solve": SOLVE}), "spec"), tmp_path)
    preflight.check(found)
    run = begun(tmp_path / "runs", found)
    stages.run(run, found.spec, ["cache", "solve"], StopRequest())
    (used,) = cached.of_run(run, found.spec).values()
    assert (used.what, used.count, used.files) == ("prompts", 3, 2)
    pairs = PairSet.open(run.stage("solve").pairs, None)
    assert sorted(PairSource(pairs, 8, 0).batch(0, Rows(0, 8, 8)).cond["class_labels"].tolist()) == [
        0, 0, 0, 1, 1, 1, 2, 2
    ]  # fmt: skip


def test_what_caches_take_is_predicted_from_a_block(made):
    run, found, _ = made
    cost = forecast.forecast(preflight.check(found), here=True)["cache"]
    latents, prompts = (each.place(run.root.parent) for each in cached.of_run(run, found.spec).values())
    moments, row = 2 * 4 * 8 * 8 * 4, 4 * ((77 + 256) * 32 + 24)
    assert cost.bytes == 6 * moments + 4 * row
    stored = sum(path.stat().st_size for each in (latents, prompts) for path in each.glob("shard-*.safetensors"))
    assert cost.bytes < stored < cost.bytes + 5 * 1000, "the headers of five shards"
    assert 0 < cost.seconds < 10


def test_a_stage_refuses_latents_of_another_autoencoder(made, folder, tmp_path):
    run, found, _ = made
    vae = shutil.copytree(folder / "sd3" / "vae", tmp_path / "vae")
    path = vae / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    teacher = found.spec.teacher.model_copy(update={"vae": str(vae)})
    other = replace(found, spec=found.spec.model_copy(update={"teacher": teacher}))
    with pytest.raises(
        InputError, match=r"/caches/latents-\w+ has latents of another autoencoder \(digest \w{12}\) than"
    ):
        sources.load(run, other, "few", CPU)


def test_a_damaged_shard_is_made_again_to_the_same_bytes(made, tmp_path):
    run, found, _ = made
    shutil.copytree(run.root.parent, tmp_path / "runs")
    before, copy = folder_bytes(tmp_path / "runs" / "caches"), RunPaths(tmp_path / "runs" / run.name)
    for shard in (tmp_path / "runs" / "caches").glob("*/shard-00001.safetensors"):
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    copy.stage("cache").done.unlink()
    stages.run(copy, found.spec, ["cache"], StopRequest())
    assert folder_bytes(tmp_path / "runs" / "caches") == before
    assert json.loads(copy.stage("cache").done.read_text()) == json.loads(run.stage("cache").done.read_text())
    warnings = [event["text"] for event in read_events(copy, ["warning"]) if event["label"] == "cache"]
    assert [text.rpartition("/")[2] for text in warnings] == [
        "shard-00001.safetensors is damaged (checksum mismatch); regenerating it"
    ] * 2  # fmt: skip


def test_another_run_uses_the_same_caches_without_an_encoder(made, monkeypatch):
    run, found, _ = made
    other = begun(run.root.parent, spec_of(found.base, name="other"))
    monkeypatch.setattr(encoding, "load", None)
    monkeypatch.setattr(AutoencoderKL, "encode", None)
    stages.run(other, found.spec, ["cache"], StopRequest())
    assert cached.of_run(other, found.spec) == cached.of_run(run, found.spec)


def test_the_files_of_encoders_are_read_by_one_process_for_all(made, folder, monkeypatch):
    run, found, _ = made
    for path in folder.glob("sd3/*/*.safetensors"):
        os.utime(path, (0, 0))  # those that have just been written are not trusted
    read, opened = [], file_checksums.open_regular
    monkeypatch.setattr(file_checksums, "LARGE", 1000)
    monkeypatch.setattr(
        file_checksums, "open_regular", lambda path, **more: read.append(path.parent.name) or opened(path, **more)
    )
    large = ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"]
    for name, expected in (("first", large), ("second", [])):
        monkeypatch.setattr(file_checksums, "_KNOWN", {})  # another process
        read.clear()
        stages.run(begun(run.root.parent, spec_of(folder, name=name)), found.spec, ["cache"], StopRequest())
        assert sorted(each for each in read if each in large) == expected


def test_parts_of_two_processes_are_the_same_bytes(made, tmp_path):
    run, found, _ = made
    caching = Caching.of(found, tmp_path, tmp_path)
    of_another_run = [hidden(caching.place(each) / "shard-00000.safetensors") for each in caching.planned]
    for path in of_another_run:  # which makes the same caches now, and is writing the same shard
        path.parent.mkdir(parents=True)
        path.touch()
    for part in ((1, 2), (0, 2)):
        assert [caching.is_complete(each) for each in caching.planned] == [False, False]
        caching.make_all(CPU, StopRequest(), part)
    for path in of_another_run:
        path.unlink()
    theirs, ours = (folder_bytes(store / "caches") for store in (run.root.parent, tmp_path))
    assert {name: each for name, each in ours.items() if "shard-" not in name or ".safetensors" in name} == theirs


def test_before_the_cache_exists_its_prompts_are_counted(folder, monkeypatch):
    """The checks call no encoder, and know the number of prompts; without a cache stage, they ask for one."""
    monkeypatch.setattr(encoding, "load", None)
    found = spec_of(folder)
    ready = preflight.check(found)
    assert (ready.teacher.num_classes, ready.teacher.null_class is not None) == (len(UNIQUE), False)
    assert sorted(ready.built) == ["few", "flow"]
    without = {name: each for name, each in found.spec.stages.items() if name != "cache"}
    bare = resolved.resolve(found.spec.model_copy(update={"stages": without}), folder)
    with pytest.raises(InputError) as error:
        preflight.check(bare)
    assert "the spec must have a cache stage, if its data has captions or prompts" in str(error.value)


def test_what_the_autoencoder_cannot_give_is_found_before_a_run(folder):
    stages = {"cache": {**cached_runs.CACHE, "latents": "pixels"}, **STAGES}
    data = {"kind": "images", "path": str(folder / "images"), "size": 16, "captions": True}
    spec = specfile.validate({**content(folder / "sd3", data, {}), "stages": stages}, "spec")
    with pytest.raises(InputError, match="latents: pixels given, but the teacher works on latents; valid: moments, s"):
        preflight.check(checks.check(spec, folder))


def test_what_the_autoencoder_cannot_give_is_said_with_its_place_in_the_spec(folder, tmp_path):
    stages = {"store": {**cached_runs.CACHE, "latents": "pixels"}, **STAGES}
    data = {"kind": "images", "path": str(folder / "images"), "size": 16, "captions": True}
    given = {"name": "run", "teacher": {"path": str(folder / "sd3"), "size": [16, 16]}, "data": data, "stages": stages}
    found = checks.check(specfile.validate(given, "spec"), folder)
    for call in (partial(preflight.check, found), partial(Caching.of, found, tmp_path, None)):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == (
            "stages.store.latents: pixels given, but the teacher works on latents; valid: moments, sample, mean"
        )


def test_the_cost_of_images_of_several_sizes_is_measured_with_those_of_one(folder, tmp_path):
    data = {**cached_runs.images(tmp_path / "images"), "buckets": {"step": 8, "max_aspect": 4.0}}
    for i in (1, 4):
        Image.new("RGB", (32, 8)).save(tmp_path / "images" / f"{i}.png")
    learn = {"flow": {**LEARN, "recipe": "shortcut/shortcut"}}
    spec = specfile.validate(content(folder / "sd3", data, learn), "spec")
    seconds, count = caching.measure(checks.check(spec, folder), CPU)
    assert seconds > 0
    assert count > 6 * 2 * 16 * 2 * 2 * 4  # mean and log-variance of 16 x 2 x 2 latents, and the embeddings


def test_encoders_that_are_missing_are_found_before_a_run(folder, tmp_path):
    shutil.copytree(folder / "sd3", tmp_path / "sd3")
    shutil.rmtree(tmp_path / "sd3" / "text_encoder_2")
    data = {"kind": "images", "path": str(folder / "images"), "size": 16, "captions": True}
    found = checks.check(specfile.validate(content(tmp_path / "sd3", data, STAGES), "spec"), tmp_path)
    with pytest.raises(InputError, match="has no folder text_encoder_2; copy or download the whole pipeline"):
        preflight.check(found)


# --- commands ---


def write_spec(folder: Path, here: Path, given: dict[str, object] | None = None, **fields) -> None:
    (here / "run.yaml").write_text(json.dumps(spec_of(folder, given, **fields).spec.model_dump(mode="json")))


def test_the_command_makes_caches_by_parts_and_verifies_them(folder, made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_spec(folder, tmp_path)
    run, found, _ = made
    used = {what: each.folder for what, each in cached.of_run(run, found.spec).items()}
    refused = command(capfd, "cache", "run.yaml", "--verify")
    assert (refused.code, refused.err) == (
        2, f"error: runs/{used['latents']} is not complete; make it first, without --verify\n"
    )  # fmt: skip
    unmade = command(capfd, "doctor", "--data", "run.yaml")
    assert (unmade.code, unmade.err) == (
        2,
        "error: --data: the images of spec 'run' are not cached yet; make the cache first, with: distill cache "
        "run.yaml\n",
    )
    first = command(capfd, "cache", "run.yaml", "--part", "1/2")
    assert first.code == 0, first.err
    assert first.out.splitlines() == [
        f"latents: 6 images in runs/{used['latents']}: not there yet",
        f"prompts: 4 prompts in runs/{used['prompts']}: not there yet",
        "this part is complete; run the other parts too",
    ]
    second = command(capfd, "cache", "run.yaml", "--part", "2/2")
    assert f"latents: 6 images in runs/{used['latents']}: 2 of 3 shards are there, " in second.out
    assert second.out.endswith(
        "the caches are complete; use them with: distill run run.yaml, or distill submit run.yaml\n"
    )
    monkeypatch.setattr(timing, "_measured", lambda read, count: [read(0), 0.5][1])
    measured = json.loads(command(capfd, "doctor", "--data", "run.yaml", "--json").out)
    name = Path(found.spec.data.path).name
    assert {each["what"]: each["found"] for each in measured}["reading data"] == (
        f"a cached sample of '{name}': 5e+02 ms, 2 a second"
    )
    verified = command(capfd, "cache", "run.yaml", "--verify")
    assert verified.out.splitlines()[-2:] == [
        "latents: all 3 shards have their checksums", "prompts: all 2 shards have their checksums"
    ]  # fmt: skip
    with open(f"runs/{used['prompts']}/shard-00000.safetensors", "r+b") as file:  # noqa: PTH123
        file.seek(-1, 2)
        file.write(b"\x7f")
    damaged = command(capfd, "cache", "run.yaml", "--verify")
    assert damaged.code == 2
    assert "shard-00000.safetensors is damaged (checksum mismatch)" in damaged.err


def test_the_command_restores_the_caches_of_a_run(made, tmp_path, monkeypatch, capfd):
    run, found, _ = made
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.root.parent, tmp_path / "runs")
    before = folder_bytes(tmp_path / "runs" / "caches")
    shutil.rmtree(tmp_path / "runs" / "caches")
    gone = command(capfd, "sample", "run/few", "--out", "x.png", "--count", "1", "--steps", "1")
    assert (gone.code, gone.err.partition(";")[2]) == (
        1, f" make them again with: distill cache {tmp_path}/runs/run\n"
    )  # fmt: skip
    changed = command(capfd, "cache", "run", "stages.cache.shard=4")
    assert (changed.code, changed.err) == (
        2, "error: 'stages.cache.shard=4' has no effect: 'run' is a run, whose spec cannot change; leave it out\n"
    )  # fmt: skip
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    restored = command(capfd, "cache", "../runs/run")
    assert restored.out.endswith("the caches are complete; go on with: distill run ../runs/run --resume\n")
    assert not Path("runs").exists(), "they are in the store of the run"
    monkeypatch.chdir(tmp_path)
    assert folder_bytes(tmp_path / "runs" / "caches") == before
    assert command(capfd, "sample", "run/few", "--out", "x.png", "--count", "1", "--steps", "1").code == 0
    spec = tmp_path / "runs" / "run" / "spec.yaml"
    (tmp_path / "other").mkdir()
    shutil.copytree(found.spec.data.path, tmp_path / "other" / "images")
    (tmp_path / "other" / "images" / "0.txt").write_text("another caption")
    spec.write_text(spec.read_text().replace(found.spec.data.path, str(tmp_path / "other" / "images")))
    refused = command(capfd, "cache", "run")
    assert refused.code == 2 and "they have changed. Restore them, or start another run" in refused.err
    assert folder_bytes(tmp_path / "runs" / "caches") == before, "nothing is made for a run that could not use it"


REFUSED = {
    "no cache stage": (
        ["digits"],
        "spec 'digits' has no cache stage; add one as the first of its stages, like cache: ",
    ),
    "a part that does not exist": (["digits", "--part", "3/2"], "--part 3/2: must be I/N with I from 1 to N, like 1/4"),
    "a part to verify": (["digits", "--part", "1/2", "--verify"], "--part has no effect with --verify; leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_command_refuses(case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments, said = REFUSED[case]
    found = command(capfd, "cache", *arguments)
    assert found.code == 2
    assert said in found.err


def test_what_needs_the_caches_says_how_to_make_them(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_spec(folder, tmp_path, {"solve": SOLVE})
    found = command(capfd, "pairs", "run.yaml", "--check")
    assert (found.code, found.err) == (
        2,
        "error: stage 'solve' waits for the cache stage 'cache', which is not done yet; make it with: distill run "
        "run.yaml\n",
    )
    found = command(capfd, "plan", "run.yaml", "--measure")
    assert found.code == 2
    assert "error: measurements need the prompts of the cache stage 'cache', which are not complete in " in found.err
    assert found.err.endswith("; make them first with: distill cache run.yaml\n")


# --- processes ---


def ranks(run: RunPaths, *names: str) -> list[Forked]:
    """Two ranks that compute stages of a run, as `distill run` starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start("stage", str(run.root), *names, cwd=run.root, log=run.root / f"{rank}.log",
              env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.process
def test_two_ranks_that_are_killed_go_on_to_the_bytes_of_one_process(folder, made, tmp_path):
    """And a student is trained and measured from what they have made."""
    alone, found = made[0], spec_of(folder, {"few": STAGES["few"], "measure": MEASURE}, launch={"procs": 2})
    run = RunPaths(tmp_path / "runs" / "run")
    kinds = {name: each.kind for name, each in found.spec.stages.items()}
    files = {
        "spec.yaml": specfile.resolved(found.spec), "env.json": json.dumps({"threads": 1, "draws": DRAWS}),
        CREATED: event_line("created", digest=found.spec.digest(), stages=kinds),
    }  # fmt: skip
    create_run(run.root.parent, run.name, files)
    caches_of = run.root.parent / "caches"
    both = ranks(run, "cache")
    wait_for(lambda: list(caches_of.glob("latents-*/shard-*.json")), both[0])
    for each in both:
        kill(each)
    assert not run.stage("cache").done.exists()
    kept = {path: path.stat().st_ino for path in caches_of.glob("*/shard-*.safetensors")
            if path.with_suffix(".json").exists()}  # fmt: skip
    assert kept
    both = ranks(run, "cache", "few")
    assert [each.end() for each in both] == [0, 0], both[0].said + both[1].said
    assert {path: path.stat().st_ino for path in kept} == kept, "what was complete is not made again"
    assert folder_bytes(caches_of) == folder_bytes(alone.root.parent / "caches"), "records of shards are gone, too"
    done = distill("stage", str(run.root), "measure", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((run.stage("measure").root / "results.json").read_text())
    assert {row["network"] for row in results["rows"]} == {"teacher", "few"}
    assert folder_bytes(run.stage("cache").root).keys() == {"caches.json", "done.json"}


@pytest.mark.process
@pytest.mark.long
def test_the_command_starts_all_processes(folder, made, tmp_path):
    write_spec(folder, tmp_path, launch={"procs": 2, "threads": 1})
    done = distill("cache", "run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours = folder_bytes(tmp_path / "runs" / "caches")
    assert {name: each for name, each in ours.items() if "shard-" not in name or ".safetensors" in name} == (
        folder_bytes(made[0].root.parent / "caches")
    )
