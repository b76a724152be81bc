"""`launch.micro_batch: auto`: which size is chosen if memory is short, that it is kept, and that the numbers equal
those with the same size given explicitly. Memory is short because the recipe requests more than any machine has.
"""

import json

import pytest
from runs import distill, folder_bytes

from distill.core.errors import InputError
from distill.core.stop import StopRequest
from distill.execution import stages
from distill.plans import planning
from distill.runs.run_store import RunPaths
from distill.spec import checks, presets, specfile
from distill.spec.resolved import resolve
from distill.training import micro_batch

SPEC = {
    "name": "one",
    "teacher": {"kind": "gaussian", "mean": [1.0, 2.0], "std": [0.5, 0.25]},
    "stages": {
        "pairs": {"kind": "pairs", "count": 96, "block": 32, "shard": 64, "steps": 4},
        "straight": {
            "kind": "train", "recipe": "./mine.py", "network": {"kind": "mlp", "width": 8, "depth": 1},
            "pairs": "pairs", "images": 96, "batch_size": 32, "ema_half_lives": [32],
        },
    },
    "launch": {"device": "cpu", "threads": 1},
}  # fmt: skip
FULL = """
        import os, torch
        if len(batch.cond.get("class_labels", batch.pairs.data)) > [{limits}][int(os.environ.get("RANK", 0))]:
            torch.empty(1 << 50)
"""


def write_recipe(folder, *limits):
    """Reflow, with the memory for so many rows on each rank."""
    text = (presets.folder().parent / "reflow" / "reflow.py").read_text()
    head = "    def loss(self, nets: Nets, batch: Batch, ctx: Context) -> Loss:\n"
    assert head in text
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(text.replace(head, head + FULL.format(limits=", ".join(map(str, limits))), 1))


def train(folder, limit, micro):
    """The run, its stages computed in this process."""
    write_recipe(folder, limit)
    launch = {**SPEC["launch"], "micro_batch": micro}
    spec = specfile.validate({**SPEC, "launch": launch}, "s")
    stages.run(RunPaths(folder), spec, list(spec.stages), StopRequest())
    return RunPaths(folder)


def weights(run):
    saved = sorted(run.stage("straight").checkpoints.glob("step-*/*.safetensors"))
    return {path.relative_to(run.root): path.read_bytes() for path in saved}


@pytest.mark.parametrize(
    ("share", "together", "sizes"),
    [(32, 1, [32, 16, 8, 4, 2, 1]), (24, 4, [24, 12, 4]), (30, 1, [30, 15, 6, 3, 1]), (7, 1, [7, 1]), (64, 64, [64])],
)
def test_candidates_share_a_batch_evenly_in_whole_blocks(share, together, sizes):
    assert micro_batch.candidates(share, together) == sizes


def test_the_largest_that_fits_is_chosen_and_kept(tmp_path):
    run = train(tmp_path / "auto", 8, "auto")
    assert json.loads(run.stage("straight").micro_batch.read_text()) == {"micro_batch": 8, "share": 32}
    given = train(tmp_path / "given", 8, 8)
    assert not given.stage("straight").micro_batch.exists()
    assert weights(run) == weights(given)
    assert folder_bytes(run.student("straight")) == folder_bytes(given.student("straight"))
    saved = json.loads(next(run.stage("straight").checkpoints.glob("*3/meta.json")).read_text())
    assert saved["environment"]["micro_batch"] == 8


RARE = """

class Recipe(Recipe):
    def networks(self, init):
        return {**super().networks(init), "critic": Trained(init.velocity_field())}

    def turns(self, step, images):
        yield Turn("student", self.loss) if step % 5 == 4 else Turn("critic", self.loss_of_critic)

    def loss(self, nets, batch, ctx):
        if ctx.step == 9 and len(batch.pairs.data) > 8:
            import torch
            torch.empty(1 << 50)
        return super().loss(nets, batch, ctx)

    def loss_of_critic(self, nets, batch, ctx):
        return super().loss({"student": nets["critic"]}, batch, ctx)
"""


def test_each_network_is_tried_with_the_state_of_its_optimizer_however_rarely_it_has_a_turn(tmp_path):
    """The student has its second turn in step 9, and only there the memory is short."""
    write_recipe(tmp_path / "one", 32)
    mine = tmp_path / "one" / "mine.py"
    mine.write_text(mine.read_text() + RARE)
    spec = specfile.validate({**SPEC, "launch": {**SPEC["launch"], "micro_batch": "auto"}}, "s")
    run = RunPaths(tmp_path / "one")
    stages.run(run, spec, list(spec.stages), StopRequest())
    assert json.loads(run.stage("straight").micro_batch.read_text()) == {"micro_batch": 8, "share": 32}


