"""A spec as a DAG: each impossible or ineffective combination has its message, and the presets have none."""

from pathlib import Path

import pytest

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.launch import queue
from distill.plans import planning
from distill.runs import todo
from distill.runs.run_store import RunPaths
from distill.spec import checks, presets, registry, specfile
from distill.spec.resolved import resolve

MLP = {"kind": "mlp"}
UNET = {"kind": "unet", "channels": [8, 16]}
GAUSSIAN = {"kind": "gaussian", "mean": [0, 0], "std": [1, 1]}
PAIRS = {"kind": "pairs", "count": 100, "block": 50, "shard": 100}
REFLOW = {"kind": "train", "recipe": "reflow/reflow", "network": MLP, "pairs": "p", "images": 1280}
TEACH = {"kind": "train", "recipe": "pretrain/flow_matching", "network": UNET, "images": 1280}
EVALUATE = {"kind": "evaluate", "students": {"r": [1]}}


def vectors(**changes):
    """A right spec over vectors, stages merged or replaced by `changes`."""
    stages = {"p": PAIRS, "r": REFLOW, "e": EVALUATE}
    for name, change in changes.items():
        stages[name] = {**stages.get(name, {}), **change}
    return {"name": "x", "teacher": GAUSSIAN, "stages": stages}


def images(**changes):
    stages = {"t": TEACH}
    for name, change in changes.items():
        stages[name] = {**stages.get(name, {}), **change}
    return {"name": "x", "data": {"kind": "digits"}, "stages": stages}


def mistakes(content, base=Path()):
    try:
        checks.check(specfile.validate(content, "f"), base)
    except InputError as error:
        lines = str(error).splitlines()
        return [lines[0].removeprefix("spec 'x': ")] if len(lines) == 1 else [line.strip() for line in lines[1:]]
    return []


MADE = {  # the teachers of presets that `distill convert` and `distill emoji` make first
    "cifar10-ect": "edm-cifar10",
    "imagenet64-edm-rfpp": "edm-imagenet64",
    "emoji": "runs/emoji-teacher/untrained",
    "emoji-students": "runs/emoji-teacher/teacher",
}


def test_right_specs_pass():
    assert mistakes(vectors()) == []
    assert mistakes(images()) == []
    for name in presets.names():
        source = specfile.load(presets.find(name))
        if name in MADE:
            with pytest.raises(InputError, match=f"^spec '{name}': teacher.path: there is no folder {MADE[name]};"):
                checks.check(source.spec, source.base)
        else:
            checks.check(source.spec, source.base)


