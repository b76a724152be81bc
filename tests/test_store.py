"""Files are written atomically, and only one process at a time executes a run, even after kills."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from runs import CARD

from distill.core.atomic import write_atomic, write_json
from distill.core.errors import InputError, RunError
from distill.core.owners import Owner
from distill.exchange import student_card
from distill.reports import run_status
from distill.runs import claims, events
from distill.runs.run_store import (
    CREATED,
    RunPaths,
    append_event,
    create_run,
    event_files,
    event_line,
    find_run,
    read_events,
    runs,
)


def make(store, name="one", stages=("a", "b")):
    created = event_line("created", stages=dict.fromkeys(stages, "train"))
    return create_run(store, name, {"spec.yaml": "name: one\n", CREATED: created, "sub/mine.py": b"x"})


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- files ---


def test_write_atomic_leaves_the_old_whole_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, "old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"^cannot write .*folder: Is a directory; nothing was changed$"):
        write_atomic(tmp_path / "folder", "new")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert everything(tmp_path) == ["file", "folder"], "no temporary file stays"


def test_a_run_is_made_whole(tmp_path):
    run = make(tmp_path / "store")
    files = ["events", "events/created.jsonl", "spec.yaml", "sub", "sub/mine.py"]
    assert everything(tmp_path / "store") == ["one", *(f"one/{file}" for file in files)]
    assert [each.root for each in runs(tmp_path / "store")] == [run.root]


def test_a_run_name_is_used_once(tmp_path):
    make(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(InputError) as caught:
        make(tmp_path)
    assert str(caught.value) == (
        f"there is a run 'one' in {tmp_path} already; resume it with --resume, or start another with --name OTHER"
    )
    assert everything(tmp_path) == before


def test_find_run_by_name_and_by_folder(tmp_path, monkeypatch):
    run = make(tmp_path / "store")
    assert find_run(tmp_path / "store", "one").root == run.root
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("elsewhere"), "store/one").root == run.root
    with pytest.raises(InputError, match=r"^there is no run 'on' in .*store; did you mean 'one'\? valid: one$"):
        find_run(tmp_path / "store", "on")
    with pytest.raises(InputError, match="the store is empty; `distill run digits` creates a first run"):
        find_run(tmp_path / "empty", "one")


# --- events ---


def test_a_line_cut_by_a_kill_spoils_no_other(tmp_path):
    run = make(tmp_path)
    append_event(run, "a", number=1)
    (own,) = [path for path in run.events.iterdir() if path != run.root / CREATED]
    with own.open("a") as file:
        file.write('{"time": 1, "eve')
    append_event(run, "b")
    assert [event["event"] for event in read_events(run)] == ["created", "a", "b"]


def test_the_tail_of_events(tmp_path):
    run = make(tmp_path)
    for number in range(1000):
        append_event(run, "mark", number=number)
    tail = list(events.backwards(event_files(run), 1000))
    assert [event["number"] for event in tail] == list(range(999, 999 - len(tail), -1))
    assert 10 < len(tail) < 20


# --- claims ---


def held_by(run, owner):
    run.running.mkdir()
    write_json(run.running / "owner.json", asdict(owner))


@pytest.mark.process
def test_a_claim_excludes_others_and_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "GRACE", 0.1)
    run = make(tmp_path)
    before = everything(tmp_path)
    with claims.claim(run):
        assert claims.executing(run).pid == os.getpid()
        said = f"^run 'one' is being executed by process {os.getpid()}; wait for it, or stop it: kill {os.getpid()}$"
        with pytest.raises(InputError, match=said):
            claims.refuse_if_executing(run)
        other = subprocess.run(
            [sys.executable, "-c", TAKE, str(run.root), "0"], capture_output=True, text=True, check=False
        )
        assert "InputError: run 'one' is being executed" in other.stderr
    assert claims.executing(run) is None
    claims.refuse_if_executing(run)
    assert everything(tmp_path) == before


TAKE = """
import sys, time
from pathlib import Path
from distill.runs import claims
from distill.runs.run_store import RunPaths
claims.GRACE = 0.1
with claims.claim(RunPaths(Path(sys.argv[1]))):
    print("taken", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def take(run, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", TAKE, str(run.root), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.process
def test_the_claim_of_a_killed_process_is_taken_over_by_exactly_one(tmp_path):
    run = make(tmp_path)
    for _ in range(3):
        killed = take(run, 60)
        assert killed.stdout.readline() == "taken\n"
        killed.send_signal(signal.SIGKILL)  # a zombie from here on: nobody waits for it yet
        racers = [take(run, 1.5) for _ in range(6)]
        lines = [racer.communicate()[0] for racer in racers]
        assert sorted(lines) == [""] * 5 + ["taken\n"]
        killed.wait()
        assert claims.executing(run) is None


def test_a_process_number_that_was_given_away_again_is_no_owner(tmp_path):
    run = make(tmp_path)
    held_by(run, replace(Owner.this(), start="1"))  # our number, another process
    with claims.claim(run):
        assert claims.executing(run).start == Owner.this().start


def test_a_claim_from_before_the_last_boot_is_stale(tmp_path):
    run = make(tmp_path)
    held_by(run, replace(Owner.this(), boot="another"))
    claims.refuse_if_executing(run)


def test_a_claim_of_another_host_is_believed(tmp_path):
    run = make(tmp_path)
    held_by(run, Owner("elsewhere", "b", 7, "1"))
    gone = f"if that process no longer exists, delete its lock folder {run.running}"
    said = f"run 'one' is being executed by process 7 on elsewhere; {gone}"
    for attempt in (claims.refuse_if_executing, lambda run: claims.claim(run).__enter__()):
        with pytest.raises(InputError) as caught:
            attempt(run)
        assert str(caught.value) == said
    assert run_status.read(run).state == "running"


def test_a_claim_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "GRACE", 0.1)
    run = make(tmp_path)
    run.running.mkdir()
    (run.running / "junk").touch()
    with pytest.raises(
        InputError,
        match=r"^the lock folder \S+running does not name the process that created it; if no process executes the run, "
        "delete this folder$",
    ):
        claims.claim(run).__enter__()
    (run.running / "owner.json").write_text("{")
    with pytest.raises(
        InputError, match=r"running cannot be read; if no process executes this run, remove that folder$"
    ):
        claims.executing(run)


# --- how runs stand ---


def test_states(tmp_path):
    run = make(tmp_path)
    assert run_status.read(run).state == "new"
    append_event(run, "started", pid=1)
    found = run_status.read(run)
    assert (found.state, found.message) == ("stopped", "its process was killed")
    append_event(run, "stopped", message="by TERM")
    assert run_status.read(run).message == "by TERM"
    append_event(run, "started", pid=2)
    append_event(run, "failed", message="no more")
    assert (run_status.read(run).state, run_status.read(run).message) == ("failed", "no more")
    run.stage("a").root.mkdir(parents=True)
    append_event(run, "progress", label="a", done=5, total=10, unit="images", logs={"loss": 0.5})
    with claims.claim(run):
        found = run_status.read(run)
        assert found.state == "running"
        assert [(stage.name, stage.state, stage.done, stage.total) for stage in found.stages] == [
            ("a", "begun", 5, 10),
            ("b", "waiting", None, None),
        ]
    for name in ("a", "b"):
        run.stage(name).root.mkdir(parents=True, exist_ok=True)
        write_json(run.stage(name).done, {})
    assert run_status.read(run).state == "done"


def test_a_run_without_events_can_be_looked_at(tmp_path):
    run = make(tmp_path)
    shutil.rmtree(run.events)
    assert run_status.read(run).state == "new"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0 s ago"), (100, "100 s ago"), (7200, "2 h ago"), (180, "3 min ago"), (2e6, "23 d ago")]
)
def test_age(seconds, said):
    assert run_status.age(time.time() - seconds) == said


def test_students_are_what_their_cards_say(tmp_path):
    run = make(tmp_path)
    run.student("a").mkdir(parents=True)
    (run.student("a") / "distill.json").write_text(student_card.to_json(CARD))
    assert run_status.students(RunPaths(run.root)) == {"a": CARD}
