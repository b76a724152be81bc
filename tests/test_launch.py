"""The parent process of a run, with one process or several ranks: exit codes, signals, killed processes.

A fake process that follows the instructions of the test replaces `distill stage`, since only the parent is tested.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from choices import few
from commands import command
from runs import alive, folder_bytes, make_run, wait_for

import distill as package
from distill.core.errors import EXIT_FAILED, EXIT_INPUT, EXIT_PEER, EXIT_STOPPED, PeerLost, RunError, Stopped
from distill.execution import stages
from distill.launch import environment, local, ranks, tasks
from distill.runs import claims, todo
from distill.runs.run_store import RunPaths, read_events
from distill.training.world import World

# argv: stage RUN STAGE... --lifeline FD. A mode is "KIND CODE TEXT": what to do, and how to leave.
FAKE = """
import json, os, signal, sys, time
from pathlib import Path
folder, names, lifeline = Path(__file__).parent, sys.argv[3:-2], int(sys.argv[-1])
names = [name for name in names if name != "--measure"]
modes = json.loads((folder / "modes").read_text())
kind, code, text = modes.get(os.environ.get("RANK", "0"), modes["all"]).split(" ", 2)
heard = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
if kind in ("listen", "hang"):  # held back, taken one by one: a handler that another interrupts could lose its note
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
from distill.launch import local
local.watch(lifeline)
mine = f"{'+'.join(names)}.{os.environ.get('RANK', '0')}"
(folder / f"{mine}.new").write_text(json.dumps({**os.environ, "pid": os.getpid()}))
(folder / f"{mine}.new").rename(folder / f"{mine}.json")
while kind == "later" and not (folder / "go").exists():
    time.sleep(0.01)
if text:
    print(text, file=sys.stderr, flush=True)
leave = time.monotonic() + (60 if kind in ("listen", "hang", "deaf") else 0)
while (left := leave - time.monotonic()) > 0:
    if taken := signal.sigtimedwait(heard if kind == "listen" else [], left):
        with (folder / f"{mine}.signals").open("a") as notes:
            notes.write(signal.Signals(taken.si_signo).name + " ")
        if taken.si_signo != signal.SIGINT:
            leave = time.monotonic() + 0.5  # as if it saved; what else comes is noted too
for name in names if code == "0" else ():
    (Path(sys.argv[2]) / "stages" / name).mkdir(parents=True, exist_ok=True)
    (Path(sys.argv[2]) / "stages" / name / "done.json").touch()
sys.exit(int(code))
"""

STARTER = """
import os, signal, subprocess, sys
from pathlib import Path
from distill.launch import local, ranks
from distill.runs.run_store import RunPaths
root, stage, asked, ranks.FAILING, ranks.STOPPING, *names = sys.argv[1:]
ranks.FAILING, ranks.STOPPING = float(ranks.FAILING), float(ranks.STOPPING)
real = subprocess.Popen
def popen(command, **options):
    global asked
    process = real([command[0], stage, *command[4:]], **options)
    if asked:
        os.kill(os.getpid(), signal.Signals[asked])
        asked = ""
    return process
subprocess.Popen = popen
measure = names[-1] == "--measure"
sys.exit(local.run_stages(RunPaths(Path(root)), names[:-1] if measure else names, measure=measure))
"""
LISTEN, HANG, DEAF = "listen 75 ", "hang 75 ", "deaf 75 "


class Parent:
    """`run_stages` in a process of its own, over fakes."""

    def __init__(self, run, folder):
        self.run, self.folder, self.process = run, folder, None

    def launch(self, all_ranks, *names, asked="", failing=10, stopping=120, **modes):
        """asked: a signal that comes while the first process is started; modes: of single ranks, like r1="..."."""
        for path in self.folder.glob("*.json"):
            path.unlink()
        by_rank = {"all": all_ranks, **{rank[1:]: mode for rank, mode in modes.items()}}
        (self.folder / "modes").write_text(json.dumps(by_rank))
        values = [self.run.root, self.folder / "stage.py", asked, failing, stopping]
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER, *map(str, values), *(names or ["teach"])],
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def begun(self, procs=1, stage="teach"):
        """The environments of a group's processes, once all of them are there."""
        paths = [self.folder / f"{stage}.{rank}.json" for rank in range(procs)]
        assert wait_for(lambda: all(path.exists() for path in paths), self.process, timeout=60)
        return [json.loads(path.read_text()) for path in paths]

    def go(self):
        (self.folder / "go").touch()

    def end(self):
        """Its code and what it and rank 0 said, once everything has ended."""
        try:
            _, said = self.process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, said

    def signals(self, procs):
        return [(self.folder / f"teach.{rank}.signals").read_text().split() for rank in range(procs)]

    def resume(self):
        return f"resume with: distill run {self.run.root} --resume\n"