CASES = {
    "no stages": ({"name": "x", "stages": {}}, "stages: empty; a run needs at least one stage"),
    "unknown reference": (
        vectors(r={"pairs": "pp"}),
        "stages.r.pairs: there is no stage 'pp'; did you mean 'p'? valid: p",
    ),
    "later reference": (
        vectors(r={"network": None, "init": "s"}, s=REFLOW),
        "stages.r.init: refers to 's', which comes later; a stage can refer only to earlier stages; no train "
        "stage comes "
        "before 'r'",
    ),
    "itself": (
        vectors(r={"network": None, "init": "r"}),
        "stages.r.init: refers to itself; a stage can refer only to earlier stages; no train stage comes before 'r'",
    ),
    "wrong kind": (
        vectors(e={"students": {"p": [1]}}),
        "stages.e.students.p: 'p' is a pairs stage, not train; valid: r",
    ),
    "evaluation of nothing": (
        vectors(e={"students": {"r": []}}),
        "stages.e.students.r: no numbers of steps given, e.g. [1, 2, 4]",
    ),
    "a flow that is not evaluated": (
        vectors(e={"fine_students": ["rr"]}),
        "stages.e.fine_students: 'rr' is not in stages.e.students; did you mean 'r'? valid: r",
    ),
    "a flow twice": (vectors(e={"fine_students": ["r", "r"]}), "stages.e.fine_students: 'r' is listed twice"),
    "pairs of another teacher": (
        vectors(p2={**PAIRS, "teacher": "r"}, r2={**REFLOW, "pairs": "p2"}),
        "stages.r2.pairs: 'p2' has pairs of the student of stage 'r', but this stage's teacher is the spec's teacher; "
        "set the same teacher in both stages",
    ),
    "a stage that tables would take for the teacher": (
        images(teacher=TEACH),
        "stages.teacher: the name 'teacher' is reserved for the teacher in tables; give the stage another name",
    ),
    "no such recipe": (
        vectors(r={"recipe": "reflow/reflw"}),
        "stages.r.recipe: there is no recipe 'reflow/reflw'; did you mean 'reflow/reflow'? valid: "
        f"{', '.join(registry.names())}; for a recipe of your own, give its file: ./file.py",
    ),
    "no such file": (
        vectors(r={"recipe": "./mine.py"}),
        "stages.r.recipe: recipe './mine.py': there is no file mine.py",
    ),
    "file elsewhere": (
        vectors(r={"recipe": "../mine.py"}),
        "stages.r.recipe: recipe '../mine.py': a recipe of your own must be in the folder of its spec or below; "
        "write ./file.py",
    ),
    "unknown option": (
        vectors(r={"options": {"distanse": "l2"}}),
        "stages.r.options.distanse: unknown key; did you mean 'distance'? valid: data_weight, distance, mu, "
        "sigma, time_law",
    ),
    "wrong option": (
        vectors(r={"options": {"distance": "l3"}}),
        "stages.r.options.distance: 'l3' given; must be 'l2' or 'pseudo_huber'",
    ),
    "needs data of vectors": (
        vectors(c={**TEACH, "recipe": "consistency/consistency", "network": {"kind": "mlp"}}),
        "stages.c: consistency/consistency needs data, but the teacher makes vectors, for which there is no "
        "data; use reflow/reflow",
    ),
    "needs data": (
        vectors(t={**TEACH, "network": MLP}),
        "stages.t: pretrain/flow_matching needs data, but the spec has none; e.g. data: {kind: digits}",
    ),
    "needs pairs": (
        vectors(r={"pairs": None}),
        "stages.r: reflow/reflow needs pairs; name a pairs stage in stages.r.pairs (p)",
    ),
    "needs a teacher": (
        images(p={**PAIRS, "teacher": "t"}, r={**REFLOW, "network": UNET}),
        "stages.r: reflow/reflow needs a teacher; give stages.r.teacher (a train stage), or the spec's teacher",
    ),
    "pairs need a teacher": (
        images(p=PAIRS),
        "stages.p: pairs need a teacher; give stages.p.teacher (a train stage), or the spec's teacher",
    ),
    "evaluation needs a teacher": (
        images(e={"kind": "evaluate", "students": {"t": [1]}}),
        "stages.e: an evaluation needs a teacher; give stages.e.teacher (a train stage), or the spec's teacher",
    ),
    "pairs without effect": (
        images(p={**PAIRS, "teacher": "t"}, u={**TEACH, "pairs": "p"}),
        "stages.u.pairs: pretrain/flow_matching needs no pairs, so this has no effect; remove it",
    ),
    "teacher without effect": (
        images(u={**TEACH, "teacher": "t"}),
        "stages.u.teacher: pretrain/flow_matching needs no teacher, so this has no effect; remove it",
    ),
    "spec's teacher without effect": (
        images() | {"teacher": {"kind": "diffusers", "path": "org/name"}},
        "teacher: no stage uses it, so it has no effect; remove it",
    ),
    "data without effect": (
        {
            "name": "x",
            "teacher": {"kind": "diffusers", "path": "org/name"},
            "data": {"kind": "digits"},
            "stages": {"p": PAIRS},
        },
        "data: no stage uses it, so it has no effect; remove it",
    ),
    "init and network": (
        vectors(s={**REFLOW, "init": "r"}),
        "stages.s: init and network are both given, but training starts from only one of them; remove one",
    ),
    "nothing to start from": (
        images(t={"network": None}),
        "stages.t: no initial weights; give network (new weights), init (an earlier train stage), or a checkpoint as "
        "the spec's teacher",
    ),
    "dropout of a fresh network": (
        vectors(r={"dropout": 0.1}),
        "stages.r.network: the stage's dropout has no effect on a new network; remove it, or set network.dropout",
    ),
    "teacher without weights": (
        vectors(r={"network": None}),
        "stages.r: the gaussian teacher has no weights to start from; give network, e.g. network: {kind: mlp}",
    ),
    "unknown half-life": (
        vectors(r={"ema_half_lives": [500, 1000], "export": 600}),
        "stages.r.export: 600 is not one of ema_half_lives and ema_lengths; valid: raw, 500, 1000",
    ),
    "half-life of less than an image": (
        images(t={"ema_half_lives": [0.5]}),
        "stages.t.ema_half_lives: 0.5 of an image; give at least 1. Lengths relative to the training belong in "
        "ema_lengths",
    ),
    "EMA length twice": (
        images(t={"ema_lengths": [0.1, 0.1]}),
        "stages.t.ema_lengths: [0.1, 0.1] contains a value twice",
    ),
    "snapshots of nothing": (
        images(t={"ema_snapshots": 128}),
        "stages.t.ema_snapshots: has no effect without ema_lengths; add ema_lengths: [0.05, 0.1], or remove it",
    ),
    "snapshots that never come": (
        images(t={"ema_lengths": [0.1], "ema_snapshots": 10**9}),
        f"stages.t.ema_snapshots: {10**9} of {TEACH['images']} images; give at most half of them",
    ),
    "too many snapshots": (
        images(t={"images": 1_280_000, "ema_lengths": [0.1], "ema_snapshots": 128}),
        "stages.t.ema_snapshots: makes 10,000 snapshots; give more images, for at most 1,000",
    ),
    "half-life twice": (
        vectors(r={"ema_half_lives": [500, 500]}),
        "stages.r.ema_half_lives: [500.0, 500.0] contains a value twice",
    ),
    "long warm-up": (
        vectors(r={"optimizer": {"warmup_images": 1280}}),
        "stages.r.optimizer.warmup_images: 1280 of 1280 images; the warm-up must end before the training does",
    ),
    "beta of one": (
        vectors(r={"optimizer": {"betas": [0.9, 1]}}),
        "stages.r.optimizer.betas: [0.9, 1.0]; both must be below 1",
    ),
    "images not divisible": (
        vectors(r={"images": 1300}),
        "stages.r.images: 1300 is not a multiple of batch_size (128); nearest: 1280",
    ),
    "fewer images than a batch": (
        vectors(r={"images": 5}),
        "stages.r.images: 5 is not a multiple of batch_size (128); nearest: 128",
    ),
    "batch not divisible": (
        vectors() | {"launch": {"micro_batch": 48}},
        "launch.micro_batch: 48 does not divide stages.r.batch_size (128)",
    ),
    "shard of half a block": (
        vectors(p={"shard": 120}),
        "stages.p.shard: 120 is not a multiple of block (50); nearest: 100",
    ),
    "never saved": (
        vectors(r={"checkpoint": {"minutes": None}}),
        "stages.r.checkpoint: images and minutes are both null, so nothing would be saved; give one",
    ),
    "std too long": (
        vectors() | {"teacher": {**GAUSSIAN, "std": [1, 1, 1]}},
        "teacher.std: 3 values given for a mean of 2; give one per coordinate",
    ),
    "ragged means": (
        vectors() | {"teacher": {"kind": "mixture", "means": [[0, 0], [1]], "std": 1}},
        "teacher.means: rows of [1, 2] coordinates given; all need the same number, at least 1",
    ),
    "weights missing": (
        vectors() | {"teacher": {"kind": "mixture", "means": [[0, 0], [1, 1]], "std": 1, "weights": [1]}},
        "teacher.weights: 1 given for 2 components",
    ),
    "no teacher folder": (
        vectors(r={"network": None}) | {"teacher": {"kind": "diffusers", "path": "./nowhere"}},
        "teacher.path: there is no folder ./nowhere; give a checkpoint's folder or a hub id (org/name)",
    ),
    "images for vectors": (
        vectors() | {"data": {"kind": "digits"}},
        "data: kind digits has images, the gaussian teacher makes vectors of 2; use data: {kind: none} or another "
        "teacher",
    ),
    "mlp for images": (
        images(t={"network": MLP}),
        "stages.t.network: an mlp is for vectors, but data of kind digits has images; use kind: unet",
    ),
    "unet for vectors": (
        vectors(r={"network": UNET}),
        "stages.r.network: a unet is for images, but the teacher makes vectors; use kind: mlp",
    ),
    "groups do not divide": (
        images(t={"network": {"kind": "unet", "channels": [8, 12]}}),
        "stages.t.network.channels: 12 is not a multiple of norm_groups (8)",
    ),
    "no channels": (
        images(t={"network": {"kind": "unet", "channels": []}}),
        "stages.t.network.channels: empty; give the number of channels of each resolution, finest first",
    ),
    "ranks share a batch": (
        images() | {"launch": {"procs": 3}},
        "launch.procs: stages.t.batch_size (128) is not a multiple of the 3 processes; change one of them",
    ),
    "micro-batches of ranks": (
        images() | {"launch": {"procs": 2, "micro_batch": 48}},
        "launch.micro_batch: 48 does not divide stages.t.batch_size (128 / 2 processes = 64)",
    ),
    "blocks that are cut by micro-batches": (
        images(t={"options": {"coupling": "ot", "coupling_block": 32}}) | {"launch": {"procs": 2, "micro_batch": 16}},
        "stages.t: pretrain/flow_matching couples samples in blocks of 32, and micro-batches of 16 do not contain "
        "whole blocks; make batch_size / processes, or launch.micro_batch, a multiple of 32",
    ),
    "blocks that are cut by ranks": (
        images(t={"options": {"coupling": "weighted"}}) | {"launch": {"procs": 4}},
        "stages.t: pretrain/flow_matching couples samples in blocks of 64, and micro-batches of 32 do not contain "
        "whole blocks; make batch_size / processes, or launch.micro_batch, a multiple of 64",
    ),
    "workers without training": (
        vectors() | {"stages": {"p": PAIRS}, "launch": {"procs": 2, "workers": 2}},
        "launch.workers: 2 given, but it applies to training, and no stage trains; remove it",
    ),
    "whole weights": (
        images() | {"launch": {"zero_stage": 2, "zero_persistence_threshold": 0}},
        "launch.zero_persistence_threshold: has no effect, because no weights are sharded; remove it, or set "
        "zero_stage: 3",
    ),
    "times of nobody": (
        vectors(e={"times": {"s": ["optimal"]}}),
        "stages.e.times.s: this stage does not measure 's'; valid: r, teacher",
    ),
    "times that lead nowhere": (
        vectors(e={"times": {"teacher": [[1, 0.5]]}}),
        "stages.e.times.teacher: [1.0, 0.5] given; times must decrease from 1 to 0, like [1, 0.6, 0]",
    ),
    "times by another word": (
        vectors(e={"times": {"teacher": ["best"]}}),
        "f: stages.e.times.teacher.0: 'best' given; must be 'optimal' or a list",
    ),
    "an optimizer that cannot be divided": (
        images(t={"optimizer": {"name": "muon"}}) | {"launch": {"zero_stage": 1}},
        "stages.t.optimizer.name: muon does not work with launch.zero_stage: a step needs whole weight matrices, "
        "which ZeRO divides; use adamw, or zero_stage: null",
    ),
    "quantised moments that cannot be divided": (
        images(t={"optimizer": {"name": "adamw_8bit"}}) | {"launch": {"zero_stage": 0}},
        "stages.t.optimizer.name: adamw_8bit does not work with launch.zero_stage: its moments are quantised in "
        "blocks, which ZeRO would cut elsewhere on another number of processes; use adamw, or zero_stage: null",
    ),
    "momentum of nothing": (
        images(t={"optimizer": {"momentum": 0.9}}),
        "stages.t.optimizer.momentum: has no effect with adamw; remove it, or set name: muon",
    ),
    "momentum that never ends": (
        images(t={"optimizer": {"name": "muon", "momentum": 1.0}}),
        "stages.t.optimizer.momentum: 1; it must be below 1",
    ),
    "nothing to offload": (
        images() | {"launch": {"zero_stage": 0, "offload_optimizer": True}},
        "launch.offload_optimizer: works only with zero_stage 1 to 3; remove it, or set zero_stage",
    ),
    "one process": (
        vectors() | {"launch": {"divide_teacher": True}},
        "launch.divide_teacher: has no effect with one process; remove it, or increase procs",
    ),
    "no teacher to divide": (
        images() | {"launch": {"divide_teacher": True, "procs": 2}},
        "launch.divide_teacher: no stage has a teacher with weights, so it has no effect; remove it",
    ),
    "nothing to compute again": (
        vectors() | {"launch": {"activation_checkpointing": True}},
        "launch.activation_checkpointing: has no effect for an mlp; remove it",
    ),
    "closed forms have no weights": (
        vectors() | {"launch": {"divide_teacher": True, "procs": 2}},
        "launch.divide_teacher: no stage has a teacher with weights, so it has no effect; remove it",
    ),
    "nobody to wait for": (
        images() | {"launch": {"collective_minutes": 3}},
        "launch.collective_minutes: has no effect with one process; remove it",
    ),
    "a part without a pair": (
        vectors(q=PAIRS, r={"pairs": {"p": 0.95, "q": 0.05}, "batch_size": 4}),
        "stages.r.pairs: the fraction 0.05 of batch_size=4 is less than one pair per batch; increase batch_size or "
        "this fraction",
    ),
    "times of no rows": (
        vectors(e={"teacher_steps": [], "times": {"teacher": [[1, 0.5, 0]]}}),
        "stages.e.times.teacher: has no effect, because teacher_steps is empty; remove it, or give numbers of steps",
    ),
    "more optimal steps than there are": (
        vectors(e={"students": {"r": [1, 101]}, "times": {"r": ["optimal"]}}),
        "stages.e.times.r: optimal times are found for at most 100 steps, not 101; give fewer steps",
    ),
    "more optimal steps of the teacher": (
        vectors(e={"teacher_steps": [128], "times": {"teacher": [[1, 0], "optimal"]}}),
        "stages.e.times.teacher: optimal times are found for at most 100 steps, not 128; give fewer steps",
    ),
    "a solver without steps": (
        vectors(e={"teacher_solvers": {"sa": []}}),
        "stages.e.teacher_solvers.sa: no numbers of steps given, e.g. [20, 40]",
    ),
    "too few steps to restart": (
        vectors(e={"teacher_solvers": {"restart": [4, 18]}}),
        "stages.e.teacher_solvers.restart: restart needs at least 5 steps, not 4",
    ),
    "steps of a solver twice": (
        vectors(e={"teacher_solvers": {"sa": [4, 8, 4]}}),
        "stages.e.teacher_solvers.sa: 4 steps are listed twice",
    ),
    "a row of Euler twice": (
        vectors(e={"teacher_steps": [1, 4], "teacher_solvers": {"euler": [4, 5]}}),
        "stages.e.teacher_solvers.euler: 4 steps are in teacher_steps already; remove them here",
    ),
    "the fine row twice": (
        vectors(e={"teacher_solvers": {"heun": [8, 16]}}),
        "stages.e.teacher_solvers.heun: 16 steps are measured already, as fine_solver and fine_steps; remove them here",
    ),
    "a tolerance is missing": (
        vectors(e={"fine_solver": "dopri5"}),
        "stages.e.fine_tolerance: missing; dopri5 needs it, e.g. 1e-4",
    ),
    "a tolerance of steps": (
        vectors(e={"fine_tolerance": 1e-4}),
        "stages.e.fine_tolerance: has no effect with fine_solver: heun; remove it",
    ),
    "steps of a tolerance": (
        vectors(e={"fine_solver": "dopri5", "fine_tolerance": 1e-4, "fine_steps": 24}),
        "stages.e.fine_steps: has no effect with fine_solver: dopri5, which chooses its steps; remove it",
    ),
    "a tolerance where the velocity jumps": (
        vectors(
            e={
                "fine_solver": "dopri5",
                "fine_tolerance": 1e-4,
                "guidance_scale": 2,
                "guidance": {"interval": [0.2, 0.6]},
            }
        ),
        "stages.e.fine_solver: dopri5 does not work with guidance.interval, where the velocity jumps; use another "
        "solver, such as heun",
    ),
    "a solver by another name": (
        vectors(e={"teacher_solvers": {"sda": [4]}}),
        "f: stages.e.teacher_solvers.sda: 'sda' given; must be 'euler', 'heun', 'ab2', 'ab3', 'dpm_solver_pp_2m', "
        "'dpm_solver_pp_3m', 'edm_churn', 'ipndm3', 'ipndm4', 'restart', 'sa', 'unip3', 'unipc2' or 'unipc3'",
    ),
    "too many resolutions": (
        images(t={"network": {"kind": "unet", "channels": [8, 8, 8, 8, 8]}}),
        "stages.t.network.channels: 5 resolutions halve the images 4 times, but their side of 8 is not "
        "divisible by 16; give fewer resolutions",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes(case):
    content, said = CASES[case]
    assert said in mistakes(content)


def test_whole_blocks_pass():
    content = images(t={"options": {"coupling": "ot", "coupling_block": 32}})
    for launch in ({}, {"procs": 4}, {"procs": 2, "micro_batch": 32}):
        assert mistakes(content | {"launch": launch}) == []


def test_an_array_is_as_large_as_the_most_shards(tmp_path):
    """Of the smaller pairs stage it has fewer parts, none without a shard."""
    small, large = vectors()["stages"]["p"] | {"count": 50}, {"shard": 50}
    content = vectors(p=large, q=small | large) | {"launch": {"slurm": {"pairs_jobs": 2}}}
    assert mistakes(content) == []
    planned = queue.plans(RunPaths(tmp_path), specfile.validate(content, "f"), ["p", "q"])
    assert {plan.name: plan.parts for plan in planned} == {"p.parts": [0, 1], "p": None, "q.parts": [0], "q": None}
    assert mistakes(content | {"launch": {"slurm": {"pairs_jobs": 3}}}) == [
        "launch.slurm.pairs_jobs: 3 jobs given, but stage 'p' has only 2 shards; give fewer jobs, or a smaller "
        "stages.p.shard"
    ]


def test_one_wrong_recipe_hides_no_other_mistake():
    found = mistakes(images(t={"recipe": "nope", "images": 5}, u={**TEACH, "images": 5}))
    assert len(found) == 2, "and data is not called useless because of a recipe that could not be asked"
    assert found[0].startswith("stages.t.recipe: there is no recipe 'nope'; valid: ")
    assert found[1].startswith("stages.u.images: 5 is not")


def test_pending_are_the_stages_that_are_not_done(tmp_path):
    spec = specfile.validate(vectors(), "f")
    run = RunPaths(tmp_path)
    assert todo.pending(run, spec) == ["p", "r", "e"]
    run.stage("p").root.mkdir(parents=True)
    assert todo.pending(run, spec) == ["p", "r", "e"]
    run.stage("p").pairs.mkdir()
    write_json(run.stage("p").pairs / "manifest.json", {"shards": {}})
    write_json(run.stage("p").done, {})
    assert todo.pending(run, spec) == ["r", "e"]


def test_pairs_that_are_gone_are_pending_as_long_as_a_stage_needs_them(tmp_path):
    spec, run = specfile.validate(vectors(), "f"), RunPaths(tmp_path)
    folder = run.stage("p").pairs
    folder.mkdir(parents=True)

    def make():
        (folder / "a").write_bytes(b"123")
        write_json(folder / "manifest.json", {"shards": {"a": {"size": 3}}})

    make()
    write_json(run.stage("p").done, {})
    assert (todo.pending(run, spec), todo.lost_pairs(run, spec)) == (["r", "e"], [])
    for harm in [
        lambda: (folder / "a").unlink(),
        lambda: (folder / "a").write_bytes(b"12"),
        lambda: (folder / "manifest.json").unlink(),
        lambda: (folder / "manifest.json").write_text("{"),
        lambda: (folder / "manifest.json").write_text("[]"),
    ]:
        make()
        harm()
        assert (todo.pending(run, spec), todo.lost_pairs(run, spec)) == (["p", "r", "e"], ["p"])
    run.stage("r").root.mkdir(parents=True)
    write_json(run.stage("r").done, {})
    assert (todo.pending(run, spec), todo.lost_pairs(run, spec)) == (["e"], []), "nobody needs them any more"


# --- recipes of one's own ---

OWN = '''"""Mine (Me 2026, arXiv 2601.00001): nothing."""
from pathlib import Path
from pydantic import BaseModel, ConfigDict

class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    weight: float = 0.5
    """how much"""
    table: Path | None = None
    """a file"""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"pairs", "teacher"}) if self.weight else frozenset()

    @property
    def student(self) -> str:
        return "velocity"

class Recipe:
    sampler = "euler"
'''


def test_a_recipe_beside_the_spec(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    content = vectors(r={"recipe": "./mine.py", "options": {"weight": 2.0}})
    assert mistakes(content, tmp_path) == []
    assert mistakes(vectors(r={"recipe": "./mine.py", "options": {"weight": "x"}}), tmp_path) == [
        "stages.r.options.weight: 'x' given; must be a number"
    ]
    assert mistakes(vectors(r={"recipe": "./mine.py", "options": {"weight": "2.0"}}), tmp_path) == [
        "stages.r.options.weight: '2.0' given; must be a number"
    ], "as strict as the spec itself"
    no_pairs = vectors(r={"recipe": "./mine.py", "options": {"weight": 0}})
    said = "stages.r.pairs: ./mine.py needs no pairs, so this has no effect; remove it"
    assert said in mistakes(no_pairs, tmp_path), "needs may depend on the options"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'return "velocity"',
            'return "generator"',
            "makes a student of unknown kind 'generator'; valid: velocity, flow_map, acceleration",
        ),
        (
            'return "velocity"',
            'return "flow_map"',
            "sets the sampler euler, which cannot sample a flow_map student; valid: jump, renoise",
        ),
        (
            'sampler = "euler"',
            'sampler = "jump"',
            "sets the sampler jump, which cannot sample a velocity student; valid: euler, same_noise",
        ),
        (
            '{"pairs", "teacher"}',
            '{"pairs"}',
            "needs pairs, which a teacher generates; add 'teacher' to its Config.needs",
        ),
    ],
)
def test_what_a_recipe_asks_for_and_is_not_there(tmp_path, old, new, said):
    assert old in OWN
    (tmp_path / "mine.py").write_text(OWN.replace(old, new))
    assert f"stages.r: ./mine.py {said}" in mistakes(vectors(r={"recipe": "./mine.py"}), tmp_path)