def test_a_resume_keeps_what_was_chosen(tmp_path):
    folder = tmp_path / "one"
    kept = RunPaths(folder).stage("straight").micro_batch
    kept.parent.mkdir(parents=True)
    kept.write_text('{"micro_batch": 4, "share": 32}')
    assert weights(train(folder, 32, "auto")) == weights(train(tmp_path / "given", 32, 4))
    assert json.loads(kept.read_text()) == {"micro_batch": 4, "share": 32}
    other = RunPaths(tmp_path / "other").stage("straight").micro_batch  # of another number of processes
    other.parent.mkdir(parents=True)
    other.write_text('{"micro_batch": 4, "share": 16}')
    train(tmp_path / "other", 32, "auto")
    assert json.loads(other.read_text()) == {"micro_batch": 32, "share": 32}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is not JSON"),
        ('{"micro_batch": 0, "share": 32}', "micro_batch: 0 given; input should be greater than 0"),
        ('{"micro_batch": "8", "share": 32}', 'micro_batch: "8" given; input should be a valid integer'),
        ('{"micro_batch": 5, "share": 32}', "micro_batch: 5 given; valid: 32, 16, 8, 4, 2, 1"),
    ],
)
def test_a_damaged_choice_is_refused(tmp_path, text, said):
    kept = RunPaths(tmp_path / "one").stage("straight").micro_batch
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    with pytest.raises(InputError) as error:
        train(tmp_path / "one", 32, "auto")
    assert str(error.value) == f"{kept} cannot be used: {said}; delete this file, so that a new micro-batch is chosen"


def test_too_little_memory_for_the_smallest_is_one_message(tmp_path):
    with pytest.raises(
        InputError,
        match="launch.micro_batch=auto: there is not enough memory for the smallest possible micro-batch size, 1; ",
    ):
        train(tmp_path / "one", 0, "auto")
    run = RunPaths(tmp_path / "one")
    assert not run.stage("straight").micro_batch.exists()
    assert not run.stage("straight").checkpoints.exists()


def test_another_error_is_no_lack_of_memory(tmp_path):
    write_recipe(tmp_path / "one", 32)
    mine = tmp_path / "one" / "mine.py"
    mine.write_text(mine.read_text().replace("import os, torch\n", "raise RuntimeError('another')\n", 1))
    spec = specfile.validate({**SPEC, "launch": {**SPEC["launch"], "micro_batch": "auto"}}, "s")
    with pytest.raises(RuntimeError, match="^another$"):
        stages.run(RunPaths(tmp_path / "one"), spec, list(spec.stages), StopRequest())


def test_a_spec_says_auto_and_where_it_cannot(tmp_path):
    write_recipe(tmp_path, 32)
    spec = specfile.validate({**SPEC, "launch": {"micro_batch": "auto"}}, "s")
    assert spec.digest() == specfile.validate({**SPEC, "launch": {}}, "s").digest()
    (_, step, *_) = planning.steps(resolve(spec, tmp_path))
    assert step.work == "96 images = 3 student updates of 32: 1 x auto (processes, micro-batches that fit into memory)"
    for launch, said in (
        ({"zero_stage": 2}, "launch.micro_batch: auto does not work with launch.zero_stage; give a number, or "
            "zero_stage: null"),
        ({"procs": 2, "divide_teacher": True}, "launch.micro_batch: auto does not work with "
            "launch.divide_teacher; give a number"),
    ):  # fmt: skip
        given = specfile.validate({**SPEC, "launch": {"micro_batch": "auto", **launch}}, "s")
        with pytest.raises(InputError) as error:
            checks.check(given, tmp_path)
        assert said in str(error.value)
    with pytest.raises(InputError, match=r"launch.micro_batch"):
        specfile.validate({**SPEC, "launch": {"micro_batch": "most"}}, "s")


@pytest.mark.process
@pytest.mark.long
def test_ranks_choose_what_each_of_them_can(tmp_path):
    """Rank 1 has the memory for less, and rank 0 does not wait for it for ever."""
    write_recipe(tmp_path, 16, 4)
    launch = {**SPEC["launch"], "procs": 2, "micro_batch": "auto"}
    (tmp_path / "s.yaml").write_text(json.dumps({**SPEC, "launch": launch}))
    done = distill("run", "s.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stage = RunPaths(tmp_path / "runs" / "one").stage("straight")
    assert json.loads(stage.micro_batch.read_text()) == {"micro_batch": 4, "share": 16}
    saved = json.loads(next(stage.checkpoints.glob("*3/meta.json")).read_text())
    assert (saved["environment"]["micro_batch"], saved["environment"]["procs"]) == (4, 2)
