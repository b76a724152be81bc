"""A damaged run does not hide other runs and gives one clear error, whichever of its files is damaged."""

import json
import os
from pathlib import Path

import pytest
from commands import command
from runs import CARD, make_run

from distill.core.atomic import write_json
from distill.core.errors import InputError
from distill.core.text import short
from distill.evaluation import report_page
from distill.exchange import student_card
from distill.reports import comparison_table, run_status
from distill.runs import events, results
from distill.runs.run_store import CREATED, RunPaths, append_event, event_files, event_line, read_events, runs

ROW = {
    "network": "teacher", "role": "teacher", "solver": "heun", "steps": 16, "fine": True, "nfe": 31, "distance": None,
    "kid": None, "precision": None, "recall": None, "rms": 0.0, "images_per_second": 10.0, "straightness": None,
    "picture": "pictures/teacher.png",
}  # fmt: skip
RESULTS = {
    "stage": "evaluate", "samples": 10, "seed": 0, "block": 5, "device": "cpu", "guidance_scale": 1.0,
    "distance": None, "features": None, "reference": 0, "vector": True, "rows": [ROW],
}  # fmt: skip


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def fifo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def event(text: str):
    """A line more among the events."""

    def damage(run: RunPaths) -> None:
        with (run.root / CREATED).open("a") as file:
            file.write(text + "\n")

    return damage


def owner(text: str):
    return lambda run: put(run.running / "owner.json", text)


def looped(run: RunPaths) -> None:
    run.spec.unlink()
    run.spec.symlink_to(run.spec)


def no_folder(run: RunPaths) -> None:
    (run.root / CREATED).unlink()
    (run.root / CREATED).mkdir()


OWNER = {"host": "h", "boot": "b", "pid": 7, "start": "1"}
PROGRESS = {"time": 1.0, "event": "progress", "label": "teach", "unit": "images", "done": 1, "total": 2, "logs": {}}
CLAIM = "running cannot be read; if no process executes this run, remove that folder"

# Of what `list` reads: what was done to a run, and what is said of it.
SEEN = {
    "garbage as owner": (owner("garbage"), CLAIM),
    "an owner of another kind": (owner("[1, 2]"), CLAIM),
    "an owner without number": (owner(json.dumps(OWNER | {"pid": "many"})), CLAIM),
    "an owner of all processes": (owner(json.dumps(OWNER | {"pid": -1})), CLAIM),
    "a pipe as owner": (lambda run: fifo(run.running / "owner.json"), CLAIM),
    "a file as claims": (lambda run: put(run.units / "teach", ""), "teach cannot be read; if no process"),
    "a word for a count": (
        event(json.dumps(PROGRESS | {"done": "many"})),
        'created.jsonl cannot be used: progress.done: "many" given; input should be a valid integer; repair or delete '
        "the line that begins with '{\"time\": 1.0, \"event\": \"progress\", ",
    ),
    "a word for a time": (
        event('{"time": "soon", "event": "stopped"}'),
        'created.jsonl cannot be used: stopped.time: "soon" given; input should be a valid number',
    ),
    "a time after all dates": (event('{"time": 1e300, "event": "odd"}'), "created.jsonl cannot be used: time: 1e+300"),
    "no time at all": (event('{"time": NaN, "event": "odd"}'), "created.jsonl cannot be used: time: NaN given"),
    "a key of many lines": (
        event(json.dumps(PROGRESS | {"logs": {"x\nwarning: all is lost\n" * 8: "low"}})),
        "created.jsonl cannot be used: progress.logs.x warning: all is lost x warning: all is lost",
    ),
    "a kind of many lines": (
        lambda run: put(run.root / CREATED, event_line("created", stages={"teach": "train\n" * 50_000})),
        'created.jsonl cannot be used: created.stages.teach: "train\\ntrain',
    ),
    "a list for an event": (event("[1]"), "created.jsonl cannot be used: [1] given; input should be an object"),
    "a negative count": (event(json.dumps(PROGRESS | {"total": -1})), "progress.total: -1 given"),
    "a count without end": (event(json.dumps(PROGRESS | {"done": 10**400})), "progress.done: 1000"),
    "a pipe as events": (lambda run: fifo(run.root / CREATED), "created.jsonl cannot be read: it is a FIFO, not"),
    "a folder as events": (no_folder, "created.jsonl cannot be read: it is a folder, not a file; delete it"),
    "a device as events": (
        lambda run: ((run.root / CREATED).unlink(), (run.root / CREATED).symlink_to("/dev/zero")),
        "created.jsonl cannot be read: it is a device, not a file",
    ),
    "a pipe as spec": (lambda run: fifo(run.spec), "spec.yaml cannot be read: it is not a regular file"),
    "a spec that is itself": (looped, "spec.yaml cannot be read: Too many levels of symbolic links"),
}  # fmt: skip


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    for name in ("first", "bad", "last"):
        make_run(folder, name, "mixture-2d")
    append_event(RunPaths(folder / "last"), "stopped", message="stopped by SIGTERM")
    return folder