FLOW_MAP = OWN.replace('return "velocity"', 'return "flow_map"')


@pytest.mark.parametrize("sampler", ["jump", "renoise"])
def test_a_flow_map_is_a_student_and_no_teacher(tmp_path, sampler):
    (tmp_path / "map.py").write_text(FLOW_MAP.replace('sampler = "euler"', f'sampler = "{sampler}"'))
    flow_map = {**REFLOW, "recipe": "./map.py"}
    assert mistakes(vectors(r=flow_map), tmp_path) == []
    along = vectors(r=flow_map, e={"times": {"r": ["optimal"]}})
    assert mistakes(along, tmp_path) == [
        "stages.e.times.r: its student is a flow map, for which step times cannot be chosen; remove it"
    ]
    again = {**flow_map, "network": None, "init": "r"}
    assert mistakes(vectors(r=flow_map, again=again), tmp_path) == [], "of one flow map another is made"
    assert mistakes(vectors(again=again), tmp_path) == [], "and of a velocity student"

    no_path = (
        "the student of 'r' is a flow map, but a teacher must be a velocity field; name a stage with a velocity student"
    )
    pairs, student = {**PAIRS, "teacher": "r"}, {**REFLOW, "teacher": "r", "pairs": "p2"}
    evaluation = {**EVALUATE, "teacher": "r"}
    found = mistakes(vectors(r=flow_map, p2=pairs, s=student, e=evaluation), tmp_path)
    assert found == [f"stages.{name}.teacher: {no_path}" for name in ("e", "p2", "s")]

    assert mistakes(vectors(r=flow_map, e={"fine_students": ["r"]}), tmp_path) == [
        "stages.e.fine_students: 'r' is a flow map, which a solver cannot integrate; remove it"
    ]
    velocity = {**REFLOW, "network": None, "init": "r"}
    assert mistakes(vectors(r=flow_map, s=velocity), tmp_path) == [
        "stages.s.init: the student of 'r' is a flow map, but reflow/reflow makes one of kind velocity; "
        "name a stage with a velocity student"
    ]
    (tmp_path / "bent.py").write_text(OWN.replace('"velocity"', '"acceleration"').replace('"euler"', '"accelerated"'))
    bent = {**flow_map, "recipe": "./bent.py"}
    assert mistakes(vectors(r=bent, again={**bent, "network": None, "init": "r"}), tmp_path) == []
    assert mistakes(vectors(r=flow_map, s={**bent, "network": None, "init": "r"}), tmp_path) == [
        "stages.s.init: the student of 'r' is a flow map, but ./bent.py makes one of kind acceleration; "
        "name a stage with a velocity student"
    ]
    assert mistakes(vectors(r=bent, s={**again, "init": "r"}, e=evaluation), tmp_path) == [
        "stages.e.teacher: the student of 'r' is a velocity with its acceleration, but a teacher must be a "
        "velocity field; name a stage "
        "with a velocity student",
        "stages.s.init: the student of 'r' is a velocity with its acceleration, but ./map.py makes one of kind "
        "flow_map; "
        "name a stage with a velocity student",
    ]
    unknown = {**flow_map, "recipe": "./map.py", "options": {"weight": "x"}}
    found = mistakes(vectors(r=unknown, s=velocity, e=evaluation), tmp_path)
    assert found == ["stages.r.options.weight: 'x' given; must be a number"], "said once, where it stands"
    wrong = {**velocity, "options": {"time_law": 1}}
    assert len(mistakes(vectors(r=flow_map, s=wrong), tmp_path)) == 1


