"""Events of a run, with one file per process: merged by time, read from either end, in bounded memory."""

import json
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from commands import command
from runs import make_run

from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.reports import run_status
from distill.runs import events, jobs
from distill.runs.run_store import CREATED, RunPaths, append_event, event_files, event_line, read_events


def put(path: Path, *times: float, cut: str = "") -> None:
    """A file of events that are named as the file is, with these times."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"time": at, "event": f"{path.stem} {number}"}) + "\n" for number, at in enumerate(times)]
    path.write_text("".join(lines) + cut)


def names(found) -> list[str]:
    return [event["event"] for event in found]


@pytest.fixture
def run(tmp_path) -> RunPaths:
    return RunPaths(tmp_path / "one")


def test_files_are_merged_by_time_then_by_name_and_keep_their_own_order(run):
    run.root.mkdir()
    put(run.old_events, 1, 2, 9)
    put(run.events / "b.jsonl", 3, 5, 4, 9, cut='{"time": 10, "eve')
    put(run.events / "a.jsonl", 3, 8, 9)
    put(run.events / ".c.jsonl", 1)
    put(run.events / "notes.txt", 1)
    expected = [
        "events 0", "events 1", "a 0", "b 0", "b 1", "b 2", "a 1", "events 2", "a 2", "b 3",
    ]  # fmt: skip
    assert names(read_events(run)) == expected
    assert names(read_events(run, ["b 3", "a 0"])) == ["a 0", "b 3"]
    put(run.events / "b.jsonl", 3, 4, 5, 9, cut='{"time": 10, "eve')
    assert names(events.backwards(event_files(run), 10**6)) == expected[::-1]
    size = len(run.old_events.read_text()) // 3
    assert names(events.backwards(event_files(run), 3 * size)) == expected[:-4:-1]


@pytest.mark.process
def test_each_process_writes_a_file_of_its_own(run):
    run.root.mkdir()
    code = (
        "import sys\nfrom pathlib import Path\nfrom distill.runs.run_store import RunPaths, append_event\n"
        "for number in range(200): append_event(RunPaths(Path(sys.argv[1])), sys.argv[2], number=number)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(run.root), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    append_event(run, "d")
    append_event(run, "d")
    assert len(event_files(run)) == 4
    assert run.events / f"{Owner.this().token}.jsonl" in event_files(run)
    found = list(read_events(run))
    assert [event["time"] for event in found] == sorted(event["time"] for event in found)
    for name in "abc":
        assert [event["number"] for event in found if event["event"] == name] == list(range(200))


def test_a_disk_that_is_full_for_a_moment_spoils_no_later_line(run):
    run.root.mkdir()
    append_event(run, "first")
    (own,) = event_files(run)
    size, limits = own.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))  # the second line is cut
    try:
        with pytest.raises(RunError, match=f"^cannot write {own}: "):
            append_event(run, "second")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert own.stat().st_size == size + 10
    append_event(run, "third")
    assert names(read_events(run)) == ["first", "third"]


def test_a_run_of_an_earlier_version_is_shown_and_gone_on_with(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs")
    (run.root / CREATED).rename(run.old_events)
    run.events.rmdir()
    with run.old_events.open("a") as file:
        file.write(event_line("started", pid=1) + event_line("stopped", message="by TERM"))
    assert command(capfd, "show", "one").out.startswith("one  stopped: by TERM")
    assert "events  runs/one/events.jsonl\n" in command(capfd, "show", "one").out
    before = run.old_events.read_bytes()
    append_event(run, "started", pid=2)
    append_event(run, "failed", message="no room")
    assert run.old_events.read_bytes() == before
    found = run_status.read(run)
    assert (found.state, found.message, len(found.stages)) == ("failed", "no room", 5)
    assert found.created == json.loads(before.splitlines()[0])["time"]
    assert "events  runs/one/events\n" in command(capfd, "show", "one").out
    assert names(read_events(run)) == ["created", "started", "stopped", "started", "failed"]


def test_a_run_that_was_preempted_a_thousand_times(tmp_path):
    """Neither memory nor open files nor what is read grows with what each of its processes has written."""
    run = make_run(tmp_path)
    for number in range(1000):
        lines = [{"event": "started"}, *[{"event": "progress", "label": "teach", "done": number}] * 10]
        text = "".join(json.dumps({"time": 2e9 + number, **line}) + "\n" for line in lines)
        (run.events / f"{number * 7919 % 1000:024}.jsonl").write_text(text)
    run.stage("teach").root.mkdir(parents=True)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 10, limits[1]))
    try:
        (found,) = run_status.read_all([run])
        tracemalloc.start()
        times = [event["time"] for event in read_events(run)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (found.state, found.stages[0].done) == ("stopped", 999)
    assert times == sorted(times) and len(times) == 11_001
    assert peak < 25e6


def test_what_is_no_folder_of_events_is_named(run):
    run.root.mkdir()
    run.events.write_text("")
    run.spec.write_text("")
    with pytest.raises(InputError, match="^.*/one/events cannot be read: it is not a folder; delete it$"):
        run_status.read(run)
    with pytest.raises(RunError, match="^cannot write .*/one/events/[0-9a-f]{24}[.]jsonl: "):
        append_event(run, "stopped")


# --- jobs ---


def test_a_job_and_who_submits_it_write_files_of_their_own(tmp_path):
    run = make_run(tmp_path)
    run.jobs.mkdir()
    fields = {"stages": ["teach"], "parts": None, "script": "teach.sbatch", "after": []}
    jobs.append(run, "7", "submitted", **fields)
    (run.jobs / "7" / "another.jsonl").write_text(event_line("began", restart=0))
    jobs.append(run, "7", "ended", restart=0, why="crash", again=True)
    old = event_line("submitted", **fields) + event_line("began", restart=0)
    (run.jobs / "5.jsonl").write_text(old)  # of an earlier version
    jobs.append(run, "5", "ended", restart=0, why="done", again=False)
    assert (run.jobs / "5.jsonl").read_text() == old
    token = Owner.this().token
    assert sorted(path.name for path in (run.jobs / "7").iterdir()) == sorted(
        ["another.jsonl", f"{token}.jsonl", f"submitted-{token}.jsonl"]
    )
    assert sorted(job.id for job in jobs.submitted(run)) == ["5", "7"]
    for job in ("5", "7"):
        assert sorted(names(jobs.history(run, job))) == ["began", "ended", "submitted"]
    assert jobs.restarts(run, ["7"]) == {"crash": 1}