@pytest.mark.parametrize("what", SEEN)
def test_lists_show_the_others_and_name_the_bad_one(store, capfd, what):
    damage, said = SEEN[what]
    damage(RunPaths(store / "bad"))
    for look in ("list", "status"):
        done = command(capfd, look)
        assert (done.code, done.err) == (0, "")
        rows = [line.split()[:2] for line in done.out.splitlines()]
        assert [row for row in rows if row[0] in ("bad", "first", "last")] == [
            ["bad", "damaged"], ["first", "new"], ["last", "stopped"]
        ]  # fmt: skip
        (warning,) = [line for line in done.out.splitlines() if line.startswith("warning")]
        assert warning.startswith("warning: run 'bad' is damaged: ") and said in warning
        found = {each["name"]: each for each in json.loads(command(capfd, look, "--json").out)}
        assert [each["state"] for each in found.values()] == ["damaged", "new", "stopped"]
        assert said in found["bad"]["message"]
    for look in (["show"], ["status"], *([["run", "--resume"], ["logs"]] if what == "a pipe as spec" else [])):
        done = command(capfd, *look, "bad")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ") and said in done.err and done.err.count("\n") == 1


TO_STAGE = "delete that file and done.json to evaluate again"


def found(**changes: object) -> str:
    return json.dumps(RESULTS | changes)


def row(**changes: object) -> str:
    return json.dumps(RESULTS | {"rows": [ROW | changes]})


def linked(run: RunPaths) -> None:
    """A picture that lies elsewhere."""
    put(run.stage("evaluate").root / "results.json", found())
    put(run.root / "secret.png", "\x89PNG")
    (run.stage("evaluate").root / "pictures").mkdir()
    (run.stage("evaluate").root / "pictures" / "teacher.png").symlink_to(run.root / "secret.png")


def no_picture(run: RunPaths) -> None:
    put(run.stage("evaluate").root / "results.json", found())
    put(run.stage("evaluate").root / "pictures" / "teacher.png", "secret")


def result(text: str):
    return lambda run: put(run.stage("evaluate").root / "results.json", text)


def student(text: str):
    return lambda run: put(run.student("teach") / "distill.json", text)