def test_what_starts_from_trained_weights_takes_no_fresh_network(tmp_path):
    distill = {**REFLOW, "recipe": "reflow/slimflow"}
    assert mistakes(vectors(d=distill)) == [
        "stages.d.network: reflow/slimflow starts from trained weights, which a new network does not have; remove "
        "it, and "
        "give init (an earlier train stage)"
    ]
    anneal = {**distill, "options": {"phase": "anneal", "anneal_images": 640}}
    assert mistakes(vectors(a=anneal, d={**distill, "network": None, "init": "a"})) == []


def test_derivatives_do_not_pass_where_weights_are_divided(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.replace('{"pairs", "teacher"}', '{"pairs", "teacher", "jvp"}'))
    for zero_stage, refused in ((None, False), (0, False), (2, False), (3, True)):
        content = vectors(r={"recipe": "./mine.py"}) | {"launch": {"zero_stage": zero_stage}}
        said = (
            "stages.r: ./mine.py uses forward-mode derivatives (jvp), which do not work with "
            "launch.zero_stage: 3: gathering the weights of a layer while it is called has none; use 0, 1 or 2"
        )
        assert mistakes(content, tmp_path) == ([said] if refused else [])


def test_a_config_says_what_it_needs(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.partition("    @property")[0] + '\nclass Recipe:\n    sampler = "euler"\n')
    said = (
        "stages.r.recipe: recipe './mine.py': its class Config must have the properties needs and student, "
        "as reflow/reflow does"
    )
    assert said in mistakes(vectors(r={"recipe": "./mine.py"}), tmp_path)


