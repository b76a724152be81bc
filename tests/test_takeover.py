"""Claims of processes in other containers and hosts, which cannot be looked up: renewed, given up, taken over."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from commands import command
from runs import folder_bytes, make_run

from distill.core import atomic, lease
from distill.core.errors import InputError
from distill.core.owners import Owner
from distill.runs import claims
from distill.runs.run_store import CREATED, RunPaths, event_files

EVERY = 0.2  # seconds between two renewals of the processes here
LIMIT = lease.MISSED * EVERY
ROOT = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]

HOLD = """
import os, sys, time
from pathlib import Path
from distill.runs import claims
from distill.runs.run_store import RunPaths, append_event
run = RunPaths(Path(sys.argv[1]))
with claims.claim(run, note=lambda message: print("noted", message, flush=True), every=float(sys.argv[2])):
    print("taken", os.getpid(), flush=True)
    while True:
        append_event(run, "beat")
        time.sleep(0.001)
"""


class Holder:
    """A process that claims a run and writes to it without end."""

    def __init__(self, run: RunPaths, *prefix: str, every: float = EVERY) -> None:
        self.contained = bool(prefix)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-c", HOLD, str(run.root), str(every)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said = self.process.stdout.readline().split()

    @property
    def pid(self) -> int:
        """As this process counts; the first of a container is the only child of `unshare`."""
        number = self.process.pid
        return int(Path(f"/proc/{number}/task/{number}/children").read_text()) if self.contained else number

    def kill(self) -> str:
        """What it had to say."""
        self.process.kill()
        return self.process.communicate()[1]


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "store")


@pytest.fixture(scope="session")
def container() -> list[str]:
    """What starts a command as the first process of a pid namespace."""
    command = ["unshare", *ROOT, "--pid", "--fork", "--kill-child", "--mount-proc"]
    tried = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no pid namespace can be made here: {tried.stderr}")
    return command


def refusal(run: RunPaths) -> str:
    with pytest.raises(InputError) as caught:
        claims.claim(run).__enter__()
    return str(caught.value)


def plant(run: RunPaths, age: float, **fields: object) -> None:
    """A claim that was renewed some seconds ago."""
    record = run.running / claims.RECORD
    run.running.mkdir(exist_ok=True)
    record.write_text(json.dumps(fields))
    os.utime(record, ns=(0, round(claims._now(run.root) - age * 1e9)))


# --- another container ---


@pytest.mark.process
def test_another_container_is_refused_while_the_claim_is_renewed_and_takes_over_later(run, container):
    holder = Holder(run, *container)
    assert holder.said == ["taken", "1"], "the first process of its namespace"
    deadline = time.monotonic() + 3 * LIMIT
    while time.monotonic() < deadline:
        said = refusal(run)
        assert said.startswith(
            f"run 'one' is being executed by process 1 in another container on {os.uname().nodename}"
        )
        assert said.endswith(
            "; wait for it, or stop it there; if that process no longer exists, run this command again in 1 s"
        ), said
        assert claims.executing(run).pid == 1
        with pytest.raises(InputError, match="in another container"):
            claims.refuse_if_executing(run)
    other = subprocess.run(
        [*container, sys.executable, "-c", HOLD, str(run.root), "1"], capture_output=True, text=True, check=False
    )
    assert "InputError: run 'one' is being executed by process 1 in another container" in other.stderr
    assert holder.kill() == ""
    killed = time.monotonic()
    while claims.executing(run) is not None:
        assert time.monotonic() - killed < LIMIT + 1
        time.sleep(0.01)
    assert time.monotonic() - killed > LIMIT - 2 * EVERY
    with claims.claim(run):
        assert claims.executing(run) == Owner.this()


@pytest.mark.process
def test_in_its_own_container_a_killed_process_is_known_to_be_gone_at_once(run, container):
    script = f"""
