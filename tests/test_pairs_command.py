"""The command `distill pairs`: for a teacher, and for a spec whose shards are made by several processes."""

import json

import pytest
from commands import command, snapshot
from runs import distill, folder_bytes, make_run, start

SPEC = """
name: many
teacher: {kind: mixture, means: [[-2, 0], [2, 0]], std: 0.3}
stages:
  pairs: {kind: pairs, count: 200, block: 16, shard: 32, steps: 4}
  real: {kind: pairs, count: 64, block: 16, shard: 32, steps: 8, paths: forward, solver: euler}
  reflow:
    {kind: train, recipe: reflow/reflow, pairs: {pairs: 0.75, real: 0.25}, network: {kind: mlp}, images: 256,
     batch_size: 64}
"""
GAUSSIAN = "{kind: gaussian, mean: [0.5, 0.0], std: [0.5, 1.0]}"
OPTIMAL = [GAUSSIAN, "--out", "p", "--paths", "trajectories", "--optimal-times"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


@pytest.mark.process
def test_processes_that_share_a_spec_make_the_files_of_one(capfd, here):
    one = command(capfd, "pairs", "spec.yaml", "--stage", "pairs", "--name", "one")
    assert one.code == 0, one.err
    assert "the set of 200 pairs is complete; run the remaining stages with: distill run runs/one --resume" in one.out
    arguments = ["pairs", "spec.yaml", "--stage", "pairs", "--shards"]
    shares = [start(*arguments, f"{i}/2", cwd=here, log=here / f"share-{i}.log") for i in (1, 2)]
    assert [each.end() for each in shares] == [0, 0], [each.said for each in shares]
    assert any("the set of 200 pairs is complete" in each.said for each in shares)
    alone, together = (folder_bytes(here / "runs" / name / "stages" / "pairs" / "pairs") for name in ("one", "many"))
    assert alone == {name: together[name] for name in alone} and len(alone) == 8
    done = distill("run", "runs/many", "--resume", cwd=here)  # takes them as they are, and goes on
    assert done.returncode == 0, done.stderr
    after = folder_bytes(here / "runs" / "many" / "stages" / "pairs" / "pairs")
    assert alone == after
    assert (here / "runs" / "many" / "students" / "reflow" / "distill.json").is_file()


@pytest.mark.long
@pytest.mark.process
def test_ranks_that_share_the_checksums_refuse_a_shard_that_one_of_them_finds_damaged(capfd, here):
    for stage in ("pairs", "real"):
        made = command(capfd, "pairs", "spec.yaml", "--stage", stage)
        assert made.code == 0, made.err
    damaged = here / "runs" / "many" / "stages" / "pairs" / "pairs" / "shard-00001.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    run = distill("run", "runs/many", "--resume", "launch.procs=2", cwd=here)
    assert run.returncode == 2, run.stderr
    assert "rank 1: error: " in run.stderr
    assert "shard-00001.safetensors is damaged (checksum mismatch); delete damaged and unknown files" in run.stderr
    assert not list((here / "runs" / "many" / "stages" / "reflow").glob("checkpoints/*"))


def test_the_accuracy_of_a_solver_is_told(capfd, here):
    done = command(capfd, "pairs", GAUSSIAN, "--check", "--solver", "euler", "--steps", "4", "--count", "500")
    assert (done.code, snapshot(here)) == (0, snapshot(here))
    assert "with 4 steps, the endpoints of 500 pairs differ by " in done.out and " steps are enough" in done.out
    assert not (here / "runs").exists()
    told = command(capfd, "pairs", "spec.yaml", "--check", "--stage", "real")
    assert told.code == 0 and "with 8 steps, the endpoints of 64 pairs" in told.out
    assert not (here / "runs").exists(), "none is made for it"


def test_a_teacher_in_yaml_may_be_longer_than_the_name_of_a_file(capfd, here):
    long = f"{{kind: mixture, means: {[[i, -i] for i in range(40)]}, std: 0.3}}"
    assert len(long) > 255
    done = command(capfd, "pairs", long, "--out", "p", "--count", "16")
    assert done.code == 0 and "the set of 16 pairs is complete" in done.out, done.err


def test_forward_pairs_of_a_teacher_say_what_their_noise_is(capfd, here):
    options = ["--paths", "forward", "--count", "512", "--steps", "32", "--out", "pairs"]
    done = command(capfd, "pairs", GAUSSIAN, *options)
    assert done.code == 0, done.err
    assert "the noise has mean " in done.out and "the set of 512 pairs is complete" in done.out
    parts = [
        command(capfd, "pairs", GAUSSIAN, *options[:-1], "parts", "--shard", "256", "--shards", f"{i}/2")
        for i in (1, 2)
    ]
    assert "1 of 2 shards are complete" in parts[0].out and "the set of 512 pairs is complete" in parts[1].out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GAUSSIAN], "--out is missing; give the folder to write the pairs to"),
        (
            [GAUSSIAN, "seed=5", "--out", "p", "--stage", "x"],
            "--stage, seed=5 cannot be used with a teacher ('{kind: gaussian, mean: [0.5, 0.0]",
        ),
        ([GAUSSIAN, "--out", "p", "--shards", "0/2"], "--shards 0/2: must be I/N with I from 1 to N, like 1/4"),
        ([GAUSSIAN, "--out", "p", "--shards", "3/2"], "--shards 3/2: must be I/N with I"),
        ([GAUSSIAN, "--out", "p", "--shards", "4/4"], "--shards 4/4: the set has 3 shards, so there is none for"),
        (
            ["spec.yaml", "--stage", "real", "--shards", "3/3"],
            "--shards 3/3: the set has 2 shards, so there is none for",
        ),
        ([GAUSSIAN, "--out", "p", "--shards", "²/2"], "--shards ²/2: must be I/N with I"),
        ([GAUSSIAN, "--out", "p", "--count", f"{10**18}"], "--count: 1000000000000000000 given; must be at most"),
        ([GAUSSIAN, "--out", "p", "--steps", f"{10**9}"], "--steps: 1000000000 given; must be at most 10,000"),
        (["spec.yaml", "--stage", "pairs", f"stages.pairs.count={10**18}"], "count: 1000000000000000000 given"),
        (["spec.yaml", "--stage", "pairs", "stages.pairs.count=1e9"], "stages.pairs.shard: 1,000,000,000 pairs in fil"),
        ([GAUSSIAN, "--out", "p", "--times", "1,x"], "--times 1,x: give numbers separated by commas, like"),
        ([GAUSSIAN, "--out", "p", "--times", "1,0"], "--times: has no effect with paths: backward, which store no"),
        (
            [GAUSSIAN, "--out", "p", "--paths", "trajectories"],
            "--times: None given; trajectories need times decreasing",
        ),
        (
            [GAUSSIAN, "--out", "p", "--paths", "trajectories", "--times", "1,0.3,0"],
            "--times: 0.3 given; times must be multiples of 1/steps = 1/16, the step size of the solver",
        ),
        (
            [GAUSSIAN, "--out", "p", "--paths", "forward", "--solver", "dpm_solver_pp_2m"],
            "--solver: dpm_solver_pp_2m solves only from noise to data; with paths: forward, use euler, heun, ab2 or "
            "ab3",
        ),
        (
            [GAUSSIAN, "--out", "p", "--optimal-times", "2"],
            "--optimal-times: does not work with paths: backward; remove it, or",
        ),
        ([*OPTIMAL, "20"], "--optimal-times: 20 is more than the 16 steps of the solver; increase steps"),
        ([*OPTIMAL, "2", "--times", "1,0"], "--times: cannot be given together with optimal_times; remove one"),
        (
            [GAUSSIAN, "--out", "p", "--paths", "forward", "--store-noise"],
            "--store-noise: has no effect with paths: forward",
        ),
        (
            [GAUSSIAN, "--out", "p", "--paths", "forward", "--data", "digits"],
            "data 'digits' has samples of shape [1, 8, 8], but the teacher",
        ),
        ([GAUSSIAN, "--out", "p", "--data", "digits"], "--data has no effect on backward paths, which start from"),
        (["spec.yaml"], "run 'many' has 2 pairs stages; name one with --stage: pairs, real"),
        (["spec.yaml", "--stage", "pairz"], "--stage pairz: run 'many' has no such pairs stage; did you mean 'pairs'?"),
        (["spec.yaml", "--count", "5"], "--count cannot be used with a SPEC; override its values instead, like"),
        (["spec.yaml", "--seed", "0", "--guidance-scale", "0"], "--guidance-scale, --seed cannot be used with a SPEC"),
        ([GAUSSIAN, "--check", "--out", "p", "--shards", "1/2"], "--shards, --out cannot be used with --check, which"),
        (["digits", "--check"], "which is not trained yet; train it with: distill run digits"),
        (["mixture-2d", "stages.pairs.paths=segments"], "stages.pairs.times: None given; segments need times"),
    ],
)
def test_what_cannot_be_is_said(capfd, here, arguments, message):
    done = command(capfd, "pairs", *arguments)
    assert done.code == 2 and message in done.err, done.err
    assert not (here / "p").exists()