# --- guidance by a student of the run ---

SHOWN = (
    "has no unconditional prediction, because it was trained only on its teacher's outputs; use 1, or a teacher trained"
)


def test_guidance_needs_an_unconditional_velocity(tmp_path):
    evaluation = {"kind": "evaluate", "teacher": "t", "students": {"t": [1]}, "guidance_scale": 2}
    guided = {**PAIRS, "teacher": "t", "guidance_scale": 2}
    assert mistakes(images(p=guided, e=evaluation)) == [], "of labelled data"

    pictures = {"kind": "images", "path": str(tmp_path), "size": 8}
    said = (
        "given, but the data has no classes, so the student of 't' has no separate unconditional prediction; "
        "use 1, or labelled"
    )
    expected = [f"stages.p.guidance_scale: 2 {said} data", f"stages.e.guidance_scale: 2 {said} data"]
    for data in (pictures, {**pictures, "kind": "hf"}):
        assert mistakes(images(p=guided, e=evaluation) | {"data": data}) == expected
    (tmp_path / "class").mkdir()
    assert mistakes(images(p=guided, e=evaluation) | {"data": pictures}) == []
    assert mistakes(images(p=guided) | {"data": {**pictures, "kind": "hf", "label_column": "label"}}) == []

    again = mistakes(vectors(p2={**PAIRS, "teacher": "r", "guidance_scale": 0.5}))
    assert again == [f"stages.p2.guidance_scale: 0.5 given, but the student of 'r' {SHOWN} on data"]
    reflow = {**REFLOW, "network": None, "teacher": "t"}
    found = mistakes(images(p=guided, r=reflow, e={**evaluation, "teacher": "r"}))
    assert found == [f"stages.e.guidance_scale: 2 given, but the student of 'r' {SHOWN} on data"], "images too"
    flow_map = {**TEACH, "network": None, "recipe": "consistency/consistency", "options": {"guidance_scale": 2.0}}
    assert mistakes(images(c={**flow_map, "teacher": "t"})) == [], "a recipe may guide its teacher too"
    shown = {**flow_map, "recipe": "reflow/perflow", "options": {"label_dropout": 0.1, "guidance_sync": True}}
    assert mistakes(images(f={**shown, "teacher": "t"}, e={**evaluation, "teacher": "f"})) == [], "dropped classes too"
    found = mistakes(images(p={**guided, "guidance_scale": 1}, r=reflow, c={**flow_map, "teacher": "r"}))
    assert found == [f"stages.c.options.guidance_scale: 2 given, but the student of 'r' {SHOWN} on data"]