import subprocess, sys
holder = subprocess.Popen([sys.executable, "-c", {HOLD!r}, sys.argv[1], "30"], stdout=subprocess.PIPE, text=True)
assert holder.stdout.readline().startswith("taken")
holder.kill(), holder.wait()
subprocess.run([sys.executable, "-c", {HOLD!r}.partition("while")[0], sys.argv[1], "30"], check=True)
"""
    done = subprocess.run(
        [*container, sys.executable, "-c", script, str(run.root)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, "taken", "")
    assert claims.executing(run) is None


@pytest.mark.process
def test_where_proc_shows_another_namespace_nothing_is_looked_up(run, container):
    """As with the /proc of the host: there, the number of a process means another one."""
    container = [option for option in container if option != "--mount-proc"]
    holder = Holder(run, *container)
    seen = claims.owner(run.running)
    assert (seen.pid, seen.is_here, seen.namespace.endswith(f"]:{holder.pid}")) == (1, False, True)
    assert "process 1 in another container" in refusal(run)
    holder.kill()
    code = "from distill.core.owners import Owner; print(Owner.this().is_here, Owner.this() == Owner.this())"
    done = subprocess.run([*container, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False True\n"


@pytest.mark.process
def test_a_process_that_was_suspended_too_long_ends_before_it_writes(run, container):
    holder = Holder(run, *container)
    os.kill(holder.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    while claims.executing(run) is not None:
        assert time.monotonic() - stopped < LIMIT + 1
        time.sleep(0.01)
    with claims.claim(run, every=EVERY):
        before = folder_bytes(run.root)
        os.kill(holder.pid, signal.SIGCONT)
        out, err = holder.process.communicate(timeout=30)
        assert holder.process.returncode == 1
        assert err == (
            f"error: process {os.getpid()} on {os.uname().nodename} has taken over run 'one', because this process (1 "
            f"on {os.uname().nodename}) was suspended or could not reach {run.root} for too long; this process exits "
            "and writes nothing more; what was saved is intact. When no other process executes the run, you can resume "
            f"it here with: distill run {run.root} --resume\n"
        )
        assert out == f"noted {err.removeprefix('error: ')}"
        time.sleep(2 * EVERY)
        after = folder_bytes(run.root)
        written = {name: content for name, content in after.items() if content != before.get(name)}
        assert after.keys() >= before.keys()
        if written:  # the line that it was just writing, in its own file
            ((name, content),) = written.items()
            assert name.startswith("events/")
            assert content.startswith(before.get(name, b""))
            assert content.count(b"\n") == before.get(name, b"").count(b"\n") + 1
        assert claims.executing(run) == Owner.this()


@pytest.mark.process
def test_a_process_that_was_suspended_goes_on_if_nobody_has_taken_over(run, container, capfd):
    holder = Holder(run, *container)
    while len(event_files(run)) < 2:
        time.sleep(0.01)
    (own,) = [path for path in event_files(run) if path != run.root / CREATED]
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(LIMIT + EVERY)
    size = own.stat().st_size
    os.kill(holder.pid, signal.SIGCONT)
    time.sleep(LIMIT)
    assert own.stat().st_size > size
    assert "in another container" in refusal(run)
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(LIMIT + EVERY)
    with claims.claim(run, every=EVERY):
        os.kill(holder.pid, signal.SIGCONT)
        assert "has taken over run 'one'" in holder.process.communicate(timeout=30)[1]
    graves = list(run.root.glob(".dead-*"))
    assert {path.is_dir() for path in graves} == {True, False}, "the late renewal took one, who took over another"
    assert command(capfd, "clean", str(run.root), "--pairs", "--yes").code == 0
    assert list(run.root.glob(".dead-*")) == []


@pytest.mark.process
def test_a_process_on_this_machine_may_be_suspended_for_as_long_as_it_likes(run, monkeypatch):
    monkeypatch.setattr(claims, "GRACE", 0.0)
    holder = Holder(run)
    os.kill(holder.pid, signal.SIGSTOP)
    time.sleep(LIMIT + EVERY)
    assert f"process {holder.pid}; wait for it, or stop it: kill {holder.pid}" in refusal(run)
    holder.kill()


@pytest.mark.process
def test_a_claim_that_somebody_removes_ends_its_process(run):
    holder = Holder(run)
    (run.running / claims.RECORD).unlink()
    assert holder.process.wait(30) == 1
    said = (
        f"error: the lock folder {run.running} of this process was deleted, or another process is taking over the run; "
    )
    assert holder.process.communicate()[1].startswith(said)


# --- ages ---

FOREIGN = {"host": "elsewhere", "boot": "b", "pid": 7, "start": "1", "namespace": "pid:[1]"}


def test_the_age_of_a_renewal_decides_by_the_clock_of_the_file_system(run, monkeypatch):
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # ours is wrong
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for age, left in ((0.0, 120), (100.0, 20), (119.0, 1), (-100.0, 220)):
        plant(run, age, **FOREIGN, every=30.0)
        assert refusal(run) == (
            "run 'one' is being executed by process 7 on elsewhere; wait for it, or stop it there; if that process no "
            f"longer exists, run this command again in {left} s"
        )
        assert claims.executing(run).host == "elsewhere"
    for age in (121.0, 1e6, -121.0, -1e6):  # the last two: the clock was set back since
        plant(run, age, **FOREIGN, every=30.0)
        assert claims.executing(run) is None
        with claims.claim(run):
            assert claims.executing(run) == Owner.this()


def test_cancel_says_where_a_process_must_be_stopped(run, capfd):
    plant(run, 0.0, **FOREIGN | {"pid": os.getpid()}, every=30.0)  # our number, in another container
    done = command(capfd, "cancel", str(run.root))
    assert done.out == (
        f"run 'one' is being executed by process {os.getpid()} on elsewhere; stop it there: kill {os.getpid()}\n"
    )
    plant(run, 121.0, **FOREIGN, every=30.0)
    assert command(capfd, "cancel", str(run.root)).out == "no process or job of run 'one' is running or queued\n"


def test_what_is_never_renewed_holds_until_it_is_removed(run):
    plant(run, 1e9, **{name: value for name, value in FOREIGN.items() if name != "namespace"})
    assert refusal(run).endswith(
        f"process 7 on elsewhere; if that process no longer exists, delete its lock folder {run.running}"
    )


def test_a_claim_from_before_a_restart_of_this_machine_is_judged_by_its_age(run, monkeypatch):
    """Another machine may have the same host name."""
    monkeypatch.setattr(claims, "GRACE", 0.0)
    fields = asdict(replace(Owner.this(), boot="another"))
    plant(run, 100.0, **fields, every=30.0)
    assert refusal(run).endswith("if that process no longer exists, run this command again in 20 s")
    plant(run, 121.0, **fields, every=30.0)
    with claims.claim(run):
        pass


@pytest.mark.parametrize("every", [-1.0, 1e9, "soon", None])
def test_a_record_that_asks_for_patience_without_end_is_refused(run, every):
    plant(run, 0.0, **FOREIGN, every=every)
    assert refusal(run).endswith("running cannot be read; if no process executes this run, remove that folder")


def test_folders_of_another_container_are_left_alone_for_a_day(tmp_path):
    me = Owner.this()
    inside = replace(me, pid=2**31 - 1, namespace="pid:[1]")
    assert [Owner.of_label(each.label) for each in (me, inside)] == [me, inside]
    older = Owner.of_label(f"{me.pid},{me.start},{me.boot},{me.host}")
    assert older == replace(me, namespace="") and older.is_here and older.is_alive()
    new, old, dead = (tmp_path / f".{name}.new-{who.label}" for name, who in
                      (("a", inside), ("b", inside), ("c", replace(me, pid=2**31 - 1))))  # fmt: skip
    for folder in (new, old, dead):
        folder.mkdir()
    os.utime(old, (0, 0))
    atomic.clear_up(tmp_path)
    assert list(tmp_path.iterdir()) == [new]


# --- what renewing is exposed to ---


@pytest.mark.process
def test_a_full_disk_ends_nothing(run, container):
    """A renewal changes a time and needs no room; what it cannot do is done at the next."""
    script = """
