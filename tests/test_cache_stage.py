"""A cache stage in a spec: what it stores, who waits for it, who makes it, and the mistakes in it."""

import json
import os
from pathlib import Path

import pytest
import torch
from commands import command

from distill.core.errors import InputError, RunError
from distill.data.arrays import ArrayData
from distill.data.source import Bucket
from distill.execution import caching
from distill.launch import local, queue
from distill.plans import planning
from distill.runs import cached, jobs
from distill.runs.run_store import RunPaths
from distill.spec import cacheuse, checks, specfile

IMAGES = {"kind": "images", "path": "IMAGES", "size": 8, "captions": True}
SOLVE = {"kind": "pairs", "count": 8, "block": 4, "shard": 4, "steps": 2}
LEARN = {"kind": "train", "recipe": "shortcut/shortcut", "images": 8, "batch_size": 4}
MEASURE = {"kind": "evaluate", "students": {}, "samples": 16, "block": 8}
KEYS = {"latents": "a" * 64, "prompts": "b" * 64}


def spec(cache: dict[str, object] | None = None, stages: dict[str, object] | None = None, **fields):
    """The spec of a teacher in the current folder, on captioned images."""
    Path("TEACHER").mkdir(exist_ok=True)
    made = {"cache": {"kind": "cache", **(cache or {})}, **(stages or {"learn": LEARN, "measure": MEASURE})}
    content = {"name": "x", "teacher": {"path": "TEACHER"}, "data": IMAGES, "stages": made, **fields}
    return specfile.validate({name: each for name, each in content.items() if each is not None}, "f")


def check(*args, **fields):
    return checks.check(spec(*args, **fields), Path())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