def test_a_teacher_that_is_not_trained_yet_is_named(capfd, here):
    done = command(capfd, "pairs", "digits", "--shards", "1/2")
    assert done.code == 2
    said = "the teacher of stage 'pairs' is the student of stage 'teach', which is not trained yet; train it with: "
    assert f"{said}distill run" in done.err


WRONG = {
    "pairs: {pairs: 0.75, real: 0.25}": [
        (
            "pairs: {pairs: 0.75, real: 0.5}",
            "stages.reflow.pairs: {pairs: 0.75, real: 0.5} given; the fractions must be greater than 0 and add",
        ),
        ("pairs: {pairs: 0.75, none: 0.25}", "stages.reflow.pairs: there is no stage 'none'"),
    ],
    "paths: forward, solver: euler": [
        (
            "paths: segments, times: [1, 0.5, 0]",
            "'real' has segments of paths, but reflow/reflow needs whole paths from noise",
        ),
        ("guidance_scale: 2.0", "the pairs stages have different guidance scales; use the same"),
    ],
    "{kind: mixture, means: [[-2, 0], [2, 0]], std: 0.3}": [
        ("{kind: diffusers, path: teacher}", "stages.real.paths: forward needs real data, but the spec has none"),
    ],
}


@pytest.mark.parametrize(("old", "new", "message"), [(old, *case) for old, cases in WRONG.items() for case in cases])
def test_pair_sets_that_do_not_fit_are_refused(capfd, here, old, new, message):
    (here / "teacher").mkdir()
    assert old in SPEC
    (here / "spec.yaml").write_text(SPEC.replace(old, new))
    done = command(capfd, "plan", "spec.yaml")
    assert done.code == 2 and message in done.err, done.err


def test_a_plan_counts_the_calls_of_every_kind_of_paths(capfd, here):
    found = json.loads(command(capfd, "plan", "spec.yaml", "--json").out)["stages"]
    assert [step["network_calls"] for step in found] == [200 * 7, 64 * 8, None]
    assert found[2]["needs"] == ["pairs", "real", "the spec's teacher"]


def test_a_plan_says_what_a_run_needs_where_its_name_is_taken(capfd, here):
    said = "(a run with this name already exists; use --name OTHER for a new one, or --resume)"
    assert said not in command(capfd, "plan", "spec.yaml").out
    make_run(here / "runs", "many")
    assert said in command(capfd, "plan", "spec.yaml").out