import os, subprocess, sys, time
from pathlib import Path
from distill.runs import claims
from distill.runs.run_store import CREATED, create_run, event_line
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
run = create_run(folder, "one", {"spec.yaml": "name: one", CREATED: event_line("created")})
with claims.claim(run, every=0.1):
    with (folder / "fill").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            print(error.strerror)
    first = (run.running / claims.RECORD).stat().st_mtime
    time.sleep(1)
    assert (run.running / claims.RECORD).stat().st_mtime > first + 0.5
    (folder / "fill").unlink()
print(claims.executing(run))
"""
    (run.root / "disk").mkdir()
    done = subprocess.run(
        [*container, sys.executable, "-c", script, str(run.root / "disk")], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("No space left on device\nNone\n", "")


@pytest.mark.process
def test_a_child_neither_holds_nor_returns_the_claim_of_its_parent(run):
    script = """
import os, sys, threading, time
from pathlib import Path
from distill.runs import claims
from distill.runs.run_store import RunPaths, append_event
run = RunPaths(Path(sys.argv[1]))
with claims.claim(run, every=0.1):
    child = os.fork()
    if child == 0:
        assert threading.active_count() == 1
        time.sleep(0.5)
        append_event(run, "from a child")
        sys.exit()  # leaves the claim
    os.waitpid(child, 0)
    time.sleep(0.3)
    assert claims.owner(run.running).pid == os.getpid()