GAUSSIAN = {"kind": "gaussian", "mean": [0.0], "std": [1.0]}
MISTAKES = {
    "no data": ({}, {"data": None}, "stages.cache: a cache needs data with images or prompts, but the spec has none"),
    "digits": ({}, {"data": {"kind": "digits"}}, "data of kind digits is kept in memory, so a cache has no effect"),
    "a second one": (
        {},
        {"stages": {"more": {"kind": "cache"}, "learn": LEARN}},
        "stages.more: 'cache' is a cache stage already; a spec can have one, so remove one of them",
    ),
    "random crops": (
        {},
        {"data": {**IMAGES, "crop": "random"}},
        "stages.cache: data.crop=random does not work with a cache, which stores one crop of each image",
    ),
    "prompts of classes": (
        {"prompts": True},
        {"data": {**IMAGES, "captions": False}},
        "stages.cache.prompts: true given, but the data has no prompts; e.g. data: {kind: images",
    ),
    "a negative prompt of classes": (
        {"negative": "blurry"},
        {"data": {**IMAGES, "captions": False}},
        "stages.cache.negative: has no effect, because no embeddings of prompts are stored; remove it",
    ),
    "encoders of embeddings that are given": (
        {"encoder_dtype": "bfloat16"},
        {"teacher": {"path": "TEACHER", "conditions": "c.safetensors"}},
        "stages.cache.encoder_dtype: has no effect, because no embeddings of prompts are stored; remove it",
    ),
    "prompts that are given": (
        {"prompts": True},
        {"teacher": {"path": "TEACHER", "conditions": "c.safetensors"}},
        "stages.cache.prompts: true given, but teacher.conditions=c.safetensors has the embeddings already",
    ),
    "prompts without a teacher": (
        {"prompts": True},
        {"teacher": None, "stages": {"learn": {**LEARN, "recipe": "pretrain/flow_matching"}}},
        "stages.cache.prompts: true given, but the spec has no teacher whose text encoders embed prompts",
    ),
    "latents that nobody reads": (
        {"latents": "mean"},
        {"stages": {"solve": SOLVE, "measure": MEASURE}},
        "stages.cache.latents: mean given, but no stage trains on images, and evaluations read the images themselves",
    ),
    "nothing to store": (
        {},
        {"data": {**IMAGES, "captions": False}, "stages": {"solve": SOLVE, "measure": MEASURE}},
        "stages.cache: has no effect, because the data has no prompts and no stage trains on images",
    ),
    "half a block": ({"block": 24}, {}, "stages.cache.shard: 1024 is not a multiple of block (24); nearest: 1032"),
    "a teacher of vectors": ({}, {"teacher": GAUSSIAN}, "data: kind images has images, the gaussian teacher makes"),
    "more processes than train": (
        {},
        {"stages": {"solve": SOLVE, "measure": MEASURE}, "launch": {"procs": 2, "zero_stage": 1}},
        "launch.zero_stage: 1 given, but it applies to training, and no stage trains; remove it",
    ),
    "parts of one job": (
        {},
        {"launch": {"slurm": {"pairs_jobs": 2, "one_job": True}}},
        "launch.slurm.pairs_jobs: 2 given, but one_job runs all stages in one job",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_cache_that_cannot_work_or_has_no_effect_is_refused(case):
    cache, fields, said = MISTAKES[case]
    with pytest.raises(InputError) as error:
        check(cache, **fields)
    assert said in str(error.value)


def test_it_is_the_first_stage():
    with pytest.raises(InputError, match="stages.cache: must come before 'solve', because other stages read what it "):
        checks.check(specfile.validate({**spec().model_dump(mode="json"), "stages": {
            "solve": SOLVE, "cache": {"kind": "cache"}, "learn": LEARN}}, "f"), Path())  # fmt: skip


def test_what_is_stored_depends_on_who_reads_it():
    found = check()
    assert (cacheuse.stores_latents(found), cacheuse.may_store_prompts(found.spec)) == (True, True)
    assert [name for name in found.spec.stages if cacheuse.reads_latents(found, name)] == ["learn"]
    found = check(stages={"solve": SOLVE, "measure": MEASURE})
    assert (cacheuse.stores_latents(found), cacheuse.may_store_prompts(found.spec)) == (False, True)
    found = check({"prompts": False}, stages={"solve": {**SOLVE, "paths": "forward"}})
    assert (cacheuse.stores_latents(found), cacheuse.may_store_prompts(found.spec)) == (True, False)


def test_all_other_stages_wait_for_it_and_all_processes_make_it():
    given = spec(launch={"procs": 2, "slurm": {"pairs_jobs": 3}}, stages={"solve": SOLVE, "learn": LEARN, "e": MEASURE})
    planned = queue.plans(RunPaths(Path("x").absolute()), given, list(given.stages))
    assert {plan.name: (plan.parts, plan.after, plan.described(given.launch)[2]) for plan in planned} == {
        "cache.parts": ([0, 1, 2], [], "1 x 1"),
        "cache": (None, ["cache.parts"], "1 x 2"),
        "solve.parts": ([0, 1], ["cache"], "1 x 1"),
        "solve": (None, ["solve.parts"], "1 x 2"),
        "learn": (None, ["cache"], "1 x 2"),
        "e": (None, ["cache"], "1 x 2"),
    }
    assert local.groups(list(given.stages), given.cache) == [["cache"], ["solve", "learn", "e"]]
    assert [checks.needed(given, name) for name in given.stages] == [[], ["cache"], ["cache"], ["cache"]]


def test_a_plan_says_what_is_stored_and_who_waits():
    steps = planning.steps(check(launch={"procs": 2}))
    assert [step.needs for step in steps] == [
        ["data", "the spec's teacher"], ["cache", "data", "the spec's teacher"], ["cache", "the spec's teacher"]
    ]  # fmt: skip
    assert steps[0].what == "images as latents and embeddings of prompts"
    assert steps[0].work == "all of the data that is not in the store yet, by 2 processes"
    assert steps[0].writes == ["STORE/caches/latents-*/", "STORE/caches/prompts-*/"]


def test_only_parts_that_are_not_made_are_queued(tmp_path):
    run, given = RunPaths(tmp_path / "x"), spec(launch={"slurm": {"pairs_jobs": 3}})
    (run.stage("cache").root).mkdir(parents=True)
    latents = cached.UsedCache("latents", cached.folder_of("latents", KEYS["latents"]), 40, 5)
    cached.note(run, "cache", [latents])
    assert cached.noted(run, "cache") == [latents]
    assert jobs.parts_to_make(run, given, "cache") == [0, 1, 2]
    latents.place(tmp_path).mkdir(parents=True)
    for number in (0, 1, 3, 4):
        (latents.place(tmp_path) / f"shard-{number:05}.json").touch()
    assert jobs.parts_to_make(run, given, "cache") == [2]
    listed = {f"shard-{number:05}.safetensors": {"size": 1} for number in range(5)}
    (latents.place(tmp_path) / "manifest.json").write_text(json.dumps({"shards": listed}))
    assert jobs.parts_to_make(run, given, "cache") == []


def test_a_run_knows_its_caches_and_misses_them(tmp_path):
    run, given = RunPaths(tmp_path / "x"), spec()
    assert cached.of_run(run, given) == {}, "it is not made yet"
    assert cached.with_conditions(given, run) == given
    made = [cached.UsedCache(what, cached.folder_of(what, key), 3, 1, "d" * 64) for what, key in KEYS.items()]
    run.stage("cache").root.mkdir(parents=True)
    run.stage("cache").done.write_text(json.dumps({"stage": "cache", "kind": "cache", **cached.as_json(made)}))
    for each in made:
        each.place(tmp_path).mkdir(parents=True)
    assert cached.of_run(run, given) == {each.what: each for each in made}
    assert cached.with_conditions(given, run).teacher.conditions == str(tmp_path / "caches" / f"prompts-{'b' * 64}")
    with pytest.raises(InputError) as error:
        cached.refuse_other(run, made[0], "e" * 64)
    assert "has the digest eeeeeeeeeeee, but run 'x' was started with dddddddddddd" in str(error.value)
    made[1].place(tmp_path).rmdir()
    with pytest.raises(RunError) as missing:
        cached.of_run(run, given)
    assert (
        f"the prompts of run 'x' are no longer in {made[1].place(tmp_path)}; make them again with: distill cache "
        in (str(missing.value))
    )


@pytest.mark.parametrize("folder", ["caches/latents-x", "../latents-" + "a" * 64, "/caches/latents-" + "a" * 64])
def test_a_run_from_elsewhere_cannot_name_other_folders(tmp_path, folder):
    run = RunPaths(tmp_path / "x")
    run.stage("cache").root.mkdir(parents=True)
    content = {"caches": [{"what": "latents", "folder": folder, "count": 1, "files": 1, "digest": ""}]}
    run.stage("cache").done.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"done.json cannot be used: caches.0.folder: "):
        cached.of_run(run, spec())


def test_caches_that_no_run_uses_are_deleted_after_a_day(tmp_path, capfd):
    store = tmp_path / "runs"
    run = RunPaths(store / "x")
    used, old, new = (store / "caches" / f"latents-{letter * 64}" for letter in "abc")
    for folder in (used, old, new):
        folder.mkdir(parents=True)
        (folder / "shard-00000.safetensors").write_bytes(bytes(1000))
    for folder in (used, old):
        os.utime(folder, (0, 0))
    run.stage("cache").root.mkdir(parents=True)
    run.spec.write_text(specfile.resolved(spec()))
    cached.note(run, "cache", [cached.UsedCache("latents", f"caches/{used.name}", 3, 1)])
    assert cached.unused(store) == [old]
    found = command(capfd, "clean", "--caches")
    assert found.out == f"    1.0 kB  runs/caches/{old.name}\n1.0 kB would be freed; nothing was deleted: add --yes\n"
    assert command(capfd, "clean", "--caches", "--yes").out.endswith("deleted 1 folder, 1.0 kB\n")
    assert sorted(path.name for path in (store / "caches").iterdir()) == [used.name, new.name]
    assert command(capfd, "clean", "--caches").out == (
        "nothing to delete in runs/caches: every cache is used by a run, or was used within the last day\n"
    )
    refused = command(capfd, "clean", "x", "--caches")
    assert (refused.code, refused.err) == (
        2, "error: --caches applies to the whole store; leave RUN and the other options out\n"
    )  # fmt: skip
    os.utime(new, (0, 0))
    teacher = {"path": "TEACHER", "conditions": str(new)}
    run.spec.write_text(specfile.resolved(spec(teacher=teacher)))
    assert cached.unused(store) == [], "a spec can name a folder of embeddings"
    run.spec.write_text(specfile.resolved(spec()))
    assert cached.unused(store) == [new]
    run.stage("cache").caches.write_text("{}")
    assert cached.unused(store) == [], "a run whose caches are not known may need any"


def test_too_many_files_are_refused_before_anything_is_encoded():
    class Many(ArrayData):
        buckets = (Bucket((3, 8, 8), range(150_000)), Bucket((3, 8, 16), range(0)), Bucket((3, 16, 8), range(150_001)))

        def __len__(self):
            return 300_001

    data = Many("x", torch.zeros(1, 3, 8, 8), None, None)
    given = {"learn": {**LEARN, "recipe": "pretrain/flow_matching", "network": {"kind": "unet", "channels": [8]}}}
    plain = {**IMAGES, "captions": False}
    found = check({"block": 2, "shard": 2, "prompts_shard": 2}, given, teacher=None, data=plain)
    with pytest.raises(InputError) as error:
        caching.check(found, data, None, takes_prompts=False)
    assert str(error.value) == (
        "stages.cache.shard: 300,001 images in files of 2 are 150,001 files, more than 100,000; set shard to 4 or more"
    )
    caching.check(check({"block": 2, "shard": 4, "prompts_shard": 2}, given, teacher=None, data=plain), data, None,
                  takes_prompts=False)  # fmt: skip