def test_paths_among_a_recipes_options_are_made_absolute(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "t.csv").write_text("")
    spec = specfile.validate(vectors(r={"recipe": "./mine.py", "options": {"table": "t.csv"}}), "f")
    assert resolve(spec, tmp_path).spec.stages["r"].options == {"table": str(tmp_path / "t.csv")}


def test_what_is_wrong_with_a_recipe_of_ones_own(tmp_path):
    at = f"recipe './mine.py' cannot be imported: {tmp_path}/mine.py, line"
    for content, said in [
        ("x = (", "cannot be imported"),
        ("\nopen('missing.json')", f"{at} 2: FileNotFoundError: .Errno 2. No such file or directory: 'missing.json'$"),
        ("def f():\n    1 / 0\n\nf()", f"{at} 2: ZeroDivisionError: division by zero$"),
        ("raise KeyboardInterrupt", f"{at} 1: KeyboardInterrupt$"),
        ("raise BrokenPipeError", f"{at} 1: BrokenPipeError$"),
        ("raise ModuleNotFoundError('x')", f"{at} 1: ModuleNotFoundError: x$"),
        ("import nonexistent_package", "needs the package nonexistent_package"),
        ('"""Doc."""\nclass Config: ...', "has no class Recipe"),
        ("class Config: ...\nclass Recipe: ...", "has no docstring; add one that names its paper"),
        ('"""Doc."""\nclass Config: ...\nclass Recipe: ...', "its class Recipe sets no sampler; add sampler = "),
    ]:
        (tmp_path / "mine.py").write_text(content)
        with pytest.raises(InputError, match=said):
            registry.load("./mine.py", tmp_path)