@pytest.fixture
def parent(tmp_path):
    """By the number of ranks, with changes of a preset. That of emoji has a cache stage, with processes of its own."""

    def build(procs=1, *changes, threads=1, preset="digits"):
        folder = tmp_path / "fake"
        folder.mkdir()
        (folder / "stage.py").write_text(FAKE)
        built.append(
            Parent(
                make_run(tmp_path / "runs", "one", preset, f"launch.procs={procs}", *changes, threads=threads), folder
            )
        )
        return built[-1]

    built = []
    yield build
    for each in built:
        if each.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)
            each.process.communicate()


def gone(environments, seconds=20):
    """Whether all these processes end within this time."""
    deadline = time.monotonic() + seconds
    while any(alive(env["pid"]) for env in environments) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(alive(env["pid"]) for env in environments)


def failures(run):
    return [event["message"] for event in read_events(run) if event["event"] in ("failed", "stopped")]


# --- one process ---


@pytest.mark.process
def test_the_parent_returns_the_childs_code_and_sets_its_threads(parent, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    one = parent(threads=3)
    for code in (0, 1, 2, 75):
        one.launch(f"leave {code} words", "teach", "pairs", "reflow")
        (env,) = one.begun(stage="teach+pairs+reflow")
        assert one.end() == (code, "words\n")
    assert env["OMP_NUM_THREADS"] == "3", "as the run recorded them"
    assert env["GOMP_SPINCOUNT"] == str(environment.SPINS), "or threads that wait take a core from other processes"
    assert not set(env) & set(local.RANK_VARIABLES), "whoever started us may be a rank of something else"
    assert not one.run.log(1).parent.exists()


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_the_users_choice(monkeypatch, name):
    for each in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(each, raising=False)
    bounded = {"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": str(environment.SPINS)}
    assert environment.thread_variables(4) == bounded
    monkeypatch.setenv(name, "1")
    assert environment.thread_variables(4) == {"OMP_NUM_THREADS": "4"}


def test_the_same_processes_compute_all_stages_but_the_cache():
    names = ["teach", "pairs", "reflow", "one_step", "evaluate"]
    assert local.groups(names, None) == [names]
    assert local.groups(["cache", *names], "cache") == [["cache"], names]


# --- what ranks are told ---


@pytest.mark.process
@pytest.mark.parametrize(("changes", "share"), [([], "2"), (["launch.threads=5"], "5")])
def test_each_rank_knows_its_place(parent, changes, share):
    one = parent(3, *changes, threads=7, preset="emoji")
    one.launch("leave 0 words", "cache", "teach")
    assert one.end() == (0, "words\n" * 2), "of rank 0 twice"
    ports = set()
    for stage in ("cache", "teach"):
        environments = one.begun(3, stage)
        ports |= (mine := {env["MASTER_PORT"] for env in environments})
        assert len(mine) == 1 and 1024 <= int(*mine) < 65536
        for rank, env in enumerate(environments):
            assert (env["RANK"], env["LOCAL_RANK"]) == (str(rank), str(rank))
            assert (env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"], env["MASTER_ADDR"]) == ("3", "3", "127.0.0.1")
            assert env["OMP_NUM_THREADS"] == share
        assert len({env["HF_MODULES_CACHE"] for env in environments}) == 3, "diffusers does not write it atomically"
    assert len(ports) == 2
    logs = {path.name: path.read_text() for path in one.run.log(1).parent.iterdir()}
    assert logs == {"rank-1.log": "words\n" * 2, "rank-2.log": "words\n" * 2}


@pytest.mark.process
def test_the_first_group_that_fails_is_the_last(parent):
    one = parent(2, preset="emoji")
    one.launch("leave 0 ", "cache", "teach", r0="leave 1 words")
    assert one.end() == (1, "words\n")
    assert not list(one.folder.glob("teach*"))


# --- signals ---


PASSED = [(s, a, p) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT) for a in (True, False) for p in (1, 3)]


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "to_all", "procs"),
    few(PASSED, (signal.SIGTERM, False, 3), (signal.SIGUSR1, False, 3), (signal.SIGINT, True, 3)),
)
def test_the_parent_passes_signals_on(parent, number, to_all, procs):
    """A terminal tells all processes of Ctrl-C, a scheduler tells one: either way each stops once, and saves."""
    one = parent(procs)
    one.launch(LISTEN)
    one.begun(procs)
    (os.killpg if to_all else os.kill)(one.process.pid, number)
    assert one.end() == (75, "")
    for heard in one.signals(procs):
        assert ("SIGTERM" if number == signal.SIGINT else number.name) in heard
        assert heard.count("SIGINT") == (1 if to_all and number == signal.SIGINT else 0), "a second: do not save"