assert claims.owner(run.running) is None
assert threading.active_count() == 1
print("returned")
"""
    done = subprocess.run([sys.executable, "-c", script, str(run.root)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("returned\n", 0), done.stderr


# --- races ---

RACE = """
import os, sys, time
from pathlib import Path
from dataclasses import replace
from distill.runs import claims
from distill.core import lease
from distill.core.errors import InputError
from distill.core.owners import Owner
from distill.runs.run_store import RunPaths

claims.GRACE = 0.05
root, number = Path(sys.argv[1]), int(sys.argv[2])
me = replace(Owner.this(), namespace=f"pid:[{number}]", boot=f"boot {number}")  # others cannot look us up


class Lost(Exception):
    pass


def lost():
    raise Lost


for line in sys.stdin:
    what, index, moment = line.split()
    run = RunPaths(root / index)
    while time.time() < float(moment):
        pass
    if what == "renew":  # the process that was suspended goes on
        dead = claims._look(run.running)
        record = run.running / claims.RECORD
        try:
            kept = lease.Lease(record, CONTENT, 30.0, lambda at: claims._grave(run, DEAD, at), lost)
            kept._renew()
            print("holds", flush=True)
        except Lost:
            print("lost", flush=True)
        sys.stdin.readline()
        continue
    try:
        with claims.claim(run, me=me):
            print("holds", flush=True)
            sys.stdin.readline()
    except InputError as error:
        print("refused", flush=True)
        sys.stdin.readline()
"""


def race(tmp_path: Path, rounds: int, suspended: bool) -> dict[tuple[str, ...], int]:
    """What two processes say that take over one claim at once, or one of them and the suspended holder of the claim."""
    dead = Owner("elsewhere", "b", 7, "1", namespace="pid:[7]")
    content = json.dumps(asdict(dead) | {"every": 30.0}).encode()
    script = f"CONTENT = {content!r}\nfrom distill.core.owners import Owner\nDEAD = {dead!r}\n{RACE}"
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    found: dict[tuple[str, ...], int] = {}

    def shift(index: int) -> float:
        """Seconds that the first begins later. A renewal is quicker than to take over, which writes files first."""
        return index % 20 * 5e-4 if suspended else (index % 20 - 10) * 5e-5

    for index in range(rounds):
        run = RunPaths(tmp_path / str(index))
        run.running.mkdir(parents=True)
        (run.running / claims.RECORD).write_bytes(content)
        os.utime(run.running / claims.RECORD, (0, time.time() - 121))
        moment = time.time() + 0.002
        for number, racer in enumerate(racers):
            at = moment + (0 if number else shift(index))
            racer.stdin.write(f"{'renew' if suspended and number == 0 else 'take'} {index} {at}\n")
            racer.stdin.flush()
        said = tuple(racer.stdout.readline().strip() for racer in racers)
        found[said] = found.get(said, 0) + 1
        for racer in racers:
            racer.stdin.write("on\n")
            racer.stdin.flush()
    for racer in racers:
        racer.stdin.close()
        assert racer.wait(30) == 0
    return found


@pytest.mark.process
@pytest.mark.parametrize("rounds", [100, pytest.param(5000, marks=pytest.mark.long)])
def test_of_two_that_take_over_at_once_one_does(tmp_path, rounds):
    found = race(tmp_path, rounds, suspended=False)
    assert set(found) <= {("holds", "refused"), ("refused", "holds")} and sum(found.values()) == rounds, found


@pytest.mark.process
@pytest.mark.parametrize("rounds", [100, pytest.param(5000, marks=pytest.mark.long)])
def test_the_suspended_holder_and_who_takes_over_never_both_hold_the_run(tmp_path, rounds):
    found = race(tmp_path, rounds, suspended=True)
    assert set(found) <= {("holds", "refused"), ("lost", "holds")} and sum(found.values()) == rounds, found
