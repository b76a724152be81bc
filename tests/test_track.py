"""Trackers show what the events of a run say, as often as they are asked, and cannot disturb the run."""

import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from commands import command, snapshot
from runs import distill, kill, make_run, start, wait_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_outside_solver import install

from distill.core.errors import InputError, RunError
from distill.reports import tracking
from distill.runs.results import load_results
from distill.runs.run_store import RunPaths, append_event, read_events
from distill.trackers import find_tracker, tracker_names

HERE = Path(__file__).parent
OUTSIDE = (HERE / "outside" / "outside_tracker.py").read_text()
FAILS = OUTSIDE.replace(
    '        self._write(f"{at.stage} {at.done} {at.unit}: {dict', "        raise OSError(28, 'full \\x1b[31m')  # {"
)
SPEC = """
name: one
data: {kind: digits}
stages:
  teach:
    kind: train
    recipe: pretrain/flow_matching
    network: {kind: unet, channels: [8], layers_per_block: 1}
    images: 256
    batch_size: 32
    checkpoint: {images: 64, keep: 2}
  evaluate:
    kind: evaluate
    teacher: teach
    teacher_steps: [1, 2]
    fine_steps: 3
    students: {teach: [1]}
    baselines: []
    samples: 250
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages, with the trackers `lines` and `fails`."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    make_site(tmp_path / "site")
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.startswith("outside_")]:
        del sys.modules[name]


def make_site(site: Path) -> None:
    install(site, "outside-trackers", "distill.trackers", lines="outside_tracker", fails="outside_fails")
    shutil.copy(HERE / "outside" / "outside_tracker.py", site)
    assert FAILS != OUTSIDE
    (site / "outside_fails.py").write_text(FAILS)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A folder with a small run that two trackers have followed, of which one failed; and what the command printed."""
    folder = tmp_path_factory.mktemp("track")
    (folder / "spec.yaml").write_text(SPEC)
    make_site(folder / "site")
    path = os.pathsep.join([str(folder / "site"), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = distill(
        "run", "spec.yaml", "--track", "tensorboard", "--track", "fails",
        cwd=folder, env={"OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)}, fresh=True,
    )  # fmt: skip
    return folder, done


@pytest.fixture
def finished(followed, monkeypatch):
    """The run of `followed`."""
    folder, done = followed
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield RunPaths(folder / "runs" / "one")
    torch.set_num_threads(before)


def scalars(run: RunPaths) -> dict[tuple[str, str], list[tuple[float, int, float]]]:
    """(stage, name) -> [(time, step, value)], as TensorBoard shows them."""
    found = {}
    for folder in sorted(run.tracking("tensorboard").iterdir()):
        shown = EventAccumulator(str(folder)).Reload()
        for name in shown.Tags()["scalars"]:
            found[folder.name, name] = [(each.wall_time, each.step, each.value) for each in shown.Scalars(name)]
    return found


def logged(run: RunPaths, stage: str, name: str) -> list[tuple[float, int, float]]:
    """The same from the run's events."""
    found = (event for event in read_events(run, ["progress"]) if event["label"] == stage)
    return [(event["time"], event["done"], event["logs"][name]) for event in found if name in event["logs"]]


def approximately(points: list[tuple[float, int, float]]) -> list[object]:
    return [(time, step, pytest.approx(value, rel=1e-6)) for time, step, value in points]  # float32


# --- a run that is done ---


@pytest.mark.process
def test_a_tracker_that_fails_is_a_warning_and_the_run_succeeds(followed):
    folder, done = followed
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert "warning: the tracker 'fails' failed with exit code 1; the run is not affected. Its output is in" in warning
    log = (folder / "runs" / "one" / "logs" / "track-fails.log").read_text()
    assert "error: the tracker 'fails' failed: " in log and "outside_fails.py, line 20: OSError: [Errno 28] full" in log
    assert "\x1b" not in log and "Traceback" not in log
    run = RunPaths(folder / "runs" / "one")
    assert [stage for stage in ("teach", "evaluate") if run.stage(stage).done.exists()] == ["teach", "evaluate"]
    assert [event["event"] for event in read_events(run, ["failed", "finished"])] == ["finished"]


@pytest.mark.process
def test_scalars_are_those_of_the_events_followed_or_replayed(capfd, finished):
    while_it_ran = scalars(finished)
    loss = logged(finished, "teach", "loss")
    assert loss[-1][1] == 256 and while_it_ran["teach", "loss"] == approximately(loss)
    assert while_it_ran["teach", "grad_norm"] == approximately(logged(finished, "teach", "grad_norm"))
    rows = load_results(finished.stage("evaluate")).rows
    euler = [(row.nfe, row.distance) for row in rows if row.label == "teacher, euler"]
    shown = while_it_ran["evaluate", "teacher, euler/FD-digits"]
    assert [(step, value) for _, step, value in shown] == [
        (1, pytest.approx(euler[0][1])),
        (2, pytest.approx(euler[1][1])),
    ]
    assert [step for _, step, _ in while_it_ran["evaluate", "teach/rms"]] == [1]
    count = len(list(read_events(finished)))
    for options in ([], ["--to", "tensorboard"], ["--follow"]):
        done = command(capfd, "track", "one", *options)
        assert (done.code, done.err) == (0, "")
        assert done.out == (
            f"passed {count} events of run 'one' on to tensorboard\n"
            "to look at it: tensorboard --logdir runs/one/tracking/tensorboard\n"
        )
        assert scalars(finished) == while_it_ran


@pytest.mark.process
def test_samples_of_the_checkpoints_that_exist_are_those_of_sample(capfd, finished, tmp_path):
    done = command(capfd, "track", "one", "--to", "tensorboard", "--samples", "20")
    assert done.code == 0, done.err
    shown = EventAccumulator(str(finished.tracking("tensorboard") / "teach")).Reload()
    pictures = shown.Images("samples")
    assert [each.step for each in pictures] == [192, 256], "two checkpoints are kept"
    out = tmp_path / "sample.png"
    assert command(capfd, "sample", "one/teach", "--count", "20", "--seed", "0", "--out", str(out)).code == 0
    assert pictures[1].encoded_image_string == out.read_bytes() != pictures[0].encoded_image_string
    notes = [each.tensor_proto.string_val[0].decode() for each in shown.Tensors("notes")]
    assert notes[0].startswith("started on ") and notes[-1] == "done"
    evaluation = EventAccumulator(str(finished.tracking("tensorboard") / "evaluate")).Reload()
    row = load_results(finished.stage("evaluate")).rows[0]
    assert (
        evaluation.Images(row.label)[0].encoded_image_string
        == (finished.stage("evaluate").root / row.picture).read_bytes()
    )


@pytest.mark.process
def test_wandb_offline_has_the_same_numbers_and_the_same_id_each_time(finished):
    from wandb.proto.wandb_internal_pb2 import Record

    def tracked() -> list[Record]:
        env = {"WANDB_MODE": "offline"}
        done = distill("track", "one", "--to", "wandb", cwd=finished.root.parent.parent, env=env, fresh=True)
        assert done.returncode == 0, done.stderr
        assert "upload it first: wandb sync runs/one/tracking/wandb/wandb/offline-run-*\n" in done.stdout
        (file,) = finished.tracking("wandb").glob("wandb/offline-run-*/*.wandb")
        return [Record.FromString(content) for content in wandb_records(file.read_bytes())]

    first, second = tracked(), tracked()
    (about,) = [record.run for record in first if record.HasField("run")]
    assert (about.display_name, about.project) == ("one", "distill")
    assert about.run_id == [record.run for record in second if record.HasField("run")][0].run_id
    for records in (first, second):
        rows = [
            {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for record in records
        ]
        shown = [(int(row["teach/images"]), float(row["teach/loss"])) for row in rows if "teach/loss" in row]
        assert shown == [(step, pytest.approx(loss)) for _, step, loss in logged(finished, "teach", "loss")]
    assert {r.metric.name: r.metric.step_metric for r in first if r.HasField("metric")}["teach/loss"] == "teach/images"


def wandb_records(content: bytes) -> list[bytes]:
    """The records of a .wandb file: those of LevelDB's log, after seven bytes of its own."""
    place, part, found = 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768  # a record may be in several parts, which do not cross the end of a block
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7]) if left >= 7 else (0, 0)
        if kind == 0:
            place += left
            continue
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


# --- trackers ---


def progress(run: RunPaths, done: int, loss: float) -> None:
    append_event(
        run, "progress", label="teach", unit="images", done=done, total=512, per_second=1.0, logs={"loss": loss}
    )


def lines(run: RunPaths) -> list[str]:
    return (run.tracking("lines") / "lines").read_text().splitlines()


def test_what_a_resumed_run_repeats_is_shown_once(tmp_path):
    run = make_run(tmp_path)
    for done, loss in ((128, 2.0), (256, 1.5), (384, 99.0), (256, 1.5), (384, 1.25), (512, float("nan"))):
        progress(run, done, loss)
    with tracking.opened(run, "tensorboard") as feed:
        assert feed.more() == 7
    shown = [(step, value) for _, step, value in scalars(run)["teach", "loss"]]
    assert shown[:-1] == [(128, 2.0), (256, 1.5), (384, 1.25)]
    assert shown[-1] == (512, pytest.approx(float("nan"), nan_ok=True))


def test_an_outside_tracker_gets_what_is_new_and_only_whole_lines(tmp_path, site):
    run = make_run(tmp_path / "store")
    assert tracker_names() == ["tensorboard", "wandb", "fails", "lines"]
    with tracking.opened(run, "lines") as feed:
        assert (feed.more(), feed.more()) == (1, 0)
        append_event(run, "stage started", stage="teach", kind="train", device="cpu")
        progress(run, 128, 2.0)
        append_event(run, "warning", label="teach", text="<b>")
        append_event(run, "progress", label="no stage", done=1)
        assert feed.more() == 4
        (file,) = [path for path in run.events.iterdir() if path.name != "created.jsonl"]
        with file.open("a") as other:
            other.write('{"time": 1e10, "event": "progress", "label": "teach", "done": 256, "logs": {"loss": 1')
            other.flush()
            assert feed.more() == 0
            other.write(".5}}\n")
        assert feed.more() == 1
        assert lines(run) == [
            "one one",
            "teach 0 images: started on cpu",
            "teach 128 images: {'images per second': 1.0, 'loss': 2.0}",
            "teach 128 images: warning: <b>",
            "teach 256 images: {'loss': 1.5}",
        ]
        progress(run, 256, 1.0)
        assert feed.more() == 1 and lines(run)[5:] == [
            "teach back to 256",
            "teach 256 images: {'images per second': 1.0, 'loss': 1.0}",
        ]


def test_one_that_fails_is_one_message_and_changes_nothing_of_the_run(capfd, tmp_path, site):
    run = make_run(tmp_path / "store")
    progress(run, 128, 2.0)
    before = snapshot(run.root)
    done = command(capfd, "track", str(run.root), "--to", "fails")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        f"error: the tracker 'fails' failed: {site}/outside_fails.py, line 20: OSError: [Errno 28] full \ufffd[31m; "
        f"the run is not affected. To pass everything on again: distill track {run.root} --to fails\n"
    )
    after = snapshot(run.root)
    assert {name: content for name, content in after.items() if not name.startswith("tracking")} == before


def test_a_run_is_tracked_by_one_process_at_a_time(capfd, tmp_path, site):
    run = make_run(tmp_path / "store")
    with tracking.opened(run, "lines"):
        done = command(capfd, "track", str(run.root), "--to", "lines")
        assert (done.code, done.out) == (2, "")
        assert "is tracking run 'one' with lines already; wait for it, or stop it\n" in done.err
        assert command(capfd, "track", str(run.root), "--to", "tensorboard").code == 0, "another tracker is free"
    assert command(capfd, "track", str(run.root), "--to", "lines").code == 0


def test_wrong_options_are_refused(capfd, tmp_path):
    run = make_run(tmp_path / "store")
    before = snapshot(tmp_path)

    def refused(*options: str) -> str:
        done = command(capfd, *options)
        assert (done.code, done.out, snapshot(tmp_path)) == (2, "", before)
        return done.err

    wrong = "error: unknown tracker 'tensorbord': did you mean 'tensorboard'? valid: tensorboard, wandb\n"
    assert refused("track", str(run.root), "--to", "tensorbord") == wrong
    assert (
        refused("run", "digits", "--store", str(tmp_path / "store"), "--name", "new", "--track", "tensorbord") == wrong
    )
    assert "--device cpu: no effect without --samples; remove it" in refused(
        "track", str(run.root), "--to", "tensorboard", "--device", "cpu"
    )
    assert "less than or equal to 256" in refused("track", str(run.root), "--to", "tensorboard", "--samples", "257")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.delitem(sys.modules, "distill.trackers.wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(sys, "path", [*sys.path, "/nowhere"])  # what was read before is not used
    with pytest.raises(
        InputError, match=r"^tracker 'wandb' needs the package wandb; install it with: pip install 'distill\[wandb\]'$"
    ):
        find_tracker("wandb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OUTSIDE.replace("def start", "def begin"), "start is missing; fix or uninstall the package"),
        (OUTSIDE.replace("def start(run: TrackedRun)", "def start()"), r"start must take \(run\); fix"),
        (OUTSIDE.replace("VIEW = ", "VIEW = 1 or "), "VIEW: Input should be a valid string; fix"),
    ],
    ids=["a part is missing", "other arguments", "of another type"],
)
def test_one_that_lacks_something_is_refused(site, text, message):
    (site / "outside_tracker.py").write_text(text)
    with pytest.raises(InputError, match=f"^tracker 'lines' of the package outside-trackers .*: {message}"):
        find_tracker("lines")


def test_samples_that_cannot_be_drawn_are_one_warning_for_a_stage(capfd, tmp_path, site):
    run = make_run(tmp_path / "store")
    asked = []

    def draw(stage: str, step: int) -> tuple[int, bytes] | None:
        asked.append((stage, step))
        if stage == "teach":
            raise RunError("no \x1b[31mprompts")
        return 8 * step, b"a picture"

    with tracking.opened(run, "lines", draw) as feed:
        for stage, step in (("teach", 1), ("reflow", 1), ("teach", 2), ("reflow", 2)):
            append_event(run, "saved", stage=stage, step=step)
        assert feed.more() == 5
    assert capfd.readouterr().err == "warning: no samples of stage 'teach' from here on: no \ufffd[31mprompts\n"
    assert asked == [("teach", 1), ("reflow", 1), ("reflow", 2)]
    assert lines(run)[1:] == ["reflow 8 images: samples, 9 bytes", "reflow 16 images: samples, 9 bytes"]


# --- the report of a run that trains ---


@pytest.mark.process
def test_a_report_can_be_written_while_it_trains_and_followed_to_its_stop(capfd, tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC.replace("images: 256", "images: 10000000"))
    run = RunPaths(tmp_path / "runs" / "one")
    process = start("run", "spec.yaml", "--track", "tensorboard", cwd=tmp_path, log=tmp_path / "log")
    try:
        assert wait_for(lambda: len(logged(run, "teach", "loss") if run.events.is_dir() else []) >= 2, process)
        done = command(capfd, "report", str(run.root))
        assert done.code == 0, done.err
        page = run.report.read_text()
        assert "No evaluation has finished yet." in page and "Numbers logged by stage teach" in page
        assert "of 10,000,000 images" in page and "<td>begun</td>" in page and "<td>waiting</td>" in page
        assert wait_for(lambda: run.tracking("tensorboard").is_dir(), process)
    finally:
        code = kill(process, 15)
    assert code == 75, (tmp_path / "log").read_text()
    assert scalars(run)["teach", "loss"] == approximately(logged(run, "teach", "loss"))
    assert "warning" not in (tmp_path / "log").read_text()