@pytest.mark.process
@pytest.mark.parametrize("procs", [1, 3])
def test_a_child_that_had_not_begun_counts_as_stopped(parent, procs):
    one = parent(procs)
    one.launch(DEAF)
    one.begun(procs)
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (75, f"stopped before it had started; {one.resume()}")


@pytest.mark.process
def test_nobody_is_told_to_go_on_with_a_run_that_is_thrown_away(parent):
    one = parent()
    one.launch(DEAF, "teach", "--measure")
    one.begun()
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (75, f"stopped before it had started; {ranks.MEASURED}\n")
    one.launch(DEAF, "teach", "--measure")
    os.kill(one.begun()[0]["pid"], signal.SIGKILL)
    killed = f"error: the process was killed by SIGKILL (out of memory?); {ranks.MEASURED}\n"
    assert one.end() == (128 + 9, killed)


def test_what_was_stopped_while_it_was_measured_names_no_way_on(capfd, tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs")

    def stopped(paths, spec, names, stop, *, measure):
        raise Stopped("stopped by SIGTERM; saved: 1 image")

    monkeypatch.setattr(stages, "run", stopped)
    done = command(capfd, "stage", str(run.root), "teach", "--measure")
    assert (done.code, done.err) == (75, f"stopped; {ranks.MEASURED}\n")


@pytest.mark.process
@pytest.mark.parametrize("procs", [1, 3])
def test_a_signal_while_processes_are_being_started_reaches_all(parent, procs):
    one = parent(procs)
    one.launch(DEAF, asked="SIGINT")
    assert one.end() == (75, f"stopped before it had started; {one.resume()}")


@pytest.mark.process
def test_ranks_do_not_wait_long_for_one_that_had_not_begun(parent):
    """They have nothing to save, and may be waiting for it where no signal is looked at."""
    one = parent(3)
    one.launch(LISTEN, failing=1, r1=DEAF, r2=HANG)
    environments = one.begun(3)
    began = time.monotonic()
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (75, ""), "rank 0 could say so itself"
    assert 1 <= time.monotonic() - began < 10
    assert gone(environments, 0)


@pytest.mark.process
def test_a_signal_that_nobody_passed_on_is_a_failure(parent):
    one = parent(2)
    one.launch(HANG, failing=0.5, r1=DEAF)
    os.kill(one.begun(2)[1]["pid"], signal.SIGTERM)
    assert one.end() == (
        128 + 15,
        f"error: rank 1 of run 'one' was killed by SIGTERM (out of memory?); what it saved is intact; {one.resume()}",
    )


@pytest.mark.process
def test_no_group_begins_after_a_signal(parent):
    one = parent(2, preset="emoji")
    one.launch("listen 0 ", "cache", "teach")
    one.begun(2, "cache")
    one.process.send_signal(signal.SIGTERM)
    assert one.end() == (75, f"stopped before it had started; {one.resume()}")
    assert not list(one.folder.glob("teach*"))


@pytest.mark.process
@pytest.mark.parametrize("procs", [1, 3])
def test_children_whose_parent_is_killed_stop(parent, procs):
    one = parent(procs)
    one.launch(LISTEN)
    environments = one.begun(procs)
    one.process.kill()
    one.process.wait(30)
    assert gone(environments)
    assert one.signals(procs) == [["SIGTERM"]] * procs, "they were asked to stop, and could save"


# --- ends ---


@pytest.mark.process
def test_one_rank_stops_and_the_others_follow(parent):
    one = parent(3)
    one.launch("later 75 ", r0="later 75 said", r1="leave 75 ")
    environments = one.begun(3)
    assert gone(environments[1:2])
    one.go()
    assert one.end() == (75, "said\n")


@pytest.mark.process
def test_ranks_that_do_not_follow_one_that_stopped_are_killed(parent):
    one = parent(3)
    one.launch("leave 75 ", stopping=1, r0=DEAF)
    environments = one.begun(3)
    assert one.end() == (75, f"stopped; what was saved is intact; {one.resume()}")
    assert gone(environments, 0)
    assert failures(one.run) == ["rank 0 did not report the stop"]


@pytest.mark.process
def test_losing_a_rank_that_stopped_is_no_failure(parent):
    one = parent(2)
    one.launch("later 76 ", r0="leave 75 said")
    assert gone(one.begun(2)[:1])
    one.go()
    assert one.end() == (75, "said\n")


@pytest.mark.process
def test_one_rank_fails_and_all_end_soon(parent):
    one = parent(3)
    one.run.log(1).parent.mkdir()
    one.run.log(1).write_text("of an earlier start\n")
    lines = [f"line {i}" for i in range(30)]
    one.launch(LISTEN, failing=1, r1="later 1 " + "\n".join(lines))
    environments = one.begun(3)
    one.go()
    began = time.monotonic()
    assert one.end() == (1, "rank 1: " + "\n".join(lines[-20:]) + "\n")
    assert 1 <= time.monotonic() - began < 10
    assert gone(environments, 0)
    assert not list(one.folder.glob("*.signals")), "nothing is left to save together"
    assert failures(one.run) == ["rank 1: line 29"]


def test_a_rank_that_stopped_leaves_the_others_time_to_save_and_one_that_failed_ten_seconds():
    """After that they are killed, as the tests around this one show."""
    waits = {code: ranks._patience(code) for code in (0, EXIT_STOPPED, EXIT_FAILED, EXIT_INPUT, EXIT_PEER, -9)}
    assert waits == {0: 120, EXIT_STOPPED: 120, EXIT_FAILED: 10, EXIT_INPUT: 10, EXIT_PEER: 10, -9: 10}


@pytest.mark.process
def test_what_an_earlier_start_said_is_not_said_again(parent):
    one = parent(2)
    one.launch("leave 1 first", r0=LISTEN, failing=0.2)
    assert one.end() == (1, "rank 1: first\n")
    one.launch("leave 1 second", r0=LISTEN, failing=0.2)
    assert one.end() == (1, "rank 1: second\n")
    one.launch("leave 3 ", r0=LISTEN, failing=0.2)
    assert one.end() == (3, "rank 1: exited with code 3 without a message\n")
    assert one.run.log(1).read_text() == "first\nsecond\n"
    assert failures(one.run) == ["rank 1: first", "rank 1: second", "rank 1: exited with code 3"]


@pytest.mark.process
@pytest.mark.parametrize("procs", [1, 3])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_child_that_was_killed_is_named(parent, procs, killed):
    if killed >= procs:
        killed = 0
    one = parent(procs)
    one.launch(LISTEN, failing=0.5)
    environments = one.begun(procs)
    os.kill(environments[killed]["pid"], signal.SIGKILL)
    who = "the process" if procs == 1 else f"rank {killed}"
    assert one.end() == (
        128 + 9,
        f"error: {who} of run 'one' was killed by SIGKILL (out of memory?); what it saved is intact; {one.resume()}",
    )
    assert gone(environments, 0)
    assert failures(one.run) == (["rank 1: was killed by SIGKILL"] if killed else [])


@pytest.mark.process
def test_a_rank_that_lost_another_is_not_the_cause(parent):
    one = parent(3)
    one.launch("later 1 reason", r0="leave 76 lost", r2="later 76 lost too")
    assert gone(one.begun(3)[:1])
    one.go()
    assert one.end() == (1, "lost\nrank 1: reason\n")


@pytest.mark.process
def test_where_all_lost_each_other_the_first_counts(parent):
    one = parent(3)
    one.launch("later 76 lost too", r2="leave 76 lost")
    assert gone(one.begun(3)[2:])
    one.go()
    assert one.end() == (76, f"lost too\nrank 2: lost\nthe logs of the other ranks are in {one.run.root / 'logs'}\n")


@pytest.mark.process
def test_what_all_refuse_is_said_once(parent):
    one = parent(3)
    one.launch("leave 2 refused", r0="later 2 refused")
    assert gone(one.begun(3)[1:])
    one.go()
    assert one.end() == (2, "refused\n")


@pytest.mark.process
@pytest.mark.parametrize("apart", [False, True])
def test_processes_that_do_not_work_together_are_not_ended_when_one_is_done(tmp_path, monkeypatch, apart):
    monkeypatch.setattr(ranks, "STOPPING", 0.1)
    run = make_run(tmp_path)
    envs = [{"PATH": os.environ["PATH"], "SECONDS": text, "FILE": str(tmp_path / text)} for text in ("0.7", "0")]
    ranks.run(run, ["sh", "-c", "sleep $SECONDS; : > $FILE"], 0, envs, ranks.Relay(), apart=apart)
    assert [(tmp_path / text).exists() for text in ("0", "0.7")] == [True, apart]


# --- what cannot be started ---


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    run = make_run(tmp_path)
    (run.root / "logs").write_text("")
    with pytest.raises(RunError) as caught:
        ranks.run(run, ["true"], 0, [{}, {}], ranks.Relay())
    assert str(caught.value) == f"cannot write {run.log(1)}: File exists; nothing was changed"


@pytest.mark.process
def test_where_one_process_cannot_be_started_none_stays(tmp_path):
    run, relay = make_run(tmp_path), ranks.Relay()
    with pytest.raises(RunError) as caught:
        ranks.run(run, ["sleep", "60"], 0, [{"PATH": os.environ["PATH"]}, {"A": "b" * 2**20}], relay)
    assert str(caught.value) == "cannot start a process: Argument list too long; what was saved is intact"
    (process,) = relay.processes
    assert process.wait(10) == -signal.SIGKILL


# --- the command ---


@pytest.mark.process
def test_a_rank_ends_with_all_that_it_said_and_its_code(tmp_path):
    """It takes no interpreter down: what is registered for that is not called."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'taken down')\n")
    for ranks_, ending in (({"WORLD_SIZE": "2"}, ""), ({}, "taken down\n")):
        for arguments, code, said in ((["--version"], 0, "distill 0"), (["nope"], 2, "No such command")):
            done = subprocess.run(
                [sys.executable, "-m", "distill", *arguments], capture_output=True, text=True, check=False,
                env={**os.environ, **ranks_, "PYTHONPATH": f"{tmp_path}:{Path(package.__file__).parent.parent}"},
            )  # fmt: skip
            assert done.returncode == code and said in done.stdout + done.stderr
            assert done.stdout.endswith(ending) and ("taken down" in done.stdout) == bool(ending)
    crash = "import sys; from distill.cli import main; main.main = lambda tell: 1 / 0; main.run()"
    done = subprocess.run(
        [sys.executable, "-c", crash], capture_output=True, text=True, check=False,
        env={**os.environ, "WORLD_SIZE": "2", "PYTHONPATH": f"{tmp_path}:{Path(package.__file__).parent.parent}"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_procs_is_short_for_launch_procs(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    started = []
    monkeypatch.setattr(local, "run_stages", lambda run, names: started.append(todo.load_spec(run).launch.procs) or 0)
    assert command(capfd, "run", "mixture-2d", "--procs", "2", "--store", "runs", "--name", "one").code == 0
    assert command(capfd, "run", "one", "--resume", "--procs", "4", "--store", "runs").code == 0
    assert started == [2, 4]
    (changed,) = [
        e["changes"] for e in read_events(RunPaths(tmp_path / "runs" / "one")) if e["event"] == "spec changed"
    ]
    assert changed == ["launch.procs: 2 -> 4"]
    assert command(capfd, "run", "mixture-2d", "--procs", "0").code == 2


ALL = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("procs", "size", "stage", "said"),
    [
        (2, None, "teach", "stage 'teach' must be computed by 2 processes (launch.nodes=1, launch.procs=2), but "
         "WORLD_SIZE is not set; start them with `distill run`, torchrun or `accelerate launch --multi_gpu`"),
        (2, "4", "teach", "WORLD_SIZE=4, but stage 'teach' must be computed by 2 processes (launch.nodes=1, "
         "launch.procs=2); start this number, or change launch, e.g. distill run RUN --resume launch.procs=4"),
        (1, "2", "teach", "WORLD_SIZE=2, but stage 'teach' must be computed by 1 process (launch.nodes=1, "
         "launch.procs=1); start this number, or change launch, e.g. distill run RUN --resume launch.procs=2"),
        (2, None, "pairs", "stage 'pairs' must be computed by 2 processes (launch.nodes=1, launch.procs=2), but "
         "WORLD_SIZE is not set; start them with `distill run`, torchrun or `accelerate launch --multi_gpu`"),
    ],
)  # fmt: skip
def test_another_number_of_processes_than_that_of_launch_is_refused(
    capfd, tmp_path, monkeypatch, procs, size, stage, said
):
    run = make_run(tmp_path / "runs", "one", "digits", f"launch.procs={procs}")
    before = folder_bytes(run.root)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
        for name, value in ALL.items():
            monkeypatch.setenv(name, value)
    done = command(capfd, "stage", str(run.root), stage)
    assert (done.code, done.err) == (2, f"error: {said}\n")
    assert folder_bytes(run.root) == before


@pytest.mark.parametrize("stage", ["teach", "pairs"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, "the environment sets MASTER_ADDR, MASTER_PORT, but not "
         "WORLD_SIZE; start the processes with {}, or, to compute in one process, run: unset MASTER_ADDR MASTER_PORT"),
        ({"RANK": "1"}, "the environment sets RANK, but not WORLD_SIZE; start the processes with {}, or, to compute in "
         "one process, run: unset RANK"),
        ({"WORLD_SIZE": "1"}, "WORLD_SIZE is set, but RANK is not; start the processes with {}"),
        (ALL | {"WORLD_SIZE": "one"}, "WORLD_SIZE=one: must be a whole number; start the processes with {}"),
        (ALL | {"WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be a whole number; start the processes with {}"),
    ],
)  # fmt: skip
def test_a_launcher_that_does_not_say_how_many_processes_it_starts_is_refused(
    capfd, tmp_path, monkeypatch, given, said, stage
):
    """`accelerate launch --cpu` on several machines sets only MASTER_ADDR and MASTER_PORT."""
    run = make_run(tmp_path / "runs", "one", "digits", "launch.procs=1")
    before = folder_bytes(run.root)
    for name in local.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    done = command(capfd, "stage", str(run.root), stage)
    launchers = "`distill run`, torchrun or `accelerate launch --multi_gpu`"
    assert (done.code, done.err) == (2, f"error: {said.format(launchers)}\n")
    assert folder_bytes(run.root) == before


def test_a_process_of_a_job_says_only_where_it_stopped(capfd, tmp_path, monkeypatch):
    """Its job is queued again: what it says is the job's message, and the user has nothing to do."""
    run = make_run(tmp_path / "runs")
    (tmp_path / "ends").mkdir()
    for name, value in {tasks.ENDS: str(tmp_path / "ends"), "SLURM_JOB_ID": "3", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)

    def fake(*_, **__):
        raise Stopped("stopped by SIGUSR1; saved: step-7")

    monkeypatch.setattr(stages, "run", fake)
    done = command(capfd, "stage", str(run.root), "teach")
    assert (done.code, done.err) == (75, "stopped by SIGUSR1; saved: step-7\n")
    *_, last = read_events(run)
    assert (last["event"], last["message"]) == ("stopped", "stopped by SIGUSR1; saved: step-7")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_claims_the_run_and_speaks_for_all(capfd, tmp_path, monkeypatch, rank):
    run = make_run(tmp_path / "runs", "one", "digits", "launch.procs=2")
    before = folder_bytes(run.events)
    seen, endings = [], [None, Stopped("stopped by SIGTERM; on we go"), PeerLost("rank 1, step 3: lost")]

    def fake(paths, spec, names, stop, world, measure):
        assert not measure
        seen.append((names, world.rank, world.size, claims.executing(paths) is not None))
        if endings[0] is not None:
            raise endings[0]

    for name, value in (ALL | {"RANK": str(rank), "LOCAL_RANK": str(rank)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(stages, "run", fake)
    monkeypatch.setattr(World, "join", lambda device, minutes, local_rank, lost: World(rank, 2))
    stage = ["stage", str(run.root), "teach"]
    hint = "" if rank else f"; resume with: distill run {run.root} --resume"
    for code, said in ((0, ""), (75, f"stopped by SIGTERM; on we go{hint}\n"), (76, "rank 1, step 3: lost\n")):
        done = command(capfd, *stage)
        assert (done.code, done.err) == (code, said)
        endings.pop(0)
    assert seen == [(["teach"], rank, 2, rank == 0)] * 3
    if rank > 0:
        assert folder_bytes(run.events) == before
    else:
        kinds = [event["event"] for event in read_events(run)]
        assert kinds == ["created", "started", "finished", "started", "stopped", "started", "failed"]