# Of what only some commands read: what was done, what is said, and by which.
UNSEEN = {
    "empty results": (result(""), f"results.json cannot be used: it is not JSON; {TO_STAGE}", ["show", "report"]),
    "results of another kind": (result('{"a": 1}'), "results.json cannot be used: stage: is missing", ["show"]),
    "results nested without end": (result("[" * 100_000), "results.json cannot be used", ["show", "report"]),
    "results without rows": (result(found(rows=[])), "rows: [] given; list should have at least 1 item", ["show"]),
    "results without the fine row": (result(row(fine=False)), "the teacher's row with its fine solver is", ["report"]),
    "no rate": (result(row(images_per_second=0)), "images_per_second: 0 given", ["report"]),
    "numbers that are none": (result(row(rms=float("nan"))), "rows.0.rms: NaN given", ["show", "report"]),
    "names that move the cursor": (result(row(network="\x1b[2J")), "without control characters", ["show", "report"]),
    "a picture elsewhere": (
        result(row(picture="../../../../secret.png")),
        "rows.0.picture: \"../../../../secret.png\" given; a picture is a .png file of the stage's own folder, like "
        f"pictures/NAME.png; {TO_STAGE}",
        ["show", "report"],
    ),
    "a picture by its whole path": (result(row(picture="/etc/passwd.png")), "rows.0.picture", ["report"]),
    "a picture that is a link": (linked, "teacher.png cannot be used: it links out of its folder", ["report"]),
    "a picture that is none": (no_picture, "teacher.png cannot be used: it is not a PNG picture", ["report"]),
    "an empty card": (student(""), "teach/distill.json cannot be used", ["show", "status"]),
    "a card of another kind": (student("[]"), "teach/distill.json cannot be used", ["show", "status"]),
    "an empty record of the machine": (lambda run: put(run.env, ""), "env.json cannot be used: it is not", ["report"]),
    "a foreign record of the machine": (
        lambda run: put(run.env, '{"git": "none", "packages": 3}'), "env.json cannot be used: git: \"none\"", ["report"]
    ),
    "a number for stages": (lambda run: put(run.spec, "name: a\nstages: 3\n"), "spec.yaml: stages: 3 given", ["show"]),
    "a list for a spec": (lambda run: put(run.spec, "- 1\n"), "spec.yaml: contains [1], not a spec", ["show"]),
    "a damaged comparison": (lambda run: put(run.comparison, "{"), "comparison.json cannot be used: it is", ["report"]),
    "a word for a loss, long ago": (
        lambda run: (
            event(json.dumps(PROGRESS | {"logs": {"loss": "low"}}))(run),
            event(event_line("started", pid=1) * 2000)(run),
        ),
        "created.jsonl cannot be used: progress.logs.loss: \"low\" given", ["report"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSEEN)
def test_what_lists_do_not_read_is_an_error_of_who_reads_it(store, capfd, what):
    damage, said, commands = UNSEEN[what]
    bad = RunPaths(store / "bad")
    damage(bad)
    for look in ("list", "status"):
        done = command(capfd, look)
        assert (done.code, done.err) == (0, "")
        assert [line.split()[0] for line in done.out.splitlines()[2:]] == ["bad", "first", "last"]
    for look in commands:
        done = command(capfd, look, "bad")
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ") and said in done.err and done.err.count("\n") == 1
    assert not bad.report.exists()


def test_jobs_of_a_damaged_run_keep_no_other_from_being_listed(store, capfd):
    put(store / "bad" / "jobs" / "7.jsonl", event_line("submitted", stages=3, parts=None, script="a", after=[]))
    done = command(capfd, "status")
    assert done.code == 0
    assert [line.split()[:2] for line in done.out.splitlines()[2:5]] == [
        ["bad", "damaged"], ["first", "new"], ["last", "stopped"]
    ]  # fmt: skip
    assert "jobs/7.jsonl cannot be used: submitted.stages: 3 given" in done.out
    done = command(capfd, "status", "bad")
    assert (done.code, done.out) == (2, "") and "jobs/7.jsonl cannot be used" in done.err


def test_the_name_of_a_run_moves_no_cursor(store, capfd):
    (store / "bad").rename(store / "bad\x1b[2J\udcff")
    for look in ("list", "status"):
        done = command(capfd, look)
        assert done.code == 0 and "\x1b" not in done.out
        assert "bad\ufffd[2J\ufffd" in done.out
    done = command(capfd, "show", "bad\x1b[2J\udcff")
    assert done.code == 0 and "\x1b" not in done.out
    assert command(capfd, "report", "bad\x1b[2J\udcff").code == 0


def test_the_name_of_a_run_is_one_line(store, capfd):
    (store / "bad").rename(store / "bad\nwarning: all is lost")
    (store / "last").rename(store / "last\nwarning: all is lost")
    damage, _ = SEEN["garbage as owner"]
    damage(RunPaths(store / "bad\nwarning: all is lost"))
    for look in (
        ["list"],
        ["status"],
        ["show", "last\nwarning: all is lost"],
        ["status", "last\nwarning: all is lost"],
    ):
        done = command(capfd, *look)
        assert done.code == 0 and "last warning: all is lost" in done.out
        assert not [line for line in done.out.splitlines() if line.startswith("warning: all")]


def test_a_message_without_end_is_shown_short(store, capfd):
    append_event(RunPaths(store / "bad"), "failed", message="no\n" * 3000)
    for look in ("show", "status"):
        done = command(capfd, look, "bad")
        assert done.code == 0 and done.out.startswith("bad  failed: no no no") and len(done.out) < 3000


def test_of_very_many_losses_the_first_are_shown(store, capfd):
    run = RunPaths(store / "bad")
    (stage, *_) = next(read_events(run))["stages"]
    run.stage(stage).root.mkdir(parents=True)
    event(json.dumps(PROGRESS | {"label": stage, "logs": {f"{'x' * 40}{n}": 0.5 for n in range(1000)}}))(run)
    for look in ("show", "status"):
        done = command(capfd, look, "bad")
        assert done.code == 0 and "x" * 20 in done.out and len(done.out) < 20_000


def test_a_loss_that_is_no_number_is_null_for_programs(store, capfd):
    run = RunPaths(store / "bad")
    (stage, *_) = next(read_events(run))["stages"]
    run.stage(stage).root.mkdir(parents=True)
    event(json.dumps(PROGRESS | {"label": stage, "logs": {"loss": float("nan"), "norm": float("inf")}}))(run)

    def refuse(word):
        raise AssertionError(word)

    for look in (["list"], ["show", "bad"], ["status", "bad"]):
        found = json.loads(command(capfd, *look, "--json").out, parse_constant=refuse)
        found = found[0] if isinstance(found, list) else found
        assert found["stages"][0]["logs"] == {"loss": None, "norm": None}


def test_a_name_that_no_file_can_have_is_no_run(store, capfd):
    for name in ("x" * 300, "runs/" * 1000):
        done = command(capfd, "show", name)
        assert done.code == 2
        assert done.err.startswith(f"error: there is no run '{short(name)}' in runs; ")


# --- what is read, and what it costs ---


def read_bytes() -> int:
    """That this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def long_run(store: Path, *, done: bool) -> RunPaths:
    """A run with megabytes of events."""
    run = make_run(store, "long", "mixture-2d")
    stages = next(read_events(run))["stages"]
    with (run.root / CREATED).open("a") as file:
        file.writelines(json.dumps(PROGRESS | {"label": "pairs", "done": step}) + "\n" for step in range(10_000))
    for name in stages:
        run.stage(name).root.mkdir(parents=True)
        if done:
            write_json(run.stage(name).done, {})
    append_event(run, "finished" if done else "stopped", message="")
    assert (run.root / CREATED).stat().st_size > 10**6
    return run


@pytest.mark.parametrize("done", [True, False])
def test_a_list_reads_kilobytes_of_a_run_however_long(tmp_path, done):
    run = long_run(tmp_path, done=done)
    before = read_bytes()
    nothing = read_bytes() - before
    (found,) = run_status.read_all([run])
    assert read_bytes() - before - 2 * nothing < 16_384
    assert found.state == ("done" if done else "stopped")


def test_events_are_read_backwards_as_far_as_is_asked_for(tmp_path):
    run = long_run(tmp_path, done=True)
    forwards = list(read_events(run))
    files = event_files(run)
    assert list(events.backwards(files, 10**9)) == forwards[::-1]
    some = list(events.backwards(files, 50_000))
    assert some == forwards[: -len(some) - 1 : -1]
    assert len(some) > 100
    assert [each["event"] for each in read_events(run, ["created", "finished"])] == ["created", "finished"]


def test_a_line_without_end_is_passed_over(tmp_path):
    run = make_run(tmp_path, "one", "mixture-2d")
    with (run.root / CREATED).open("ab") as file:
        file.write(b"\0" * 3_000_000 + b"\n")
    append_event(run, "stopped", message="by TERM")
    assert [each["event"] for each in read_events(run)] == ["created", "stopped"]
    assert run_status.read(run).message == "by TERM"


def test_runs_are_what_has_a_spec(tmp_path):
    make_run(tmp_path, "one", "mixture-2d")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "registry").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "spec.yaml").touch()
    assert [run.name for run in runs(tmp_path)] == ["one"]
    assert runs(tmp_path / "missing") == runs(tmp_path / "notes.txt") == []


def test_a_list_tells_of_the_stage_that_is_begun_and_a_run_of_all(tmp_path):
    run = make_run(tmp_path, "one", "mixture-2d")
    for name in ("pairs", "reflow"):
        run.stage(name).root.mkdir(parents=True)
        append_event(run, "progress", label=name, unit="images", done=1, total=2, logs={})
        append_event(run, "saved", stage=name, step=3)
    write_json(run.stage("pairs").done, {})
    (brief,), whole = run_status.read_all([run]), run_status.read(run)
    assert [(stage.state, stage.done, stage.saved_step) for stage in brief.stages] == [
        ("done", None, None), ("begun", 1, None), ("waiting", None, None), ("waiting", None, None)
    ]  # fmt: skip
    assert [(stage.done, stage.saved_step) for stage in whole.stages[:2]] == [(1, 3), (1, 3)]


def test_cards_and_results_of_a_whole_run_are_read(tmp_path):
    run = make_run(tmp_path, "one", "mixture-2d")
    put(run.student("teach") / "distill.json", student_card.to_json(CARD))
    put(run.stage("evaluate").root / "results.json", found())
    assert run_status.students(run) == {"teach": CARD}
    assert results.of_run(run)["evaluate"].rows[0].picture == "pictures/teacher.png"
    assert results.picture(run.stage("evaluate").root, results.of_run(run)["evaluate"].rows[0].picture) is None
    assert "The teacher reaches RMS to the teacher" in report_page.write(run).read_text()  # though 0 has no logarithm
    put(run.comparison, " " * (2**24 + 1))
    with pytest.raises(InputError, match="comparison.json cannot be read: it has more than 16,777,216 bytes"):
        comparison_table.load(run)