def test_entry_points_are_recipes_too(tmp_path, monkeypatch):
    package = tmp_path / "other_distill-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other-distill\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[distill.recipes]\nother/mine = other_mine\n")
    (tmp_path / "other_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert "other/mine" in registry.names()
    assert registry.load("other/mine", Path()).__name__ == "other_mine"
    assert registry.describe("other/mine", Path()).needs == ["pairs", "teacher"]


def test_descriptions_are_read_and_agree_with_what_is_imported():
    for name in registry.names():
        described, module = registry.describe(name, Path()), registry.load(name, Path())
        assert {option.name for option in described.options} == set(module.Config.model_fields)
        assert set(described.needs) >= set(module.Config().needs)
        assert described.summary and described.summary in module.__doc__
        for option in described.options:
            field = module.Config.model_fields[option.name]
            assert option.meaning == " ".join(field.description.split())
            assert option.default == field.default


# --- the plan ---


def test_a_miniature_trains_all_stages_for_two_steps():
    warm = {"optimizer": {"warmup_images": 1000}, "images": 128_000, "batch_size": 64}
    spec = planning.miniature(specfile.validate(vectors(p={"steps": 5}, r=warm), "f"))
    assert (spec.stages["r"].images, spec.stages["r"].optimizer.warmup_images) == (128, 0)
    assert (spec.stages["p"].count, spec.stages["p"].solver, spec.stages["p"].steps) == (50, "euler", 1)
    checks.check(spec, Path())
    parted = vectors(p={"shard": 50}) | {"launch": {"slurm": {"pairs_jobs": 2}, "threads": 1}}
    assert mistakes(parted) == []
    small = planning.miniature(specfile.validate(parted, "f"))
    checks.check(small, Path())
    assert (small.launch.slurm.pairs_jobs, small.launch.threads) == (1, 1)


def test_plan_counts_work_and_network_calls():
    spec = specfile.validate(vectors(p={"steps": 5}), "f")
    pairs, train, evaluation = planning.steps(resolve(spec, Path()))
    assert pairs.network_calls == 100 * 9, "heun calls twice per step, except in the last"
    assert train.work == "1,280 images = 10 student updates of 128"
    assert train.needs == ["p", "the spec's teacher"]
    divided = specfile.validate(vectors() | {"launch": {"procs": 2, "micro_batch": 16}}, "f")
    work = planning.steps(resolve(divided, Path()))[1].work
    assert work == "1,280 images = 10 student updates of 128: 2 x 4 x 16 (processes, micro-batches, samples)"
    assert evaluation.network_calls == 2500 * (1 + 2 + 4 + 8 + 16 + 31 + 1)
    changes = {"p": {"steps": 5, "solver": "euler", "guidance_scale": 2}, "e": {"guidance_scale": 2}}
    guided = planning.steps(resolve(specfile.validate(vectors(**changes), "f"), Path()))
    assert guided[0].network_calls == 100 * 10
    assert guided[2].network_calls == 2500 * (2 * (1 + 2 + 4 + 8 + 16 + 31) + 1)
    times = {"teacher": ["optimal", [1, 0.5, 0.2, 0]], "r": [[1, 0.6, 0]]}
    along = planning.steps(resolve(specfile.validate(vectors(e={"times": times}), "f"), Path()))[2]
    assert along.network_calls == 2500 * (2 * (1 + 2 + 4 + 8 + 16) + 31 + 3 + 1 + 2 + 2 * 2), (
        "ab3 and unipc2 in two steps too"
    )
    assert along.work.startswith("16 rows x 2,500 samples")
    fine = specfile.validate(vectors(e={"fine_students": ["r"]}), "f")
    assert planning.steps(resolve(fine, Path()))[2].work.startswith("8 rows x 2,500 samples"), "as many as are made"
