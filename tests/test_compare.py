"""`distill compare` with the real command: rehearsed, killed, resumed; its table agrees with the files of the run."""

import json

import pytest
from commands import command
from runs import distill, folder_bytes, kill, start, wait_for

from distill.core.records import read_json
from distill.reports import comparison_table
from distill.runs import results
from distill.runs.run_store import RunPaths

pytestmark = pytest.mark.process

SMALL = [
    "stages.teach.images=640",
    "stages.teach.optimizer.warmup_images=0",
    "stages.teach.network.channels=[8, 16]",
    "stages.pairs.count=500",
    "stages.pairs.shard=250",
    "stages.reflow.images=1280",
    "stages.reflow.checkpoint.images=128",
    "stages.one_step.images=2560",
    "stages.one_step.checkpoint.images=256",
    "stages.reflow.optimizer.warmup_images=256",
    "stages.one_step.optimizer.warmup_images=256",
    "stages.evaluate.samples=64",
    "stages.evaluate.teacher_steps=[1, 2]",
    "stages.evaluate.fine_steps=2",
]
COMPARE = ["compare", "digits", "--recipes", "one_step,reflow,perflow", "--budget", "0.02", *SMALL, "--store", "runs"]
TRAINED = ("teach", "one_step-reflow", "one_step", "reflow", "perflow")


def checkpoints(run, stage):
    return any(run.stage(stage).checkpoints.glob("step-*"))


@pytest.mark.long
def test_the_table_holds_what_the_files_hold(capfd, tmp_path):
    run = RunPaths(tmp_path / "runs" / "one")
    done = distill(*COMPARE, "--name", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_table(run, done.stdout)
    before = run.comparison_table.read_bytes(), run.comparison_figure.read_bytes()
    run.comparison_table.unlink()
    run.comparison_figure.unlink()
    again = command(capfd, "report", "one", "--store", str(tmp_path / "runs"))
    assert again.code == 0, again.err
    assert (run.comparison_table.read_bytes(), run.comparison_figure.read_bytes()) == before


@pytest.mark.long  # `distill compare` runs like any run, and test_reflow_command kills one in `make test`
@pytest.mark.timeout(900)
def test_killed_twice_it_ends_as_if_undisturbed(tmp_path):
    """It resumes with the lengths that it began with."""
    run, log = RunPaths(tmp_path / "runs" / "killed"), tmp_path / "log"
    process = start(*COMPARE, "--name", "killed", cwd=tmp_path, log=log)
    assert wait_for(lambda: checkpoints(run, "one_step-reflow"), process), log.read_text()
    kill(process)
    assert not run.stage("one_step").done.exists()
    frozen = run.spec.read_bytes(), run.comparison.read_bytes()
    process = start(*COMPARE, "--name", "killed", "--resume", cwd=tmp_path, log=log)
    assert wait_for(lambda: any((run.stage("evaluate").root / "rows").glob("*.json")), process), log.read_text()
    kill(process)
    assert not run.comparison_table.exists()
    end = distill("compare", "killed", "--resume", "--store", "runs", cwd=tmp_path)
    assert end.returncode == 0, end.stdout + end.stderr
    assert (run.spec.read_bytes(), run.comparison.read_bytes()) == frozen
    check_table(run, end.stdout)

    whole = RunPaths(tmp_path / "runs" / "whole")
    done = distill("run", str(run.spec), "--name", "whole", "--store", "runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in TRAINED:
        expected, found = folder_bytes(whole.student(stage)), folder_bytes(run.student(stage))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == [], stage
    assert not whole.comparison.exists() and not whole.comparison_table.exists()


def check_table(run, said):
    measured, record = results.load_results(run.stage("evaluate")), read_json(run.comparison)
    page = run.comparison_table.read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    heads, rows = lines[0], {line[0]: line for line in lines[2:]}
    assert heads == ["recipe", "images", "FD-digits@1", "@2", "@4", "@8", "best baseline", "S", "training", "memory",
                     "teacher calls"]  # fmt: skip
    solvers = [f"teacher, {name}" for name in ("euler", "ab3", "unipc2", "dpm_solver_pp_2m")]
    assert list(rows) == [*solvers, "one_step (reflow, one_step)", "reflow", "perflow"]

    def shown(name, steps):
        row = measured.row(name, steps)
        return results.number(row.distance) + (" (b)" if any(row is each for each, _ in measured.unbeaten) else "")

    assert rows["reflow"][2:5] == [shown("reflow", steps) for steps in (1, 2, 4)]
    assert rows["one_step (reflow, one_step)"][2:4] == [shown("one_step", 1), "-"]
    assert rows["perflow"][2:6] == ["-", "-", *(shown("perflow", n) for n in (4, 8))]
    assert rows["teacher, dpm_solver_pp_2m"][3] == results.number(measured.row("teacher", 2, fine=True).distance)
    base = measured.baseline(measured.row("perflow", 4))
    assert rows["perflow"][6] == f"{results.number(base.distance)} {base.solver}"
    images = {entry["name"]: sum(part["images"] for part in entry["parts"]) for entry in record["entries"]}
    assert {name: int(row[1].replace(",", "")) for name, row in rows.items() if row[1] != "-"} == {
        "one_step (reflow, one_step)": images["one_step"], "reflow": images["reflow"], "perflow": images["perflow"],
    }  # fmt: skip
    parts = {part["stage"]: part["images"] for entry in record["entries"] for part in entry["parts"]}
    assert parts["one_step"] == pytest.approx(2 * parts["one_step-reflow"], abs=256)
    done = {stage: read_json(run.stage(stage).done)["images"] for stage in parts}
    assert done == parts
    calls = {name: int(row[-1].replace(",", "")) for name, row in rows.items() if row[-1] != "-"}
    assert calls["reflow"] == calls["one_step (reflow, one_step)"] == 500 * 12
    assert calls["perflow"] == 4 * 8 * images["perflow"] / 4, "8 Euler steps of the teacher for each image"
    found = comparison_table.found(run)
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert "comparison.md" in said and "comparison.svg" in said
    assert "distill compare digits --recipes one_step,reflow,perflow" in page


@pytest.mark.long
def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    guided = ["stages.reflow.recipe=reflow/perflow", "stages.reflow.pairs=null",
              "stages.reflow.options={windows: 2, solver_steps: 3, guidance_scale: 2.0}",
              "stages.one_step.init=null", "stages.evaluate.students={}"]  # fmt: skip
    done = distill(
        "compare", "digits", "--dry-run", "--recipes", "perflow", "--budget", "0.05", *SMALL[:3], *guided,
        "launch.procs=2", cwd=tmp_path, env={"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line.split() for line in done.stdout.splitlines() if "perflow" in line]
    assert line[-1] == "6", "3 steps, each of two calls, since it is guided; those of both processes"
    assert done.stdout.endswith("nothing was written\n")
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.glob("distill-*")) == [], "the rehearsal is gone"


@pytest.mark.long
def test_a_mixture_is_compared_by_its_own_distance(tmp_path):
    small = ["stages.pairs.count=2048", "stages.pairs.shard=2048", "stages.reflow.network.width=16"]
    done = distill("compare", "mixture-2d", "--recipes", "reflow", "--budget", "0.01", *small,
                   "stages.evaluate.samples=256", "stages.evaluate.block=256", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "runs" / "mixture-2d" / "comparison.json").read_text())
    (entry,) = record["entries"]
    assert entry["pair_calls"] == 2048 * 63
    assert entry["parts"][0]["measured"]["teacher_calls"] == 0
    assert "SW2@1" in (tmp_path / "runs" / "mixture-2d" / "comparison.md").read_text()
